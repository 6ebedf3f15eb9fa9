"""One attention call as one rank runs it: what the plan decided, without tensors.

    >>> from ringpass.layouts.layout import Layout
    >>> zigzag = Layout("zigzag", 2)
    >>> site = Site(Problem("k <= q", 8, 8, zigzag, zigzag), rank=1, scale=0.5)
    >>> key = register(site)                       # what the operator in the graph carries
    >>> lookup(key, 8, 8) is site
    True

The operator `ring_attention` names its site by a key, and finds it in a table that the backend fills in every process
before it compiles: nothing is parsed, rewritten or classified again when the graph runs, except for a length that is
symbolic and for data of the call that prune the schedule.  The key is a digest of the
site's contents, so that equal sites share one, in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ringpass.layouts.ranges import Ranges
from ringpass.masks.constants import ConstantArray
from ringpass.masks.expr import Const, H, K, Q, call, loads, parse, table
from ringpass.schedule.dilation import Dilation, GroupProblem, HeadGroup, group_problems
from ringpass.schedule.launches import STACK, Launch, gives_each_key_once, launches
from ringpass.schedule.program import Program, program, tiles_between
from ringpass.schedule.tiles import Problem, Tile


@dataclass(frozen=True)
class Site:
    """`problem`: mask, lengths, layouts and tile of the call.  Texts are expressions of `ringpass.masks.expr`.

    A dilated site consists of one site per head group (`groups`), each over its own tokens and heads.
    """

    problem: Problem
    rank: int
    group: str = ""  # the process group's name
    scale: float = 1.0
    dropout: float = 0.0
    stream: int = 0  # the number of its dropout mask among those of the graph
    bias: str = ""
    score: str = ""  # any other function of the scaled scores, instead of a bias
    sink: str = ""  # the score of one extra key per row, with value 0: an expression without k
    comm: str = "ring"
    dilation: Dilation | None = None  # None: every query sees every key that the mask allows
    heads: int = 1  # query heads
    share: range | None = None  # of these, those for which the rank attends, with pooled tokens; None: all
    learned: tuple[int, ...] = ()  # the leaves that need a gradient
    pruning: tuple[int, ...] = ()  # the leaves whose values prune the schedule of each call
    prove: str = "sample"  # which schedules made in a call are proved: see `schedule.run_time_proof`
    head_group: HeadGroup | None = None  # of a dilated site, the group that this site is for
    group_index: int = 0  # the index of this group

    @property
    def mask(self) -> str:
        """Which keys a query may attend to."""
        return self.problem.mask

    @property
    def split(self) -> bool:
        """Whether the rank attends to its own keys alone, and results are merged over ranks."""
        return self.problem.split and self.world > 1

    @property
    def world(self) -> int:
        """The number of ranks P."""
        return self.problem.world

    @cached_property
    def program(self) -> Program:
        """The steps of this rank."""
        return program(self.problem, self.rank)

    @cached_property
    def groups(self) -> tuple[Site, ...]:
        """The sites of the head groups of a dilated site; of any other, the site itself."""
        if self.dilation is None:
            return (self,)
        return tuple(_of_group(self, i, x) for i, x in enumerate(self.group_problems))

    @property
    def group_problems(self) -> tuple[GroupProblem, ...]:
        """The head groups of a dilated site, each with its problem."""
        return group_problems(self.problem, self.dilation, self.heads, self.share) if self.dilation else ()

    @property
    def own_heads(self) -> int:
        """The number of query heads for which the rank attends."""
        return self.heads if self.share is None else len(self.share)

    @cached_property
    def learns(self) -> bool:
        """Whether its tiles give gradients of leaves."""
        return any(loads(parse(text)) & {*self.learned} for text in (self.bias, self.score) if text)

    @property
    def depends_on_tokens(self) -> bool:
        """Whether anything that acts on a tile's scores, other than its mask, depends on the tokens."""
        return bool(self.bias or self.dropout or self.score)

    def launches(self, tiles: Sequence[Tile], batch: int) -> list[Launch]:
        """The launches for `tiles` of a step, of `batch` sequences.

        If the site splits full tiles, to save memory, none is larger than a tile.
        """
        if self.problem.cut_all:
            return launches(tiles, self.problem.tile, stack=0)
        return launches(tiles, stack=0 if self.depends_on_tokens else STACK // max(1, batch))

    def with_constants(self, arrays: Sequence[ConstantArray]) -> Site:
        """The site with the values of its pruning leaves, equal on all ranks, so that their schedules match.

        `arrays`: one for each number in `pruning`.
        """
        if not self.pruning:
            return self
        constants = tuple(zip(self.pruning, arrays, strict=True))
        return replace(self, problem=replace(self.problem, constants=constants))

    @cached_property
    def dropout_indices(self) -> str:
        """Index expressions (head, query, key), in the model's original order, that seed the dropout mask."""
        orders = self.problem.query_layout.order, self.problem.key_layout.order
        tokens = [table(order.permutation.values, i) if order else i for order, i in zip(orders, (Q, K), strict=True)]
        head = call("add", H, Const(self.share.start)) if self.share else H
        indices = [head, *tokens]
        return "; ".join(str(self.head_group.reindexed(x) if self.head_group else x) for x in indices)

    @property
    def owned_queries(self) -> Ranges:
        """The query tokens of this rank, as ranges."""
        return self.problem.query_layout.ranges(self.rank, self.problem.queries)

    @property
    def owned_keys(self) -> Ranges:
        """The key tokens of this rank, as ranges."""
        return self.problem.key_layout.ranges(self.rank, self.problem.keys)


def _of_group(site: Site, index: int, group: GroupProblem) -> Site:
    """The site of one head group."""
    texts = (str(group.head_group.reindexed_in_segment(parse(x))) if x else "" for x in (site.bias, site.score))
    bias, score = texts
    return replace(
        site,
        problem=group.problem,
        bias=bias,
        score=score,
        dilation=None,
        head_group=group.head_group,
        group_index=index,
    )


@lru_cache(maxsize=4096)
def one_launch_per_key(site: Site, rank: int, src: int, batch: int) -> bool:
    """Whether one launch of `rank` gives the gradient of each key that it uses of rank `src`."""
    return gives_each_key_once(site.launches(tiles_between(site.problem, rank, src), batch))


# --- the table of planned sites ---------------------------------------------------------------------------------------

SITES: dict[str, Site] = {}
"""Sites by key, for the life of the process: compiled graphs name them."""
MASK_CHARACTERS = 40  # characters of a mask that stand in a key, for readers of graphs


def register(site: Site) -> str:
    """The key by which an operator names `site`: the beginning of its mask, and a digest of its contents."""
    digest = hashlib.sha256(repr(site).encode()).hexdigest()[:16]
    mask = site.mask if len(site.mask) <= MASK_CHARACTERS else f"{site.mask[:MASK_CHARACTERS]}.."
    key = f"{mask} #{digest}"
    SITES.setdefault(key, site)
    return key


def lookup(key: str, queries: int, keys: int) -> Site:
    """The site of a key, for these numbers of tokens: where they are symbolic, each call may bring its own.

    Raises LookupError for a graph that was not planned in this process.
    """
    if key not in SITES:
        raise LookupError(
            f"no attention is planned as {key!r} in this process: run torch.compile(.., backend='ring_dilated') here, "
            "which fills the table before it loads a compiled graph"
        )
    site = SITES[key]
    planned = site.problem.queries, site.problem.keys
    return site if planned == (queries, keys) else _of_lengths(site, queries, keys)


@lru_cache(maxsize=256)
def _of_lengths(site: Site, queries: int, keys: int) -> Site:
    return replace(site, problem=replace(site.problem, queries=queries, keys=keys))
