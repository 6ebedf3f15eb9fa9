"""Masked steps as one call each, against dense attention and against the same steps tile by tile."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from ringpass.kernels import flex
from ringpass.kernels.plain import plain, plain_backward
from ringpass.kernels.tile import TileArgs
from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import K as KEY
from ringpass.masks.expr import loads, parse, table
from ringpass.masks.intervals import PARTIAL
from ringpass.ops import masked_steps, primitives, ring
from ringpass.ops.transports.table import make_transport
from ringpass.schedule.dilation import Dilation
from ringpass.schedule.program import Program
from tests.support import thread_ranks
from tests.support.attention_parity import SCALE, of_rank, one_thread, worst
from tests.support.marks import slow
from tests.support.model_parity import parity
from tests.support.model_parity import worst as worst_of_model
from tests.support.process_ranks import Workers
from tests.support.sites import site
from tests.support.whole_steps import whole_steps

BATCH, TOKENS, HEADS = 2, 197, (4, 2)
TABLE = str(table([i % 5 != 1 for i in range(TOKENS)], KEY))
MASKS = {
    "window": "q - k < 40 & k <= q",
    "documents": "k <= q & x0[b, q] == x0[b, k]",
    "padding": "x1[b, k]",
    "dead rows": "k <= q & x1[b, k] & x1[b, q]",
    "global tokens": "k < 3 | q < 3 | abs(q - k) < 9",
    "prefix": "k <= q | k < x2[b]",
    "heads": "q - k < 20 * (h + 1) & k <= q",
    "table": f"k <= q & {TABLE}",
}


def leaves() -> list[Tensor]:
    """Document ids, tokens that exist (the first two of batch 0 do not), lengths of prefixes."""
    ids = torch.arange(TOKENS).expand(BATCH, -1) // torch.tensor([[50], [71]])
    exists = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    exists[0, :2] = exists[1, 150:] = False
    return [ids, exists, torch.tensor([17, 90])]


def tensors() -> list[Tensor]:
    """q, k, v and the gradient of out."""
    g = torch.Generator().manual_seed(0)
    heads = (HEADS[0], HEADS[1], HEADS[1], HEADS[0])
    return [torch.randn(BATCH, h, TOKENS, 16, generator=g, dtype=torch.float64) for h in heads]


def on_the_ring(mask: str, layout: str, world: int, given: list[Tensor], **about: Any) -> list[list[Tensor]]:
    """[out, dq, dk, dv] of each rank."""

    def job(rank: int, group: str) -> list[Tensor]:
        here = site(mask, TOKENS, layout, rank, world, 32, group=group, scale=SCALE, **about)
        q, k, v, grad = (of_rank(x, layout, rank, world) for x in given)
        with torch.no_grad():
            out, lse = ring.forward(here, q, k, v, leaves(), None)
            dq, dk, dv, _ = ring.backward(here, grad, q, k, v, out, lse, leaves(), None)
        return [out, dq, dk, dv]

    with one_thread():
        return thread_ranks.run(world, job)


def dense(mask: str, given: list[Tensor]) -> list[Tensor]:
    """[out, dq, dk, dv] of all tokens."""
    q, k, v, grad = given
    allowed = evaluate(parse(mask), primitives.indices(q.device, BATCH, HEADS[0], [0, TOKENS], [0, TOKENS]), leaves())
    args = TileArgs(SCALE, mask=allowed)
    out, lse = plain(q, k, v, args)
    return [out, *plain_backward(grad, q, k, v, out, lse.masked_fill(lse == -torch.inf, torch.inf), args)[:3]]


def masked(program: Program) -> int:
    """The steps of a rank with a partial tile."""
    return sum(any(tile.kind == PARTIAL for tile in step.tiles) for step in program.steps)


@pytest.mark.parametrize(
    ("layout", "world"), [("contiguous", 1), ("zigzag", 2), ("contiguous", 3), ("striped", 4), ("zigzag", 5)]
)
@pytest.mark.parametrize("name", MASKS)
def test_whole_steps_are_dense_attention(name: str, layout: str, world: int) -> None:
    """And each step with a partial tile is one call, forward and backward."""
    mask, given = MASKS[name], tensors()
    with whole_steps() as calls:
        found = on_the_ring(mask, layout, world, given)
    assert worst(found, dense(mask, given), layout) < 1e-12
    programs = [site(mask, TOKENS, layout, rank, world, 32).program for rank in range(world)]
    assert len(calls) == 2 * sum(map(masked, programs))
    assert calls or (name, world) == ("window", 1)  # which consists of triangles


@pytest.mark.parametrize("mask", ["documents", "window", "heads"])
@pytest.mark.parametrize("dilation", [Dilation((16, 64), (1, 3)), Dilation((50,), (2,), "block")])
def test_dilated_whole_steps_are_the_tiles(mask: str, dilation: Dilation) -> None:
    given, about = tensors(), {"dilation": dilation, "heads": HEADS[0]}
    tiles = on_the_ring(MASKS[mask], "zigzag", 3, given, **about)
    with whole_steps() as calls:
        whole = on_the_ring(MASKS[mask], "zigzag", 3, given, **about)
    assert calls
    torch.testing.assert_close(whole, tiles, rtol=1e-12, atol=1e-12)


def test_gradients_of_a_whole_step_return_in_the_dtype_of_the_keys() -> None:
    """Both ends find it alike: it is one launch, however many tiles it has."""
    here = site(MASKS["documents"], TOKENS, "contiguous", 1, 2, 32)
    k = torch.empty(BATCH, HEADS[1], TOKENS // 2, 16, dtype=torch.bfloat16)
    transport = make_transport(here, k, k)
    (brought,) = [step.receive for step in here.program.steps if step.receive]
    assert len(here.program.steps[1].tiles) > 1 and transport.gradient_dtype(brought) == torch.float32
    with whole_steps():
        assert transport.gradient_dtype(brought) == torch.bfloat16
        on_the_ring(MASKS["documents"], "contiguous", 2, [x.bfloat16() for x in tensors()])


@pytest.mark.parametrize("about", [{"bias": "0.1 * (k - q)"}, {"dropout": 0.1}, {"score": "score * 2.0"}])
def test_anything_but_a_mask_is_computed_by_tiles(about: dict[str, Any]) -> None:
    here, q = site(MASKS["window"], TOKENS, **about), torch.empty(BATCH, HEADS[0], TOKENS, 16)
    with whole_steps():
        assert not any(masked_steps.runs_whole(here, step.tiles, q) for step in here.program.steps)
        plain_site = site(MASKS["window"], TOKENS)
        assert any(masked_steps.runs_whole(plain_site, step.tiles, q) for step in plain_site.program.steps)
        causal = site("k <= q", TOKENS)
        assert not any(masked_steps.runs_whole(causal, step.tiles, q) for step in causal.program.steps)


def test_tiles_are_computed_where_no_kernel_takes_a_step() -> None:
    here = site(MASKS["window"], TOKENS)
    q = torch.empty(BATCH, HEADS[0], TOKENS, 16)
    assert not any(masked_steps.runs_whole(here, step.tiles, q) for step in here.program.steps)


# --- block lists ------------------------------------------------------------------------------------------------------

SPANS = BATCH, HEADS[0], [20, 90, 100, 197], [0, 197]
CPU = torch.device("cpu")


def lists_of(mask: str) -> list[Tensor]:
    used = sorted(loads(parse(mask)))
    assert used in ([], [0], [1], [2])
    own = [leaves()[i] for i in used]
    text = mask.replace(f"x{used[0]}", "x0") if used else mask
    made: list[Tensor] = masked_steps.block_lists(own, text, *SPANS, CPU)
    return made


@pytest.mark.parametrize("name", sorted(MASKS.keys() - {"dead rows"}))
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_block_lists_of_an_expression_are_those_of_torch(
    name: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_steps, "EVALUATED", at_once)
    *ours, rows, keys = lists_of(MASKS[name])
    tokens = [torch.cat([torch.arange(a, b) for a, b in zip(s[::2], s[1::2], strict=True)]) for s in SPANS[2:]]
    assert torch.equal(rows, tokens[0]) and torch.equal(keys, tokens[1])
    allowed = evaluate(parse(MASKS[name]), primitives.indices(CPU, *SPANS), leaves())
    allowed = allowed.expand(*allowed.shape[:2], len(rows), len(keys))
    whole = allowed.expand(BATCH, HEADS[0], -1, -1)
    theirs = create_block_mask(
        lambda b, h, i, j: whole[b, h, i, j], BATCH, HEADS[0], len(rows), len(keys), device="cpu"
    )
    counts = (theirs.kv_num_blocks, theirs.full_kv_num_blocks, theirs.q_num_blocks, theirs.full_q_num_blocks)
    for got, want in zip(ours[::2], counts, strict=True):
        assert want is not None
        assert got.shape[:2] == allowed.shape[:2]  # once for all batch elements and heads that share the mask
        assert torch.equal(got.expand_as(want), want)


@pytest.mark.parametrize("name", sorted(MASKS.keys() - {"dead rows", "table"}))
def test_fake_block_lists_have_the_shapes_of_real_ones(name: str) -> None:
    used = sorted(loads(parse(MASKS[name])))
    real = lists_of(MASKS[name])
    text = MASKS[name].replace(f"x{used[0]}", "x0") if used else MASKS[name]
    with FakeTensorMode() as mode:
        own = [mode.from_tensor(leaves()[i]) for i in used]
        fake = masked_steps.block_lists(own, text, *SPANS, CPU)
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


def test_no_mask_of_full_size_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most `EVALUATED` pairs at once, or a row of squares."""
    sizes: list[int] = []
    squares = flex.squares

    def noted(mask: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(mask.numel())
        return squares(mask)

    monkeypatch.setattr(flex, "squares", noted)
    monkeypatch.setattr(masked_steps, "EVALUATED", 1 << 19)
    masked_steps.block_lists([], MASKS["window"], 2, 4, [0, 2000], [0, 1000], CPU)
    assert sum(sizes) == 2000 * 1000 and max(sizes) <= 1 << 19 and len(sizes) == 4


# --- models -----------------------------------------------------------------------------------------------------------


def model_step(group: dist.ProcessGroup, limit: int, compiler: str) -> tuple[dict[str, float], int]:
    """Errors of a padded GPT-2 against one device, and the number of whole steps that it ran."""
    with whole_steps() as calls, patch.object(masked_steps, "EVALUATED", 1):
        errors = parity(group, "gpt2", 53, True, True, unroll_limit=limit, tile=8, compiler=compiler)
    return errors, len(calls)


@pytest.mark.parametrize(("limit", "compiler"), [(0, "aot_eager"), slow(10_000, "inductor")])
def test_a_padded_model(workers: Workers, limit: int, compiler: str) -> None:
    found = workers.run(model_step, 3, limit, compiler)
    error, where = worst_of_model([errors for errors, _ in found])
    assert error < 1e-10 and all(calls for _, calls in found), where
