"""axes: the axes of a graph that are slices of one sequence, and the split points of their layouts.

    x                  tokens 0..S of the sequence      contiguous cut 1          attention
    x[:, 1:]           tokens 1..S                      contiguous                each token on the same rank as in x
    cat([text, image]) tokens 0..T+I                    zigzag cut 77

A layout assigns tokens to ranks independently between its split points (`ringpass.layouts.layout`).  Aligned slices
share the union of their boundaries as split points, so that a token is on the same rank in all slices that hold it:
slicing and concatenating move nothing.

    h[:, 512:1024]     a section of h                   contiguous section 512:1024 of 1 x 4096

Where a sequence is worked through in many slices, these are *sections*: they split no layout, and a rank's tokens of a
section are those that it holds anyway.  Sections may be of the merged rows of several samples, `h.flatten(0, 1)`.

Contract: depends on the graph, the options and P alone.  Slices whose layouts do not agree get no axis; what makes them
is then gathered, and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, count
from typing import Any

import networkx as nx
import sympy
import torch

from ringpass.layouts.hilbert import Order
from ringpass.layouts.layout import CONTIGUOUS, Layout, Section, following, section_of, split_at
from ringpass.layouts.ranges import clipped
from ringpass.nodes import Size, hint_of, size_of
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor, Factors, Sweep, product
from ringpass.schedule.cost import CANDIDATES


def held_axes(
    axes: Mapping[Factor, Axis], attentions: Sequence[tuple[AttentionSite, Axis | None]], sweep: Sweep
) -> dict[Factor, Axis]:
    """Those of `axes` that ranks divide throughout.  `attentions`: each site with the axis of its queries.

    Factorised attention goes along the places of each frame, then along the frames of each place: one of the two axes
    is in the batch of the other's attentions.  The longer one is held; attentions along the other then run on each
    rank's rows of the batch, and move nothing.
    """
    conflicts = nx.Graph()
    for site, axis in attentions:
        batch = {f for dims in sweep.dims(site.q)[:-2] for f in dims} & axes.keys()
        conflicts.add_edges_from((axis.factor, f) for f in batch if axis is not None and f is not axis.factor)
    held: dict[Factor, Axis] = {}
    for factor, axis in sorted(axes.items(), key=lambda pair: (-pair[1].hint, pair[1].index)):
        if factor not in conflicts or held.keys().isdisjoint(conflicts[factor]):
            held[factor] = axis
    return {factor: axis for factor, axis in axes.items() if factor in held}


def aligned_axes(axes: Mapping[Factor, Axis], sweep: Sweep, world: int) -> dict[Factor, Axis]:
    """`axes`, those of attentions, with the split points of the slices of their sequences, and axes of those slices.

    By factor.  `world`: P, the number of ranks.
    """
    found = dict(axes)
    sequences = dict.fromkeys(sweep.alignment.locate(sweep.aligned(axis.factor))[0] for axis in axes.values())
    for sequence in sequences:
        alone = len(list(sweep.alignment.slices(sequence))) == 1
        slices = [] if alone else list(_slices(sequence, found, sweep, world))
        points = [_split_points(one, slices) for one in slices]
        if len(slices) > 1 and all(p is not None for p in points):
            split = [_with_split_points(one, p or (), world) for one, p in zip(slices, points, strict=True)]
            if _agree(split, _hints(sweep), world):
                found |= {axis.factor: axis for axis in split}
    return _with_sections(found, sweep)


def _with_sections(axes: Mapping[Factor, Axis], sweep: Sweep) -> dict[Factor, Axis]:
    """`axes`, and those of the sections of their sequences or of merged rows of them."""
    found = dict(axes)
    numbers = count(max((axis.index for axis in axes.values()), default=-1) + 1)
    for section in sweep.sections:
        (factor, *more), (sequence, offset) = sweep.resolve([section]), sweep.alignment.locate(section)
        if more or factor in found or not factor.size.is_Integer:
            continue
        bases = list(_bases(sequence, axes, sweep))
        if len({axis.sequence or axis.factor for _, axis, _ in bases}) != 1:
            continue  # of no axis, or of several that do not agree
        for factors, base, first in bases:
            start, tokens = sympy.expand(offset - first), size_of(base.tokens)
            rows = product(factors)
            if not start.is_Integer or not 0 <= start <= rows - factor.size:
                continue
            whole = Section(int(start), int(start + factor.size), int(rows / tokens), int(tokens))
            layout = replace(base.layout, name=section_of(base.layout.name, whole))
            found[factor] = Axis(next(numbers), factor, int(factor.size), layout, sequence, offset)
            if len(factors) == 1 and base.sequence is None:
                found[base.factor] = replace(base, sequence=sequence, offset=first)
            break
    return found


def _bases(sequence: Factor, axes: Mapping[Factor, Axis], sweep: Sweep) -> Iterator[tuple[Factors, Axis, sympy.Expr]]:
    """(factors, axis, offset) of each slice of `sequence` of known size that has an axis, or whose samples have one."""
    for part, offset in sweep.alignment.slices(sequence):
        factors = sweep.resolve([part])
        axis = axes.get(factors[-1])
        known = all(f.size.is_Integer for f in factors) and axes.keys().isdisjoint(factors[:-1])
        if axis is not None and known and axis.layout.order is None:
            yield factors, axis, offset


def _slices(sequence: Factor, axes: Mapping[Factor, Axis], sweep: Sweep, world: int) -> Iterator[Axis]:
    """The axes of all slices of enough tokens: those of attentions, and new ones."""
    number = max(axis.index for axis in axes.values()) + 1
    base: Axis | None = None
    for part, offset in sorted(sweep.alignment.slices(sequence), key=lambda found: _rank(found[0], axes, sweep)):
        factors = sweep.resolve([part])
        tokens = tokens_of(sweep, factors)
        section = sweep.is_section(factors) and axes.keys().isdisjoint(factors)
        if section or tokens is None or tokens < 2 * world:
            continue
        if len(factors) > 1 and axes.keys().isdisjoint(factors):
            factors = (sweep.fuse(factors),)
        if len(factors) != 1:
            continue
        axis = axes.get(factors[0]) or Axis(number, factors[0], tokens, Layout(CONTIGUOUS, world))
        number += axis.index == number
        axis = replace(axis, sequence=sequence, offset=offset)
        order = axis.layout.order if base is None else _order(base, axis)
        if axis.factor in axes and axis.layout.order != order or order is OFF_THE_CURVE:
            continue
        base = base or axis
        yield replace(axis, layout=Layout(following(CONTIGUOUS, order), world))


def _rank(part: Factor, axes: Mapping[Factor, Axis], sweep: Sweep) -> tuple[bool, int]:
    """Attentions' axes first, those along a curve before others, in the order of their numbers."""
    factors = sweep.resolve([part])
    axis = axes.get(sweep.fused.get(factors, factors[0]))
    return (axis is None or axis.layout.order is None, axis.index if axis else len(axes))


