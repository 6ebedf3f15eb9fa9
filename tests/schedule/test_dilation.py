"""Dilated attention: on simulated ranks it equals the dense reference; what plans say of it; wrong options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ringpass import Dilation, OptionError, RingConfig, reference
from ringpass.layouts.layout import Layout
from ringpass.ops import ring
from ringpass.schedule.dilation import preset
from ringpass.schedule.messages import received
from ringpass.schedule.site import Site
from tests.support import thread_ranks
from tests.support.attention_parity import SCALE, check_ranks, of_rank, one_thread
from tests.support.dilation_cases import TOLERANCE, WIDTH, Case, random_case
from tests.support.sites import site

FEW, ALL = 40, 1100  # cases of the default run, and with -m slow
LEARNED = "x{}[h, q, k]"


def site_of(
    dilation: Dilation, tokens: int, rank: int, world: int, layout: str = "contiguous", mask: str = "True", **more: Any
) -> Site:
    """A site whose queries and keys are one sequence."""
    return site(mask, tokens, layout, rank, world, scale=SCALE, dilation=dilation, **more)


def received_rows(planned: Site, kv_heads: int) -> int:
    """(token, K/V head) pairs that the site's rank receives."""
    return received(planned.group_problems, planned.rank, planned.heads, kv_heads)


# --- random cases -----------------------------------------------------------------------------------------------------


def on_the_ring(c: Case) -> list[list[Tensor]]:
    """[out, dq, dk, dv, and the rank's partial gradient of the bias] of each rank."""
    last = len(c.leaves) - 1
    more: dict[str, Any] = {"bias": LEARNED.format(last), "learned": (last,)} if c.learned else {}
    heads = c.inputs[0].shape[1]

    def job(rank: int, group: str) -> list[Tensor]:
        planned = site_of(
            c.dilation, c.tokens, rank, c.world, c.layout, c.mask, tile=c.tile, group=group, heads=heads, **more
        )
        q, k, v, grad = (of_rank(x, c.layout, rank, c.world) for x in c.inputs)
        with torch.no_grad():
            out, lse = ring.forward(planned, q, k, v, c.leaves, None)
            dq, dk, dv, learned = ring.backward(planned, grad, q, k, v, out, lse, c.leaves, None)
        return [out, dq, dk, dv, *learned]

    return thread_ranks.run(c.world, job)


def dense(c: Case) -> list[Tensor]:
    """The same of the reference, on all tokens."""
    q, k, v, *bias = (x.clone().requires_grad_() for x in [*c.inputs[:3], *(c.leaves[-1:] if c.learned else [])])
    out = reference.attention(q, k, v, c.dilation, mask=c.allowed, bias=bias[0] if bias else None, scale=SCALE)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, *bias), c.inputs[3])]


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= FEW else []) for n in range(ALL)])
def test_the_ring_equals_the_reference(seed: int) -> None:
    with one_thread():
        c = random_case(seed)
        found, wanted = on_the_ring(c), dense(c)
    check_ranks([results[:4] for results in found], wanted[:4], c.layout, TOLERANCE, str(c))
    if c.learned:
        got = torch.stack([results[4] for results in found]).sum(0)
        assert torch.allclose(got, wanted[4], rtol=TOLERANCE, atol=TOLERANCE), f"bias: {c}"


def test_the_cases_meet_every_circumstance() -> None:
    """In the default run, on several ranks."""
    met: dict[str, set[int]] = {}
    for c in map(random_case, range(FEW)):
        lengths, rates = c.dilation.segment_lengths, c.dilation.dilation_rates
        covered = reference.multiplicity(c.dilation, c.inputs[0].shape[1], c.tokens).any(-1)
        circumstances = {
            c.dilation.head_offset: True,
            c.layout: True,
            c.mask.split("<")[0]: True,
            "GQA": c.inputs[0].shape[1] > c.inputs[1].shape[1],
            "learned bias": c.learned,
            "rows that no pattern covers": not covered.all(),
            "a rate that does not divide its length": any(w % r for w, r in zip(lengths, rates, strict=True)),
            "a length above the sequence's": max(lengths) > c.tokens,
            "a length that does not divide the sequence's": any(c.tokens % w for w in lengths),
            "a rank holds several segments": min(lengths) * 2 <= c.tokens // c.world,
            "a segment spans ranks": max(lengths) > -(-c.tokens // c.world),
        }
        for name, holds in circumstances.items():
            met.setdefault(name, set()).update({c.world} if holds else set())
    assert len(met) == 16 and all(len(worlds - {1}) >= 2 for worlds in met.values()), met


def test_reference_is_the_formula() -> None:
    """LongNet's sum, pair by pair, for one batch row and head."""
    d, tokens, heads = Dilation((4, 9), (1, 3)), 11, 3
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, WIDTH, generator=g, dtype=torch.float64) for _ in range(3))
    out = reference.attention(q, k, v, d, causal=True, scale=SCALE)
    for j in range(heads):
        for p in range(tokens):
            top, bottom = torch.zeros(WIDTH, dtype=torch.float64), 0.0
            for w, o, r in ((4, 0, 1), (9, j % 3, 3)):
                for c in range(p + 1):
                    if p // w == c // w and p % w % r == o and c % w % r == o:
                        weight = float((SCALE * q[0, j, p] @ k[0, j, c]).exp())
                        top, bottom = top + weight * v[0, j, c], bottom + weight
            assert torch.allclose(out[0, j, p], top / bottom, rtol=1e-12)


