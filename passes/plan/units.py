"""units: sequences of which one is another with neighbouring tokens merged, and the factor that is the axis of both.

    attention over x (B, S, D)                tokens (S/4, 4)          contiguous in units of 4
    attention over x.view(B, S/4, 4 * D)      tokens (S/4,)            contiguous
    a grid, and the same with 2x2 merged      (H/2, 2, W/2, 2) and (H/2, W/2): each rank holds rows of H/2

If the outermost factor is the axis, each rank holds whole units of the longer sequence: merging them, and giving each
token what was made of its unit, moves nothing.

A slice that leaves out less than a unit at the start and at the end, such as all tokens but the last, has an axis of
its own, on which each token is on the same rank.

Contract: depends on the graph and P alone.  A sequence is left out if the axis would have fewer than 2 units per rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch.fx import Node

from ringpass.layouts.layout import few
from ringpass.nodes import hint_of, size_of
from ringpass.passes.plan.axes import tokens_of
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor, Factors, Sweep, product


def unit_factors(operands: Iterable[Node], sweep: Sweep, world: int) -> frozenset[Factor]:
    """The factors that number the units of several sequences.  `operands`: queries and keys of attentions."""
    sequences = dict.fromkeys(sweep.dims(x)[-2] for x in operands if hint_of(x.meta["val"].shape[-2]) >= 2 * world)
    for factors in list(sequences):  # and what they are joined from
        sequences |= dict.fromkeys(sweep.resolve([part]) for part, _ in sweep.alignment.slices(sweep.index(factors)))
    found: set[Factor] = set()
    for outermost in dict.fromkeys(factors[0] for factors in sequences):
        group = [factors for factors in sequences if factors[0] is outermost]
        units = _shared(sorted(group, key=len, reverse=True), sweep, world)
        inner = {factor for factors in group for factor in factors[1:]}
        if units and inner.isdisjoint(factors[0] for factors in sequences):  # else attention along dims of a grid
            found.add(sweep.fuse(units) if len(units) > 1 else units[0])
    return frozenset(found)


def _shared(group: Sequence[Factors], sweep: Sweep, world: int) -> Factors:
    """The factors with which sequences of one outermost factor begin, as far as they are enough units; the most split
    sequence stands first."""
    shared, merged = group[0], False
    for factors in group[1:]:
        same = [a is b for a, b in zip(shared, factors, strict=False)]
        common = shared[: (*same, False).index(False)]
        units = tokens_of(sweep, common)
        if units is not None and hint_of(units) >= 2 * world and _numbers(shared[len(common) :]):
            shared, merged = common, True
    return shared if merged else ()


def _numbers(inner: Factors) -> bool:
    """Whether the units have the same size for all lengths."""
    return bool(product(inner).is_number)


def slices_of_units(
    operands: Iterable[Node], numbered: Collection[Factor], axes: Mapping[Factor, Axis], sweep: Sweep, world: int
) -> Iterator[tuple[Factor, Axis]]:
    """The axes of slices that hold tokens of every unit of a sequence.

    `operands`: queries and keys of attentions; `numbered`: the factors that number units.
    """
    number = max((axis.index for axis in axes.values()), default=0) + 1
    for factors in dict.fromkeys(sweep.dims(x)[-2] for x in operands):
        units = axes.get(factors[0]) if len(factors) > 1 and factors[0] in numbered else None
        if units is None or not product(factors).is_number:
            continue
        tokens, unit = int(product(factors)), int(product(factors[1:]))
        sequence = Factor(product(factors))  # not that of axes whose layouts are made for split points
        for part, start in sweep.alignment.slices(sweep.index(factors)):
            inside = sweep.resolve([part])
            stop = start + size_of(product(inside))
            whole = start.is_number and stop.is_number and 0 <= start < unit and tokens - unit < stop <= tokens
            if len(inside) == 1 and whole and inside[0] not in axes and stop - start >= few(world):
                layout = units.layout.in_units(unit, int(start))
                yield inside[0], Axis(number, inside[0], int(stop - start), layout, sequence, start, units.index)
                number += 1
