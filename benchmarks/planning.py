"""How long does planning take?

    python -m benchmarks.planning

Three questions, in pure Python, no processes:

    classify    all tiles of S = 1,048,576 tokens, down to 1,024, as empty, full or partial
    plan        the same sequence on 1,024 ranks: tile and layout chosen, one rank's program written down, and the
                schedule of all ranks proved, as each rank does before anything is sent
    prove       the proof alone, for 64 ranks of 4,096 tokens and for the ranks and tokens of `plan`

Processor seconds of one core; caches are emptied before each sample.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rich.table import Table

from benchmarks.bytes_received import chosen
from benchmarks.paired import Case, against, arguments, collect, conclude, screen
from benchmarks.paired import spread as text
from ringpass.layouts.layout import Layout
from ringpass.patterns import Pattern, causal, documents, global_tokens, window
from ringpass.schedule.site_proof import prove_problems
from ringpass.schedule.tiles import Problem, tiling

CLASSIFY, PLAN = 10.0, 30.0  # seconds
FEWER = 64, 2**18  # ranks and tokens of the other proof
QUICK = {"tokens": 16384, "ranks": 4, "rounds": 1}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    console = screen()
    total = 4 * len(patterns(args.tokens)) * args.rounds
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
    ranks, tokens = min(FEWER[0], args.ranks), min(FEWER[1], args.tokens)
    fewer = patterns(tokens)
    for name, mask in patterns(args.tokens).items():
        whole, few = problem(mask, args.tokens, args.ranks), problem(fewer[name], tokens, ranks)
        questions: dict[str, Callable[[], object]] = {
            "classify": partial(tiling, problem(mask, args.tokens, 1)),
            "plan": partial(plan, whole),
            f"prove {ranks:,} ranks": partial(prove, chosen(few)),
            f"prove {args.ranks:,} ranks": partial(prove, chosen(whole)),
        }
        seconds: dict[str, list[float]] = {what: [] for what in questions}
        for i in range(args.rounds):
            for what, run in questions.items():
                yield f"{name}, {what}, round {i + 1} of {args.rounds}"
                seconds[what].append(_timed(run))
        yield Case({"mask": name, "tokens": args.tokens, "ranks": args.ranks}, seconds)


def problem(mask: Pattern, tokens: int, ranks: int) -> Problem:
    """One attention of contiguous shards, all in one tile."""
    here = Layout("contiguous", ranks)
    return Problem(str(mask), tokens, tokens, here, here)


def plan(problem: Problem) -> None:
    """Chooses tile and layout and proves the schedule, as rank 0 does."""
    prove(chosen(problem))


def prove(problem: Problem) -> None:
    """Proves the schedule as the backend does on rank 0."""
    prove_problems([problem], rank=0)


def _timed(run: Callable[[], object]) -> float:
    tiling.cache_clear()
    start = time.process_time()
    run()
    return time.process_time() - start


def _table(cases: list[Case]) -> Table:
    table = Table("mask", *cases[0].seconds, title="processor seconds, median (min-max)")
    for case in cases:
        table.add_row(str(case.case["mask"]), *map(text, case.seconds.values()))
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
