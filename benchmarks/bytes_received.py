"""Do ranks receive the keys that their queries see, and no others?

    python -m benchmarks.bytes_received

Planned, not run: key tokens that each rank receives in a forward under the layout, the tile and the transfers that the
backend chooses, over those that it needs: remote keys that some query of the rank may attend to, from the mask itself.
Beside it, what each rank would receive from

    whole shards    a ring that passes whole shards on: every shard of the other ranks
    all-gather      the same tokens, all at once

in the contiguous layout, whatever the mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.paired import Case, against, arguments, collect, conclude, screen
from ringpass.layouts.layout import Layout
from ringpass.patterns import Pattern, causal, documents, global_tokens, prefix, window
from ringpass.schedule.attention_time import Load
from ringpass.schedule.cost import choose, refine, with_layout
from ringpass.schedule.proof import lower_bound
from ringpass.schedule.tiles import Problem, tiling

BOUND = 1.05
HEADS, GROUPS, WIDTH = 32, 8, 128  # of the attention whose layout is chosen: FLOPs against bytes
QUICK = {"tokens": 4096, "ranks": 4}


def main(argv: list[str] | None = None) -> None:
    """Plan, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    console = screen()
    masks = patterns(args.tokens)
    cases = collect(console, "bytes received", len(masks), planned(masks, args.tokens, args.ranks))
    conclude(console, "bytes_received", args, _table(cases), cases, _verdict(cases))


def patterns(tokens: int) -> dict[str, Pattern]:
    """One of each family, in proportion to the sequence."""
    share, random = tokens // 16, Random(0)
    lengths = [random.randint(share // 16, share) for _ in range(4 * tokens // share)]
    total = np.cumsum(lengths)
    lengths = [n for n, end in zip(lengths, total, strict=True) if end <= tokens]
    lengths.append(tokens - sum(lengths) or lengths.pop())
    return {
        "causal": causal(),
        f"window of {share}": causal() & window(share - 1),
        f"prefix of {share}": prefix(share),
        f"local {share // 4} + global 64": global_tokens(64) | window(share // 8, share // 8),
        f"{len(lengths)} documents": causal() & documents(lengths),
    }


def planned(masks: Mapping[str, Pattern], tokens: int, ranks: int) -> Iterator[Any]:
    """A case for each mask, after a text that names it."""
    for name, mask in masks.items():
        yield name
        here = Layout("contiguous", ranks)
        problem = chosen(Problem(str(mask), tokens, tokens, here, here))
        received = tiling(problem).received(ranks).astype(int).tolist()
        needed = [lower_bound(problem, rank) for rank in range(ranks)]
        whole = [tokens - here.length(rank, tokens) for rank in range(ranks)]
        facts = {"layout": problem.query_layout.name.split()[0], "tile": problem.tile, "mask": str(mask)}
        counts = {"received": received, "needed": needed, "whole shards": whole, "all-gather": whole}
        yield Case({"name": name, "tokens": tokens, "ranks": ranks}, facts={**facts, **counts})


def chosen(problem: Problem) -> Problem:
    """One attention with the tile and the layout that the backend plans for it."""
    problem = replace(problem, tile=refine([problem], "cpu"))
    load = Load(problem, HEADS, GROUPS, (WIDTH, WIDTH), itemsize=2)
    return with_layout(problem, choose([load], problem.world, fixed=True)[0].layout, problem.world)


def over_needed(case: Case) -> float:
    """The largest of received over needed: in total, and of the rank that receives most."""
    received, needed = (np.array(case.facts[name]) for name in ("received", "needed"))
    busiest = received.argmax()
    return float(max(received.sum() / max(1, needed.sum()), received[busiest] / max(1, needed[busiest])))


COLUMNS = ("mask", "layout", "received at most", "in total", "needed", "over needed", "whole shards", "all-gather")


def rows(cases: list[Case]) -> list[tuple[str, ...]]:
    """The table's cells, under COLUMNS."""
    totals = "needed", "whole shards", "all-gather"
    out = []
    for case in cases:
        received = case.facts["received"]
        needed, *others = (f"{sum(case.facts[name]):,}" for name in totals)
        moved = f"{max(received):,}", f"{sum(received):,}", needed, f"{over_needed(case):.3f}"
        out.append((str(case.case["name"]), str(case.facts["layout"]), *moved, *others))
    return out


def _table(cases: list[Case]) -> Table:
    table = Table(*COLUMNS, title="key tokens that ranks receive in a forward")
    for row in rows(cases):
        table.add_row(*row)
    return table


def _verdict(cases: list[Case]) -> str:
    return "received over needed, the worst: " + against(max(map(over_needed, cases)), BOUND, False)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bytes_received", description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--ranks", type=int, default=8)
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
