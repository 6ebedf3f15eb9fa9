"""Dilated attention (LongNet, arXiv 2307.02486, eqs. 3-10): which tokens of which heads attend together.

    >>> for head_group in Dilation((4, 8), (1, 2)).head_groups(heads=2, tokens=8): print(head_group)
    heads 0 1: every token of each 4
    heads 0: every 2nd token from 0 of each 8
    heads 1: every 2nd token from 1 of each 8

A *pattern* (w, r) cuts the sequence into segments of w tokens; in each, head j attends among every r-th token, from its
offset o on: j mod r (`mod`, as in the paper), or the index of the head's block, with heads divided into r blocks
(`block`, torchscale).  A *head group* is the heads of one pattern that share an offset, with the tokens that they
attend to (`ringpass.layouts.strided`).  Numbered 0, 1, 2 .., these tokens are a sequence of their own, on which
attention is dense within segments.  So a head group is an ordinary problem of the schedule, with masks rewritten to its
numbers.

The results of all head groups are merged by log-sum-exp: a key that several patterns cover counts several times, and a
query that no pattern covers gives 0.  This equals dense attention with the additive mask log m, where m is the number
of patterns that contain a pair (`ringpass.reference`), gradients included.

FLOPs are those of S sum(w_i / r_i^2) pairs per head on average, of S^2 for dense attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ringpass.errors import OptionError, did_you_mean
from ringpass.layouts.layout import restricted
from ringpass.layouts.ranges import Ranges, spread
from ringpass.layouts.strided import StridedSegments
from ringpass.masks.expr import Call, Const, Expr, H, Index, K, Load, Q, Table, call, parse, rebuilt
from ringpass.masks.simplify import linear, simplify
from ringpass.patterns import MOST
from ringpass.schedule.head_shares import ordinal, read_heads
from ringpass.schedule.tiles import Problem

OFFSETS = ("mod", "block")
ONE = Const(1)


@dataclass(frozen=True)
class HeadGroup:
    """The tokens of `strided`, for heads first, first + step, ..: `heads` is (first, step, number)."""

    pattern: int
    strided: StridedSegments
    heads: tuple[int, int, int]

    @property
    def members(self) -> range:
        """The query heads."""
        first, step, number = self.heads
        return range(first, first + step * number, step)

    def key_heads(self, heads: int, kv_heads: int) -> tuple[int, ...]:
        """The K/V heads that its query heads read: one per query head, or one per equal number of query heads.

        `heads`, `kv_heads`: the numbers of query heads and of K/V heads of the attention.
        """
        return read_heads(self.members, heads // kv_heads)

    def tokens(self, ranges: Ranges) -> NDArray[np.int64]:
        """The tokens of the sequence at `ranges` of the group's own numbers."""
        return self.strided.at(spread(ranges))

    def mask(self, expr: Expr) -> Expr:
        """The mask `expr` over the group's tokens and heads, False across segments."""
        width, inside = self.strided.width, simplify(self.reindexed_in_segment(expr))
        if self.strided.length <= width:
            return inside
        return simplify(call("and", inside, call("eq", *(call("floordiv", x, Const(width)) for x in (Q, K)))))

    def reindexed_in_segment(self, expr: Expr) -> Expr:
        """`expr` over the group's tokens and heads, for queries and keys of the same segment."""
        if isinstance(expr, Call) and len(expr.args) == 2 and expr.op in ("lt", "le", "gt", "ge", "eq", "ne"):
            apart = self._apart(call("sub", *expr.args))
            if apart is not None:
                return Call(expr.op, (apart, Const(0)))
        apart = self._apart(expr)
        if apart is not None:
            return apart
        if isinstance(expr, Index):
            return self._index(expr)
        return rebuilt(expr, self.reindexed if isinstance(expr, Load | Table) else self.reindexed_in_segment)

    def reindexed(self, expr: Expr) -> Expr:
        """`expr` over the group's tokens and heads, for any of its queries and keys."""
        return self._index(expr) if isinstance(expr, Index) else rebuilt(expr, self.reindexed)

    def _index(self, index: Index) -> Expr:
        if index == H:
            first, step, number = self.heads
            return Const(first) if number == 1 else call("add", call("mul", H, Const(step)), Const(first))
        if index not in (Q, K):
            return index
        r = self.strided
        token = call("add", call("mul", index, Const(r.rate)), Const(r.offset))
        skipped = r.segment - r.width * r.rate
        if not skipped or r.length <= r.width:
            return token
        return call("add", token, call("mul", call("floordiv", index, Const(r.width)), Const(skipped)))

    def _apart(self, expr: Expr) -> Expr | None:
        """A multiple of q - k, plus a constant: within a segment, q - k is `rate` times that of the group."""
        if isinstance(expr, Load | Table):
            return None
        terms = linear(expr)
        if terms is None or {*terms} - {ONE} != {Q, K} or terms[Q] != -terms[K]:
            return None
        apart = call("mul", call("sub", Q, K), Const(terms[Q] * self.strided.rate))
        return call("add", apart, Const(terms.get(ONE, 0)))

    def __str__(self) -> str:
        r = self.strided
        every = "every token" if r.everything else f"every {ordinal(r.rate)} token from {r.offset}"
        return f"heads {' '.join(map(str, self.members))}: {every} of each {r.segment}"


