"""What does it cost that the ranks compare each call?

    python -m benchmarks.agreement --ranks 2 8

The ranks of a ring compare a call of a model as before each forward: two token inputs of 8,192 tokens, a table of 64
frequencies, a graph of 200 KB as text. Each round times, per call:

    agreement     as it is: checksums in one vector, headers in one tensor, which is read once
    one by one    a read for each checksum and for the header of each rank, and the graph hashed in each call
    all-gather    the exchange alone, of the same header: what no comparison can do without

This is the time on a CPU. On a GPU the difference is larger, since each read there waits for all work that is queued,
and from a graph's third call on the one that is left follows the call's own work.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table

from benchmarks.paired import Case, arguments, collect, conclude, interleaved, on_ranks, screen
from benchmarks.paired import spread as text
from ringpass.comm.agreement import Agreement
from ringpass.comm.headers import checksum, digest, gather_headers
from ringpass.comm.ring import ring_of

QUICK = {"ranks": [2], "rounds": 2, "tokens": 64, "graph": 1000}
NAMES = ("ids", "labels", "frequencies")


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    console = screen()
    messages = (message for ranks in args.ranks for message in on_ranks(ranks, job, args))
    cases = collect(console, "agreement", len(args.ranks) * 3 * (args.rounds + 1), messages)
    conclude(console, "agreement", args, _table(cases), cases, _verdict(cases))


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On each rank: the alternatives, at this number of ranks."""
    inputs = [torch.arange(args.tokens).view(1, -1), torch.arange(args.tokens).view(1, -1), torch.rand(64)]
    ring = ring_of(None)
    pg = ring.pg
    assert pg is not None
    facts = (("graph", "x" * args.graph),)
    agreement = Agreement(ring, facts, NAMES)
    header = torch.arange(5)

    def one_by_one() -> list[int]:
        sums = [(name, int(checksum(x))) for name, x in zip(NAMES, inputs, strict=True)]
        mine = torch.tensor([digest(json.dumps(facts)), digest(json.dumps(sums)), digest("[]"), 7])
        ring.store.set(f"at/{ring.rank}", "1 1")
        everyone = [torch.empty_like(mine) for _ in range(ring.world)]
        dist.all_gather(everyone, mine)
        headers = [x.tolist() for x in everyone]
        assert all(found[:3] == headers[0][:3] for found in headers)
        return [found[3] for found in headers]

    steps = {
        "agreement": lambda: agreement.numbers(inputs, 7),
        "one by one": one_by_one,
        "all-gather": lambda: gather_headers(header, ring),
    }
    seconds = yield from interleaved(steps, args.rounds, f"P={ring.world}, ")
    case = Case({"ranks": ring.world, "tokens": args.tokens, "graph characters": args.graph}, seconds)
    case.add_ratio("of one by one", lambda agreement, one_by_one, **_: agreement / one_by_one)
    yield case


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8], help="numbers of ranks")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of each of the two inputs")
    parser.add_argument("--graph", type=int, default=200_000, help="characters of the graph's text")
    return arguments(parser, argv, QUICK)


def _table(cases: list[Case]) -> Table:
    table = Table(title="ms per call, median (smallest-largest)")
    for name in ("ranks", *cases[0].seconds, "of one by one"):
        table.add_column(name, justify="right")
    for case in cases:
        times = [text([1e3 * x for x in samples]) for samples in case.seconds.values()]
        table.add_row(str(case.case["ranks"]), *times, text(case.ratios["of one by one"], 2))
    return table


def _verdict(cases: list[Case]) -> str:
    found = [
        f"P={case.case['ranks']}: {1e3 * statistics.median(case.seconds['agreement']):.3g} ms, "
        f"{statistics.median(case.ratios['of one by one']):.2f} of one by one"
        for case in cases
    ]
    return f"the ranks compare a call in {'; '.join(found)}"


if __name__ == "__main__":
    main()
