"""Proves all that one attention sends and computes, on all ranks: shares of heads, head groups, their schedules.

    >>> from ringpass.layouts.layout import Layout
    >>> contiguous = Layout("contiguous", 4)
    >>> for proof in prove_site(Problem("k <= q", 64, 64, contiguous, contiguous), heads=(4, 2), degree=2): print(proof)
    4 ranks: 1 exchanges, 32 of 32 tokens moved, area 1552 at most, 520 on average
    4 ranks: 1 exchanges, 32 of 32 tokens moved, area 1552 at most, 520 on average

Contract: each function raises ScheduleError for the first thing that is wrong, with the rank and what it is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ringpass.errors import ScheduleError
from ringpass.layouts.pooling import heads_text
from ringpass.schedule.dilation import Dilation, GroupProblem, group_problems
from ringpass.schedule.head_shares import HeadShare, head_shares
from ringpass.schedule.messages_proof import prove_messages
from ringpass.schedule.pooling_proof import prove_pooling
from ringpass.schedule.proof import Proof, prove, prove_from
from ringpass.schedule.tiles import Problem, tiling

PROVED = 16_384  # tiles of a schedule whose programs on all ranks are written down and proved one by one


def prove_site(
    problem: Problem, heads: tuple[int, int], degree: int = 1, dilation: Dilation | None = None, rank: int = 0
) -> tuple[Proof, ...]:
    """The proofs of an attention's distinct schedules.

    `heads`: the numbers of query heads and of K/V heads; `degree`: the Ulysses degree.
    """
    shares = head_shares(*heads, degree)
    prove_shares(shares, heads, problem)
    proofs: dict[Problem, Proof] = {}
    for share in shares:
        groups = group_problems(share.problem(problem), dilation, heads[0], share.heads) if dilation else ()
        own = [group.problem for group in groups] if dilation else [share.problem(problem)]
        proofs |= prove_problems(own, rank)
        prove_groups(groups, len(share.heads), len(share.key_heads))
    return tuple(proofs.values())


def prove_problems(problems: Iterable[Problem], rank: int) -> dict[Problem, Proof]:
    """The proof of each problem.

    A schedule of more than PROVED tiles is proved as arrays, and the program of `rank` alone is compared with them.
    """
    distinct = dict.fromkeys(problems)
    return {p: prove(p) if len(tiling(p)) <= PROVED else prove_from(p, rank) for p in distinct}


def prove_groups(groups: tuple[GroupProblem, ...], heads: int, kv_heads: int) -> None:
    """Proves the exchanges that the head groups of a dilated attention share, if they have at most PROVED tiles."""
    if groups and sum(len(tiling(group.problem)) for group in groups) <= PROVED:
        prove_messages(groups, heads, kv_heads)


def prove_shares(shares: Sequence[HeadShare], heads: tuple[int, int], problem: Problem) -> None:
    """Each query head is in one share, with the K/V heads that it reads; the all-to-alls bring what shares need."""
    if len(shares) == 1:
        return
    check_shares(shares, heads)
    for side, tokens, layout in (
        ([share.heads for share in shares], problem.queries, problem.query_layout),
        ([share.key_heads for share in shares], problem.keys, problem.key_layout),
    ):
        prove_pooling(heads_text(side), tokens, layout.name, layout.world)


def check_shares(shares: Sequence[HeadShare], heads: tuple[int, int]) -> None:
    """Proves that shares divide the query heads, and read the K/V heads that belong to them."""
    total, kv_heads = heads
    if [share.member for share in shares] != list(range(len(shares))):
        raise ScheduleError(f"the shares are of members {[share.member for share in shares]}, not of each one in order")
    reached = 0
    for share in shares:
        if share.heads.start != reached or share.heads.step != 1 or not share.heads:
            raise ScheduleError(f"rank {share.member}: {share} do not follow head {reached - 1}, the last one before")
        reached = share.heads.stop
        n, m = len(share.heads), len(share.key_heads)
        read = [share.key_heads[i * m // n] for i in range(n)] if m and n % m == 0 else []
        wanted = [head // (total // kv_heads) for head in share.heads]
        if read != wanted:
            raise ScheduleError(f"rank {share.member}: {share} read K/V heads {share.key_heads}, not {wanted}")
    if reached != total:
        raise ScheduleError(f"rank {len(shares) - 1}: the shares end with head {reached - 1} of {total}")
