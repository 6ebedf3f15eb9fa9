"""Ulysses (arXiv 2309.14509) and what is between it and a ring (USP, arXiv 2405.07719): on which ranks heads attend.

    >>> for share in head_shares(heads=7, kv_heads=7, degree=2): print(share)
    heads 0:3 of 7 on every 2nd rank from 0
    heads 3:7 of 7 on every 2nd rank from 1

The *Ulysses degree* U of an attention divides P.  Of each group of U neighbouring ranks, member u attends for share u
of the heads, with the tokens of the whole group, which it gets by an all-to-all before the attention; its output
returns by another one after it.  The members u of all groups are a ring of P / U ranks.  U = 1 is the ring over all
ranks, U = P Ulysses.

Contract: a share is an attention of its own, over fewer ranks and longer blocks, so masks, schedules and proofs are
those of any attention.  What depends on a head speaks of the model's: head h of a share is head first + h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ringpass.masks.expr import Const, H, call, parse
from ringpass.masks.rewrite import substitute
from ringpass.schedule.tiles import Problem


@dataclass(frozen=True)
class HeadShare:
    """Share `member` of `degree`: the query heads of `heads`, of `total`; `key_heads`: the K/V heads that they read.

    Each K/V head is named once where an equal number of query heads reads it, else once per query head.
    """

    member: int
    degree: int
    heads: range
    total: int
    key_heads: tuple[int, ...]

    def problem(self, problem: Problem) -> Problem:
        """What this share schedules, of an attention whose problem is `problem`."""
        layouts = (x.pooled(self.degree, self.member) for x in (problem.query_layout, problem.key_layout))
        query, key = layouts
        return replace(problem, mask=self.text(problem.mask), query_layout=query, key_layout=key)

    def text(self, text: str) -> str:
        """The expression `text`, over the heads of the share; of nothing, nothing."""
        first = self.heads.start
        return str(substitute(parse(text), H, call("add", H, Const(first)))) if text and first else text

    def __str__(self) -> str:
        heads = f"heads {self.heads.start}:{self.heads.stop} of {self.total}"
        return f"{heads} on every {ordinal(self.degree)} rank from {self.member}"


@lru_cache(maxsize=256)
def head_shares(heads: int, kv_heads: int, degree: int) -> tuple[HeadShare, ...]:
    """The shares of `heads` query heads, as equal as they can be; `kv_heads` divides `heads`."""
    found = []
    for member in range(degree):
        own = range(member * heads // degree, (member + 1) * heads // degree)
        found.append(HeadShare(member, degree, own, heads, read_heads(own, heads // kv_heads)))
    return tuple(found)


def read_heads(heads: range, each: int) -> tuple[int, ...]:
    """The K/V heads that query `heads` read, if `each` neighbouring query heads read one.

    One per query head, or, where an equal number of them reads each, each once.

    >>> read_heads(range(2, 6), 2), read_heads(range(1, 4), 2)
    ((1, 2), (0, 1, 1))
    """
    read = tuple(head // each for head in heads)
    unique = tuple(dict.fromkeys(read))
    alike = len(read) // max(1, len(unique))
    return unique if read == tuple(head for head in unique for _ in range(alike)) else read


def allowed_degrees(world: int, heads: int) -> tuple[int, ...]:
    """The Ulysses degrees of an attention of `heads` query heads over `world` ranks.

    >>> allowed_degrees(world=12, heads=7)
    (1, 2, 3, 4, 6)
    """
    return tuple(degree for degree in range(1, min(world, heads) + 1) if world % degree == 0)


def ordinal(n: int) -> str:
    """1st, 2nd, 11th, 23rd."""
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
