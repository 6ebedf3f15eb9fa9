"""Exchanges end with NCCL as with gloo: the proof agrees with a simulation, and the loop keeps the proved order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ringpass import Dilation
from ringpass.comm import p2p
from ringpass.errors import ScheduleError
from ringpass.layouts.layout import Layout
from ringpass.masks.constants import ConstantArray
from ringpass.ops import primitives, ring
from ringpass.patterns import causal, sink, window
from ringpass.schedule.dilation import group_problems
from ringpass.schedule.messages import exchanges
from ringpass.schedule.order import GRADIENTS, KEYS, Ends, Event, order
from ringpass.schedule.order_proof import check_circles, prove_order
from ringpass.schedule.program import program
from ringpass.schedule.proof import ends_of
from ringpass.schedule.site import Site
from ringpass.schedule.tiles import Problem
from tests.support import thread_ranks
from tests.support.attention_parity import SCALE, of_rank, one_thread
from tests.support.nccl import completes, keys_first
from tests.support.pattern_models import SelfAttention
from tests.support.pipeline_stages import fake_ring, stages
from tests.support.sites import site

LAYOUTS = ("contiguous", "zigzag", "striped")
MASKS = {
    "causal": "k <= q",
    "window 1/8": "k <= q & q - k < {S8}",
    "window 1/4": "k <= q & q - k < {S4}",
    "window 1/2": "k <= q & q - k < {S2}",
    "window and sink": "k <= q & (q - k < {S8} | k < 4)",
    "wide window and sink": "k <= q & (q - k < {S4} | k < 4)",
    "two-sided window": "q - k < {S8} & k - q < {S8}",
    "wide two-sided window": "q - k < {S4} & k - q < {S4}",
    "window and global tokens": "(q - k < {S8} & k - q < {S8}) | k < 4 | q < 4",
    "prefix": "k <= q | k < {S8}",
    "block causal": "k // {S8} <= q // {S8}",
    "documents 1/4": "k // {S4} == q // {S4} & k <= q",
    "documents 1/3": "k // {S3} == q // {S3} & k <= q",
    "documents 1/5": "k // {S5} == q // {S5}",
    "sink and window": "k < 4 | q - k < {S8} & k <= q",
}
Ranks = Sequence[Sequence[Ends]]
Issue = Callable[[Sequence[int], bool], Iterable[Event]]


def grid(worlds: Iterable[int]) -> Iterator[tuple[str, Ranks]]:
    """The exchanges of all ranks for every mask and layout."""
    for world in worlds:
        tokens = 128 * world
        parts = {f"S{n}": tokens // n + (n in (3, 5)) for n in (2, 3, 4, 5, 8)}
        for name, mask in MASKS.items():
            for layout in LAYOUTS:
                x = Layout(layout, world)
                problem = Problem(mask.format(**parts), tokens, tokens, x, x, 64)
                ranks = [ends_of(program(problem, rank)) for rank in range(world)]
                yield f"{name} in {layout} on {world} ranks", ranks


def ends(ranks: Ranks, issue: Issue, backward: bool) -> bool:
    """Whether all exchanges end under NCCL, by simulation."""
    return completes(ranks, [issue([x.shift for x in of_rank], backward) for of_rank in ranks])


def refused(ranks: Ranks, issue: Issue) -> bool:
    """Whether the proof refuses the order of starts of a backward."""
    try:
        check_circles(ranks, [list(issue([x.shift for x in of_rank], True)) for of_rank in ranks], backward=True)
    except ScheduleError as error:
        assert "with NCCL, its backward waits in a circle" in str(error)
        return True
    return False


def check_grid(worlds: Iterable[int]) -> int:
    """That no schedule stops, and that the proof says of keys first what the simulation says; how often that stops."""
    stopped = 0
    for where, ranks in grid(worlds):
        assert ends(ranks, order, False) and ends(ranks, order, True), where
        prove_order(ranks)
        assert ends(ranks, keys_first, False), where
        stops = not ends(ranks, keys_first, True)
        assert refused(ranks, keys_first) == stops, where
        stopped += stops
    return stopped


def test_ordinary_masks_end() -> None:
    assert check_grid((2, 3, 4, 5, 6)) > 0


@pytest.mark.slow
def test_ordinary_masks_end_on_more_ranks() -> None:
    assert check_grid((7, 8, 12, 16)) > 0


FIXTURES = json.loads((Path(__file__).parent / "deadlocks.json").read_text())
"""Schedules whose backward stops for ever with keys first: each rank's (shift, dst, src)."""


@pytest.mark.parametrize("case", FIXTURES, ids=lambda case: str(case["where"]))
def test_known_deadlocks_are_refused(case: dict[str, Any]) -> None:
    ranks = [[Ends(*x) for x in of_rank] for of_rank in case["ranks"]]
    assert not ends(ranks, keys_first, True) and refused(ranks, keys_first)
    assert ends(ranks, order, True)
    prove_order(ranks)


# --- random schedules -------------------------------------------------------------------------------------------------


def random_ranks(seed: int) -> Ranks:
    """The exchanges of a random mask, documents or a dilation, in a random layout, on 2 to 16 ranks."""
    random = Random(seed)
    world, layout = random.randint(2, 16), Layout(random.choice(LAYOUTS), 1)
    layout = Layout(layout.name, world)
    tokens = random.randint(8 * world, 24 * world)
    problem = Problem(_mask(random, tokens), tokens, tokens, layout, layout, random.choice((4, 16, 64)))
    if random.random() < 0.7:
        return [ends_of(program(problem, rank)) for rank in range(world)]
    n = random.randint(1, 3)
    lengths = tuple(random.randint(4, tokens) for _ in range(n))
    dilation = Dilation(lengths, tuple(random.randint(1, 4) for _ in range(n)))
    groups = group_problems(problem, dilation, heads=4)
    return [[x.ends for x in exchanges(groups, rank, 4, 2)[1:]] for rank in range(world)]


