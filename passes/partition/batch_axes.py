"""batch axes: what needs all tokens of a sequence is divided over ranks along another dim.

    y = x.cumsum(1)         (B, L, D) tokens -> all-to-all -> (B, S, D / P) -> cumsum -> all-to-all -> (B, L, D) tokens

A node that needs all tokens runs replicated, on gathered operands.  A *region* is what such nodes and those that follow
from them make up, up to where nodes run on local tokens again: a scan over chunks, a norm over tokens, a transform
along the sequence.  Where the ops of a region treat some other dim alike for each index (heads, channels, rows of the
batch), its ranks divide that *batch axis* instead: each has all tokens of a part of the heads, moved by one all-to-all
of each value that enters or leaves, 1 / P of its bytes, and nothing is computed twice.  What sums over the batch axis,
such as a loss of a picture that is made of patches, adds the sums of all ranks.

A recurrence over chunks may leave its tokens where they are and pass its state from rank to rank (`recurrences`).

Contract: an analysis, as `placement`.  Of the dims that a region has, the one with the fewest bytes per rank is taken;
if the region is a recurrence too, the way that moves fewer bytes.  A region that has neither is left replicated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ringpass.layouts.layout import CONTIGUOUS, Layout
from ringpass.nodes import bytes_of, first_of, has_effect, tensors_of
from ringpass.passes.op_rules.table import draws_shared, reads, rule_for
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.partition.recurrence import Recurrence
from ringpass.passes.partition.recurrences import Decide, find_recurrence
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor


def divide_regions(p: PlacementPlan, nodes: Iterable[Node], world: int, decide: Decide) -> None:
    """Puts the nodes of each region on a batch axis, or chunk by chunk, where that is possible and moves fewer bytes.

    Changes `p`: its modes, `slices`, `batch_axes`, `recurrences`, `choices`, `moved`.  `decide`: the mode of any other
    node.
    """
    for region in _regions(p, [n for n in nodes if n in p.live]):
        tried = [_divided(p, region, factor, world) for factor in _candidates(p, region)]
        best = min(tried, key=lambda division: division.bytes, default=Division(None))
        if best.bytes >= _bytes_replicated(p, region):
            best = Division(None)
        axis = _axis_of(p, best.factor, world) if best.factor is not None else None
        recurrence = find_recurrence(p, region, decide, _runs_on, world) if world > 1 else None
        other = _moved(p, region, best.on, axis, world)
        p.moved.append(min(recurrence.bytes, other) if recurrence is not None else other)
        if recurrence is not None:
            p.choices.append(_choice(region, recurrence, other, axis))
            if recurrence.bytes < other:
                _take(p, recurrence)
                continue
        if axis is not None and best.factor is not None:
            p.batch_axes[best.factor] = axis
            p.modes.update(dict.fromkeys(best.on, axis))


def _axis_of(p: PlacementPlan, factor: Factor, world: int) -> Axis:
    """The batch axis of a dim."""
    number = max(a.index for a in (*p.axis_of.values(), *p.batch_axes.values())) + 1
    return p.batch_axes.get(factor) or Axis(number, factor, int(factor.size), Layout(CONTIGUOUS, world))


def _take(p: PlacementPlan, recurrence: Recurrence) -> None:
    """Notes a recurrence in the plan."""
    p.modes.update(recurrence.modes)
    p.slices.update(recurrence.slices)
    if recurrence.unit > 1:
        p.batch_axes.update(dict.fromkeys(recurrence.factors, recurrence.axis))
    p.recurrences.update(dict.fromkeys((*recurrence.owned, *recurrence.writes, *recurrence.views), recurrence))


def _choice(region: Sequence[Node], recurrence: Recurrence, other: int, axis: Axis | None) -> str:
    """A line for the dump: what a recurrence moves either way, and which way is taken."""
    states = f"{recurrence.state_bytes} of states in {len(recurrence.handed)} transfers"
    passing = f"{recurrence.bytes} bytes ({states}, {recurrence.token_bytes} of tokens)"
    how = f"all-to-all to a dim of {axis.tokens}" if axis is not None else "gathering"
    taken = "states pass" if recurrence.bytes < other else how
    ends = f"{region[0].name} .. {region[-1].name}"
    chunks = len(recurrence.owners)
    return f"{ends}: {chunks} chunks; passing states moves {passing}, {how} {other}; taken: {taken}"


def _moved(p: PlacementPlan, region: Sequence[Node], on: set[Node], axis: Axis | None, world: int) -> int:
    """The bytes that all ranks together send in a forward, if the nodes `on` run on the batch axis, others on all."""
    total, inside = 0, {*region}
    for node in dict.fromkeys(n for user in region for n in (user, *reads(user))):
        held = axis if node in on else p.modes[node] if p.holds_shards(node) else None
        readers = [n for n in node.users if n in p.live and n.op != "output" and (n in inside or node in on)]
        wanted = dict.fromkeys(axis if n in on else p.modes[n] for n in readers if node in reads(n))
        for other in wanted if held is not None else ():
            if other is None or axis is None or not any(axis.factor in d for d in p.sweep.operand_dims(node)):
                total += bytes_of(node) * (world - 1)
            elif other is not held and held is not None:
                total += bytes_of(node) - _staying(node, held, other)
    return total


def _staying(node: Node, held: Axis, wanted: Axis) -> int:
    """The bytes of a value that need not move, if ranks divide it along one dim before, and along another after."""
    ranks = range(held.layout.world)
    both = sum(held.layout.length(r, held.hint) * wanted.layout.length(r, wanted.hint) for r in ranks)
    return int(bytes_of(node) * both // (held.hint * wanted.hint))


@dataclass
class Division:
    """A region divided along `factor`: the nodes that then run on it, and the bytes that a rank holds of the region."""

    factor: Factor | None
    on: set[Node] = field(default_factory=set)
    summed: set[Node] = field(default_factory=set)  # those of them that sum over it: every rank has all of the result
    bytes: float = 0


def _regions(p: PlacementPlan, nodes: Sequence[Node]) -> list[list[Node]]:
    """The connected sets of nodes that run replicated and read, or follow from, sharded values."""
    region_of: dict[Node, list[Node]] = {}
    regions: list[list[Node]] = []
    for node in nodes:
        if node.op != "call_function" or p.modes[node] is not None or not tensors_of(node) or _takes_few(p, node):
            continue
        if node in p.sites and p.sites[node].split:
            continue
        inside = [region_of[n] for n in reads(node) if n in region_of]
        if not inside and not any(p.holds_shards(n) for n in reads(node)):
            continue
        merged = list({id(r): r for r in inside}.values())
        first = merged[0] if merged else []
        regions += [] if merged else [first]
        for other in merged[1:]:
            first += other
            regions = [r for r in regions if r is not other]
            region_of |= dict.fromkeys(other, first)
        first.append(node)
        region_of[node] = first
    order = {node: i for i, node in enumerate(nodes)}
    return [sorted(region, key=order.__getitem__) for region in regions]


def _takes_few(p: PlacementPlan, node: Node) -> bool:
    """Whether `node` takes a few tokens of a sharded value, which alone move."""
    takes = rule_for(node).select is not None
    return takes and p.holds_shards(first_of(node)) and p.few_are_taken(first_of(node))


def _candidates(p: PlacementPlan, region: list[Node]) -> list[Factor]:
    """The dims of what enters a region along which ranks could divide it, in order."""
    entering = [n for node in region for n in reads(node) if p.holds_shards(n)]
    factors = dict.fromkeys(f for n in entering for d in p.sweep.operand_dims(n) for f in d)
    of_recurrences = {f for recurrence in p.recurrences.values() for f in recurrence.factors}
    return [f for f in factors if f not in p.axis_of and f not in of_recurrences and f.size.is_Integer and f.size >= 2]


def _bytes_replicated(p: PlacementPlan, region: list[Node]) -> int:
    """The bytes that every rank holds of a region that runs replicated: its values, and what enters."""
    entering = dict.fromkeys(n for node in region for n in reads(node) if p.holds_shards(n))
    return sum(map(bytes_of, (*entering, *region)))


def _divided(p: PlacementPlan, region: list[Node], factor: Factor, world: int) -> Division:
    """The region with every node that can run on `factor` there."""
    found = Division(factor)
    share = -(-int(factor.size) // world) / int(factor.size)
    gathered: set[Node] = set()
    for node in region:
        on = _runs_on(p, node, factor) and (factor.size >= world or _runs_on_none(p, node, factor))
        on = first_of(node) in found.on if rule_for(node).follows else on
        summed = first_of(node) in found.summed if rule_for(node).follows else on and _sums(p, node, factor)
        if on:
            found.on.add(node)
        if summed:
            found.summed.add(node)
        for n in reads(node):
            whole = not on or not _crosses(p, n, factor)
            if (p.holds_shards(n) or n in found.on - found.summed) and whole:
                gathered.add(n)
        found.bytes += bytes_of(node) * (share if on and not summed else 1)
    for node in found.on - found.summed:
        outside = [user for user in node.users if user not in found.on and user in p.live and user.op != "output"]
        if any(not _hands_over(p, node, user) for user in outside if user not in region):
            gathered.add(node)
    found.bytes += sum(map(bytes_of, gathered))
    return found


def _runs_on(p: PlacementPlan, node: Node, factor: Factor) -> bool:
    """Whether `node` treats each index of `factor` alike, which all its results have once, or none, if it is summed."""
    note, rule = p.sweep.notes[node], rule_for(node)
    if not note.known or has_effect(node) or node in p.sites or draws_shared(node):
        return False
    moved = [f for pair in note.redistributed for f in pair]
    if factor in p.sweep.resolve([*note.need_replication, *moved]) or not rule.may_shard(p, node):
        return False
    held = [_holds_once(p, n, factor) for n in reads(node)]
    if _sums(p, node, factor):
        combines = rule.reduce is not None and not any(value.is_complex() for value in tensors_of(node))
        return combines and any(held) and None not in held
    return bool(_holds_once(p, node, factor)) and None not in held


def _sums(p: PlacementPlan, node: Node, factor: Factor) -> bool:
    """Whether `node` sums over `factor`."""
    return factor in p.sweep.resolve(p.sweep.notes[node].reduction)


def _runs_on_none(p: PlacementPlan, node: Node, factor: Factor) -> bool:
    """Whether `node` also runs on a rank that has no index of `factor`.

    How many elements an index has in a dim could not be told there: it must be one.
    """
    dims = (d for n in (node, *reads(node)) for d in p.sweep.operand_dims(n))
    return rule_for(node).takes_none and all(d[-1] is factor for d in dims if factor in d)


def _holds_once(p: PlacementPlan, node: Node, factor: Factor) -> bool | None:
    """Whether each tensor of `node` has `factor`, in one dim; None: some have it in two, or some have it not."""
    counts = {sum(p.sweep.resolve(d).count(factor) for d in dims) for dims in p.sweep.results(node)}
    return bool(counts.pop()) if len(counts) == 1 and counts <= {0, 1} else None


def _crosses(p: PlacementPlan, node: Node, factor: Factor) -> bool:
    """Whether a value enters the region by an all-to-all: it has `factor`, in another dim than that of its tokens."""
    axis = p.modes[node]
    if not isinstance(node.meta["val"], torch.Tensor):
        return axis is None
    dims = [d for d in p.sweep.dims(node) if factor in d]
    return axis is None or axis in p.batch_axes.values() or (bool(dims) and not any(p.axes(d) for d in dims))


def _hands_over(p: PlacementPlan, node: Node, user: Node) -> bool:
    """Whether `user`, outside the region, reads its local tokens of `node`."""
    axis = p.modes[user]
    return axis is not None and p.on(node, axis)
