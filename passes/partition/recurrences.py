"""recurrences: a recurrence over chunks of a divided sequence, by passing its state from rank to rank.

    for i in range(n):                                       rank 0 has chunks 0, 1; rank 1 has chunks 2, 3
        y[:, i] = q[:, i] @ state                            rank 0: i = 0, 1, then sends `state`
        state = state * g[:, i] + k[:, i].mT @ v[:, i]       rank 1: receives it, then i = 2, 3

Where a region (`batch_axes`) picks its sequence chunk by chunk, the tokens may stay.  Each chunk has an *owner*, the
rank that holds most of its tokens.  A node that follows from picks runs on the owner of the last chunk, in the order of
the program, that it reads; a value that another owner reads is *handed over*.  So the state moves, as often as
neighbouring chunks have different owners, and, of chunks that a boundary between ranks divides, some tokens.

    on the chunk axis   values with a dim of chunks that ops treat alike; what takes tokens apart, or puts together
    owned               picks, and what follows from them, on the rank of its readers if that sends fewer bytes
    writes              slice_scatter, stack and cat of owned values: on the chunk axis again, or on tokens

Contract: an analysis, as `placement`.  Of the batch axis and the recurrence the one that moves fewer bytes in a forward
is taken.  A region is no recurrence if a rank would own no chunk, if a length is symbolic, if anything but a write
reads owned values along with those of all chunks or outside the region, or if owned nodes read a parameter: its
gradient would be summed at places that depend on the rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from torch.fx import Node

from ringpass.layouts.layout import CONTIGUOUS, Layout, assigned
from ringpass.layouts.ranges import clipped, size
from ringpass.nodes import bytes_of, first_of, has_effect, operands_of, tensors_of
from ringpass.passes.op_rules.table import draws_counter_based, draws_shared, reads, rule_for
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.partition.recurrence import HandOver, Recurrence
from ringpass.passes.plan.tracked import differentiable
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor

Decide = Callable[[PlacementPlan, Node], Axis | None]
RunsOn = Callable[[PlacementPlan, Node, Factor], bool]


def find_recurrence(
    p: PlacementPlan, region: list[Node], decide: Decide, runs_on: RunsOn, world: int
) -> Recurrence | None:
    """The recurrence of a region that moves the fewest bytes; None if it is none.

    `decide`: the mode of any other node.
    """
    found = []
    for recurrence in _candidates(p, world):
        if _Trial(p, recurrence, region, decide, runs_on).fits():
            found.append(recurrence)
    return min(found, key=lambda recurrence: recurrence.bytes, default=None)


def _candidates(p: PlacementPlan, world: int) -> Iterator[Recurrence]:
    """Each way in which chunks of a sequence may have owners."""
    number = max(a.index for a in (*p.axis_of.values(), *p.batch_axes.values())) + 1
    groups: dict[tuple[object, ...], list[Factor]] = {}
    for parts, fused in p.sweep.fused.items():
        axis = p.axis_of.get(fused)
        if axis is not None and _plain(axis) and parts[0].size.is_Integer:
            groups.setdefault((int(parts[0].size), _place_of(axis)), []).append(parts[0])
    for (count, place), factors in groups.items():
        assert isinstance(count, int)
        sources = tuple(axis for axis in p.axis_of.values() if _plain(axis) and _place_of(axis) == place)
        for owners in dict.fromkeys((_holders(sources[0], count), _evenly(count, world))):
            layout = Layout(assigned(owners), world)
            known = {a for f in factors if (a := p.batch_axes.get(f))} or {Axis(number, factors[0], count, layout)}
            if len({*owners}) == world and len(known) == 1 and (chunks := known.pop()).layout == layout:
                yield Recurrence(chunks, tuple(factors), sources, owners, sources[0].hint // count)
    for factor, axis in dict.fromkeys(p.axis_of.items()):
        if _plain(axis) and axis.hint >= world:
            owners = _holders(axis, axis.hint)
            yield Recurrence(axis, (factor,), (axis,), owners, 1)


def _place_of(axis: Axis) -> tuple[object, ...]:
    """Equal for axes of the same tokens."""
    return axis.sequence or axis.factor, axis.offset, axis.tokens


def _plain(axis: Axis) -> bool:
    """Whether tokens of the axis are numbered in the order of the sequence, and known."""
    layout = axis.layout
    return isinstance(axis.tokens, int) and not (layout.order or layout.section or layout.strided or layout.replicated)


def _holders(axis: Axis, count: int) -> tuple[int, ...]:
    """For each of `count` chunks, the rank that holds most of its tokens."""
    unit, ranks = axis.hint // count, range(axis.layout.world)
    held = [axis.layout.ranges(rank, axis.hint) for rank in ranks]
    return tuple(max(ranks, key=lambda r: size(clipped(held[r], i * unit, (i + 1) * unit))) for i in range(count))


def _evenly(count: int, world: int) -> tuple[int, ...]:
    """The same number of neighbouring chunks for each rank."""
    return _holders(Axis(0, Factor(count), count, Layout(CONTIGUOUS, world)), count)


class _Trial:
    """Sorts the nodes of a region into what runs where.  The modes that it notes are taken back by `fits`."""

    def __init__(
        self, p: PlacementPlan, recurrence: Recurrence, region: list[Node], decide: Decide, runs_on: RunsOn
    ) -> None:
        self.p, self.recurrence, self.region, self.decide, self.runs_on = p, recurrence, region, decide, runs_on
        self.seen: dict[int, int] = {}  # when a chunk was first picked

    def fits(self) -> bool:
        """Whether every node has its place; fills the recurrence."""
        p, recurrence = self.p, self.recurrence
        modes, slices, batch_axes = dict(p.modes), set(p.slices), dict(p.batch_axes)
        p.batch_axes.update(dict.fromkeys(recurrence.factors, recurrence.axis) if recurrence.unit > 1 else {})
        try:
            fits = all(map(self._place, self.region)) and bool(recurrence.owned) and self._ends()
            recurrence.modes = {n: p.modes[n] for n in self.region}
            recurrence.slices = p.slices - slices
            return fits
        finally:
            p.modes.update(modes)
            p.slices.intersection_update(slices)
            p.batch_axes.clear()
            p.batch_axes.update(batch_axes)

    def _place(self, node: Node) -> bool:
        """Notes where a node runs; False: the region is no recurrence."""
        p, recurrence, operands = self.p, self.recurrence, operands_of(node)
        if not p.sweep.notes[node].known or has_effect(node) or node in p.sites or draws_shared(node):
            return False
        return (
            self._picks(node)
            or self._writes(node)
            or self._views(node)
            or self._on_tokens(node)
            or self._on_chunks(node)
            or self._follows(node, operands)
            or not (any(map(p.holds_shards, reads(node))) or any(n in recurrence.owned for n in operands))
        )

    def _has_chunks(self, node: Node, dim: int) -> int:
        """How many elements of a chunk are along `dim` of a value that is on chunks or their tokens; 0: it is on none.

        A chunk is one element of a dim of chunks, `unit` of a dim of tokens.
        """
        p, recurrence = self.p, self.recurrence
        factors, mode = p.sweep.dims(node)[dim], p.modes[node]
        if len(factors) != 1 or mode is None:
            return 0
        if mode is recurrence.axis and factors[0] in recurrence.factors:
            return 1
        return recurrence.unit if self._tokens_of(factors[0]) is mode else 0

    def _tokens_of(self, factor: Factor) -> Axis | None:
        """The axis of the tokens of which the recurrence has the chunks, if `factor` is that of one."""
        axis = self.p.axis_of.get(factor)
        return axis if axis in self.recurrence.sources and self.recurrence.unit > 1 else None

    def _picks(self, node: Node) -> bool:
        """A part of one chunk, on its owner."""
        taken = rule_for(node).takes_part(node)
        source = first_of(node) if taken else node
        if taken is None:
            return False
        dim, start, stop = taken
        each = self._has_chunks(source, dim)
        if not each or start // each != (stop - 1) // each or stop <= start:
            return False
        chunk = start // each
        self.seen.setdefault(chunk, len(self.seen))
        self.recurrence.owned[node] = chunk
        self.recurrence.picks[node] = chunk, each
        self._enter(source)
        return True

    def _enter(self, value: Node) -> None:
        """Notes that a value is read in chunks, as tokens that may be elsewhere."""
        if self.p.modes[value] is not self.recurrence.axis:
            self.recurrence.entering[value] = self.p.modes[value]

    def _writes(self, node: Node) -> bool:
        """Owned values into those of all chunks."""
        p, recurrence, put = self.p, self.recurrence, rule_for(node).puts(node)
        if put is None or not any(part in recurrence.owned for part, _, _ in put.parts):
            return False
        (factor,) = p.sweep.dims(node)[put.dim] if len(p.sweep.dims(node)[put.dim]) == 1 else (None,)
        tokens = self._tokens_of(factor) if factor is not None else None
        each = 1 if factor in recurrence.factors else recurrence.unit if tokens is not None else 0
        complete = [i for _, a, b in put.parts for i in range(a, b)] == [*range(node.meta["val"].shape[put.dim])]
        if not each or not (put.base is not None or complete):
            return False
        if put.base is not None and (each != 1 or p.modes[put.base] not in (recurrence.axis, None)):
            return False
        for part, start, stop in put.parts:
            if part not in recurrence.owned or start // each != (stop - 1) // each:
                return False
        recurrence.writes[node] = put, each
        p.modes[node] = recurrence.axis if tokens is None else tokens
        if tokens is not None:
            recurrence.leaving[node] = tokens
        return True

    def _views(self, node: Node) -> bool:
        """Tokens as chunks of tokens, or back."""
        p, recurrence = self.p, self.recurrence
        if not rule_for(node).view or recurrence.unit == 1:
            return False
        source = first_of(node)
        dims, inner = p.sweep.dims(node), p.sweep.dims(source)
        by_chunk = [d for d in dims if recurrence.factors and d and d[0] in recurrence.factors]
        held = [d for d in range(len(inner)) if self._has_chunks(source, d) == recurrence.unit]
        if by_chunk and held and p.modes[source] is not recurrence.axis:
            self._enter(source)
            recurrence.views.add(node)
            p.modes[node] = recurrence.axis
            return True
        tokens = [t for d in dims if len(d) == 1 and (t := self._tokens_of(d[0])) is not None]
        if p.modes[source] is recurrence.axis and len(tokens) == 1:
            recurrence.leaving[node] = tokens[0]
            recurrence.views.add(node)
            p.modes[node] = tokens[0]
            return True
        return False

    def _on_tokens(self, node: Node) -> bool:
        """What follows from values that left."""
        p = self.p
        operands = operands_of(node)
        if any(n in self.recurrence.owned for n in operands) or not any(p.holds_shards(n) for n in operands):
            return False
        mode = self.decide(p, node)
        if mode is None or mode is self.recurrence.axis and self.recurrence.unit > 1:
            return False
        p.modes[node] = mode
        return True

    def _on_chunks(self, node: Node) -> bool:
        """What treats each chunk alike."""
        p, recurrence = self.p, self.recurrence
        operands = operands_of(node)
        if recurrence.unit == 1 or any(n in recurrence.owned for n in operands):
            return False
        if not any(p.modes[n] is recurrence.axis for n in operands):
            return False
        if any(p.holds_shards(n) and p.modes[n] is not recurrence.axis for n in operands):
            return False
        if not any(self.runs_on(p, node, factor) for factor in recurrence.factors):
            return False
        p.modes[node] = recurrence.axis
        return True

    def _follows(self, node: Node, operands: list[Node]) -> bool:
        """What follows from owned values, on the owner of the latest chunk."""
        p, recurrence = self.p, self.recurrence
        if draws_counter_based(node):
            return False
        owned = [n for n in operands if n in recurrence.owned]
        others = [n for n in operands if n not in recurrence.owned]
        if not owned or any(p.holds_shards(n) or p.modes[n] is not None or n in p.tracked for n in others):
            return False
        recurrence.owned[node] = max((recurrence.owned[n] for n in owned), key=self.seen.__getitem__)
        return True

    def _owner(self, node: Node) -> int:
        return self.recurrence.owners[self.recurrence.owned[node]]

    def _readings(self, node: Node) -> Iterator[tuple[Node, int]]:
        """(owned value, the rank where it is read) of each one that a node reads."""
        if node in self.recurrence.writes:
            put, each = self.recurrence.writes[node]
            yield from ((part, self.recurrence.owners[start // each]) for part, start, _ in put.parts)
        elif node in self.recurrence.owned:
            yield from ((n, self._owner(node)) for n in operands_of(node) if n in self.recurrence.owned)

    def _follow_readers(self) -> None:
        """Moves a node to the owner of all that read it, where fewer bytes are handed over then.

        `state * 0.9` is computed where it is read, rather than sent beside `state`.
        """
        recurrence, read = self.recurrence, Counter(r for node in self.region for r in self._readings(node))
        for node in reversed([n for n in recurrence.owned if n not in recurrence.picks]):
            chunks = {recurrence.owned.get(user) for user in node.users if user in self.p.live}
            later = chunks.pop() if len(chunks) == 1 else None
            if later is None or recurrence.owners[later] == (src := self._owner(node)):
                continue
            dst, operands = recurrence.owners[later], [n for n in operands_of(node) if n in recurrence.owned]
            more = sum(bytes_of(n) for n in operands if self._owner(n) != dst and not read[n, dst])
            if more < bytes_of(node):
                recurrence.owned[node] = later
                read.subtract((n, src) for n in operands)
                read.update((n, dst) for n in operands)

    def _hand_over(self) -> None:
        """Notes what is sent, once to each rank that reads it."""
        sent: set[tuple[Node, int]] = set()
        for node in self.region:
            for value, dst in self._readings(node):
                if (src := self._owner(value)) != dst and (value, dst) not in sent:
                    sent.add((value, dst))
                    self.recurrence.handed.append(HandOver(value, src, dst, node))

    def _ends(self) -> bool:
        """Whether owned values end in writes that come after all transfers, and the first transfer after a pick that
        needs a gradient, if any value that is handed over does; notes what the transfers begin and end with."""
        p, recurrence = self.p, self.recurrence
        self._follow_readers()
        self._hand_over()
        place = {node: i for i, node in enumerate(self.region)}
        inside = {*self.region}
        for node in recurrence.owned:
            if any(user in p.live and user not in inside for user in node.users):
                return False
            if any(
                user in p.live and user not in recurrence.owned and user not in recurrence.writes for user in node.users
            ):
                return False
        if not recurrence.handed:
            return True
        values = [h.value for h in recurrence.handed]
        if not all(len(tensors_of(v)) == 1 and v.meta["val"].dtype.is_floating_point for v in values):
            return False
        first, last = (place[recurrence.handed[i].reader] for i in (0, -1))
        picked = dict.fromkeys(first_of(n) for n in recurrence.picks if place[n] <= first)
        recurrence.begins = tuple(n for n in picked if n in p.tracked and differentiable(n.meta["val"]))
        recurrence.ends = tuple(
            n for n in recurrence.writes if any(u in p.live and u not in recurrence.writes for u in n.users)
        )
        sources = {first_of(n) for n in recurrence.picks if first_of(n) in p.tracked}
        return (
            sources <= {*recurrence.begins} and bool(recurrence.ends) and all(place[n] >= last for n in recurrence.ends)
        )
