"""Programs of all ranks, executed on tiny integers in one process: what a fault changes, without the proof.

    >>> from tests.support.programs import problem
    >>> from ringpass.schedule.program import program
    >>> execute([program(problem("k <= q", 2, 8), rank) for rank in range(2)]).moved
    8

A message is the numbers of the tokens whose rows are sent.  Of each rank's queries and all keys, an outcome counts how
often each pair was attended to, for several values of the mask's data.  It depends on the positions of tiles and rows
alone, not on what the proof reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ringpass.layouts.ranges import rows, size, spread
from ringpass.masks.evaluate import evaluate
from ringpass.masks.intervals import FULL, PARTIAL
from ringpass.schedule.order import Ends, order
from ringpass.schedule.program import Program, Step
from ringpass.schedule.proof import ends_of
from ringpass.schedule.tiles import CAUSAL_TILE, MIRRORED, Problem, Tile
from tests.support.nccl import completes

SAMPLES = 4  # values of the data


@dataclass(frozen=True)
class Outcome:
    """`counts`: for each rank (data, queries, keys), as bytes; `moved`: tokens that were received; `failure`: how it
    ended otherwise."""

    counts: tuple[bytes, ...] = ()
    moved: int = 0
    failure: str = ""


class Failure(Exception):
    """A rank waits for ever, or reads what it does not have."""


def execute(programs: Sequence[Program]) -> Outcome:
    """What the programs of ranks 0, 1, .. compute, by the layouts of the first one's problem."""
    problem = programs[0].problem
    try:
        delivered = _deliver(problem, programs)
        _refuse_stop([ends_of(one) for one in programs])
        counts = [_attend(problem, rank, one, delivered[rank]) for rank, one in enumerate(programs)]
    except Failure as failure:
        return Outcome(failure=str(failure))
    moved = sum(len(block) for of_rank in delivered for i, block in enumerate(of_rank) if i)
    return Outcome(tuple(count.numpy().tobytes() for count in counts), moved)


def _deliver(problem: Problem, programs: Sequence[Program]) -> list[list[Tensor]]:
    """For each rank the tokens in the key block of each step."""
    owned = [problem.key_layout.ranges(rank, problem.keys) for rank in range(problem.world)]
    sent: dict[tuple[int, int, int], list[Tensor]] = defaultdict(list)
    for rank, one in enumerate(programs):
        for step in one.steps[1:]:
            if step.send:
                sent[rank, step.send.dst, step.shift].append(_packed(step, owned[rank]))
    blocks = []
    for rank, one in enumerate(programs):
        blocks.append([torch.from_numpy(spread(owned[rank]))])
        for step in one.steps[1:]:
            block = torch.zeros(0, dtype=torch.int64)
            if step.receive:
                box = sent[step.receive.src, rank, step.shift]
                if not box or step.receive.src == rank:
                    raise Failure("a message that nobody sends")
                block = box.pop(0)
                if len(block) != step.receive.size:
                    raise Failure("a message of another length")
            blocks[-1].append(block)
    if any(sent.values()):
        raise Failure("a message that nobody receives")
    return blocks


def _packed(step: Step, owned: tuple[tuple[int, int], ...]) -> Tensor:
    assert step.send is not None
    try:
        where = rows(step.send.tokens, owned)
    except AssertionError as error:
        raise Failure("rows that the sender lacks") from error
    return torch.from_numpy(spread(owned))[torch.from_numpy(spread(where))]


def _refuse_stop(ranks: Sequence[Sequence[Ends]]) -> None:
    for backward in (False, True):
        if not completes(ranks, [order([x.shift for x in of_rank], backward) for of_rank in ranks]):
            raise Failure("exchanges that wait for ever")


def _attend(problem: Problem, rank: int, one: Program, blocks: Sequence[Tensor]) -> Tensor:
    allowed = allowed_pairs(problem)
    queries = torch.from_numpy(spread(problem.query_layout.ranges(rank, problem.queries)))
    counts = torch.zeros(len(allowed), len(queries), problem.keys, dtype=torch.int16)
    for step, block in zip(one.steps, blocks, strict=True):
        said = torch.from_numpy(spread(step.tokens)) if step.tokens else torch.zeros(0, dtype=torch.int64)
        for tile in step.tiles:
            if not (0 <= tile.q[0] < tile.q[1] <= len(queries) and 0 <= tile.k[0] < tile.k[1] <= len(block)):
                raise Failure("a tile beyond its block")
            if tile.kind == PARTIAL and tile.k[1] > size(step.tokens):
                raise Failure("a mask of keys that the step does not name")
            counts[:, slice(*tile.q)].index_add_(2, block[slice(*tile.k)], _of_tile(tile, allowed, queries, said))
    return counts


def _of_tile(tile: Tile, allowed: Tensor, queries: Tensor, said: Tensor) -> Tensor:
    """How often the pairs of a tile are attended to: (data, rows, keys)."""
    shape = len(allowed), tile.q[1] - tile.q[0], tile.k[1] - tile.k[0]
    ones = torch.ones(shape, dtype=torch.int16)
    if tile.kind == FULL:
        return ones
    if tile.kind in (CAUSAL_TILE, MIRRORED):
        if shape[1] != shape[2]:
            raise Failure("a triangle that is no square")
        return ones.tril() if tile.kind == CAUSAL_TILE else ones.triu()
    if tile.kind != PARTIAL:
        raise Failure("a kind that no kernel knows")
    return allowed[:, queries[slice(*tile.q)]][:, :, said[slice(*tile.k)]].to(torch.int16)


@lru_cache(maxsize=16)
def allowed_pairs(problem: Problem) -> Tensor:
    """(data, queries, keys): the mask, for values of its data, batch elements and heads 0 and 1."""
    n = 256  # more tokens than any sequence here, of which the problem may have a part
    where = {
        "b": torch.arange(2).view(-1, 1, 1, 1),
        "h": torch.arange(2).view(1, -1, 1, 1),
        "q": torch.arange(problem.queries).view(1, 1, -1, 1),
        "k": torch.arange(problem.keys).view(1, 1, 1, -1),
    }
    found = []
    for i in range(SAMPLES):
        g = torch.Generator().manual_seed(i)
        ids, exists = torch.randint(0, 1 + i, (2, n), generator=g), torch.rand(2, n, generator=g) < i / (SAMPLES - 1)
        ids = torch.arange(n).expand(2, n) if i == SAMPLES - 1 else ids
        mask = evaluate(problem.expr, where, [ids, exists]).to(torch.bool)
        found.append(mask.expand(2, 2, problem.queries, problem.keys).flatten(0, 1))
    return torch.cat(found)
