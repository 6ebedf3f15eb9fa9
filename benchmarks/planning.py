"""How long does planning take?

    python -m benchmarks.planning

Two questions, in pure Python, no processes:

    classify    all tiles of S = 1,048,576 tokens, down to 1,024, as empty, full or partial
    plan        the same sequence on 1,024 ranks: tile and layout chosen, one rank's program written down, and the
                schedule of all ranks proved, as each rank does before anything is sent

Processor seconds of one core; caches are emptied before each sample.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table

from benchmarks.bytes_received import chosen
from benchmarks.paired import Case, against, arguments, collect, conclude, screen
from benchmarks.paired import spread as text
from ringpass.layouts.layout import Layout
from ringpass.patterns import Pattern, causal, documents, global_tokens, window
from ringpass.schedule.proof import prove_from
from ringpass.schedule.tiles import Problem, tiling

CLASSIFY, PLAN = 10.0, 30.0  # seconds
QUICK = {"tokens": 16384, "ranks": 4, "rounds": 1}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    console = screen()
    total = 2 * len(patterns(args.tokens)) * args.rounds
    cases = collect(console, "planning", total, measured(args))
    conclude(console, "planning", args, _table(cases), cases, _verdict(cases))


def patterns(tokens: int) -> dict[str, Pattern]:
    """The masks that are planned."""
    lengths = [tokens // 64] * 63
    return {
        "causal": causal(),
        "window": causal() & window(4095),
        "documents": causal() & documents([*lengths, tokens - sum(lengths)]),
        "local + global": global_tokens(64) | window(2048, 2048),
    }


def measured(args: argparse.Namespace) -> Iterator[Any]:
    """A case for each mask, after a text for each sample."""
    for name, mask in patterns(args.tokens).items():
        seconds: dict[str, list[float]] = {"classify": [], "plan": []}
        for i in range(args.rounds):
            for what, run in (("classify", classify), ("plan", plan)):
                yield f"{name}, {what}, round {i + 1} of {args.rounds}"
                ranks = 1 if what == "classify" else args.ranks
                here = Layout("contiguous", ranks)
                seconds[what].append(_timed(run, Problem(str(mask), args.tokens, args.tokens, here, here)))
        yield Case({"mask": name, "tokens": args.tokens, "ranks": args.ranks}, seconds)


def classify(problem: Problem) -> None:
    """Finds the non-empty tiles."""
    tiling(problem)


def plan(problem: Problem) -> None:
    """Chooses tile and layout and proves the schedule, as rank 0 does."""
    prove_from(chosen(problem), rank=0)


def _timed(run: Callable[[Problem], None], problem: Problem) -> float:
    tiling.cache_clear()
    start = time.process_time()
    run(problem)
    return time.process_time() - start


def _table(cases: list[Case]) -> Table:
    title = "processor seconds, median (min-max)"
    table = Table("mask", "classify", f"plan {cases[0].case['ranks']:,} ranks", title=title)
    for case in cases:
        table.add_row(str(case.case["mask"]), *(text(case.seconds[what]) for what in ("classify", "plan")))
    return table


def _verdict(cases: list[Case]) -> str:
    slowest = [max(statistics.median(case.seconds[what]) for case in cases) for what in ("classify", "plan")]
    return f"slowest: classify {against(slowest[0], CLASSIFY, False)} s; plan {against(slowest[1], PLAN, False)} s"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--ranks", type=int, default=1024)
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
