"""How much of a training step do the checks between ranks take?

    python -m benchmarks.checks --length 8192

A step of a GPT-2 of 2 layers through `backend="ring_dilated"`. Each round takes three:

    all checks     as it is: calls compare the graph, the inputs and a hundredth of the weights, backwards their call
    calls alone    with options={"compare_weights": 0}: weights are compared in the first call alone
    none           the comparisons taken out of the package, for this benchmark

Sizes of messages, hooks on the backward and what a rank leaves in the store for the others are in all three.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.table import Table

from benchmarks.paired import Case, against, arguments, collect, conclude, interleaved, on_ranks, screen, spread
from benchmarks.step_time import model_step
from ringpass.comm import agreement
from ringpass.comm.agreement import Agreement, Comparison, Said
from ringpass.comm.headers import onto, to_host

BOUND = 1.01  # of the step without
QUICK = {"length": 64, "rounds": 2, "width": 32, "compiler": "aot_eager"}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    cases = collect(screen(), "checks", 3 * (args.rounds + 2), on_ranks(args.ranks, job, args))
    conclude(screen(), "checks", args, _table(cases), cases, _verdict(cases))


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On each rank: the step in three ways."""

    def step(weights: int) -> Callable[[], None]:
        options = {"compiler": args.compiler, "compare_weights": weights}
        return model_step(args.length, args.width, backend="ring_dilated", options=options)

    checked, calls, bare = step(100), step(0), step(100)

    def unchecked() -> None:
        with patch.object(Agreement, "begin", _equal), patch.object(agreement, "as_messages", lambda *_: False):
            bare()

    for run in (checked, calls, bare):
        run()  # compiles
        yield "compiled"
    seconds = yield from interleaved({"all checks": checked, "calls alone": calls, "none": unchecked}, args.rounds)
    case = Case({"ranks": dist.get_world_size(), "length": args.length}, seconds)
    for name in ("all checks", "calls alone"):
        case.ratios[f"{name} over none"] = [a / b for a, b in zip(seconds[name], seconds["none"], strict=True)]
    yield case


def _equal(agreement: Agreement, args: Sequence[object], mine: int, device: torch.device) -> Comparison:
    """In place of `Agreement.begin`: no rank asks another."""
    alone = torch.tensor([mine], dtype=torch.int64)
    return Comparison(agreement, Said([], [], []), to_host(alone), onto(alone[0], device), [mine])


def _table(cases: Sequence[Case]) -> Table:
    table = Table("checks", "s", "over none", title="a step of GPT-2, median (min-max)")
    for case in cases:
        for name, samples in case.seconds.items():
            ratios = case.ratios.get(f"{name} over none")
            table.add_row(name, spread(samples), spread(ratios, 3) if ratios else "")
    return table


def _verdict(cases: Sequence[Case]) -> str:
    """The median of the rounds."""
    (case,) = cases
    ratio = statistics.median(case.ratios["all checks over none"])
    return f"a step with all checks, over one without, at S={case.case['length']}: {against(ratio, BOUND, False)}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager"])
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
