"""prove_moves: proves what a program moves beside attention: redistributions, halos, and states of recurrences.

Contract: raises ScheduleError where tokens that change ranks, or values that are handed over, do not arrive, on any
rank.  Lengths that are symbolic are left to the call, and so is a move of more than PROVED (rank, token) pairs or among
more than RANKS ranks, whose proof for all ranks would take longer than it is worth: `layouts.redistribution` checks
the move of the rank itself whenever it makes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from ringpass import ops
from ringpass.comm.collectives import HaloRanges, Shard
from ringpass.layouts.layout import Layout
from ringpass.layouts.ranges import spread
from ringpass.layouts.redistribution import held_by, redistribution
from ringpass.layouts.redistribution_proof import check_redistribution
from ringpass.masks.constants import Array
from ringpass.nodes import args_of, operands_of
from ringpass.passes.partition.partitioned import Partitioned
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.partition.recurrence import Recurrence
from ringpass.schedule.hand_over_proof import Made, Reading, Sent, check_hand_overs

PROVED, RANKS = 1 << 21, 64


def prove_moves(placement: PlacementPlan, program: Partitioned) -> None:
    """Proves the moves of a program, equal ones once, and the hand-overs of its recurrences."""
    for recurrence in {id(x): x for x in placement.recurrences.values()}.values():
        prove_hand_overs(recurrence)
    seen: set[tuple[Any, ...]] = set()
    for node in program.gm.graph.nodes:
        if node.op == "call_function" and node.target in (ops.redistribute, ops.halo):
            about = _redistributed(node) if node.target is ops.redistribute else _halo(node)
            if about is not None and about not in seen:
                seen.add(about)
                _prove(about)


def prove_hand_overs(recurrence: Recurrence) -> None:
    """Proves the transfers of a recurrence, from what its nodes read."""
    nodes = [*recurrence.owned, *recurrence.writes]
    place = {node: i for i, node in enumerate(nodes[0].graph.nodes)} if nodes else {}
    rank = {node: recurrence.owners[chunk] for node, chunk in recurrence.owned.items()}
    readings = [Reading(n.name, place[at], where) for at in nodes for n, where in _read(recurrence, at, rank)]
    handed = [Sent(one.value.name, one.src, one.dst, place[one.reader]) for one in recurrence.handed]
    check_hand_overs({node.name: Made(rank[node], place[node]) for node in rank}, readings, handed)


def _read(recurrence: Recurrence, node: Node, rank: dict[Node, int]) -> list[tuple[Node, int]]:
    """(owned value, the rank where it is read) of each one that a node reads."""
    if node in rank:
        return [(n, rank[node]) for n in operands_of(node) if n in rank]
    put, each = recurrence.writes[node]
    return [(part, recurrence.owners[start // each]) for part, start, _ in put.parts]


Move = tuple[Any, ...]
"""What tells moves apart: ("layouts", layout, other, world, tokens) or ("halo", layout, world, tokens, each, ..)."""


def _redistributed(node: Node) -> Move | None:
    _, _, _, tokens, layout, other, world, _, _ = args_of(node)
    return ("layouts", layout, other, world, tokens) if isinstance(tokens, int) else None


def _halo(node: Node) -> Move | None:
    x, *where, _, left, right, _ = args_of(node)
    if not all(isinstance(n, int | str) for n in where) or not isinstance(left, int) or not isinstance(right, int):
        return None
    shard, size = Shard(*where), x.meta["val"].shape[where[0]]
    if not isinstance(size, int) or not shard.length:
        return None
    return "halo", shard.layout.name, shard.world, shard.tokens, size // shard.length, left, right


def _prove(about: Move) -> None:
    kind, layout, *rest = about
    if kind == "layouts":
        other, world, tokens = rest
        each = 1
    else:
        world, tokens, each, left, right = rest
    if world > RANKS or world * tokens * each > PROVED:
        return
    ranks = range(world)
    if kind == "layouts":
        held, wanted = ([held_by(Layout(x, world), rank, tokens) for rank in ranks] for x in (layout, other))
    else:
        shard = Shard(0, 1, tokens, layout, world, 0)
        ranges = HaloRanges(shard, each, left, right)
        held, wanted = ([spread(x) for x in side] for side in (ranges.held, ranges.wanted))
    _check(held, wanted)


def _check(held: Sequence[Array], wanted: Sequence[Array]) -> None:
    check_redistribution(held, wanted, [redistribution(held, wanted, rank) for rank in range(len(held))])
