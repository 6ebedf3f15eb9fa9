"""pieces: the axes of a graph that are runs of one line of tokens, and where their layouts are cut.

    x                  line 0..S        contiguous cut 1          attention
    x[:, 1:]           line 1..S        contiguous                what follows, on the same rank for each token
    cat([text, image]) line 0..T+I      zigzag cut 77

Tokens are dealt out from cut to cut (`ringpass.layouts.layout`), and every run of a line is cut where any of them
begins or ends: so a token is on the same rank in all runs that hold it, and taking runs apart and putting them together
moves nothing.

Contract: depends on the graph, the options and P alone.  Runs whose layouts do not agree are left out: what makes them
is then gathered, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import sympy
import torch

from ringpass.layouts.hilbert import Order
from ringpass.layouts.layout import Layout, few, following, split_at
from ringpass.layouts.ranges import clipped
from ringpass.nodes import hint_of, size_of
from ringpass.passes.propagate.factors import Factor, Sweep
from ringpass.schedule.cost import CANDIDATES


@dataclass(frozen=True, eq=False)
class Axis:
    """One sequence axis.  `tokens` is S, an int or a SymInt; `hint` its value in this compilation.

    `line`: the line of tokens of which it is a run that agrees with its other runs, from `offset` on; None: alone.
    """

    index: int
    factor: Factor
    tokens: Any
    layout: Layout
    line: Factor | None = None
    offset: Any = sympy.Integer(0)

    @property
    def hint(self) -> int:
        return hint_of(self.tokens)

    def reaches_all(self, name: str) -> bool:
        """Whether each rank has tokens of it where the map `name` deals them out."""
        candidate = self.layout.with_scheme(name)
        return all(candidate.length(rank, self.hint) for rank in range(candidate.world))

    def __str__(self) -> str:
        return f"axis {self.index}: {self.tokens} tokens, {self.layout.name}"


def on_lines(axes: Mapping[Factor, Axis], sweep: Sweep, world: int) -> dict[Factor, Axis]:
    """The axes of attentions, cut where the other runs of their lines are, and those runs' own axes."""
    found = dict(axes)
    lines = dict.fromkeys(sweep.lines.place(sweep.line_of(axis.factor))[0] for axis in axes.values())
    for line in lines:
        alone = len(list(sweep.lines.runs(line))) == 1
        runs = [] if alone else list(_runs(line, found, sweep, world))
        cuts = [_cuts(run, runs) for run in runs]
        if len(runs) > 1 and all(c is not None for c in cuts):
            laid = [_laid(run, c or (), world) for run, c in zip(runs, cuts, strict=True)]
            if _agree(laid, _hints(sweep), world):
                found |= {axis.factor: axis for axis in laid}
    return found


def _runs(line: Factor, axes: Mapping[Factor, Axis], sweep: Sweep, world: int) -> Iterator[Axis]:
    """The axes of all runs of enough tokens: those of attentions, and new ones."""
    number = max(axis.index for axis in axes.values()) + 1
    base: Axis | None = None
    for run, offset in sorted(sweep.lines.runs(line), key=lambda found: _rank(found[0], axes, sweep)):
        factors = sweep.resolve([run])
        tokens = _tokens(sweep, factors)
        if tokens is None or tokens < few(world):
            continue
        if len(factors) > 1 and axes.keys().isdisjoint(factors):
            factors = (sweep.fuse(factors),)
        if len(factors) != 1:
            continue
        own = axes.get(factors[0]) or Axis(number, factors[0], tokens, Layout("contiguous", world))
        number += own.index == number
        own = replace(own, line=line, offset=offset)
        order = own.layout.order if base is None else _order(base, own)
        if own.factor in axes and own.layout.order != order or order is OFF_THE_CURVE:
            continue
        base = base or own
        yield replace(own, layout=Layout(following("contiguous", order), world))


def _rank(run: Factor, axes: Mapping[Factor, Axis], sweep: Sweep) -> tuple[bool, int]:
    """Attentions' axes first, those along a curve before others, in the order of their numbers."""
    factors = sweep.resolve([run])
    axis = axes.get(sweep.fused.get(factors, factors[0]))
    return (axis is None or axis.layout.order is None, axis.index if axis else len(axes))


OFF_THE_CURVE: Any = object()


def _order(base: Axis, run: Axis) -> Order | None:
    """The curve along which the tokens of `run` are, as part of `base` or around it."""
    order, start = base.layout.order, run.offset - base.offset
    if order is None:
        return None
    stop = sympy.expand(start + size_of(run.tokens))
    if start.is_Integer and stop == size_of(base.tokens) and start <= order.prefix:
        return replace(order, prefix=order.prefix - int(start))
    return None if stop.is_Integer and stop <= order.prefix else OFF_THE_CURVE


def _tokens(sweep: Sweep, factors: Sequence[Factor]) -> Any:
    """The length of a dim of these factors, as some tensor has it."""
    sizes = [f.size for f in factors]
    if all(n.is_number for n in sizes):
        return int(sympy.prod(sizes))
    for node, value in sweep.values.items():
        if isinstance(node.meta.get("val"), torch.Tensor):
            for dim, own in enumerate(value):
                if sweep.resolve(own) == tuple(factors):
                    return node.meta["val"].shape[dim]
    return None


def _cuts(run: Axis, runs: Sequence[Axis]) -> tuple[int, ...] | None:
    """Where the layout of `run` is cut; None where that is not the same for all lengths."""
    size, found = size_of(run.tokens), set()
    for end in {e for other in runs for e in (other.offset, other.offset + size_of(other.tokens))}:
        start, stop = sympy.expand(end - run.offset), sympy.expand(end - run.offset - size)
        if not start.is_Integer and not stop.is_Integer:
            return None
        late = not start.is_Integer or (stop.is_Integer and 2 * start > size)
        place = int(stop if late else start)
        if (-run.hint < place < 0) if late else (0 < place < run.hint):
            found.add(place)
    return tuple(sorted(found, key=lambda place: (place < 0, place)))


def _laid(run: Axis, cuts: tuple[int, ...], world: int) -> Axis:
    return replace(run, layout=Layout(following(split_at("contiguous", cuts), run.layout.order), world))


def _hints(sweep: Sweep) -> dict[Any, int]:
    """The value of each symbolic length."""
    sizes = [n for node in sweep.values for n in getattr(node.meta.get("val"), "shape", ())]
    symbols = [n for n in sizes if isinstance(n, torch.SymInt) and n.node.expr.is_Symbol]
    return {n.node.expr: hint_of(n) for n in symbols}


def _agree(runs: Sequence[Axis], hints: Mapping[Any, int], world: int) -> bool:
    """Whether each token is on one rank in all runs, and no rank without tokens of a run: for every length."""
    for run in runs:
        if isinstance(run.tokens, torch.SymInt):  # what is between the cuts then has enough for each rank
            cuts = (0, *run.layout.split_points)
            if run.tokens < 2 * world + max(cuts) - min(cuts):
                return False
        if not all(map(run.reaches_all, CANDIDATES)):
            return False
    for a, b in combinations(runs, 2):
        shift = int((b.offset - a.offset).subs(hints))
        low, high = max(shift, 0), min(a.hint, shift + b.hint)
        for rank in range(world):
            if clipped(a.layout.ranges(rank, a.hint), low, high, 0) != clipped(
                b.layout.ranges(rank, b.hint), low - shift, high - shift, shift
            ):
                return False
    return True
