"""Random attentions as a plan would have them: layouts, masks, documents, dilation, grouped heads, degrees, 2 to 8
ranks."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ringpass.layouts.layout import Layout, assigned, split_at
from ringpass.masks.constants import ConstantArray
from ringpass.masks.expr import K, Q, call, parse, table
from ringpass.schedule.dilation import Dilation, GroupProblem, group_problems
from ringpass.schedule.head_shares import HeadShare, allowed_degrees, head_shares
from ringpass.schedule.site_proof import prove_site
from ringpass.schedule.tiles import Problem

HEADS = ((4, 4), (8, 2), (6, 3), (7, 7), (4, 1))


@dataclass(frozen=True)
class RandomPlan:
    """One attention: its problem, the numbers of query heads and K/V heads, its Ulysses degree, its dilation."""

    problem: Problem
    heads: tuple[int, int]
    degree: int
    dilation: Dilation | None

    @property
    def shares(self) -> tuple[HeadShare, ...]:
        return head_shares(*self.heads, self.degree)

    def groups(self, share: HeadShare) -> tuple[GroupProblem, ...]:
        if self.dilation is None:
            return ()
        return group_problems(share.problem(self.problem), self.dilation, self.heads[0], share.heads)

    @property
    def problems(self) -> list[Problem]:
        """What is scheduled, of all shares and head groups."""
        found = [
            problem
            for share in self.shares
            for problem in ([g.problem for g in self.groups(share)] or [share.problem(self.problem)])
        ]
        return list(dict.fromkeys(found))

    def prove(self) -> None:
        prove_site(self.problem, self.heads, self.degree, self.dilation)


def random_plan(seed: int) -> RandomPlan:
    """The plan of a seed."""
    random = Random(seed)
    world, heads = random.randint(2, 8), random.choice(HEADS)
    dilated = random.random() < 0.25
    cross = not dilated and random.random() < 0.2
    queries = random.randint(2 * world, 6 * world)
    keys = random.randint(2 * world, 6 * world) if cross else queries
    name = _layout(random, world, queries)
    names = (name, _layout(random, world, keys)) if cross else (name, name)
    if not dilated and random.random() < 0.1:
        names = random.choice([(names[0], "replicated"), ("replicated", names[1])])
    mask, constants = _mask(random, queries, keys)
    layouts = [Layout(x, world) for x in names]
    cut_all = random.random() < 0.3
    problem = Problem(mask, queries, keys, layouts[0], layouts[1], random.choice((3, 5, 8, 64)), cut_all, constants)
    splits = "replicated" in names
    degree = 1 if splits else random.choice(allowed_degrees(world, heads[0]))
    return RandomPlan(problem, heads, degree, _dilation(random, queries) if dilated else None)


def _layout(random: Random, world: int, tokens: int) -> str:
    name = random.choice(("contiguous", "zigzag", "striped", "assigned"))
    if name == "assigned":
        name = assigned([*random.sample(range(world), world), *(random.randrange(world) for _ in range(world))])
    if random.random() < 0.2:
        point = random.randint(1, max(1, tokens // 3))
        name = split_at(name, random.choice(([point], [-point], [1])))
    return name


def _mask(random: Random, queries: int, keys: int) -> tuple[str, tuple[tuple[int, ConstantArray], ...]]:
    def n() -> int:
        return random.randint(1, keys)

    parts = [
        f"q - k < {n()}",
        f"k - q < {n()}",
        f"k // {n()} == q // {n()}",
        f"k < {n()}",
        f"q < {n()} | k <= q",
        f"k % {random.randint(2, 5)} == {random.randint(0, 4)}",
        "x0[b, q] == x0[b, k]",
        "x1[b, k]",
        _documents(random, queries, keys),
        "h % 2 == 0 | k <= q",
    ]
    mask = "True" if random.random() < 0.1 else random.choice(parts)
    for part in random.sample(parts, random.randint(0, 2)):
        mask = f"({mask}) {random.choice('&|')} ({part})"
    mask = f"k <= q & ({mask})" if random.random() < 0.5 else mask
    expr = parse(mask)
    constants: list[tuple[int, ConstantArray]] = []
    if "x0" in mask and random.random() < 0.5:
        ids = sorted(random.randint(0, 3) for _ in range(max(queries, keys)))
        constants.append((0, ConstantArray([ids, ids[::-1]])))
    return str(expr), tuple(constants)


def _documents(random: Random, queries: int, keys: int) -> str:
    ids = sorted(random.randint(0, 4) for _ in range(max(queries, keys)))
    return str(call("eq", table(ids, Q), table(ids, K)))


def _dilation(random: Random, tokens: int) -> Dilation:
    n = random.randint(1, 3)
    lengths = tuple(random.randint(3, tokens) for _ in range(n))
    return Dilation(lengths, tuple(random.randint(1, 4) for _ in range(n)), random.choice(("mod", "block")))
