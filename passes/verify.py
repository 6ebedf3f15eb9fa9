"""verify: the contract of each stage's result, checked before the next stage reads it.

    capture, decompose   functional ATen: calls of known kinds, each with its fake value, none that mutates a tensor
    detect               masks of b, h, q, k alone, which read leaves that the site has
    propagate            one list of factors for each dim of each tensor, whose sizes multiply to the dim's
    plan                 every layout is of P ranks; a site with a schedule has the layouts of its axes
    place                nodes run on axes of the plan, and what needs an axis replicated does not run on it
    partition            a call has its fake value, an input its value; descriptions fit outputs
    lower                no `replicate` is left; each exchange and sum that was started is waited for, once

Contract: a check reads, and costs less than the stage.  It refuses with the name of the stage and the node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ringpass import ops
from ringpass.masks.expr import Expr, Index, Load, parts
from ringpass.nodes import has_effect, mutates, tensors_of
from ringpass.ops import gradient_sums, pooling, primitives
from ringpass.passes.capture.capture import Captured
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.partition.partitioned import Partitioned
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.plan.plan import RingPlan
from ringpass.passes.propagate.factors import Sweep


class VerificationError(AssertionError):
    """A stage broke its contract: a fault of ringpass, not of the model."""


def verify(stage: str, result: Any) -> None:
    """Checks what `stage` returned.  Raises VerificationError."""
    for problem in CHECKS.get(stage, lambda _: ())(result):
        raise VerificationError(f"stage {stage}: {problem}. This is a fault of ringpass: please report it.")


def _captured(captured: Captured) -> Sequence[str]:
    gm = captured.gm
    given = gm.graph.find_nodes(op="placeholder")
    wrong = [f"{len(given)} inputs, {len(captured.inputs)} values"] if len(given) != len(captured.inputs) else []
    for node in gm.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            wrong.append(f"{node.name} is a {node.op}")
        elif node.op == "call_function":
            if not _is_op(node) and not has_effect(node):
                wrong.append(f"{node.name} calls {node.target}")
            if mutates(node) and node.target is not torch.ops.aten.copy_.default:
                wrong.append(f"{node.name} changes a tensor in place")
            if "val" not in node.meta and node.users:
                wrong.append(f"{node.name} has no value")
    return wrong


def _is_op(node: Node) -> bool:
    """Whether a node calls an op, picks one of its results, or computes a size."""
    value = node.meta.get("val")
    ops = isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
    numbers = isinstance(value, bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
    return ops or node.target is operator.getitem or numbers


def _sites(sites: Sequence[AttentionSite]) -> Sequence[str]:
    wrong = []
    for site in sites:
        for name, expr in (("mask", site.mask), ("bias", site.bias), ("sink", site.sink)):
            for part in _walk(expr) if expr is not None else ():
                if isinstance(part, Load) and part.leaf >= len(site.leaves):
                    wrong.append(f"the {name} of {site.node.name} reads leaf {part.leaf} of {len(site.leaves)}")
                if part == Index("score"):
                    wrong.append(f"the {name} of {site.node.name} depends on the score")
    return wrong


def _walk(expr: Expr) -> list[Expr]:
    return [expr, *(inner for part in parts(expr) for inner in _walk(part))]


def _sweep(sweep: Sweep) -> Sequence[str]:
    return [
        f"the factors of {n.name} do not fit its dims" for n, dims in sweep.values.items() if not sweep.fits(n, dims)
    ]


def _plan(plan: RingPlan) -> Sequence[str]:
    wrong = [f"{axis} is not of {plan.world} ranks" for axis in plan.axes if axis.layout.world != plan.world]
    for site in plan.sites:
        for axis, side in ((site.query_axis, "query_layout"), (site.key_axis, "key_layout")):
            moved = side == "query_layout" and site.moves_queries
            if site.problem and axis and not moved and getattr(site.problem, side).of_units != axis.layout:
                wrong.append(f"{site.site.node.name}: its schedule's {side} is not that of {axis}")
    return wrong


def _placement(placement: PlacementPlan) -> Sequence[str]:
    wrong = []
    for node in placement.live:
        axis = placement.modes[node]
        if axis is None or node in placement.sites:
            continue
        if axis not in (*placement.axis_of.values(), *placement.batch_axes.values()):
            wrong.append(f"{node.name} runs on {axis}, which is not planned")
        if any(placement.is_of(f, axis) for f in placement.sweep.resolve(placement.sweep.notes[node].need_replication)):
            wrong.append(f"{node.name} runs on {axis}, which it needs replicated")
    return wrong


def _partitioned(program: Partitioned) -> Sequence[str]:
    graph = program.gm.graph
    given = graph.find_nodes(op="placeholder")
    wrong = [f"{len(given)} inputs, {len(program.inputs)} values"] if len(given) != len(program.inputs) else []
    results: Any = next(iter(graph.find_nodes(op="output"))).args[0]
    if len(results) != len(program.outputs) + program.extras:
        wrong.append(f"{len(results)} results, {len(program.outputs)} outputs and {program.extras} sizes described")
    for value, spec in zip(results, program.outputs, strict=False):
        if spec is not None and not (isinstance(value, Node) and len(tensors_of(value)) == 1):
            wrong.append(f"output {spec.name} is described as sharded and is no tensor")
    wrong += [
        f"{n.name} has no value" for n in graph.nodes if n.op == "call_function" and "val" not in n.meta and n.users
    ]
    return wrong


def _lowered(gm: GraphModule) -> Sequence[str]:
    return [
        problem for module in gm.modules() if isinstance(module, GraphModule) for problem in _exchanges(module.graph)
    ]


def _exchanges(graph: Graph) -> Sequence[str]:
    wrong = [f"{n.name} is left" for n in graph.nodes if n.target is ops.replicate]
    for node in graph.nodes:
        if node.target in pooling.BUFFERED:
            received = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
            waits = [user for x in received for user in x.users if user.target is primitives.wait]
            if len(waits) != 1:
                wrong.append(f"{node.name} is waited for {len(waits)} times")
        if node.target is gradient_sums.start_sum:
            waits = [user for user in node.users if user.target is gradient_sums.wait_sum]
            if [*node.users] != waits or len(waits) != 1:
                wrong.append(f"{node.name} is waited for {len(waits)} times, and read {len(node.users)} times")
    return wrong


CHECKS: dict[str, Callable[[Any], Sequence[str]]] = {
    "capture": _captured,
    "decompose": _captured,
    "detect": _sites,
    "propagate": _sweep,
    "plan": _plan,
    "place": _placement,
    "partition": _partitioned,
    "lower": _lowered,
}