# --- what is sent and computed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_offset", ["mod", "block"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("lengths", "rates"), [((512,), (8,)), ((64, 128, 256, 512), (1, 2, 4, 8)), ((125,), (3,))])
def test_each_rank_receives_what_it_needs(
    layout: str, lengths: tuple[int, ...], rates: tuple[int, ...], heads: int, groups: int, head_offset: str
) -> None:
    """Exactly the (token, K/V head) pairs of other ranks that the reference joins with a query of its own, once."""
    d, tokens, world = Dilation(lengths, rates, head_offset), 512, 8
    joined = reference.multiplicity(d, heads, tokens).view(groups, heads // groups, tokens, tokens) > 0
    for rank in range(world):
        local = torch.zeros(tokens, dtype=torch.bool)
        for start, stop in Layout(layout, world).ranges(rank, tokens):
            local[start:stop] = True
        need = int((joined[:, :, local].any(2).any(1) & ~local).sum())
        got = received_rows(site_of(d, tokens, rank, world, layout, heads=heads), groups)
        assert need <= got <= 1.05 * need, (rank, need, got)


@pytest.mark.parametrize("rate", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [64, 128, 256, 512, 1024, 4096])
def test_received_rows_follow_the_formula(length: int, rate: int) -> None:
    """(min(w, S) / L - 1)+ L / r rows per head, L = S / P the tokens of a rank, bidirectional and contiguous."""
    tokens, world, heads = 1024, 8, 8
    shard = tokens // world
    want = heads * max(min(length, tokens) // shard - 1, 0) * shard // rate
    for rank in range(world):
        assert received_rows(site_of(Dilation((length,), (rate,)), tokens, rank, world, heads=heads), heads) == want


def test_no_exchange_within_a_shard() -> None:
    for rank in range(4):
        group_sites = site_of(Dilation((32, 64), (1, 2)), 256, rank, 4, heads=4).groups
        assert all(
            not step.receive and not step.tiles for group_site in group_sites for step in group_site.program.steps[1:]
        )
        assert all(len(group_site.program.steps) == 1 for group_site in group_sites)


@pytest.mark.parametrize(("mask", "bound"), [("True", 2 * 2048), ("k <= q", 2048 + 512)])
def test_cost_is_linear_in_the_length(mask: str, bound: int) -> None:
    """Geometric patterns up to the whole sequence: pairs per token, and received rows per local one, do not grow."""
    world, heads, rows = 8, 8, []
    for tokens in [2**n for n in range(12, 21, 2)]:
        doubled = range((tokens // 2048).bit_length())
        d = Dilation(tuple(2048 << i for i in doubled), tuple(1 << i for i in doubled))
        sites = [site_of(d, tokens, rank, world, mask=mask, heads=heads) for rank in range(world)]
        pairs = sum(
            len(x.head_group.members) * x.program.area for planned in sites for x in planned.groups if x.head_group
        )
        assert pairs <= bound * tokens * heads, tokens
        rows.append(max(received_rows(planned, heads) for planned in sites) / heads / (tokens // world))
    assert rows == sorted(rows, reverse=True) and rows[-1] < 0.1, rows


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"segment_lengths": [8, 16], "dilation_rates": [1]}, r"equally long, got \[8, 16\] and \[1\]"),
        ({"segment_lengths": [0], "dilation_rates": [1]}, "'segment_lengths' must be a list of ints of at least 1"),
        ({"segment_lengths": [8], "dilation_rates": [0]}, "'dilation_rates' must be a list of ints of at least 1"),
        ({"segment_lengths": [8], "dilation_rates": [1.5]}, "'dilation_rates' must be a list of ints of at least 1"),
        ({"segment_lengths": [], "dilation_rates": []}, "'segment_lengths' must be a list of ints of at least 1"),
        ({"segment_lengths": 8, "dilation_rates": 1}, "'segment_lengths' must be a list"),
        ({"segment_lengths": [8]}, "'segment_lengths' needs 'dilation_rates' beside it"),
        ({"dilation_rates": [8]}, "'dilation_rates' needs 'segment_lengths' beside it"),
        ({"dilation": "longnett"}, "unknown dilation 'longnett' .did you mean 'longnet'"),
        ({"dilation": 3}, "'dilation' must be one of"),
        ({"dilation": "auto", "dilation_budget": 0}, "'dilation_budget' must be a number above 0"),
        ({"dilation": "auto", "head_offset": "group"}, "'head_offset'"),
        ({"dilation": "auto", "segment_lengths": [8], "dilation_rates": [1]}, "drop one"),
        ({"dilate": [0]}, "no option says how"),
        ({"dilate": {0: "longest"}}, "unknown dilation 'longest'"),
        ({"dilate": "layers.0", "dilation": "auto"}, "'dilate' must be a list of attentions"),
        ({"dilation": "auto", "comm": "allgather"}, "does not go with the option 'comm'"),
        ({"dilation": "auto", "hilbert": (4, 4)}, "along_curve=True"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        RingConfig.from_options(options)


@pytest.mark.parametrize("tokens", [1, 2, 3, 100, 4096, 5000, 2**20])
@pytest.mark.parametrize("budget", [0.05, 0.25, 1.0])
def test_auto_keeps_to_the_budget_and_reaches_the_whole_sequence(tokens: int, budget: float) -> None:
    try:
        d = preset("auto", tokens, budget=budget)
    except OptionError:
        assert tokens * budget < 4  # the patterns of one token cost more
        return
    assert d.share(tokens) <= budget and d.segment_lengths[-1] >= tokens
    longer = Dilation(tuple(2 * w for w in d.segment_lengths), d.dilation_rates)
    assert longer.share(tokens) > budget or d.segment_lengths[0] >= tokens


def test_texts_are_read_back() -> None:
    for d in (Dilation((4,), (1,)), Dilation((2048, 4096), (1, 3), "block")):
        assert Dilation.parse(str(d)) == d
