"""Does time follow density?

    python -m benchmarks.density

One rank, one thread, forward and backward of the ring's own loop. A mask allows a share d of all S x S pairs. Each
round times, at the tile that the backend chooses for the mask,

    dense           every pair: one full tile
    the patterns    a window on both sides, and a narrower one with global tokens, at each density

The bound is on time / (d x time of dense).
"""

from __future__ import annotations

import argparse
import statistics
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.paired import Case, Step, against, arguments, collect, conclude, interleaved, on_ranks, screen
from benchmarks.paired import spread as text

BOUNDS = {0.1: 1.3, 0.0: 1.5}  # from this density on
QUICK = {"length": 256, "rounds": 1, "densities": [0.5, 0.1]}


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and the verdict, write the JSON."""
    args = _arguments(argv)
    console = screen()
    total = (1 + 2 * len(args.densities)) * (args.rounds + 1)
    cases = collect(console, "density", total, on_ranks(1, job, args))
    conclude(console, "density", args, _table(cases), cases, _verdict(cases))


def job(args: argparse.Namespace) -> Iterator[Any]:
    """On the one rank: a step of every mask in each round."""
    masks = {
        f"{name} {density:g}": (name, allowed_pairs(args.length, reach, globals_) / args.length**2, reach, globals_)
        for density in args.densities
        for name, globals_ in (("window", 0), ("local + global", args.length // 256))
        for reach in [reach_for(density, args.length, globals_)]
    }
    steps, tiles = {}, {}
    for label, mask in {"dense": "True", **{label: expression(*m[2:]) for label, m in masks.items()}}.items():
        steps[label], tiles[label] = attention(mask, args)
    seconds = yield from interleaved(steps, args.rounds)
    for label, (name, density, reach, globals_) in masks.items():
        facts = {"tile": tiles[label], "reach": reach, "global tokens": globals_}
        found = Case({"mask": name, "density": density}, {k: seconds[k] for k in ("dense", label)}, facts=facts)
        found.seconds["sparse"] = found.seconds.pop(label)
        found.add_ratio("of its share", lambda dense, sparse, d=density: sparse / (d * dense))
        yield found


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


def attention(mask: str, args: argparse.Namespace) -> tuple[Step, int]:
    """Forward and backward under `mask`, and the tile."""
    from ringpass import ring
    from ringpass.layout import Layout
    from ringpass.passes.balance import refine
    from ringpass.schedule import Problem
    from ringpass.site import Site

    here = Layout("contiguous", 1)
    tile = refine([Problem(mask, args.length, args.length, here, here)], "cpu")
    lengths, layouts = (args.length, args.length), ("contiguous", "contiguous")
    site = Site(mask, "", args.width**-0.5, 0.0, 0, *lengths, *layouts, tile, rank=0, world=1, group="")
    q, k, v, grad = (torch.randn(1, args.heads, args.length, args.width) for _ in range(4))

    def step() -> object:
        with torch.no_grad():
            out, lse = ring.forward(site, q, k, v, [], None)
            return ring.backward(site, grad, q, k, v, out, lse, [], None)

    return step, tile


def bound(density: float) -> float:
    """What is promised at a density; those asked for are met to three digits."""
    return next(value for least, value in BOUNDS.items() if density >= 0.999 * least)


def _table(cases: Sequence[Case]) -> Table:
    columns = ("density", "tile", "dense, s", "sparse, s", "time / (d x dense)", "bound")
    table = Table("mask", *columns, title="time over the share of pairs that are allowed, median (min-max)")
    for case in cases:
        density = float(case.case["density"])
        cells = f"{density:.3f}", str(case.facts["tile"]), *(text(x) for x in case.seconds.values())
        table.add_row(str(case.case["mask"]), *cells, text(case.ratios["of its share"]), f"{bound(density):g}")
    return table


def _verdict(cases: Sequence[Case]) -> str:
    found = [
        f"{case.case['mask']} {case.case['density']:.2f} "
        + against(statistics.median(case.ratios["of its share"]), bound(float(case.case["density"])), False)
        for case in cases
    ]
    return "time over density x dense: " + "; ".join(found)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.density", description=__doc__)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    return arguments(parser, argv, QUICK)


if __name__ == "__main__":
    main()
