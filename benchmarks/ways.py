"""Is the way that `auto` takes, with what this machine measured, the fastest?

    python -m benchmarks.ways --ranks 2 4 --lengths 2048 8192 16384

Forward and backward of one causal attention layer through torch.compile: as a ring, by all-gather, and with each
Ulysses degree, each in the layout that is planned for it. First `ringpass measure` describes the machine, for as many
ranks; what `auto` takes with that is compared with the fastest of the round. With more ranks than cores the ranks share
them, in the measurement as in the steps.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from benchmarks.alternatives import WIDTH, Layer, sdpa
from benchmarks.paired import Case, Step, against, arguments, collect, conclude, interleaved, on_ranks, screen, spread
from ringpass.passes.plan.plan import RingPlan

BOUND = 1.05  # of the time of the fastest way
QUICK = {"ranks": [2], "lengths": [64], "rounds": 2, "heads": 2, "compiler": "aot_eager"}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    machines = {ranks: _measured(ranks) for ranks in args.ranks}
    runs = (message for ranks in args.ranks for message in on_ranks(ranks, job, args, machines[ranks]))
    ways = sum(len(_options(ranks, args.heads)) for ranks in args.ranks)
    cases = collect(screen(), "ways", len(args.lengths) * ways * (args.rounds + 1), runs)
    conclude(screen(), "ways", args, _table(cases), cases, _verdict(cases))


def _measured(ranks: int) -> str:
    """The machine's description as JSON, from the command."""
    command = [sys.executable, "-m", "ringpass", "measure", "--ranks", str(ranks)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _options(ranks: int, heads: int) -> dict[str, dict[str, Any]]:
    """The options that take each way by hand, by its name."""
    ways: dict[str, dict[str, Any]] = {"all-gather": {"comm": "allgather", "ulysses_degree": 1}}
    for degree in range(1, min(ranks, heads) + 1):
        if ranks % degree == 0:
            name = f"degree {degree}" if degree > 1 else "ring"
            ways[name] = {"comm": "ring", "ulysses_degree": degree}
    return ways


def job(args: argparse.Namespace, machine: str) -> Iterator[Any]:
    """On each rank: a case for each length."""
    from ringpass import Machine

    world = dist.get_world_size()
    for length in args.lengths:
        torch._dynamo.reset()  # it compiles one function only so often
        generator = torch.Generator().manual_seed(length)
        full = [torch.randn(1, args.heads, length, WIDTH, generator=generator) for _ in range(3)]
        common = {"compiler": args.compiler, "machine": Machine.from_json(machine)}
        taken, layout = _taken(full, args.heads, common)
        ways = _options(world, args.heads)
        steps = {name: _step(full, args.heads, common | options) for name, options in ways.items()}
        for name, step in steps.items():
            step()
            yield f"P = {world}, S = {length}, {name} compiled"
        samples = yield from interleaved(steps, args.rounds)
        case = Case({"ranks": world, "length": length}, samples, facts={"taken": taken, "layout": layout})
        rounds = zip(samples[taken], *samples.values(), strict=True)
        case.ratios["taken over the fastest"] = [own / min(all_) for own, *all_ in rounds]
        yield case


def _taken(full: Sequence[Tensor], heads: int, options: dict[str, Any]) -> tuple[str, str]:
    """The way and the layout that `auto` takes."""
    with Plans() as plans:
        _step(full, heads, options)()
    (plan,) = plans.seen
    site, world = plan.sites[0], dist.get_world_size()
    ways = {(of["comm"], of["ulysses_degree"]): name for name, of in _options(world, heads).items()}
    return ways[site.comm, site.degree], plan.axes[0].layout.scheme


class Plans(logging.Handler):
    """The plans that the backend logs while the block runs, in `seen`."""

    def __enter__(self) -> Plans:
        self.seen: list[RingPlan] = []
        self.logger = logging.getLogger("ringpass")
        self.before = self.logger.level
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before)

    def emit(self, record: logging.LogRecord) -> None:
        self.seen += [x for x in record.args or () if isinstance(x, RingPlan)]


def _step(full: Sequence[Tensor], heads: int, options: dict[str, Any]) -> Step:
    layer = Layer(heads, True, sdpa, full[0].numel())
    run = torch.compile(layer, dynamic=False, backend="ring_dilated", options=options)

    def step() -> Tensor:
        loss: Tensor = run(*full)
        torch.autograd.grad(loss, list(layer.parameters()))
        return loss

    return step


def _table(cases: Sequence[Case]) -> Table:
    table = Table(
        "P", "S", "way", "s", "over the fastest", title="a causal layer, forward and backward, median (min-max)"
    )
    for case in cases:
        for name, samples in case.seconds.items():
            chosen = name == case.facts["taken"]
            ratio = spread(case.ratios["taken over the fastest"], 2) if chosen else ""
            mark = f"{name} (taken by auto)" if chosen else name
            table.add_row(str(case.case["ranks"]), str(case.case["length"]), mark, spread(samples), ratio)
        table.add_section()
    return table


def _verdict(cases: Sequence[Case]) -> str:
    """The case in which what `auto` takes is furthest from the fastest."""
    medians = {id(c): {name: statistics.median(s) for name, s in c.seconds.items()} for c in cases}
    ratios = {id(c): medians[id(c)][c.facts["taken"]] / min(medians[id(c)].values()) for c in cases}
    worst = max(cases, key=lambda c: ratios[id(c)])
    ratio = ratios[id(worst)]
    where = f"{worst.facts['taken']} at P={worst.case['ranks']}, S={worst.case['length']}"
    return f"what auto takes, over the fastest way's median: {against(ratio, BOUND, at_least=False)}, {where}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ways", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], metavar="P")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384], metavar="S")
    parser.add_argument("--heads", type=int, default=8, help="64 wide each")
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"])
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