def _mask(random: Random, tokens: int) -> str:
    parts = [
        f"q - k < {random.randint(1, tokens)}",
        f"k - q < {random.randint(1, tokens)}",
        f"k // {random.randint(1, tokens)} == q // {random.randint(1, tokens)}",
        f"k < {random.randint(1, tokens)}",
        f"q < {random.randint(1, tokens)}",
        f"k % {random.randint(2, 9)} == {random.randint(0, 8)}",
    ]
    chosen = random.sample(parts, random.randint(1, 3))
    mask = chosen[0]
    for part in chosen[1:]:
        mask = f"({mask} {random.choice('&|')} {part})"
    return f"k <= q & {mask}" if random.random() < 0.4 else mask


def check_random(seeds: Iterable[int]) -> None:
    for seed in seeds:
        ranks = random_ranks(seed)
        assert ends(ranks, order, False) and ends(ranks, order, True), seed
        prove_order(ranks)


def test_random_schedules_end() -> None:
    check_random(range(150))


@pytest.mark.slow
def test_ten_thousand_random_schedules_end() -> None:
    check_random(range(150, 10_150))


# --- what the loop does -----------------------------------------------------------------------------------------------

WORLD, TOKENS = 4, 64
LOOPS: dict[str, dict[str, Any]] = {
    "window and sink": {"mask": "k <= q & (q - k < 8 | k < 4)"},
    "global tokens": {"mask": "(q - k < 8 & k - q < 8) | k < 4 | q < 4"},
    "dilation": {"mask": "True", "layout": "contiguous", "dilation": Dilation((8, 40), (2, 4)), "heads": 2},
    "pruned by data": {"mask": "k <= q & x0[b, q] == x0[b, k]", "pruning": (0,)},
}


def started(about: dict[str, Any]) -> tuple[list[list[tuple[str, int]]], list[list[tuple[str, int]]], list[Site]]:
    """What each rank started in a forward and in a backward, and its site."""
    found: list[list[tuple[str, int]]] = [[] for _ in range(WORLD)]
    real = thread_ranks.Mailboxes.start

    def watched(self: Any, *given: Any) -> p2p.PendingExchange:
        tag, group = given[4:6]
        what = (GRADIENTS if tag % 2 else KEYS), tag // 2
        found[int(group.removeprefix(thread_ranks.NAME))].append(what)
        return real(self, *given)

    def job(rank: int, group: str) -> tuple[int, Site]:
        about_site = {"layout": "zigzag", **about}
        here = site(tokens=TOKENS, rank=rank, world=WORLD, tile=4, group=group, scale=SCALE, **about_site)
        ids = torch.tensor([0, 0, 1, 0, 2, 3, 4, 5]).repeat_interleave(TOKENS // 8)[None]
        here = here.with_constants([ConstantArray(ids)])
        x = of_rank(torch.ones(1, 2, TOKENS, 4), about_site["layout"], rank, WORLD)
        out, lse = ring.forward(here, x, x, x, [ids], None)
        forward = len(found[rank])
        ring.backward(here, x, x, x, x, out, lse, [ids], None)
        return forward, here

    with one_thread(), patch.object(thread_ranks.Mailboxes, "start", watched), torch.no_grad():
        results = thread_ranks.run(WORLD, job)
    forward = [found[rank][:n] for rank, (n, _) in enumerate(results)]
    backward = [found[rank][n:] for rank, (n, _) in enumerate(results)]
    return forward, backward, [here for _, here in results]


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_starts_in_the_proved_order(name: str) -> None:
    forward, backward, sites = started(LOOPS[name])
    skips = False
    for rank, here in enumerate(sites):
        found = exchanges(here.group_problems, rank, here.heads, 2) if here.dilation else here.program.steps
        shifts = [x.shift for x in found[1:]]
        skips |= shifts != list(range(1, len(shifts) + 1))
        for events, direction in ((forward[rank], False), (backward[rank], True)):
            want = [(e.what, e.shift) for e in order(shifts, direction) if e.action == "start"]
            assert events == want, (rank, direction)
    assert skips  # some rank leaves out a shift: the case that once stopped


@pytest.mark.parametrize("rank", range(WORLD))
def test_the_unrolled_graph_starts_in_the_proved_order(rank: int) -> None:
    """Window and global tokens: ranks leave out different shifts."""
    model = SelfAttention(causal=True)
    pattern = causal() & (window(7) | sink(4))
    options: dict[str, Any] = {
        "compiler": "aot_eager",
        "layout": "zigzag",
        "mask": pattern,
        "tile": 4,
        "outputs": "local",
    }
    with fake_ring(rank, WORLD), stages() as seen:
        torch.compile(model, backend="ring_dilated", options=options)(torch.randn(1, TOKENS, 8)).sum().backward()
    layout = Layout("zigzag", WORLD)
    shifts = [s.shift for s in program(Problem(str(pattern), TOKENS, TOKENS, layout, layout, 4), rank).steps[1:]]
    for stage, backward in (("forward", False), ("backward", True)):
        nodes = [n for n in seen[stage][0].graph.nodes if n.target is primitives.exchange]
        tags = [n.args[5] for n in nodes]
        want = [2 * e.shift + (e.what == GRADIENTS) for e in order(shifts, backward) if e.action == "start"]
        assert tags == want
