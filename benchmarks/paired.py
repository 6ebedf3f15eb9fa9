"""Paired measurements: ranks as processes of one thread each, alternatives interleaved in every round.

>>> for message in on_ranks(2, job, 1024): ...          # what rank 0 yields, while both ranks run job(1024)
>>> samples = yield from interleaved({"ring": ring, "one rank": alone}, rounds=5)     # inside a job, on every rank

A round takes each alternative once, so that drift of the machine hits all of them; ratios are taken within a round. A
sample is the time until the last rank has finished, from a barrier on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
GRACE = 20.0  # seconds that a rank gets to end by itself
SHORTEST = 0.25  # seconds that a sample lasts at least: shorter steps are repeated within it

Step = Callable[[], object]
Samples = dict[str, list[float]]

# --- what was measured ------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One line of the question: its parameters, and the samples (seconds) of each alternative, round by round."""

    case: dict[str, Any]
    seconds: Samples = field(default_factory=dict)
    ratios: Samples = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add_ratio(self, name: str, of: Callable[..., float]) -> None:
        """`of(**samples of one round)`, for each round; names with spaces become names with underscores."""
        rounds = [dict(zip(self.seconds, values, strict=True)) for values in zip(*self.seconds.values(), strict=True)]
        self.ratios[name] = [of(**{k.replace(" ", "_"): v for k, v in values.items()}) for values in rounds]

    def as_json(self) -> dict[str, Any]:
        kinds = {"seconds": self.seconds, "ratios": self.ratios}
        found = {kind: {name: summary(values) for name, values in of.items()} for kind, of in kinds.items()}
        return {"case": self.case, **found, **self.facts}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes, and the samples themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "samples": list(values)}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`median (min-max)`, for a table's cell."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def machine() -> dict[str, Any]:
    """Where this was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# --- the command ------------------------------------------------------------------------------------------------------


def screen() -> Console:
    """Where tables go: wide enough for them where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 150)


def arguments(parser: argparse.ArgumentParser, argv: list[str] | None, quick: Mapping[str, Any]) -> argparse.Namespace:
    """Parses, with the options that every benchmark has; `quick` holds the values that --quick stands for."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=5, help="samples of each alternative")
    parser.add_argument("--quick", action="store_true", help="sizes that show that it runs, and measure nothing")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/<name>.json)")
    given = sys.argv[1:] if argv is None else argv
    if "--quick" in given:
        parser.set_defaults(**quick)
    args = parser.parse_args(given)
    if args.rounds < 1:
        parser.error(f"expected --rounds >= 1, got {args.rounds}")
    return args


def out_path(name: str, args: argparse.Namespace) -> Path:
    return args.out or RESULTS / f"{name}{'.quick' if args.quick else ''}.json"


def collect(console: Console, title: str, total: int | None, messages: Iterable[Any]) -> list[Case]:
    """The cases among `messages`, with a progress bar that moves with each message that is a text.

    `total`: how many texts will come; None: that is not known.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    cases = []
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=total)
        for message in messages:
            if isinstance(message, Case):
                cases.append(message)
            else:
                progress.update(task, advance=1, description=f"{title}: {message}")
    return cases


def conclude(
    console: Console, name: str, args: argparse.Namespace, table: Table, cases: Sequence[Case], verdict: str
) -> None:
    """Prints the table, writes the JSON, and prints the verdict last."""
    path = out_path(name, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    parameters = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
    report = {"benchmark": name, "verdict": verdict, "parameters": parameters, "machine": machine()}
    path.write_text(json.dumps(report | {"cases": [case.as_json() for case in cases]}, indent=1) + "\n")
    console.print(table)
    console.print(f"written to {path}", soft_wrap=True)
    console.print(verdict, soft_wrap=True)


def against(value: float, bound: float, at_least: bool) -> str:
    """`0.95 (bound >= 0.92: met)`."""
    met = value >= bound if at_least else value <= bound
    return f"{value:.3g} (bound {'>=' if at_least else '<='} {bound:g}: {'met' if met else 'MISSED'})"


# --- inside a job -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alone:
    """A step that rank 0 takes while the other ranks wait."""

    step: Step


def interleaved(steps: Mapping[str, Step | Alone], rounds: int, where: str = "") -> Generator[str, None, Samples]:
    """Yields a text per sample, returns the samples of each step, the same on all ranks (`yield from`).

    Each step has run once before, to warm up; that run says how often the step is repeated within a sample.
    """
    samples: Samples = {name: [] for name in steps}
    repeats = {}
    for name, step in steps.items():
        yield f"{where}{name}, warming up"
        timed(step, 1)
        repeats[name] = max(1, math.ceil(SHORTEST / timed(step, 1)))
    for i in range(rounds):
        for name, step in steps.items():
            yield f"{where}{name}, round {i + 1} of {rounds}"
            samples[name].append(timed(step, repeats[name]))
    return samples


def timed(step: Step | Alone, repeats: int) -> float:
    """Seconds per step, from a barrier until the last rank has finished; the same number on all ranks."""
    takes_part = not isinstance(step, Alone) or dist.get_rank() == 0
    run = step.step if isinstance(step, Alone) else step
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats if takes_part else 0):
        run()
    passed = torch.tensor((time.perf_counter() - start) / repeats, dtype=torch.float64)
    dist.all_reduce(passed, dist.ReduceOp.MAX)
    return passed.item()


# --- ranks ------------------------------------------------------------------------------------------------------------


class RankFailed(RuntimeError):
    """A rank raised or died; the message holds its traceback."""


def on_ranks(ranks: int, job: Callable[..., Iterator[Any]], *args: Any) -> Iterator[Any]:
    """Runs the generator `job(*args)` on new gloo ranks of one thread each; yields what it yields on rank 0."""
    context = torch.multiprocessing.get_context("spawn")
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="ringpass_benchmark_") as directory:
        pipes, processes = [], []
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                call = (theirs, rank, ranks, f"{directory}/store", job, args)
                process = context.Process(target=_rank, args=call, daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            yield from _messages(pipes)
            for process in processes:
                process.join(GRACE)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _messages(pipes: list[Connection]) -> Iterator[Any]:
    """What rank 0 sends, until all ranks are done."""
    running = list(pipes)
    while running:
        for pipe in wait(running):
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died") from None
            if kind == "failed":
                raise RankFailed(f"rank {rank}:\n{value}")
            if kind == "done":
                running.remove(pipe)
            elif rank == 0:
                yield value


def _rank(
    pipe: Connection, rank: int, ranks: int, store: str, job: Callable[..., Iterator[Any]], args: tuple[Any, ...]
) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(minutes=30)
        )
        torch.manual_seed(0)
        for value in job(*args):
            pipe.send(("value", value if rank == 0 else None))
        dist.barrier()
        pipe.send(("done", None))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
        os._exit(1)  # no wait for peers that died or hang
    dist.destroy_process_group()


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
