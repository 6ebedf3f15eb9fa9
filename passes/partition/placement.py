"""placement: for each node of the captured graph, where it runs: on a sequence axis (local tokens) or whole.

    shard late: a node runs on axis A when an operand is local on A already, or when it produces floating-point values
    with a dim on A.  Labels, position ids, padding masks and scans over them stay whole until they meet activations.
    runs: slices, cats, pads and convolutions that give runs of tokens run on the axis of what they make
    whole: when the op needs A whole (softmax over the sequence, no rule), when a tensor of it has A twice, or two axes

Contract: an analysis; it writes nothing, and depends on the graph and the plan alone, not on the rank.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import sympy
import torch
from torch.fx import Node

from ringpass.nodes import args_of, first_of, is_empty, op_name, operands_of, size_of, tensors_of
from ringpass.passes.capture.capture import Captured
from ringpass.passes.op_rules.routing import SORT, closed
from ringpass.passes.op_rules.table import CONSTANT, CREATION, LOSSES, PATTERNED, SUMS
from ringpass.passes.plan.axes import Axis
from ringpass.passes.plan.plan import RingPlan, SitePlan
from ringpass.passes.propagate.factors import CONV1D, Note, Sweep

aten = torch.ops.aten
SDPA = "scaled_dot_product_attention.default"
ATTENTION = (SDPA, "flex_attention")
COUNTER_BASED = ("dropout.default", SDPA)
CONTRACTIONS = ("matmul.default", "bmm.default", "mm.default", "einsum.default")
"""Ops whose partial results on shards of a summed factor add up to the result."""


@dataclass(frozen=True)
class Placement:
    """The analysis of one graph.  `live`: needed by an output; `tracked`: may need a gradient."""

    sweep: Sweep
    axis_of: dict[Any, Axis]
    sites: dict[Node, SitePlan]
    live: frozenset[Node]
    tracked: frozenset[Node]
    modes: dict[Node, Axis | None]
    kept: frozenset[Node] = frozenset()  # whole, as masks read them, and small: they derive from integers alone
    runs: set[Node] = field(default_factory=set)

    def on(self, node: Node, axis: Axis) -> bool:
        """Whether a dim of `node` lies on `axis`, or it counts rows of it."""
        if node in self.sweep.routing.counts:
            return self.modes[node] is axis
        return any(axis in self.axes(d) for d in self.sweep.operand_dims(node))

    def source(self, node: Node, operand: Node, axis: Axis) -> Axis | None:
        """The axis on which `operand` has the tokens that `node` reads on `axis`: another one, if they are moved."""
        if self.on(operand, axis):
            return axis
        moved = self.moved(node)
        own = (a for d in self.sweep.operand_dims(operand) for a in self.axes(d))
        return next((a for a in own if moved.get(a) is axis), None)

    def moved(self, node: Node) -> dict[Axis, Axis | None]:
        """The axis to which `node` moves the tokens of each axis that it moves; None where that is not partitioned."""
        pairs = [(self.axes([y]), self.axes([x])) for y, x in self.sweep.notes[node].moved]
        found = {y: x for ys, xs in pairs for y, x in zip_longest(ys, xs) if y or x}
        for y, x in reversed(found.items()):  # what is moved to where it is moved on from
            found[y] = found.get(x, x)
        return found

    def sums(self, node: Node) -> bool:
        """Whether `node` runs on an axis and sums over it: its value, once reduced, is whole."""
        axis = self.modes[node]
        return axis is not None and node not in self.sites and axis in self.axes(self.sweep.notes[node].summed)

    def broadcast_operands(self, node: Node) -> list[Node]:
        """Operands that `node`, running on an axis, reads whole."""
        axis, site = self.modes[node], self.sites.get(node)
        if axis is None:
            return []
        if node in self.runs:
            return operands_of(node)[1:] if op_name(node) == CONV1D else []
        if site:
            keys = [] if site.key_axis else [site.site.k, site.site.v]
            return [*keys, *(site.site.leaves[i] for i in self.learned(site))]
        return [n for n in operands_of(node) if self.source(node, n, axis) is None]

    def learned(self, site: SitePlan) -> list[int]:
        """Numbers of the site's leaves that need a gradient."""
        return [i for i, leaf in enumerate(site.site.leaves) if leaf in self.tracked]

    def axis_along(self, node: Node, dim: int) -> Axis | None:
        """The axis of one dim of `node`."""
        axes = self.axes(self.sweep.dims(node)[dim])
        return axes[0] if len(axes) == 1 else None

    def reads_around(self, node: Node, axis: Axis) -> bool:
        """Whether `node`, on an axis, reads the tokens around each token of it."""
        return node in self.sweep.halos and self.axis_along(node, self.sweep.halos[node]) is axis

    def holder(self, axis: Axis, offset: Any, part: Node, dim: int) -> int | None:
        """The rank that holds all tokens of `part`, which stand at `offset` of `axis`; None: several."""
        size = size_of(part.meta["val"].shape[dim])
        if not size.is_Integer:
            return None
        late = sympy.expand(offset - size_of(axis.tokens))
        start = int(offset) if offset.is_Integer else axis.hint + int(late) if late.is_Integer else -1
        return axis.layout.holder(axis.hint, start, start + int(size)) if start >= 0 else None

    def axes(self, factors: Any) -> list[Axis]:
        return [self.axis_of[f] for f in self.sweep.resolve(factors) if f in self.axis_of]