@dataclass(frozen=True)
class Dilation:
    """Segment lengths w_i and dilation rates r_i of the patterns, and the rule for the offsets of heads.

    >>> Dilation((2048, 4096), (1, 2)).share(tokens=8192)
    0.375
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offset: str = "mod"

    def __post_init__(self) -> None:
        for name in ("segment_lengths", "dilation_rates"):
            values: object = getattr(self, name)
            fits = isinstance(values, tuple | list) and all(type(n) is int and 1 <= n < MOST for n in values)
            if not fits or not values:
                raise OptionError(
                    f"option {name!r} must be a list of ints of at least 1 and below 2**40, got {values!r}"
                )
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.segment_lengths) != len(self.dilation_rates):
            raise OptionError(
                "options 'segment_lengths' and 'dilation_rates' must be equally long, got "
                f"{list(self.segment_lengths)} and {list(self.dilation_rates)}: each pattern has one of both"
            )
        if self.head_offset not in OFFSETS:
            hint = did_you_mean(self.head_offset, OFFSETS)
            raise OptionError(f"option 'head_offset' must be 'mod' or 'block', got {self.head_offset!r}{hint}")

    def __str__(self) -> str:
        pairs = zip(self.segment_lengths, self.dilation_rates, strict=True)
        return f"{'+'.join(f'{w}/{r}' for w, r in pairs)} {self.head_offset}"

    @staticmethod
    def parse(text: str) -> Dilation:
        """The dilation that `str` wrote.  Raises OptionError for any other text.

        >>> Dilation.parse("2048/1+4096/3 block").dilation_rates
        (1, 3)
        """
        try:
            patterns, head_offset = text.split()
            pairs = [pattern.split("/") for pattern in patterns.split("+")]
            lists = tuple(int(w) for w, _ in pairs), tuple(int(r) for _, r in pairs)
        except (AttributeError, ValueError) as error:
            raise OptionError(f"expected a dilation as text, such as '2048/1+4096/2 mod', got {text!r}") from error
        return Dilation(*lists, head_offset)

    def head_groups(self, heads: int, tokens: int, share: range | None = None) -> tuple[HeadGroup, ...]:
        """The non-empty head groups, for `heads` query heads and `tokens` tokens, by pattern.

        `share`: the query heads that are grouped, and are numbered from 0 then; None: all.
        """
        return _head_groups(self, heads, tokens, range(heads) if share is None else share)

    def offset(self, head: int, heads: int, rate: int) -> int:
        """The offset of `head` in each segment."""
        return head % rate if self.head_offset == "mod" else head // -(-heads // rate)

    def share(self, tokens: int) -> float:
        """(query, key) pairs over those of dense attention, averaged over offsets: sum(w / r^2) / S."""
        pairs = zip(self.segment_lengths, self.dilation_rates, strict=True)
        return sum(min(w, tokens) / r**2 for w, r in pairs) / tokens

    def describe(self) -> str:
        """What it attends to, by pattern."""
        pairs = zip(self.segment_lengths, self.dilation_rates, strict=True)
        each = [f"{'every token' if r == 1 else f'every {ordinal(r)} token'} of each {w}" for w, r in pairs]
        return f"{'; '.join(each)}; head offsets by {self.head_offset}"


@lru_cache(maxsize=1024)
def _head_groups(dilation: Dilation, heads: int, tokens: int, share: range) -> tuple[HeadGroup, ...]:
    out = []
    for i, (w, r) in enumerate(zip(dilation.segment_lengths, dilation.dilation_rates, strict=True)):
        by_offset: dict[int, list[int]] = {}
        for number, head in enumerate(share):
            by_offset.setdefault(dilation.offset(head, heads, r), []).append(number)
        for offset, members in sorted(by_offset.items()):
            progression = members[0], members[1] - members[0] if len(members) > 1 else 1, len(members)
            head_group = HeadGroup(i, StridedSegments(tokens, min(w, tokens), r, offset), progression)
            out += [head_group] if head_group.strided.length else []
    return tuple(out)


@dataclass(frozen=True)
class GroupProblem:
    """A head group of a dilated attention, and what it schedules."""

    head_group: HeadGroup
    problem: Problem


@lru_cache(maxsize=256)
def group_problems(
    problem: Problem, dilation: Dilation, heads: int, share: range | None = None
) -> tuple[GroupProblem, ...]:
    """The head groups of a dilated problem with `heads` query heads, or a share of them, each with its problem."""
    return tuple(
        GroupProblem(head_group, _of_head_group(problem, head_group))
        for head_group in dilation.head_groups(heads, problem.queries, share)
    )


def _of_head_group(problem: Problem, head_group: HeadGroup) -> Problem:
    n = head_group.strided.length
    query, key = (
        replace(x, name=restricted(x.name, head_group.strided)) for x in (problem.query_layout, problem.key_layout)
    )
    mask = str(head_group.mask(parse(problem.mask)))
    return replace(problem, mask=mask, queries=n, keys=n, query_layout=query, key_layout=key)


# --- presets ----------------------------------------------------------------------------------------------------------

Lists = tuple[tuple[int, ...], tuple[int, ...]]  # segment lengths, dilation rates


def longnet(tokens: int) -> Lists:
    """LongNet's language models of 2K to 32K tokens (arXiv 2307.02486, section 4.2).

    >>> longnet(32768)
    ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))
    """
    return _reaching(tokens, (2048, 4096, 8192, 16384, 32768), (1, 2, 4, 6, 12))


def longvit(tokens: int) -> Lists:
    """LongViT's (microsoft/torchscale, examples/longvit/longvit.py).

    There are lists for 1,024 to 1,048,576 patches of 32 x 32 pixels; a sequence gets that of the next such number.

    >>> longvit(128 * 128)
    ((1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16))
    """
    published = (
        (64, 128, 256, 512, 1024),
        (1024, 2048, 4096, 8192, 16384),
        (1024, 4096, 8192, 16384, 65536),
        (1024, 4096, 16384, 65536, 262144),
        (1024, 4096, 32768, 262144, 1048576),
    )
    fitting = [lengths for lengths in published if lengths[-1] >= tokens]
    return _reaching(tokens, (fitting or published[-1:])[0], (1, 2, 4, 8, 16))


def gigapath(tokens: int) -> Lists:
    """GigaPath's, even on a logarithmic scale (prov-gigapath, gigapath/slide_encoder.py, `get_optimal_segment_length`).

    There `tokens` is the longest sequence that the encoder is made for: 2^20 for the one that is published.

    >>> gigapath(2**20)
    ((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))
    """
    least, most = 10, max(10, tokens.bit_length() - 1)
    return _reaching(tokens, tuple(int(2 ** (least + (most - least) * i / 4)) for i in range(5)), (1, 2, 4, 8, 16))


def _reaching(tokens: int, lengths: tuple[int, ...], rates: tuple[int, ...]) -> Lists:
    """The lists up to the first segment that holds all tokens: LongNet's lengths grow until they do (eq. 11)."""
    used = 1 + sum(w < tokens for w in lengths[:-1])
    return lengths[:used], rates[:used]


