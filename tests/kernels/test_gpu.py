"""On a CUDA device: each kernel's numbers, the ring on thread ranks of one device, the code that Inductor writes.

Everything here is skipped where there is none.  The yardstick is `plain` in float64 on the same (rounded) inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code

from ringpass.kernels.blocks import rows_first
from ringpass.kernels.plain import plain, plain_backward
from ringpass.kernels.table import KERNELS, backward, choose
from ringpass.kernels.tile import TileArgs, merge_by_lse
from ringpass.masks.evaluate import evaluate
from ringpass.masks.expr import parse
from ringpass.ops import masked_steps
from ringpass.ops.primitives import indices
from ringpass.precision import accumulator
from tests.support.attention_parity import MASKS, dense_step, ring_step, tensors, worst
from tests.support.generated_code import check_transfers
from tests.support.models import MODELS, batch_for, loss_of
from tests.support.pipeline_stages import fake_ring, stages

pytestmark = pytest.mark.gpu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 1.5e-2, F16: 2e-3, F32: 1e-4}
SCALE = 0.15

# --- kernels ----------------------------------------------------------------------------------------------------------

SHAPES = {  # heads (H, G), query rows, keys of the two tiles; a causal first tile needs rows == keys
    "square": ((4, 4), 256, (256, 128)),
    "grouped": ((8, 2), 256, (256, 384)),
    "odd": ((3, 1), 157, (157, 43)),
    "long": ((2, 2), 100, (300, 65)),
}
KINDS = {
    "flash": ("full", "causal"),
    "cudnn": ("full", "causal"),
    "efficient": ("full", "causal", "mask", "bias"),
}
DTYPES = {"flash": (BF16, F16), "cudnn": (BF16, F16), "efficient": (BF16, F16, F32)}
CASES = [
    (name, dtype, kind, shape)
    for name, kinds in KINDS.items()
    for dtype in DTYPES[name]
    for kind in kinds
    for shape, (_, rows, keys) in SHAPES.items()
    if kind != "causal" or rows == keys[0]
]


def noise(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def args_of_both(kind: str, heads: int, rows: int, keys: tuple[int, int], dtype: torch.dtype) -> TileArgs:
    """What acts on both tiles together, as a mask and a bias; row 3 sees nothing, row 5 nothing in the first tile."""
    width = sum(keys)
    if kind == "full":
        return TileArgs(SCALE)
    if kind == "causal":
        seen = torch.ones(1, 1, rows, width, dtype=torch.bool, device="cuda")
        seen[..., : keys[0]] = seen[..., : keys[0]].tril()
        return TileArgs(SCALE, mask=seen)
    mask = torch.rand(2, 1, rows, width, generator=torch.Generator().manual_seed(7)).cuda() < 0.4
    mask[..., 3, :] = False
    mask[..., 5, : keys[0]] = False
    bias = noise(1, heads, rows, width, seed=8, dtype=dtype) if kind == "bias" else None
    return TileArgs(SCALE, mask=mask, bias=bias)


def tile_args(kind: str, both: TileArgs, first: bool, span: slice) -> TileArgs:
    """The part of one tile, as the schedule would describe it."""
    if kind == "full" or (kind == "causal" and not first):
        return TileArgs(SCALE)
    if kind == "causal":
        return TileArgs(SCALE, causal=True)
    mask, bias = (None if x is None else x[..., span] for x in (both.mask, both.bias))
    return replace(both, mask=mask, bias=bias)


def in_float64(args: TileArgs) -> TileArgs:
    return args if args.bias is None else replace(args, bias=args.bias.double())


def error(got: Tensor, want: Tensor) -> float:
    relative = (got.double() - want).norm() / want.norm().clamp_min(1e-300)
    return float(relative.nan_to_num(torch.inf))


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize(("name", "dtype", "kind", "shape"), CASES)
def test_two_merged_tiles_equal_one(name: str, dtype: torch.dtype, kind: str, shape: str, width: int) -> None:
    """Forward of both tiles, their merge, and the backward of each from the global out and lse."""
    (heads, groups), rows, keys = SHAPES[shape]
    q = noise(2, heads, rows, width, seed=0, dtype=dtype)
    k, v = (noise(2, groups, sum(keys), width, seed=s, dtype=dtype) for s in (1, 2))
    grad = noise(2, heads, rows, width, seed=3, dtype=dtype)
    both = args_of_both(kind, heads, rows, keys, dtype)
    exact = [x.double() for x in (q, k, v)]
    want_out, want_lse = plain(exact[0], exact[1], exact[2], in_float64(both))
    dead = want_lse == -torch.inf
    assert dead.any() == (kind in ("mask", "bias"))
    global_lse = want_lse.masked_fill(dead, torch.inf)
    want = plain_backward(grad.double(), exact[0], exact[1], exact[2], want_out, global_lse, in_float64(both))

    forward, back = KERNELS[name].forward, KERNELS[name].backward
    spans = [slice(0, keys[0]), slice(keys[0], sum(keys))]
    parts = [tile_args(kind, both, index == 0, span) for index, span in enumerate(spans)]
    tiles = [forward(q, k[:, :, s], v[:, :, s], a) for s, a in zip(spans, parts, strict=True)]
    for tile_out, tile_lse in tiles:
        assert tile_lse.shape == q.shape[:3] and tile_lse.dtype == accumulator(dtype) and tile_out.dtype == dtype
    out, lse = merge_by_lse(tiles[0][0].float(), tiles[0][1], tiles[1][0].float(), tiles[1][1])
    assert error(out, want_out) < TOLERANCE[dtype]
    assert torch.equal(lse == -torch.inf, dead) and (out[dead] == 0).all()
    torch.testing.assert_close(lse.double()[~dead], want_lse[~dead], rtol=1e-3, atol=1e-3)

    out, lse = out.to(dtype), lse.masked_fill(dead, torch.inf)
    dq = torch.zeros_like(q, dtype=torch.float64)
    for span, args in zip(spans, parts, strict=True):
        got = back(grad, q, k[:, :, span], v[:, :, span], out, lse, args)
        dq += got[0].double()
        assert error(got[1], want[1][:, :, span]) < 2 * TOLERANCE[dtype]
        assert error(got[2], want[2][:, :, span]) < 2 * TOLERANCE[dtype]
    assert error(dq, want[0]) < 2 * TOLERANCE[dtype] and (dq[dead] == 0).all()


@pytest.mark.parametrize(("name", "width"), [("flash", 20), ("flash", 200), ("flash", 256), ("efficient", 20)])
def test_padded_widths(name: str, width: int) -> None:
    dtype, args = BF16, TileArgs(SCALE)
    q, k, v, grad = (noise(2, 4, 70, width, seed=s, dtype=dtype) for s in range(4))
    exact = [x.double() for x in (q, k, v)]
    out, lse = plain(exact[0], exact[1], exact[2], args)
    want = plain_backward(grad.double(), exact[0], exact[1], exact[2], out, lse, args)
    assert error(KERNELS[name].forward(q, k, v, args)[0], out) < TOLERANCE[dtype]
    got = KERNELS[name].backward(grad, q, k, v, out.to(dtype), lse.float(), args)
    assert all(error(x, y) < 2 * TOLERANCE[dtype] for x, y in zip(got[:3], want[:3], strict=True))


def test_values_of_another_width() -> None:
    args = TileArgs(SCALE, causal=True)
    q, k = (noise(2, 4, 70, 64, seed=s, dtype=F32) for s in (0, 1))
    v, grad = (noise(2, 4, 70, 36, seed=s, dtype=F32) for s in (2, 3))
    exact = [x.double() for x in (q, k, v)]
    out, lse = plain(exact[0], exact[1], exact[2], args)
    want = plain_backward(grad.double(), exact[0], exact[1], exact[2], out, lse, args)
    assert error(KERNELS["efficient"].forward(q, k, v, args)[0], out) < TOLERANCE[F32]
    got = KERNELS["efficient"].backward(grad, q, k, v, out.float(), lse.float(), args)
    assert all(error(x, y) < TOLERANCE[F32] for x, y in zip(got[:3], want[:3], strict=True))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs sm90 or newer"
)
@pytest.mark.parametrize("batch", [1, 2])
def test_cudnn_comes_first_and_reads_operands_as_they_lie(batch: int) -> None:
    """Two backwards whose plans share a key: gradient and out of the second lie elsewhere than those of the first."""
    assert choose(torch.device("cuda"), BF16, (64, 64), (128, 128), TileArgs(SCALE, causal=True)) == "cudnn"
    args = TileArgs(SCALE)
    for first in (0, 64):
        q, k, v, grad = (noise(batch, 200, 4, 64, seed=s, dtype=BF16).transpose(1, 2) for s in range(4))
        q, k, v = (x[:, :, :128] for x in (q, k, v))
        grad = grad.contiguous()[:, :, first : first + 128]
        exact = [x.double() for x in (q, k, v)]
        out, lse = plain(exact[0], exact[1], exact[2], args)
        want = plain_backward(grad.double(), exact[0], exact[1], exact[2], out, lse, args)
        out = out.to(BF16) if first else rows_first(out.to(BF16))
        got = backward(grad, q, k, v, out, lse.float(), args)
        assert all(error(x, y) < 2 * TOLERANCE[BF16] for x, y in zip(got[:3], want[:3], strict=True))


# --- whole steps ------------------------------------------------------------------------------------------------------

STEPS = {
    "window": ("q - k < 100 & k <= q", False),
    "documents": ("k <= q & x0[b, q] == x0[b, k]", True),
    "heads": ("q - k < 50 * (h + 1) & k <= q", False),
}


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("lengths", [(256, 384), (157, 300)])
@pytest.mark.parametrize(("heads", "width"), [((4, 4), 64), ((8, 2), 128), ((3, 1), 48)])
@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_from_global_rows(
    name: str, heads: tuple[int, int], width: int, lengths: tuple[int, int], dtype: torch.dtype
) -> None:
    """One compiled call: its out and lse, and its gradients where most rows see more keys elsewhere."""
    (mask, has_leaf), (rows, keys) = STEPS[name], lengths
    leaves = [torch.arange(600, device="cuda").expand(2, -1) // torch.tensor([[90], [130]], device="cuda")]
    leaves = leaves if has_leaf else []
    spans = 2, heads[0], [200, 200 + rows], [0, 150, 180, 30 + keys]
    q, grad = (noise(2, rows, heads[0], width, seed=s, dtype=dtype).transpose(1, 2) for s in (0, 3))
    k, v = (noise(2, keys, heads[1], width, seed=s, dtype=dtype).transpose(1, 2) for s in (1, 2))
    allowed = evaluate(parse(mask), indices(q.device, *spans), leaves)
    args, exact = TileArgs(SCALE, mask=allowed), [x.double() for x in (q, k, v)]
    want_out, want_lse = plain(exact[0], exact[1], exact[2], args)
    lists = masked_steps.block_lists(leaves, mask, *spans, q.device)
    out, lse = masked_steps.attention_step(q, k, v, leaves, lists, mask, SCALE, [])
    dead = want_lse == -torch.inf
    assert error(out, want_out) < TOLERANCE[dtype] and torch.equal(lse == -torch.inf, dead)
    torch.testing.assert_close(lse.double()[~dead], want_lse[~dead], rtol=1e-3, atol=1e-3)
    whole_lse = torch.logaddexp(want_lse, torch.zeros_like(want_lse)).masked_fill(dead, torch.inf)
    whole = (want_out * torch.exp(want_lse - whole_lse).unsqueeze(-1)).to(dtype)
    want = plain_backward(grad.double(), exact[0], exact[1], exact[2], whole.double(), whole_lse, args)
    got = masked_steps.attention_step_backward(grad, q, k, v, whole, whole_lse.float(), leaves, lists, mask, SCALE, [])
    assert all(error(x, y) < 2 * TOLERANCE[dtype] for x, y in zip(got, want[:3], strict=True))


# --- the ring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 3e-2), (F32, 2e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", MASKS)
def test_ring_on_one_device(mask: str, layout: str, world: int, dtype: torch.dtype, tolerance: float) -> None:
    given = tensors(193, (4, 2), 64, dtype, "cuda")
    found = ring_step(mask, layout, world, 32, *given)
    assert worst(found, dense_step(mask, *given), layout) < tolerance


# --- generated code ---------------------------------------------------------------------------------------------------


def test_generated_code_is_triton_and_overlaps_in_order() -> None:
    with fake_ring(1, 3), stages() as seen:
        model = MODELS["nanogpt"].make(dtype=F32).cuda()
        run: Any = torch.compile(model, backend="ring_dilated", options={"layout": "zigzag"})
        batch = {name: x.cuda() for name, x in batch_for("nanogpt", 23, dtype=F32).items()}
        with fresh_cache():
            _, codes = run_and_get_code(lambda: loss_of(run(**batch)).backward())
    for stage, code in zip(("forward", "backward"), codes, strict=True):
        assert "@triton.jit" in code
        check_transfers(code, seen[stage][0])
