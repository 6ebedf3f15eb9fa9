"""divide: propagate, plan and place, which together say what each rank works on.

Of many slices of a sequence, such as the chunks of a loss, each rank works on its own tokens of each: they are
*sections*.  A recurrence over chunks mixes all tokens of a section, and is better divided along its heads, or chunk by
chunk.  So where sections leave something to gather or to move, the three stages run again without them, and what
gathers fewer bytes is taken, of two alike what moves fewer.

Contract: the choice depends on the graph, the options and P alone, so all ranks make the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ringpass.config import RingConfig
from ringpass.passes.capture.capture import Captured
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.failures import Failures
from ringpass.passes.op_rules.table import rule_for
from ringpass.passes.partition.placement import place
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.plan.plan import RingPlan, plan
from ringpass.passes.plan.tracked import tracked
from ringpass.passes.propagate.factors import Sweep, propagate

Run = Callable[..., Any]
"""(stage, its arguments) -> what it returns, checked: `Pipeline.run`."""


@dataclass(frozen=True)
class Division:
    """What the stages found: which dims are the same index, the plan, and where each node runs."""

    sweep: Sweep
    plan: RingPlan
    placement: PlacementPlan


def divide(
    run: Run,
    captured: Captured,
    sites: tuple[AttentionSite, ...],
    world: int,
    config: RingConfig,
    sharded: Mapping[int, int],
    failures: Failures,
) -> Division:
    """The division of the graph over `world` ranks.

    `sharded`: the positions of inputs that come sharded, and the dim in which each is.
    """
    placeholders = captured.gm.graph.find_nodes(op="placeholder")
    given = [placeholders[i] for i in sharded]

    def stages(in_sections: bool) -> Division:
        sweep = run(propagate, captured.gm, rule_for, given, failures, in_sections)
        planned = run(plan, sites, sweep, world, config, tracked(captured))
        return Division(sweep, planned, run(place, captured, planned, sweep, sharded, failures))

    found = stages(True)
    if not found.sweep.sections or not (found.placement.whole_bytes or any(found.placement.moved)):
        return found
    return min(found, stages(False), key=_bytes)


def _bytes(division: Division) -> tuple[int, int]:
    """What every rank gathers, and what moves for the regions that need all tokens."""
    return division.placement.whole_bytes, sum(division.placement.moved)
