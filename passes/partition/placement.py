"""placement: for each node of the captured graph, where it runs: on a sequence axis (local tokens) or replicated.

    shard late: a node runs on axis A when an operand is sharded on A already, or when it produces floating-point values
    with a dim on A.  Labels, position ids, padding masks and scans over them stay replicated until they meet
    activations.
    slices: slices, cats, pads and convolutions that make slices of a sequence run on the axis of what they make
    replicated: when the op needs A replicated (softmax over the sequence, no rule), when a tensor of it has A twice, or
    two axes
    whole: what follows from whole inputs alone, if it is read whole
    regions of these run on another dim that all their ops treat alike, if there is one (`batch_axes`), or chunk by
    chunk where the tokens are (`recurrences`)

Contract: an analysis; it writes nothing, and depends on the graph and the plan alone, not on the rank.  What it asks
about an op is in the op's record (`passes.op_rules`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from ringpass.nodes import first_of, has_effect, operands_of, tensors_of
from ringpass.passes.capture.capture import Captured
from ringpass.passes.failures import Failures
from ringpass.passes.op_rules.routing import closed
from ringpass.passes.op_rules.table import draws_shared, reads, rule_for
from ringpass.passes.partition.batch_axes import divide_regions
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.plan.plan import RingPlan, SitePlan
from ringpass.passes.plan.tracked import differentiable, tracked
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor, Note, Sweep


def place(
    captured: Captured,
    plan: RingPlan,
    sweep: Sweep,
    sharded: Mapping[int, int],
    failures: Failures | None = None,
) -> PlacementPlan:
    """Decides each live node's mode, in graph order.

    `sharded`: the positions of inputs that come sharded, and the dim in which each is.  A node in `failures`, and one
    on which the decision fails, runs replicated.
    """
    failures = failures or Failures()
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    given = {placeholders[i]: dim for i, dim in sharded.items()}
    sites = {s.site.node: s for s in plan.sites if s.problem and s.site.node not in failures.nodes}
    axis_of = {sweep.root(axis.factor): axis for axis in plan.axes}
    live = _live(captured, sites)
    axis_of |= _rows(sweep, axis_of, [n for n in captured.gm.graph.nodes if n in live])
    modes: dict[Node, Axis | None] = {}
    placement = PlacementPlan(sweep, axis_of, sites, live, tracked(captured), modes, _kept(captured, sites))
    for node in captured.gm.graph.nodes:
        modes[node] = None
        if node in live and node not in failures.nodes:
            with failures.of("place", node):
                modes[node] = _decide(placement, node)
        if node in given and node in live:
            modes[node] = _given(placement, node, given[node])
    _keep_whole(placement, list(captured.gm.graph.nodes))
    if axis_of:
        divide_regions(placement, captured.gm.graph.nodes, plan.world, _decide)
    return placement


def _keep_whole(p: PlacementPlan, nodes: list[Node]) -> None:
    """Leaves whole what follows from whole inputs alone and is read whole, such as a cache that a step writes into.

    Products, norms and what follows from them are not computed on every rank for that.
    """
    free: set[Node] = set()
    for node in nodes:
        divided = p.modes[node] is not None and node.op == "call_function" and node not in p.sweep.computed
        if divided and all(p.modes[n] is None or n in free for n in operands_of(node)):
            free.add(node)
    for node in reversed(nodes):
        if node in free and any(_reads_whole(p, user) for user in node.users if user in p.live):
            p.modes[node] = None
            p.slices.discard(node)


def _reads_whole(p: PlacementPlan, user: Node) -> bool:
    """Whether `user` reads all tokens of its operands, or returns them."""
    return user.op == "output" or (bool(tensors_of(user)) and p.modes[user] is None)


def _given(p: PlacementPlan, node: Node, dim: int) -> Axis | None:
    """The axis of an input that comes sharded along `dim`; None where it must be replicated."""
    factors, value = p.sweep.dims(node), node.meta["val"]
    axes = {i: found for i, d in enumerate(factors) if (found := p.axes(d))}
    simple = list(axes) == [dim] and len(axes[dim]) == len(factors[dim]) == 1
    written = any(has_effect(user) for user in node.users)
    return axes[dim][0] if simple and differentiable(value) and not written else None


def _rows(sweep: Sweep, axis_of: dict[Factor, Axis], live: list[Node]) -> dict[Factor, Axis]:
    """The axes of rows that are an order of pairs on an axis."""
    found: dict[Factor, Axis] = {}
    for rows, pairs in sweep.routing.pairs.items():
        axes = [axis_of[f] for f in sweep.resolve(pairs) if f in axis_of]
        if len(axes) == 1 and closed(sweep, rows, live):
            found[rows] = axes[0]
    return found


def _live(captured: Captured, sites: dict[Node, SitePlan]) -> frozenset[Node]:
    """What outputs and effects need, now that the masks of the partitioned sites are functions."""
    stack = [n for n in captured.gm.graph.nodes if n.op == "output" or has_effect(n)]
    live: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in live:
            continue
        live.add(node)
        site = sites[node].site if node in sites else None
        stack += (site.q, site.k, site.v, *site.leaves) if site else node.all_input_nodes
    return frozenset(live)


def _kept(captured: Captured, sites: dict[Node, SitePlan]) -> frozenset[Node]:
    """What masks and biases are made of without any floating-point input, such as slopes times positions."""
    integral: set[Node] = set()
    for node in captured.gm.graph.nodes:
        given = node.op == "placeholder" and any(differentiable(t) for t in tensors_of(node))
        if not given and all(n in integral for n in node.all_input_nodes):
            integral.add(node)
    kept: set[Node] = set()
    stack = [leaf for s in sites.values() for leaf in s.site.leaves if leaf in integral]
    while stack:
        node = stack.pop()
        if node not in kept:
            kept.add(node)
            stack += node.all_input_nodes
    return frozenset(kept)


def _decide(p: PlacementPlan, node: Node) -> Axis | None:
    """The mode of a node whose operands have theirs."""
    if node in p.sites:
        return p.sites[node].query_axis
    if node.op != "call_function" or not tensors_of(node):
        return None
    rule = rule_for(node)
    if rule.follows or node in p.sweep.routing.counts:  # counts are known on the rank alone, which alone reads them
        return p.modes[first_of(node)]
    if draws_shared(node):
        return None
    if (axis := _slice_axis(p, node)) is not None:
        p.slices.add(node)
        return axis
    operands = reads(node)
    axis = _common_axis(p, node, operands)
    return axis if axis is not None and _may_run(p, node, axis, operands) and _starts(p, node, axis, operands) else None


def _common_axis(p: PlacementPlan, node: Node, operands: list[Node]) -> Axis | None:
    """The one axis that `node` and its operands are on, once tokens are redistributed; None: no axis, or several."""
    wanted = p.redistributed(node)
    if None in (*wanted, *wanted.values()):
        return None
    axes = {wanted.get(a, a) for t in (node, *operands) for d in p.sweep.operand_dims(t) for a in p.axes(d)}
    return axes.pop() if len(axes) == 1 else None


def _may_run(p: PlacementPlan, node: Node, axis: Axis, operands: list[Node]) -> bool:
    """Whether the op on local tokens of `axis` gives local tokens of the op, or parts of its sum."""
    note, rule = p.sweep.notes[node], rule_for(node)
    if not note.known or has_effect(node) or not rule.may_shard(p, node):
        return False
    if p.reads_neighbours(node, axis) and not p.in_order(node, axis):
        return False
    return axis not in p.axes(note.need_replication) and _splits(p, node, note, axis, [node, *operands])


def _starts(p: PlacementPlan, node: Node, axis: Axis, operands: list[Node]) -> bool:
    """Whether there is a reason to run on `axis`: an operand runs there, or floating-point values are made there."""
    sources = {n: p.source(node, n, axis) for n in operands}
    if not any(sources.values()) and not rule_for(node).expands:
        return False  # the op makes the dim (slice, cat, pad): at full length
    running = any(source is not None and p.modes[n] is source for n, source in sources.items())
    return running or (node not in p.kept and any(differentiable(t) for t in tensors_of(node)))


def _slice_axis(p: PlacementPlan, node: Node) -> Axis | None:
    """The axis on which `node` slices or joins sequences; None where it does not."""
    dim, decide = p.sweep.slices.get(node), rule_for(node).slice_axis
    axis = p.axis_along(node, dim) if dim is not None else None
    if dim is None or decide is None or axis is None or p.sequence_along(node, dim) is None:
        return None
    if len(p.sweep.dims(node)[dim]) > 1:  # a unit of the axis is several tokens
        return None
    if len(p.axes(sum(p.sweep.dims(node), ()))) > 1 or p.axes(p.sweep.notes[node].need_replication):
        return None
    small = node in p.kept or not differentiable(node.meta["val"])
    return None if small else decide(p, node, axis, dim)


def _splits(p: PlacementPlan, node: Node, note: Note, axis: Axis, tensors: list[Node]) -> bool:
    """Whether the op on shards of `axis` gives shards of the op, or parts of its sum."""
    singles = [t for t in tensors if isinstance(t.meta["val"], torch.Tensor)]
    if any(sum(len(p.axes(d)) for d in p.sweep.dims(t)) > 1 for t in singles):
        return False
    if axis.layout.section and any(axis in p.axes(d[:-1]) for t in singles for d in p.sweep.dims(t)):
        return False  # where a rank has no tokens, the size of the dim does not tell that of a token
    if axis not in p.axes(note.reduction):
        return p.on(tensors[0], axis)  # else a view took a fused axis apart
    return rule_for(node).reduce is not None and not any(value.is_complex() for value in tensors_of(node))
