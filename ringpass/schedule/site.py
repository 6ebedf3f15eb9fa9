"""One attention call as one rank runs it: all that is not a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from torch import Tensor

from ringpass.layouts.layout import Layout, sieved
from ringpass.layouts.ranges import Ranges
from ringpass.masks.constants import Known
from ringpass.masks.expr import H, K, Q, loads, parse, table
from ringpass.schedule import dilation
from ringpass.schedule.dilation import Lane
from ringpass.schedule.program import Program, program
from ringpass.schedule.tiles import Problem


@dataclass(frozen=True)
class Site:
    """Texts are expressions of `ringpass.masks.expr`, over the tokens of the layouts' order.

    A dilated site is a bundle of lanes, each a site of its own over its tokens and heads
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
    score: str = ""  # any other function of the scaled scores, in place of the bias
    dilation: str = ""  # as `str(Dilation)` writes it; none: every query sees every key that the mask allows
    sink: str = ""  # the score of one key more for each row, whose value is 0: an expression without k
    learned: tuple[int, ...] = ()  # the leaves that need a gradient
    pruning: tuple[int, ...] = ()  # the leaves whose values, in each call, prune the schedule
    known: tuple[tuple[int, Known], ...] = ()  # their values in this call
    lane: Lane | None = None  # what this site is of another one
    number: int = 0  # its place among that one's lanes

    @property
    def program(self) -> Program:
        return program(self.problem, self.rank)

    @property
    def problem(self) -> Problem:
        layouts = Layout(self.query_layout, self.world), Layout(self.key_layout, self.world)
        cut_all = self.dropout > 0 or self.learns or bool(self.score)
        return Problem(self.mask, self.queries, self.keys, *layouts, self.tile, cut_all, self.known)

    @cached_property
    def learns(self) -> bool:
        """Whether its tiles give gradients of leaves."""
        return any(loads(parse(text)) & {*self.learned} for text in (self.bias, self.score) if text)

    def knowing(self, leaves: Sequence[Tensor]) -> Site:
        """The site in a call with these leaves.  All ranks hold the same ones, so their schedules fit together."""
        return replace(self, known=tuple((i, Known(leaves[i])) for i in self.pruning))

    def lanes(self, heads: int) -> tuple[Site, ...]:
        """The site itself, or, if it is dilated, its lanes, for `heads` query heads."""
        return _lanes(self, heads) if self.dilation else (self,)

    @property
    def coins(self) -> str:
        """Head, query and key whose coin attention dropout tosses: the model's own, whatever their order here."""
        layouts = Layout(self.query_layout, self.world), Layout(self.key_layout, self.world)
        tokens = [table(x.order.known.values, i) if x.order else i for x, i in zip(layouts, (Q, K), strict=True)]
        own = [H, *tokens]
        return "; ".join(str(self.lane.own(x) if self.lane else x) for x in own)

    @property
    def owned_queries(self) -> Ranges:
        return Layout(self.query_layout, self.world).ranges(self.rank, self.queries)

    @property
    def owned_keys(self) -> Ranges:
        return Layout(self.key_layout, self.world).ranges(self.rank, self.keys)


@lru_cache(maxsize=256)
def _lanes(site: Site, heads: int) -> tuple[Site, ...]:
    lanes = dilation.parse(site.dilation).lanes(heads, site.queries)
    return tuple(_of_lane(site, number, lane) for number, lane in enumerate(lanes))


def _of_lane(site: Site, number: int, lane: Lane) -> Site:
    bias, score = (str(lane.within(parse(text))) if text else "" for text in (site.bias, site.score))
    p = of_lane(replace(site.problem, known=()), lane)
    where = p.queries, p.keys, p.query_layout.name, p.key_layout.name
    rest = dict(zip(("queries", "keys", "query_layout", "key_layout"), where, strict=True))
    return replace(site, mask=p.mask, bias=bias, score=score, dilation="", lane=lane, number=number, **rest)  # type: ignore[arg-type]


def of_lane(problem: Problem, lane: Lane) -> Problem:
    """What a lane of a dilated problem schedules."""
    n = lane.residue.length
    query, key = (replace(x, name=sieved(x.name, lane.residue)) for x in (problem.query_layout, problem.key_layout))
    mask = str(lane.mask(parse(problem.mask)))
    return replace(problem, mask=mask, queries=n, keys=n, query_layout=query, key_layout=key)
