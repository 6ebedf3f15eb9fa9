"""Does the time of dilated attention grow no faster than the sequence?

    python -m benchmarks.dilation_length

One rank, one thread, forward and backward of the ring's own loop, with segment lengths and rates that double up to S: a
token attends to a bounded number of others, whatever S.  Each round times every length.  The bound is on the time of a
token over that at the first length.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from benchmarks.density import attention, doubling
from benchmarks.paired import Case, against, arguments, collect, conclude, interleaved, on_ranks, screen
from benchmarks.paired import spread as text

BOUND = 1.3
QUICK = {"lengths": [128, 256], "first": 32, "rounds": 1}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    console = screen()
    cases = collect(console, "dilation_length", len(args.lengths) * (args.rounds + 1), on_ranks(1, job, args))
    conclude(console, "dilation_length", args, _table(cases), cases, _verdict(cases))


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On the one rank: a step of each length in each round."""
    asked = {length: doubling(length, args.first) for length in args.lengths}
    steps = {f"{n:,}": attention(x, n, args)[0] for n, x in asked.items()}
    seconds = yield from interleaved(steps, args.rounds)
    first = args.lengths[0]
    for length, x in asked.items():
        found = Case(
            {"length": length}, {"shortest": seconds[f"{first:,}"], "this": seconds[f"{length:,}"]}, facts=x.facts
        )
        found.add_ratio("of a token", lambda shortest, this, n=length: this / n / (shortest / first))
        yield found


def _table(cases: Sequence[Case]) -> Table:
    first = cases[0].case["length"]
    table = Table("tokens", "dilation", "s", f"a token's time, of that at {first:,}", title="median (min-max)")
    for case in cases:
        ratio = text(case.ratios["of a token"])
        table.add_row(f"{case.case['length']:,}", str(case.facts["dilation"]), text(case.seconds["this"]), ratio)
    return table


def _verdict(cases: Sequence[Case]) -> str:
    worst = max(statistics.median(case.ratios["of a token"]) for case in cases)
    return f"a token's time over that at {cases[0].case['length']:,} tokens, at most {against(worst, BOUND, False)}"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dilation_length", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096 << i for i in range(6)])
    parser.add_argument("--first", type=int, default=512, help="first segment length")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
