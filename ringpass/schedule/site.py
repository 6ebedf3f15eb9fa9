"""One attention call as one rank runs it: all of it but the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from torch import Tensor

from ringpass.layouts.layout import Layout, restricted
from ringpass.layouts.ranges import Ranges
from ringpass.masks.constants import ConstantArray
from ringpass.masks.expr import H, K, Q, loads, parse, table
from ringpass.schedule import dilation
from ringpass.schedule.dilation import HeadGroup
from ringpass.schedule.program import Program, program
from ringpass.schedule.tiles import Problem


@dataclass(frozen=True)
class Site:
    """Texts are expressions of `ringpass.masks.expr`, over tokens in the order of the layouts.

    A dilated site consists of one site per head group, each over its own tokens and heads
    (`ringpass.schedule.dilation`).
    """

    mask: str
    bias: str
    scale: float
    dropout: float
    stream: int
    queries: int
    keys: int
    query_layout: str
    key_layout: str
    tile: int
    rank: int
    world: int
    group: str
    comm: str = "ring"
    score: str = ""  # any other function of the scaled scores, instead of a bias
    dilation: str = ""  # as `str(Dilation)` writes it; none: every query sees every key that the mask allows
    sink: str = ""  # the score of one extra key per row, with value 0: an expression without k
    learned: tuple[int, ...] = ()  # the leaves that need a gradient
    pruning: tuple[int, ...] = ()  # the leaves whose values prune the schedule of each call
    constants: tuple[tuple[int, ConstantArray], ...] = ()  # the values of these leaves in this call
    head_group: HeadGroup | None = None  # of a dilated site, the group that this site is for
    group_index: int = 0  # the index of this group

    @property
    def program(self) -> Program:
        return program(self.problem, self.rank)

    @property
    def problem(self) -> Problem:
        layouts = Layout(self.query_layout, self.world), Layout(self.key_layout, self.world)
        cut_all = self.dropout > 0 or self.learns or bool(self.score)
        return Problem(self.mask, self.queries, self.keys, *layouts, self.tile, cut_all, self.constants)

    @cached_property
    def learns(self) -> bool:
        """Whether its tiles give gradients of leaves."""
        return any(loads(parse(text)) & {*self.learned} for text in (self.bias, self.score) if text)

    def with_constants(self, leaves: Sequence[Tensor]) -> Site:
        """The site in a call with these leaves, which are equal on all ranks, so that their schedules match."""
        return replace(self, constants=tuple((i, ConstantArray(leaves[i])) for i in self.pruning))

    def per_head_group(self, heads: int) -> tuple[Site, ...]:
        """The site itself, or, if it is dilated, the sites of its head groups, for `heads` query heads."""
        return _per_head_group(self, heads) if self.dilation else (self,)

    @property
    def dropout_indices(self) -> str:
        """Index expressions (head, query, key), in the model's original order, that seed the dropout mask."""
        layouts = Layout(self.query_layout, self.world), Layout(self.key_layout, self.world)
        tokens = [table(x.order.permutation.values, i) if x.order else i for x, i in zip(layouts, (Q, K), strict=True)]
        indices = [H, *tokens]
        return "; ".join(str(self.head_group.reindexed(x) if self.head_group else x) for x in indices)

    @property
    def owned_queries(self) -> Ranges:
        return Layout(self.query_layout, self.world).ranges(self.rank, self.queries)

    @property
    def owned_keys(self) -> Ranges:
        return Layout(self.key_layout, self.world).ranges(self.rank, self.keys)


@lru_cache(maxsize=256)
def _per_head_group(site: Site, heads: int) -> tuple[Site, ...]:
    head_groups = dilation.parse(site.dilation).head_groups(heads, site.queries)
    return tuple(_of_head_group(site, group_index, head_group) for group_index, head_group in enumerate(head_groups))


def _of_head_group(site: Site, group_index: int, head_group: HeadGroup) -> Site:
    bias, score = (
        str(head_group.reindexed_in_segment(parse(text))) if text else "" for text in (site.bias, site.score)
    )
    p = of_head_group(replace(site.problem, constants=()), head_group)
    return replace(
        site,
        mask=p.mask,
        bias=bias,
        score=score,
        dilation="",
        queries=p.queries,
        keys=p.keys,
        query_layout=p.query_layout.name,
        key_layout=p.key_layout.name,
        head_group=head_group,
        group_index=group_index,
    )


def of_head_group(problem: Problem, head_group: HeadGroup) -> Problem:
    """The problem of one head group of a dilated problem."""
    n = head_group.strided.length
    query, key = (
        replace(x, name=restricted(x.name, head_group.strided)) for x in (problem.query_layout, problem.key_layout)
    )
    mask = str(head_group.mask(parse(problem.mask)))
    return replace(problem, mask=mask, queries=n, keys=n, query_layout=query, key_layout=key)
