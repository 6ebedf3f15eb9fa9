"""Does time follow density?

    python -m benchmarks.density

One rank, one thread, forward and backward of the ring's own loop, of which a share d of all S x S pairs is asked. Each
round times, at the tile that the backend chooses,

    dense           every pair: one full tile
    the masks       a window on both sides, a narrower one with global tokens, and random blocks, at each density
    dilation        lengths and rates that double up to S, from each of the first lengths

The bound is on time / (d x time of dense); for random blocks none is promised.
"""

from __future__ import annotations

import argparse
import statistics
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.paired import Case, Step, against, arguments, collect, conclude, interleaved, on_ranks, screen
from benchmarks.paired import spread as text

BOUNDS = {0.1: 1.3, 0.0: 1.5}  # of windows, from this density on
DILATED = 1.3
BLOCK, BLOCKS = 64, "random blocks"
QUICK = {"length": 256, "rounds": 1, "densities": [0.5, 0.1], "segments": [32]}


@dataclass(frozen=True)
class Sparse:
    """An attention that computes a share `density` of all pairs."""

    name: str
    density: float
    mask: str
    dilation: str
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name} {self.density:.3f}"


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    console = screen()
    total = (1 + 3 * len(args.densities) + len(args.segments)) * (args.rounds + 1)
    cases = collect(console, "density", total, on_ranks(1, job, args))
    conclude(console, "density", args, _table(cases), cases, _verdict(cases))


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On the one rank: a step of each attention in each round."""
    asked = {str(x): x for x in (*_masks(args), *(doubling(args.length, first) for first in args.segments))}
    steps, tiles = {}, {}
    for label, x in {"dense": Sparse("dense", 1.0, "True", "", {}), **asked}.items():
        steps[label], tiles[label] = attention(x, args.length, args)
    seconds = yield from interleaved(steps, args.rounds)
    for label, x in asked.items():
        facts = {"tile": tiles[label], **x.facts}
        found = Case({"mask": x.name, "density": x.density}, {k: seconds[k] for k in ("dense", label)}, facts=facts)
        found.seconds["sparse"] = found.seconds.pop(label)
        found.add_ratio("of its share", lambda dense, sparse, d=x.density: sparse / (d * dense))
        yield found


def _masks(args: argparse.Namespace) -> Iterator[Sparse]:
    for density in args.densities:
        for name, globals_ in (("window", 0), ("local + global", args.length // 256)):
            reach = reach_for(density, args.length, globals_)
            exact = allowed_pairs(args.length, reach, globals_) / args.length**2
            yield Sparse(name, exact, expression(reach, globals_), "", {"reach": reach, "global tokens": globals_})
        yield drawn(args.length, max(1, round(density * args.length / BLOCK)))


def drawn(length: int, count: int) -> Sparse:
    """Each block of queries sees `count` blocks of keys."""
    from ringpass.patterns import random_blocks

    density = count * BLOCK / length
    return Sparse(BLOCKS, density, str(random_blocks(length, BLOCK, count)), "", {"block": BLOCK, "count": count})


def doubling(length: int, first: int) -> Sparse:
    """Dilation whose segment lengths, from `first` on, and rates double up to `length`."""
    from ringpass.schedule.dilation import Dilation

    doubled = range((length // first).bit_length())
    d = Dilation(tuple(first << i for i in doubled), tuple(1 << i for i in doubled))
    return Sparse("dilation", d.share(length), "True", str(d), {"dilation": str(d)})


def expression(reach: int, globals_: int) -> str:
    """`reach` tokens on either side; the first `globals_` tokens see all and are seen by all."""
    from ringpass.patterns import global_tokens, window

    local = window(reach, reach)
    return str(local | global_tokens(globals_) if globals_ else local)


def allowed_pairs(length: int, reach: int, globals_: int) -> int:
    """Number of pairs that `expression` allows."""
    q = np.arange(length)
    first, last = np.maximum(q - reach, 0), np.minimum(q + reach, length - 1)
    seen = last - first + 1 + np.minimum(first, globals_)
    return int(np.where(q < globals_, length, seen).sum())


def reach_for(density: float, length: int, globals_: int) -> int:
    """The reach that allows about `density` of all pairs."""
    return bisect_left(range(length), density * length**2, key=lambda reach: allowed_pairs(length, reach, globals_))


def attention(x: Sparse, length: int, args: argparse.Namespace) -> tuple[Step, int]:
    """Forward and backward of `x` on `length` tokens, and the tile."""
    from ringpass.layouts.layout import Layout
    from ringpass.ops import ring
    from ringpass.schedule.cost import refine
    from ringpass.schedule.dilation import Dilation
    from ringpass.schedule.site import Site
    from ringpass.schedule.tiles import Problem

    dilation = Dilation.parse(x.dilation) if x.dilation else None
    problem = Problem(x.mask, length, length, Layout("contiguous", 1), Layout("contiguous", 1))
    site = Site(problem, rank=0, scale=args.width**-0.5, dilation=dilation, heads=args.heads)
    tile = refine([group.problem for group in site.groups], "cpu")
    site = replace(site, problem=replace(problem, tile=tile))
    # rows first in memory, as models' projections are
    q, k, v, grad = (torch.randn(1, length, args.heads, args.width).transpose(1, 2) for _ in range(4))

    def step() -> object:
        with torch.no_grad():
            out, lse = ring.forward(site, q, k, v, [], None)
            return ring.backward(site, grad, q, k, v, out, lse, [], None)

    return step, tile


def bound(case: Case) -> float | None:
    """What is promised, if anything; densities asked for are met to three digits."""
    if case.case["mask"] == BLOCKS:
        return None
    if case.case["mask"] == "dilation":
        return DILATED
    return next(value for least, value in BOUNDS.items() if float(case.case["density"]) >= 0.999 * least)


def _table(cases: Sequence[Case]) -> Table:
    columns = ("density", "tile", "dense, s", "sparse, s", "time / (d x dense)", "bound")
    table = Table("mask", *columns, title="time over the share of pairs that are allowed, median (min-max)")
    for case in cases:
        density = float(case.case["density"])
        cells = f"{density:.3f}", str(case.facts["tile"]), *(text(x) for x in case.seconds.values())
        table.add_row(str(case.case["mask"]), *cells, text(case.ratios["of its share"]), f"{bound(case) or '-'}")
    return table


def _verdict(cases: Sequence[Case]) -> str:
    found = []
    for case in cases:
        value, promised = statistics.median(case.ratios["of its share"]), bound(case)
        verdict = f"{value:.3g}" if promised is None else against(value, promised, False)
        found.append(f"{case.case['mask']} {case.case['density']:.2f} {verdict}")
    return "time over density x dense: " + "; ".join(found)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.density", description=__doc__)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--segments", type=int, nargs="+", default=[2048, 1024, 512], help="first segment lengths")
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
