"""The main job: train a model on a ring of ranks and, from the same seeds, on one rank; compare step by step.

    python -m examples.train --model gpt2 --ranks 2 --steps 16

Each training (examples/train_rank.py) has the machine to itself, its threads divided among its ranks. The last line
says whether the losses agree; the exit code is 0 only if they do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.train_rank import SHAPES, TOKENS

TOLERANCE = 1e-3
STALL = 600.0  # seconds without a new step after which a training counts as hung
ROOT = Path(__file__).resolve().parent.parent


class TrainingFailed(RuntimeError):
    """A training stopped or hung; the message holds the end of its output."""


@dataclass
class Training:
    """What one training reported: losses and seconds per step of rank 0, activation memory of every rank."""

    ranks: int
    parameters: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}"

    @property
    def tokens_per_second(self) -> float:
        """Of the median step after the first, which compiles."""
        return TOKENS / statistics.median(self.seconds[1:] or self.seconds)


def main(argv: list[str] | None = None) -> int:
    """Both trainings one after the other, the table, and the line that says whether they agree."""
    args = _arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that the ranks end too
    console = Console(highlight=False)
    start = time.monotonic()
    try:
        with _progress(console) as progress:
            names = {ranks: f"{Training(ranks).name}: waiting" for ranks in args.ranks}
            tasks = {ranks: progress.add_task(name, total=args.steps) for ranks, name in names.items()}
            trainings = [train(ranks, args, progress, task) for ranks, task in tasks.items()]
    except TrainingFailed as failure:
        console.print(f"ringpass: {failure}", markup=False, style="red", soft_wrap=True)
        return 1
    for table in (_losses(trainings), _costs(trainings)):
        console.print(table)
    console.print(f"{time.monotonic() - start:.0f} s in all")
    return _verdict(trainings, args.steps, console)


def train(ranks: int, args: argparse.Namespace, progress: Progress, task: TaskID) -> Training:
    """Start ``ranks`` processes with torchrun and follow what rank 0 reports until all have ended."""
    training = Training(ranks)
    progress.reset(task, description=f"{training.name}: starting")
    with tempfile.TemporaryDirectory(prefix="ringpass_") as directory:
        with open(Path(directory, "log"), "w") as log, _launched(ranks, args, directory, log) as process:
            for line in _follow(Path(directory, "rank0.jsonl"), process):
                _record(training, line, args.steps, progress, task)
        if process.returncode != 0:
            raise TrainingFailed(
                f"{training.name}: exit code {process.returncode}, or no step for {STALL:.0f} s\n{_tail(directory)}"
            )
        reports = [_lines(Path(directory, f"rank{rank}.jsonl").read_text()) for rank in range(ranks)]
    training.peaks = [int(report[-1]["peak"]) for report in reports]
    progress.update(task, description=f"{training.name}: done")
    return training


def _record(training: Training, line: dict[str, Any], steps: int, progress: Progress, task: TaskID) -> None:
    if "parameters" in line:
        training.parameters = line["parameters"]
        text = f"{training.name}: compiling ({training.parameters / 1e6:.1f}M parameters, {TOKENS} tokens)"
        progress.console.print(text)
        progress.update(task, description=text)
    elif "loss" in line:
        training.losses.append(line["loss"])
        training.seconds.append(line["seconds"])
        text = f"{training.name}: loss {line['loss']:.4f}"
        progress.console.print(f"{text}, step {line['step'] + 1} of {steps}, {line['seconds']:.1f} s")
        now = f"{training.name}: measuring memory" if len(training.losses) == steps else text
        progress.update(task, advance=1, description=now)


@contextlib.contextmanager
def _launched(ranks: int, args: argparse.Namespace, directory: str, log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun in its own session, so that no rank outlives this block."""
    threads = max(1, _cpus() // ranks)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    job = ["-m", "examples.train_rank", f"--model={args.model}", f"--steps={args.steps}", f"--seed={args.seed}"]
    options = [f"--backend={args.backend}", f"--threads={threads}", f"--report={directory}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        torchrun + job + options,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(10)


def _follow(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Lines of ``path`` as they are written, until the process has ended or nothing came for STALL seconds."""
    read = 0
    news = time.monotonic()
    while time.monotonic() - news < STALL:
        ended = process.poll() is not None
        text = path.read_text() if path.exists() else ""
        complete = text[read : text.rfind("\n") + 1]
        if complete:
            news = time.monotonic()
            read += len(complete)
        yield from _lines(complete)
        if ended:
            return
        time.sleep(0.2)


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _tail(directory: str, lines: int = 40) -> str:
    return "\n".join(Path(directory, "log").read_text(errors="replace").splitlines()[-lines:])


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def _losses(trainings: list[Training]) -> Table:
    table = Table("step", *(f"loss, {t.name}" for t in trainings), "difference", title="loss per step")
    for step, losses in enumerate(zip(*(t.losses for t in trainings), strict=True), start=1):
        table.add_row(str(step), *(f"{loss:.6f}" for loss in losses), f"{max(losses) - min(losses):.1e}")
    return table


def _costs(trainings: list[Training]) -> Table:
    table = Table("", *(t.name for t in trainings), title="cost")
    peaks = [", ".join(f"{peak / 2**20:.0f}" for peak in t.peaks) for t in trainings]
    table.add_row("peak activation memory of each rank, MiB", *peaks)
    table.add_row("tokens/s", *(f"{t.tokens_per_second:.0f}" for t in trainings))
    table.add_row("first step, s (compiles)", *(f"{t.seconds[0]:.1f}" for t in trainings))
    table.add_row("median step after it, s", *(f"{TOKENS / t.tokens_per_second:.1f}" for t in trainings))
    return table


def _verdict(trainings: list[Training], steps: int, console: Console) -> int:
    """Print the last line; a loss that is not finite compares as different."""
    steps_losses = zip(*(t.losses for t in trainings), strict=True)
    spreads = [max(losses) - min(losses) if all(map(math.isfinite, losses)) else math.nan for losses in steps_losses]
    largest = max(spreads, key=lambda d: (d != d, d))
    agree = largest <= TOLERANCE
    first, *others = (t.name for t in trainings)
    text = f"ringpass: {first} {'match' if agree else 'DO NOT MATCH'} {', '.join(others)}: "
    text += f"largest loss difference {largest:.1e} {'<=' if agree else 'is not <='} {TOLERANCE:.0e} over {steps} steps"
    console.print(text, style="green" if agree else "red", soft_wrap=True)
    return 0 if agree else 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="gpt2")
    parser.add_argument("--ranks", type=int, default=2, help="size of the ring that is compared with 1 rank")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="ring_dilated", help="any torch.compile backend")
    args = parser.parse_args(argv)
    if args.ranks < 2 or args.steps < 1:
        parser.error(f"expected --ranks >= 2 and --steps >= 1, got {args.ranks} and {args.steps}")
    args.ranks = [args.ranks, 1]
    return args


if __name__ == "__main__":
    sys.exit(main())
