"""Attention of one tile against a dense oracle in float64: values, gradients, masked rows, merged tiles, precision."""

from __future__ import annotations

import doctest
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ringpass.kernels import cpu as kernels_cpu
from ringpass.kernels import table as kernels
from ringpass.kernels.table import backward, choose, forward
from ringpass.kernels.tile import TileArgs, additive, merge_by_lse
from ringpass.precision import accumulator
from tests.support.tile_oracle import (
    SCALE,
    TILE_CASES,
    empty_row,
    keep_mask,
    noise,
    oracle,
    oracle_step,
    random_qkv,
    rows_without_keys,
)

CPU = torch.device("cpu")


def test_docstrings() -> None:
    assert doctest.testmod(kernels).failed == 0


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["chosen", "plain"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each case with the kernel that is chosen for it, and with the one that does everything."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "choose", lambda *_: "plain")
    return str(request.param)


@pytest.mark.parametrize("name", TILE_CASES)
def test_values_and_gradients(name: str, kernel: str) -> None:
    args, sizes = TILE_CASES[name]
    q, k, v = random_qkv(**sizes)
    grad = noise(2, q.shape[1], q.shape[2], v.shape[3], seed=3)
    (want_out, want_lse), want = oracle_step(q, k, v, args, grad)
    out, lse = forward(q, k, v, args)
    torch.testing.assert_close((out, lse), (want_out, want_lse))
    got = backward(grad, q, k, v, out, rows_without_keys(lse), args)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["rows without keys", "no bit", "mask and bias", "wide values", "learned bias of heads"]
)
def test_rows_without_keys_give_zero(name: str, dtype: torch.dtype, kernel: str) -> None:
    args, sizes = TILE_CASES[name]
    q, k, v = (x.to(dtype) for x in random_qkv(**sizes))
    out, lse = forward(q, k, v, args)
    grads = backward(torch.ones_like(out).to(dtype), q, k, v, out.to(dtype), rows_without_keys(lse), args)
    assert args.mask is not None
    blind = ~args.mask.expand(2, q.shape[1], 7, 9).any(-1)
    assert blind.any()
    assert (out[blind] == 0).all() and (lse[blind] == -torch.inf).all() and (grads[0][blind] == 0).all()
    assert not any(x.isnan().any() for x in (out, lse, *(g for g in grads if g is not None)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 3, 7, 8, 15, 16, 17, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_no_number_of_keys_loses_a_nan(keys: int, dtype: torch.dtype, causal: bool) -> None:
    """torch's CPU op gives 0 for a row of which every score is NaN, if there are fewer keys than a vector holds."""
    q, k, v = (noise(2, heads, keys, 8, seed=heads).to(dtype) for heads in (4, 2, 2))
    q[0, 1, keys // 2] = torch.nan
    k[1, 0] = torch.nan
    out, lse = forward(q, k, v, TileArgs(SCALE, causal))
    lost = torch.zeros(2, 4, keys, dtype=torch.bool)
    lost[0, 1, keys // 2] = lost[1, :2] = True
    assert (out.isnan().all(-1) == lost).all() and (lse.isnan() == lost).all()
    grads = backward(torch.ones_like(out), q, k, v, out.to(dtype), lse, TileArgs(SCALE, causal))
    assert (grads[0].isnan().any(-1) == lost).all()


@pytest.mark.parametrize(
    ("kernel", "causal"),
    [
        ("plain", False),
        ("plain", True),
        ("chosen", False),
        ("chosen", True),
    ],
    indirect=["kernel"],
)
def test_a_bias_of_minus_infinity_is_a_mask(causal: bool, kernel: str) -> None:
    """Also where causality takes what the bias leaves of a row."""
    bias = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    bias[..., 2, :3] = -torch.inf
    bias[..., 4, :] = -torch.inf
    q, k, v = random_qkv(lengths=(7, 7))
    grad = torch.ones_like(q)
    as_bias, as_mask = TileArgs(SCALE, causal, bias=bias), TileArgs(SCALE, causal, mask=bias == 0)
    (want_out, want_lse), want = oracle_step(q, k, v, as_mask, grad)
    out, lse = forward(q, k, v, as_bias)
    torch.testing.assert_close((out, lse), (want_out, want_lse))
    got = backward(grad, q, k, v, out, rows_without_keys(lse), as_bias)
    torch.testing.assert_close(got[:3], tuple(want[:3]))


@pytest.mark.parametrize(("length", "rows"), [(1500, 4 * kernels_cpu.SMALLEST), (1501, 1502)])
def test_a_mirrored_tile_makes_no_mask_of_its_size(length: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[tuple[int, int]] = []

    def noted(q: Tensor, k: Tensor, args: TileArgs) -> Tensor | None:
        masks.extend([(q.shape[2], k.shape[2])] if args.mirrored else [])
        return additive(q, k, args)

    monkeypatch.setattr(kernels_cpu, "additive", noted)
    args = TileArgs(SCALE, mirrored=True)
    q, k, v = random_qkv(heads=(1, 1), lengths=(length, length))
    (want_out, want_lse), want = oracle_step(q, k, v, args, torch.ones_like(q))
    out, lse = forward(q, k, v, args)
    torch.testing.assert_close((out, lse), (want_out, want_lse))
    torch.testing.assert_close(backward(torch.ones_like(q), q, k, v, out, lse, args)[:3], tuple(want[:3]))
    most_rows, most_keys = (max(sizes) for sizes in zip(*masks, strict=True))
    assert most_rows < rows
    assert most_keys < 2 * kernels_cpu.SMALLEST


# --- tiles ------------------------------------------------------------------------------------------------------------


def of_tile(args: TileArgs, q: slice, k: slice) -> TileArgs:
    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(*x.shape[:2], 8, 12)[:, :, q, k]

    return replace(args, mask=part(args.mask), bias=part(args.bias), keep=part(args.keep))


UNTILED: dict[str, TileArgs] = {
    "plain": TileArgs(SCALE),
    "mask and bias": TileArgs(SCALE, mask=empty_row(2, 1, 8, 12), bias=noise(1, 4, 8, 12)),
    "key mask": TileArgs(SCALE, mask=torch.arange(12).view(1, 1, 1, 12) < torch.tensor([4, 12]).view(2, 1, 1, 1)),
    "dropout": TileArgs(SCALE, mask=keep_mask(2, 1, 8, 12), keep=keep_mask(2, 4, 8, 12), dropout=0.4),
}


@pytest.mark.parametrize("name", UNTILED)
def test_merged_tiles_equal_one_tile(name: str, kernel: str) -> None:
    args = UNTILED[name]
    q, k, v = random_qkv(heads=(4, 2), lengths=(8, 12))
    grad = noise(2, 4, 8, 8, seed=3)
    (want_out, want_lse), want = oracle_step(q, k, v, args, grad)
    spans = [slice(0, 4), slice(4, 5), slice(5, 12)]
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)
    for span in spans:
        out, lse = merge_by_lse(out, lse, *forward(q, k[:, :, span], v[:, :, span], of_tile(args, slice(0, 8), span)))
    torch.testing.assert_close((out, lse), (want_out, want_lse))

    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in (slice(0, 3), slice(3, 8)):
        for span in spans:
            inputs = grad[:, :, rows], q[:, :, rows], k[:, :, span], v[:, :, span], out[:, :, rows]
            part = backward(*inputs, rows_without_keys(lse)[:, :, rows], of_tile(args, rows, span))
            dq[:, :, rows] += part[0]
            dk[:, :, span] += part[1]
            dv[:, :, span] += part[2]
    torch.testing.assert_close([dq, dk, dv], want[:3])


def test_merge_of_nothing_and_of_extremes() -> None:
    out, none = torch.ones(1, 1, 3, 2), torch.full((1, 1, 3), -torch.inf)
    merged, lse = merge_by_lse(0 * out, none, 0 * out, none)
    assert (merged == 0).all() and (lse == -torch.inf).all()
    big = torch.tensor([[[1e4, -1e4, 80.0]]])
    for pair in ((out, big, 0 * out, none), (0 * out, none, out, big)):
        merged, lse = merge_by_lse(*pair)
        assert torch.equal(merged, out) and torch.equal(lse, big)
    merged, lse = merge_by_lse(out, big, 3 * out, big)
    torch.testing.assert_close(merged, 2 * out)


def strided(x: Tensor) -> list[Tensor]:
    """`x` in other layouts: heads and rows swapped, rows apart, last dim not dense."""
    apart = torch.empty(*x.shape[:2], 2 * x.shape[2], x.shape[3], dtype=x.dtype)[:, :, ::2]
    thin = torch.empty(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)[..., ::2]
    return [x.transpose(1, 2).contiguous().transpose(1, 2), apart.copy_(x), thin.copy_(x), x.mT.contiguous().mT]


@pytest.mark.parametrize("layout", range(4))
def test_inputs_may_have_any_strides(layout: int, kernel: str) -> None:
    args = TileArgs(SCALE, mask=keep_mask(2, 1, 7, 9))
    q, k, v = random_qkv()
    grad = noise(2, 4, 7, 8, seed=3)
    out, lse = forward(q, k, v, args)
    want = backward(grad, q, k, v, out, lse, args)
    q, k, v, grad, out = (strided(x)[layout] for x in (q, k, v, grad, out))
    torch.testing.assert_close(forward(q, k, v, args), (out, lse))
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(backward(grad, q, k, v, out, lse, args), want)


# --- precision --------------------------------------------------------------------------------------------------------


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, want, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_no_less_exact_than_torch(dtype: torch.dtype, causal: bool, kernel: str) -> None:
    args = TileArgs(SCALE, causal)
    low = [x.to(dtype) for x in random_qkv(lengths=(96, 96), widths=(32, 32))]
    q, k, v = (x.double() for x in low)
    grad = noise(2, 4, 96, 32, seed=3).to(dtype)
    (out, _), grads = oracle_step(q, k, v, args, grad.double())
    want = [out, *(g for g in grads if g is not None)]

    inputs = [x.clone().requires_grad_() for x in low]
    theirs = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], is_causal=causal, scale=SCALE)
    torch_errors = errors([theirs.detach(), *torch.autograd.grad(theirs, inputs, grad)], want)

    ours, lse = forward(low[0], low[1], low[2], args)
    assert lse.dtype == accumulator(dtype) == torch.float32
    ours = ours.to(dtype)
    dq, dk, dv, _ = backward(grad, low[0], low[1], low[2], ours, lse, args)
    for mine, reference in zip(errors([ours, *(x.to(dtype) for x in (dq, dk, dv))], want), torch_errors, strict=True):
        assert mine <= 1.5 * reference + torch.finfo(dtype).eps / 4


def test_bf16_tiles_merged_in_float32_are_no_less_exact_than_one_tile() -> None:
    low = [x.to(torch.bfloat16) for x in random_qkv(lengths=(64, 256), widths=(32, 32))]
    q, k, v = low
    want, _ = oracle(q.double(), k.double(), v.double(), TileArgs(SCALE))
    one_tile, _ = forward(q, k, v, TileArgs(SCALE))
    spans = [slice(start, start + 64) for start in range(0, 256, 64)]
    parts = [forward(q, k[:, :, span], v[:, :, span], TileArgs(SCALE)) for span in spans]
    out, lse = parts[0][0].float(), parts[0][1]
    for more, more_lse in parts[1:]:
        out, lse = merge_by_lse(out, lse, more.float(), more_lse)
    (one,), (merged,) = errors([one_tile], [want]), errors([out.bfloat16()], [want])
    assert merged <= 1.5 * one


def test_large_scores_do_not_overflow(kernel: str) -> None:
    q, k, v = (100 * x.float() for x in random_qkv(lengths=(8, 8)))
    out, lse = forward(q, k, v, TileArgs(10.0))
    assert out.isfinite().all() and lse.isfinite().all()
    assert all(x.isfinite().all() for x in backward(torch.ones_like(q), q, k, v, out, lse, TileArgs(10.0))[:3])


# --- the table --------------------------------------------------------------------------------------------------------

KEEP, BIAS = torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 1)
TABLE: list[tuple[torch.device, torch.dtype, tuple[int, int], TileArgs, str]] = [
    (CPU, torch.float32, (8, 8), TileArgs(1.0), "flash_cpu"),
    (CPU, torch.float64, (8, 8), TileArgs(1.0, causal=True), "flash_cpu"),
    (CPU, torch.bfloat16, (64, 64), TileArgs(1.0, mask=KEEP), "flash_cpu"),
    (CPU, torch.float32, (8, 8), TileArgs(1.0, bias=BIAS), "flash_cpu"),
    (CPU, torch.float32, (8, 8), TileArgs(1.0, bias=BIAS, learned=True), "plain"),
    (CPU, torch.float32, (8, 8), TileArgs(1.0, keep=KEEP, dropout=0.1), "plain"),
    (CPU, torch.float32, (8, 4), TileArgs(1.0), "plain"),
    (CPU, torch.float16, (8, 8), TileArgs(1.0), "plain"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[1]} {row[4]}")
def test_table_of_kernels(row: tuple[torch.device, torch.dtype, tuple[int, int], TileArgs, str]) -> None:
    device, dtype, widths, args, name = row
    assert choose(device, dtype, widths, (7, 7), args) == name


@pytest.mark.parametrize("name", TILE_CASES)
def test_kernels_do_not_write_to_their_inputs(name: str, kernel: str) -> None:
    args, sizes = TILE_CASES[name]
    q, k, v = random_qkv(**sizes)
    grad = torch.ones(2, q.shape[1], q.shape[2], v.shape[3], dtype=q.dtype)
    out, lse = forward(q, k, v, args)
    lse = rows_without_keys(lse)
    before = [x.clone() for x in (grad, q, k, v, out, lse)]
    backward(grad, q, k, v, out, lse, args)
    assert all(map(torch.equal, before, (grad, q, k, v, out, lse)))


def test_learned_bias_gradient_has_its_own_shape() -> None:
    shapes: list[tuple[int, ...]] = [(1, 1, 1, 1), (2, 1, 1, 9), (1, 4, 7, 1), (2, 4, 7, 9)]
    q, k, v = random_qkv()
    for shape in shapes:
        args = TileArgs(SCALE, bias=noise(*shape), learned=True)
        out, lse = forward(q, k, v, args)
        dbias = backward(torch.ones_like(out), q, k, v, out, lse, args)[3]
        assert dbias is not None and tuple(dbias.shape) == shape


def test_gradients_by_finite_differences(kernel: str) -> None:
    q, k, v = random_qkv(heads=(2, 1), lengths=(3, 4), widths=(2, 2))
    mask = TileArgs(SCALE, mask=empty_row(1, 1, 3, 4))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return forward(q, k, v, mask)[0]

    weight = noise(2, 2, 3, 2, seed=5)
    out, lse = forward(q, k, v, mask)
    got = backward(weight, q, k, v, out, rows_without_keys(lse), mask)
    for index, x in enumerate((q, k, v)):
        numeric = finite_differences(lambda y, i=index: (attend(*replaced((q, k, v), i, y)) * weight).sum(), x)  # type: ignore[misc]
        torch.testing.assert_close(got[index], numeric, rtol=1e-5, atol=1e-7)


def replaced(xs: tuple[Tensor, Tensor, Tensor], index: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = [*xs]
    out[index] = x
    return out[0], out[1], out[2]


def finite_differences(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    grad = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=x.dtype)
        shift[i] = step
        grad.view(-1)[i] = (f(x + shift.view_as(x)) - f(x - shift.view_as(x))) / (2 * step)
    return grad