OFF_THE_CURVE: Any = object()


def _order(base: Axis, part: Axis) -> Order | None:
    """The curve along which the tokens of `part` are, as part of `base` or around it."""
    order, start = base.layout.order, part.offset - base.offset
    if order is None:
        return None
    stop = sympy.expand(start + size_of(part.tokens))
    if start.is_Integer and stop == size_of(base.tokens) and start <= order.prefix:
        return replace(order, prefix=order.prefix - int(start))
    return None if stop.is_Integer and stop <= order.prefix else OFF_THE_CURVE


def tokens_of(sweep: Sweep, factors: Sequence[Factor]) -> Size | None:
    """The length of a dim of these factors, as some tensor has it."""
    sizes = [f.size for f in factors]
    if all(n.is_number for n in sizes):
        return int(sympy.prod(sizes))
    for node, value in sweep.values.items():
        if isinstance(node.meta.get("val"), torch.Tensor):
            for dim, factors_of_dim in enumerate(value):
                if sweep.resolve(factors_of_dim) == tuple(factors):
                    tokens: Size = node.meta["val"].shape[dim]
                    return tokens
    return None


def _split_points(part: Axis, slices: Sequence[Axis]) -> tuple[int, ...] | None:
    """Where the layout of `part` is split; None where that is not the same for all lengths."""
    size, found = size_of(part.tokens), set()
    for end in {e for other in slices for e in (other.offset, other.offset + size_of(other.tokens))}:
        start, stop = sympy.expand(end - part.offset), sympy.expand(end - part.offset - size)
        if not start.is_Integer and not stop.is_Integer:
            return None
        late = not start.is_Integer or (stop.is_Integer and 2 * start > size)
        point = int(stop if late else start)
        if (-part.hint < point < 0) if late else (0 < point < part.hint):
            found.add(point)
    return tuple(sorted(found, key=lambda point: (point < 0, point)))


def _with_split_points(part: Axis, points: tuple[int, ...], world: int) -> Axis:
    return replace(part, layout=Layout(following(split_at(CONTIGUOUS, points), part.layout.order), world))


def _hints(sweep: Sweep) -> dict[sympy.Symbol, int]:
    """The value of each symbolic length."""
    sizes = [n for node in sweep.values for n in getattr(node.meta.get("val"), "shape", ())]
    symbols = [n for n in sizes if isinstance(n, torch.SymInt) and n.node.expr.is_Symbol]
    return {n.node.expr: hint_of(n) for n in symbols}


def _agree(slices: Sequence[Axis], hints: Mapping[sympy.Symbol, int], world: int) -> bool:
    """Whether each token is on one rank in all slices, and no rank without tokens of a slice: for every length."""
    for part in slices:
        if isinstance(part.tokens, torch.SymInt):  # what is between the split points then has enough for each rank
            points = (0, *part.layout.split_points)
            if part.tokens < 2 * world + max(points) - min(points):
                return False
        if not all(map(part.reaches_all, CANDIDATES)):
            return False
    for a, b in combinations(slices, 2):
        shift = int((b.offset - a.offset).subs(hints))
        low, high = max(shift, 0), min(a.hint, shift + b.hint)
        for rank in range(world):
            if clipped(a.layout.ranges(rank, a.hint), low, high, 0) != clipped(
                b.layout.ranges(rank, b.hint), low - shift, high - shift, shift
            ):
                return False
    return True
