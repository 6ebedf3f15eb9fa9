"""What the stage `place` hands on: for each node of one graph, where it runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

import sympy
from torch.fx import Node

from ringpass.layouts.ranges import contains
from ringpass.nodes import bytes_of, first_of, operands_of, size_of
from ringpass.passes.op_rules.spec import Reads
from ringpass.passes.op_rules.table import rule_for
from ringpass.passes.partition.recurrence import Recurrence
from ringpass.passes.plan.plan import SitePlan
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor, Sweep


@dataclass(frozen=True)
class PlacementPlan:
    """Where each node of one graph runs.

    `live`: nodes that an output needs; `tracked`: those that may need a gradient; `kept`: those that masks and biases
    are made of without any floating-point input, which stay replicated; `slices`: those that slice or join sequences on
    local tokens; `batch_axes`: other dims along which ranks divide what needs all tokens (`batch_axes`);
    `recurrences`: the recurrence that says how a node is written (`recurrences`); `choices`: a line for each region
    that may be one; `moved`: the bytes that all ranks together send in a forward for each region.
    """

    sweep: Sweep
    axis_of: dict[Factor, Axis]
    sites: dict[Node, SitePlan]
    live: frozenset[Node]
    tracked: frozenset[Node]
    modes: dict[Node, Axis | None]
    kept: frozenset[Node] = frozenset()
    slices: set[Node] = field(default_factory=set)
    batch_axes: dict[Factor, Axis] = field(default_factory=dict)
    recurrences: dict[Node, Recurrence] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)

    def on(self, node: Node, axis: Axis) -> bool:
        """Whether a dim of `node` is on `axis`, or it counts rows of it."""
        if node in self.sweep.routing.counts:
            return self.modes[node] is axis
        return any(self.is_of(f, axis) for d in self.sweep.operand_dims(node) for f in d)

    def few_are_taken(self, source: Node) -> bool:
        """Whether the elements that replicated nodes take of a sharded value, all together, are at most half of it."""
        takers = [n for n in source.users if n in self.live and rule_for(n).select and self.modes.get(n) is None]
        return 2 * sum(map(bytes_of, takers)) <= bytes_of(source)

    def few_tokens(self, node: Node) -> bool:
        """Whether `node`, on a batch axis, is what an op took of a sequence: at most as many tokens as a rank holds."""
        axis = self.modes[node]
        if axis is None or axis not in self.batch_axes.values() or rule_for(node).select is None:
            return False
        source = first_of(node)
        of_tokens = [bool(self.axes(f for d in self.sweep.dims(n) for f in d)) for n in (source, node)]
        return of_tokens == [True, False] and axis.layout.world * bytes_of(node) <= bytes_of(source)

    def holds_shards(self, node: Node) -> bool:
        """Whether ranks hold shards of `node`."""
        return self.modes.get(node) is not None and not self.reduces(node)

    @property
    def whole_bytes(self) -> int:
        """The bytes of sharded values that every rank must gather for what reads them whole, outputs left out."""
        whole = {
            n
            for node in self.live
            if node.op == "call_function"
            for n in operands_of(node)
            if self.holds_shards(n) and not self._reads_shard(node, n)
        }
        return sum(map(bytes_of, whole))

    def _reads_shard(self, node: Node, operand: Node) -> bool:
        axis = self.modes[node]
        if node in self.recurrences:
            return True
        if axis is not None:
            return node in self.slices or node in self.sites or self.source(node, operand, axis) is not None
        return rule_for(node).select is not None or node in self.sites or rule_for(node).reads is Reads.NONE

    def is_of(self, factor: Factor, axis: Axis) -> bool:
        """Whether `factor` is that of `axis`, a sequence or a batch axis."""
        return self.axis_of.get(factor) is axis or self.batch_axes.get(factor) is axis

    def source(self, node: Node, operand: Node, axis: Axis) -> Axis | None:
        """The axis of `operand` whose tokens `node` reads on `axis`: another one, if they are redistributed."""
        if self.on(operand, axis):
            return axis
        wanted = self.redistributed(node)
        candidates = (a for d in self.sweep.operand_dims(operand) for a in self.axes(d))
        return next((a for a in candidates if wanted.get(a) is axis), None)

    def redistributed(self, node: Node) -> dict[Axis, Axis | None]:
        """Each axis whose tokens `node` redistributes, and the axis of its sequence to whose ranks; None: no such."""
        pairs = [(self.axes([y]), self.axes([x])) for y, x in self.sweep.notes[node].redistributed]
        found = {
            y: x if x and y and x.sequence and x.sequence is y.sequence else None
            for ys, xs in pairs
            for y, x in zip_longest(ys, xs)
            if y or x
        }
        for y, x in reversed(found.items()):  # where the target is redistributed too: to the last one
            found[y] = found.get(x, x)
        return found

    def reduces(self, node: Node) -> bool:
        """Whether `node` runs on an axis and sums over it: its value, once reduced, is replicated."""
        axis = self.modes[node]
        if axis is None or node in self.sites:
            return False
        return any(self.is_of(f, axis) for f in self.sweep.resolve(self.sweep.notes[node].reduction))

    def replicated_operands(self, node: Node) -> list[Node]:
        """Operands that `node`, running on an axis, reads replicated."""
        axis, site = self.modes[node], self.sites.get(node)
        if axis is None and not (site and site.split):
            return []
        if node in self.slices:
            return rule_for(node).weights(node)
        if site:
            keys = [] if site.key_axis else [site.site.k, site.site.v]
            return [*keys, *(site.site.leaves[i] for i in site.learned)]
        assert axis is not None
        return [n for n in operands_of(node) if self.source(node, n, axis) is None]

    def reaches_replicated(self, user: Node) -> bool:
        """Whether `user`, or what it hands one operand on to, computes replicated from several operands."""
        if self.modes[user] is not None or user not in self.live:
            return False
        several = len(operands_of(user)) != 1
        return several or any(self.reaches_replicated(other) for other in user.users)

    def axis_along(self, node: Node, dim: int) -> Axis | None:
        """The axis of one dim of `node`."""
        axes = self.axes(self.sweep.dims(node)[dim])
        return axes[0] if len(axes) == 1 else None

    def sequence_along(self, node: Node, dim: int) -> Factor | None:
        """The sequence of which one dim of `node`, on an axis, is a slice that agrees with the others of it."""
        factors, axis = self.sweep.dims(node)[dim], self.axis_along(node, dim)
        if axis is None:
            return None
        return axis.sequence if len(factors) == 1 else self.sweep.sequence(factors)[0]

    def reads_neighbours(self, node: Node, axis: Axis) -> bool:
        """Whether `node`, on an axis, reads the tokens around each token of it."""
        return node in self.sweep.halos and self.axis_along(node, self.sweep.halos[node]) is axis

    def in_order(self, node: Node, axis: Axis) -> bool:
        """Whether neighbours on the axis are neighbours in the sequence."""
        dim = {**self.sweep.slices, **self.sweep.halos}[node]
        ordered = not axis.layout.order and not axis.layout.section
        return bool(self.axes(self.sweep.dims(node)[dim][:1])) and ordered

    def holder(self, axis: Axis, offset: sympy.Expr, part: Node, dim: int) -> int | None:
        """The rank that holds all tokens of `part`, which begin at `offset` of `axis`; None: several ranks."""
        size = size_of(part.meta["val"].shape[dim])
        if not size.is_Integer:
            return None
        late = sympy.expand(offset - size_of(axis.tokens))
        start = int(offset) if offset.is_Integer else axis.hint + int(late) if late.is_Integer else -1
        if isinstance(axis.tokens, int) and not axis.layout.order and start >= 0:
            tokens, end = ((start, start + int(size)),), start + int(size)
            rows = (axis.layout.rows(rank, axis.tokens, -(-end // axis.tokens)) for rank in range(axis.layout.world))
            return next((rank for rank, held in enumerate(rows) if contains(held, tokens)), None)
        return axis.layout.holder(axis.hint, start, start + int(size)) if start >= 0 else None

    def axes(self, factors: Iterable[Factor]) -> list[Axis]:
        """The axes among `factors`."""
        return [self.axis_of[f] for f in self.sweep.resolve(factors) if f in self.axis_of]

    def is_axis(self, factor: Factor) -> bool:
        """Whether a factor is partitioned."""
        return factor in self.axis_of