PRESETS: dict[str, Callable[[int], Lists]] = {"longnet": longnet, "longvit": longvit, "gigapath": gigapath}
"""Published lists, by the length of the sequence."""
AUTO = "auto"
BUDGET = 0.25


def preset(name: str, tokens: int, head_offset: str = "mod", budget: float = BUDGET) -> Dilation:
    """The patterns that a name stands for, in a sequence of `tokens` tokens.

    >>> print(preset("longnet", 6000))
    2048/1+4096/2+8192/4 mod
    >>> print(preset("auto", 6000))
    512/1+1024/2+2048/4+4096/8+8192/16 mod

    `auto`: lengths and rates that double, up to the whole sequence, from the longest first segment, a power of 2, with
    which at most a share `budget` of all pairs is computed.  Raises OptionError for a name that is neither that nor
    one of PRESETS, or a budget that is too small for any.
    """
    if name == AUTO:
        return _auto(tokens, head_offset, budget)
    if name not in PRESETS:
        hint = did_you_mean(name, [*PRESETS, AUTO])
        raise OptionError(f"unknown dilation {name!r}{hint}: known are {', '.join(map(repr, [*PRESETS, AUTO]))}")
    return Dilation(*PRESETS[name](tokens), head_offset)


def _auto(tokens: int, head_offset: str, budget: float) -> Dilation:
    first = 1 << max(0, tokens - 1).bit_length()
    while first:
        doubled = 1 + max(0, -(-tokens // first) - 1).bit_length()
        found = Dilation(tuple(first << i for i in range(doubled)), tuple(1 << i for i in range(doubled)), head_offset)
        if found.share(tokens) <= budget:
            return found
        first //= 2
    raise OptionError(
        f"no dilation of {tokens} tokens computes a share of {budget} of all pairs only: raise the budget"
    )