def place(captured: Captured, plan: RingPlan, sweep: Sweep, given: Mapping[Node, int]) -> Placement:
    """Decides each live node's mode, in graph order.  `given`: of these inputs each rank has its tokens in that dim."""
    sites = {s.site.node: s for s in plan.sites if s.problem}
    axis_of = {sweep.root(axis.factor): axis for axis in plan.axes}
    live = _live(captured, sites)
    axis_of |= _rows(sweep, axis_of, [n for n in captured.gm.graph.nodes if n in live])
    modes: dict[Node, Axis | None] = {}
    placement = Placement(sweep, axis_of, sites, live, _tracked(captured), modes, _kept(captured, sites))
    for node in captured.gm.graph.nodes:
        modes[node] = _decide(placement, node) if node in live else None
        if node in given and node in live:
            modes[node] = _given(placement, node, given[node])
    return placement


def _given(p: Placement, node: Node, dim: int) -> Axis | None:
    """The axis of an input that comes in shares along `dim`; None where it must be whole."""
    factors, value = p.sweep.dims(node), node.meta["val"]
    axes = {i: found for i, d in enumerate(factors) if (found := p.axes(d))}
    simple = list(axes) == [dim] and len(axes[dim]) == len(factors[dim]) == 1
    written = any(has_effect(user) for user in node.users)
    return axes[dim][0] if simple and differentiable(value) and not written else None


def _rows(sweep: Sweep, axis_of: dict[Any, Axis], live: list[Node]) -> dict[Any, Axis]:
    """The axes of rows that are an order of pairs on an axis."""
    found: dict[Any, Axis] = {}
    for rows, pairs in sweep.routing.pairs.items():
        axes = [axis_of[f] for f in sweep.resolve(pairs) if f in axis_of]
        if len(axes) == 1 and closed(sweep, rows, live):
            found[rows] = axes[0]
    return found


