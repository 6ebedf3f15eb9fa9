"""facts: what was made of one graph -> its part of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import GraphModule

from ringpass.config import RingConfig
from ringpass.explain.data import (
    LISTED_RANKS,
    AxisReport,
    BoundaryReport,
    GatherReport,
    GraphReport,
    LayoutReport,
    MemoryReport,
    ProofReport,
)
from ringpass.explain.memory import KINDS, Memory, memory_of
from ringpass.explain.remedies import remedy_for
from ringpass.explain.schedules import schedule_reports
from ringpass.explain.sites import folded, received_by_phase, site_report
from ringpass.explain.sources import parsed, short, source_of
from ringpass.explain.stages import GraphRun
from ringpass.explain.traffic import ATTENTION, Move, moves
from ringpass.explain.verdict import GIVEN
from ringpass.layouts.layout import Layout
from ringpass.nodes import hint_of
from ringpass.passes.partition.partitioned import Partitioned
from ringpass.passes.plan.plan import RingPlan
from ringpass.passes.propagate.axis import Axis
from ringpass.rank_program import RankProgram
from ringpass.schedule.machine import UNDESCRIBED
from ringpass.schedule.tiles import tiling

RUNS = 1 << 14  # which tokens each rank holds is left out above as many runs in all, so in striped order
CURVE = 1 << 16  # so are curves of more tokens
UNKNOWN = MemoryReport(dict.fromkeys(KINDS, 0), 0, 0, 0, [])
"""Of a graph that is not lowered yet, or that torch compiles as it would without ringpass."""
ORDERS = ["gloo", "NCCL"]


def graph_report(index: int, run: GraphRun, inputs: Sequence[str]) -> GraphReport:
    """The report of graph number `index`; `inputs`: what each of its inputs is (`memory_of`)."""
    received = {phase: list(moves(gm.graph, run.rank.rank)) for phase, gm in run.lowered.items()}
    memory = memory_report(memory_of_run(run, inputs)) if "forward" in run.lowered else UNKNOWN
    made = run.made
    if made is None:
        return GraphReport(
            index, run.whole, [], [], [], [], [], memory, None, None, [short(text) for text in run.told], [], None
        )
    plan, world = made.plan, run.rank.world
    of_sites = received_by_phase(plan.sites, received)
    groups = folded(plan.sites, of_sites)
    machine = plan.weighed.machine
    return GraphReport(
        index=index,
        whole="",
        axes=[_axis(axis, plan, run.config) for axis in plan.axes],
        layouts=_layouts(plan),
        sites=[site_report(group, world, of_sites) for group in groups],
        gathers=_gathers(made.program) if world > 1 else [],
        boundaries=[*_boundaries(received), *_outputs(made, run.rank.rank)],
        memory=memory,
        proof=_proof(made),
        schedules=schedule_reports([group[0] for group in groups], world),
        warnings=[short(text) for text in run.told],
        remarks=list(plan.remarks),
        machine=None if machine is UNDESCRIBED else str(machine),
    )


# --- axes, layouts ----------------------------------------------------------------------------------------------------


def _axis(axis: Axis, plan: RingPlan, config: RingConfig) -> AxisReport:
    tokens, layout = axis.hint, axis.layout
    ranks = range(layout.world if layout.world <= LISTED_RANKS else 0)
    held = [[[*run] for run in layout.ranges(rank, tokens)] for rank in ranks]
    listed = held if sum(map(len, held)) <= RUNS else []
    curve = None
    if layout.order is not None and layout.order.tokens <= CURVE:
        order = layout.order
        curve = {"grid": [*order.sizes], "prefix": order.prefix, "order": order.permutation.values.tolist()}
    return AxisReport(axis.index, tokens, layout.name, _why_layout(plan, config), listed or None, curve)


def _why_layout(plan: RingPlan, config: RingConfig) -> str:
    if config.layout != "auto":
        return f"{GIVEN} is {config.layout!r}"
    if not plan.weighed.layouts:
        return "nothing was weighed: no attention runs over the ranks"
    return f"of {len(plan.weighed.layouts)} layouts the first whose estimated time is within 2 % of the least"


def _layouts(plan: RingPlan) -> list[LayoutReport]:
    return [
        LayoutReport(found.layout, i == 0, found.time if found.described else None, str(found))
        for i, found in enumerate(plan.weighed.layouts)
    ]


# --- gathers, boundaries ----------------------------------------------------------------------------------------------


def _gathers(program: Partitioned) -> list[GatherReport]:
    """What is gathered inside the graph; outputs, which are gathered when they are used, are boundaries."""
    flops = {work.op: work.flops for work in program.whole_work}
    out = []
    for gather in program.gathers:
        where = parsed(gather.where)
        why = "it is returned" if gather.reason == "output" else gather.reason
        remedy = remedy_for(gather.op, gather.reason)
        name = gather.op or gather.value
        out.append(GatherReport(name, gather.bytes, flops.pop(gather.op, 0), where.source, where.line, why, remedy))
    named = {gather.op for gather in program.gathers}
    out += [
        GatherReport(work.op, 0, work.flops, None, None, "reads what was gathered", remedy_for(work.op, ""))
        for work in program.whole_work
        if work.op not in named
    ]
    return out


def _boundaries(received: Mapping[str, Sequence[Move]]) -> list[BoundaryReport]:
    out = []
    for phase, of_phase in received.items():
        for move in of_phase:
            if move.kind != ATTENTION:
                source = source_of(move.node).source
                out.append(BoundaryReport(move.kind, move.node.name, move.bytes, source, phase))
    return out


def _outputs(made: RankProgram, rank: int) -> list[BoundaryReport]:
    """Outputs that are gathered when something reads them in full."""
    results = next(iter(made.program.gm.graph.find_nodes(op="output"))).args[0]
    out = []
    for value, spec in zip(results, made.program.outputs, strict=False):
        if spec is None or not isinstance(spec.tokens, int) or spec.part is not None:
            continue
        local, layout = value.meta["val"], Layout(spec.layout, made.plan.world)
        lengths = [layout.length(other, spec.tokens) for other in range(layout.world)]
        each = hint_of(local.numel()) * local.element_size() // max(1, lengths[rank])
        inner = (layout.world - 1) * max(lengths) * each
        out.append(BoundaryReport("gathered output", spec.name, inner, None, "forward", on_use=True))
    return out


# --- memory, proof ----------------------------------------------------------------------------------------------------


def memory_of_run(run: GraphRun, inputs: Sequence[str]) -> Memory:
    """The memory of one graph's step."""
    results = len(run.made.program.outputs) + run.made.program.extras if run.made else _results(run)
    return memory_of(run.lowered["forward"], run.lowered.get("backward"), results, inputs)


def _results(run: GraphRun) -> int:
    outputs: GraphModule = run.read.captured.gm
    return len(next(iter(outputs.graph.find_nodes(op="output"))).args[0])


def memory_report(found: Memory) -> MemoryReport:
    """As data."""
    program = [{"phase": m.phase, "node": m.node, "live": m.live} for m in found.program]
    return MemoryReport(dict(found.kinds), found.peak, found.activations, found.held, program)


def _proof(made: RankProgram) -> ProofReport:
    problems = dict.fromkeys(p for site in made.plan.sites for share in site.shares for p in site.problems(share))
    tiles = sum(len(tiling(p)) for p in problems)
    ranks = made.plan.world
    text = (
        f"{len(problems)} different schedule{'s' * (len(problems) != 1)} of {ranks} ranks: every pair that a mask may "
        "allow is in one tile, every send has its receive, no deadlock in the order of gloo or of NCCL"
        if problems
        else "no attention runs over the ranks: nothing to prove"
    )
    return ProofReport(text, tiles, len(problems), ORDERS)