def has_effect(node: Node) -> bool:
    """Nodes that stay though nothing reads them: mutations of inputs, switches of the grad and autocast modes."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    name = getattr(node.target, "__name__", "")
    return bool(schema and schema.is_mutable) or name in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


def differentiable(t: torch.Tensor) -> bool:
    """Whether a tensor of this dtype can carry a gradient."""
    return t.is_floating_point() or t.is_complex()


def draws_elsewhere(node: Node) -> bool:
    """Whether `node` draws from the default generator: any random op that is not made counter-based."""
    tags = getattr(node.target, "tags", ()) if node.op == "call_function" else ()
    return torch.Tag.nondeterministic_seeded in tags and op_name(node) not in COUNTER_BASED


def is_dropout(node: Node) -> bool:
    """Whether `node` is a dropout that drops something."""
    if node.op != "call_function" or op_name(node) != "dropout.default":
        return False
    _, rate, train = args_of(node)
    return bool(train and rate != 0)


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
    stack, kept = [leaf for s in sites.values() for leaf in s.site.leaves if leaf in integral], set[Node]()
    while stack:
        node = stack.pop()
        if node not in kept:
            kept.add(node)
            stack += node.all_input_nodes
    return frozenset(kept)


def _tracked(captured: Captured) -> frozenset[Node]:
    tracked: set[Node] = set()
    fakes = iter(captured.inputs)
    for node in captured.gm.graph.nodes if torch.is_grad_enabled() else ():
        if node.op == "placeholder":
            needs = getattr(next(fakes), "requires_grad", False)
        elif node.op == "get_attr":
            needs = getattr(getattr(captured.gm, str(node.target), None), "requires_grad", False)
        else:
            inherits = node.target is not aten.detach.default and any(n in tracked for n in node.all_input_nodes)
            needs = inherits and any(differentiable(t) for t in tensors_of(node))
        if needs:
            tracked.add(node)
    return frozenset(tracked)


def _decide(p: Placement, node: Node) -> Axis | None:
    if node in p.sites:
        return p.sites[node].query_axis
    if node.op != "call_function" or not tensors_of(node):
        return None
    if node.target is operator.getitem:
        return p.modes[args_of(node)[0]]
    if node in p.sweep.routing.counts:  # known on the rank alone, which is all that reads them
        return p.modes[first_of(node)]
    name = op_name(node)
    if name in ATTENTION or draws_elsewhere(node):  # an attention left alone by the plan, a draw that all ranks share
        return None
    read = [] if name in CREATION else operands_of(node)[: 1 if name in PATTERNED else None]
    if (made := _run(p, node)) is not None:
        p.runs.add(node)
        return made
    note, tensors = p.sweep.notes[node], [node, *read]
    moved = p.moved(node)
    axes = {moved.get(a, a) for t in tensors for d in p.sweep.operand_dims(t) for a in p.axes(d)}
    if len(axes) != 1 or not note.known or has_effect(node) or _sorts(p, node) or None in (*moved, *moved.values()):
        return None
    (axis,) = axes
    assert axis is not None
    if p.reads_around(node, axis) and not _in_order(p, node, axis):
        return None
    if axis in p.axes(note.whole) or not _splits(p, node, note, axis, tensors):
        return None
    sources = {n: p.source(node, n, axis) for n in tensors[1:]}
    if not any(sources.values()) and name not in (*CONSTANT, "expand.default"):
        return None  # the op makes the dim (slice, cat, pad): at full length
    running = any(own is not None and p.modes[n] is own for n, own in sources.items())
    starts = node not in p.kept and any(differentiable(t) for t in tensors_of(node))
    return axis if running or starts else None


def _run(p: Placement, node: Node) -> Axis | None:
    """The axis on which `node` takes a run of tokens, or puts runs together; None where it does not."""
    dim = p.sweep.runs.get(node)
    axis = p.axis_along(node, dim) if dim is not None else None
    if dim is None or axis is None or axis.line is None or len(p.axes(sum(p.sweep.dims(node), ()))) > 1:
        return None
    if node in p.kept or not differentiable(node.meta["val"]) or p.axes(p.sweep.notes[node].whole):
        return None
    parts = parts_of(node, dim)
    own = [p.axis_along(part, dim) for part, _ in parts]
    if any(a is not None and a.line is not axis.line for a in own) or not any(own):
        return None
    if op_name(node) == CONV1D and not _in_order(p, node, axis):
        return None
    if op_name(node) in ("slice.Tensor", CONV1D):
        return axis if p.modes[first_of(node)] is own[0] else None
    few = [p.holder(axis, offset, part, dim) for (part, offset), a in zip(parts, own, strict=True) if a is None]
    return None if None in few else axis


def parts_of(node: Node, dim: int) -> list[tuple[Node, Any]]:
    """The operands of a slice, cat or pad along `dim`, and where their tokens begin in what a cat makes."""
    given = args_of(node)[0]
    parts = [n for n in given if not is_empty(n)] if isinstance(given, list | tuple) else [given]
    sizes = [size_of(n.meta["val"].shape[dim]) for n in parts]
    return [(n, sum(sizes[:i], sympy.Integer(0))) for i, n in enumerate(parts)]


def _in_order(p: Placement, node: Node, axis: Axis) -> bool:
    """Whether the tokens around each one are those of the sequence."""
    dim = {**p.sweep.runs, **p.sweep.halos}[node]
    return bool(p.axes(p.sweep.dims(node)[dim][:1])) and not axis.layout.order


def _sorts(p: Placement, node: Node) -> bool:
    """Whether `node` puts pairs into an order that is not local."""
    rows = [f for d in p.sweep.operand_dims(node) for f in d if f in p.sweep.routing.pairs]
    return node.target is SORT and any(f not in p.axis_of for f in rows)


def _splits(p: Placement, node: Node, note: Note, axis: Axis, tensors: list[Node]) -> bool:
    """Whether the op on shards of `axis` gives shards of the op, or parts of its sum."""
    singles = [t for t in tensors if isinstance(t.meta["val"], torch.Tensor)]
    if any(sum(len(p.axes(d)) for d in p.sweep.dims(t)) > 1 for t in singles):
        return False
    if axis not in p.axes(note.summed):
        return p.on(tensors[0], axis)  # else a view took a fused axis apart
    summing = (*CONTRACTIONS, "cross_entropy_loss.default", *SUMS, *LOSSES)
    return op_name(node) in summing and node.meta["val"].is_floating_point()
