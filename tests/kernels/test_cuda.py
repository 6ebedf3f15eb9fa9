"""CUDA's tile kernels as far as a machine without CUDA goes.

The choices, and shapes on fake CUDA tensors (all of these ops have a fake kernel); what the ops are fed and how their
lse is read, on imitations.  Real numbers are for tests/kernels/test_gpu.py, FlexAttention is in test_flex.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import kernels as benchmark
from ringpass import torch_features
from ringpass.kernels import cuda as kernels_cuda
from ringpass.kernels import table as kernels
from ringpass.kernels.plain import plain, plain_backward
from ringpass.kernels.table import KERNELS, backward, choose, forward
from ringpass.kernels.tile import TileArgs
from ringpass.precision import accumulator
from tests.support.tile_oracle import TILE_CASES, noise, oracle_step, random_qkv, rows_without_keys

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BLACKWELL, HOPPER, AMPERE, TURING = (10, 0), (9, 0), (8, 0), (7, 5)
FULL, CAUSAL = TileArgs(0.3), TileArgs(0.3, causal=True)
BIT, ZERO = torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 1)
MASKED, BIASED = TileArgs(0.3, mask=BIT), TileArgs(0.3, bias=ZERO)
LEARNED, DROPPED = TileArgs(0.3, bias=ZERO, learned=True), TileArgs(0.3, keep=BIT, dropout=0.1)

CHOICES: list[tuple[tuple[int, int], torch.dtype, tuple[int, int], tuple[int, int], TileArgs, str]] = [
    (HOPPER, BF16, (64, 64), (64, 64), FULL, "cudnn"),
    (HOPPER, F16, (128, 128), (64, 64), CAUSAL, "cudnn"),
    (HOPPER, F16, (20, 20), (5, 9), FULL, "cudnn"),
    (BLACKWELL, BF16, (128, 128), (64, 64), CAUSAL, "cudnn"),
    (AMPERE, BF16, (64, 64), (64, 64), FULL, "flash"),
    (AMPERE, F16, (20, 20), (64, 64), CAUSAL, "flash"),
    (HOPPER, BF16, (256, 256), (64, 64), CAUSAL, "flash"),
    (HOPPER, BF16, (264, 264), (64, 64), CAUSAL, "efficient"),
    (HOPPER, BF16, (64, 64), (64, 32), CAUSAL, "cudnn"),
    (HOPPER, BF16, (256, 256), (64, 32), CAUSAL, "efficient"),
    (AMPERE, BF16, (64, 64), (64, 32), CAUSAL, "efficient"),
    (HOPPER, BF16, (64, 32), (64, 64), FULL, "efficient"),
    (HOPPER, BF16, (64, 64), (64, 64), MASKED, "efficient"),
    (HOPPER, BF16, (64, 64), (1024, 128), MASKED, "efficient"),
    (AMPERE, F16, (128, 128), (128, 128), TileArgs(0.3, causal=True, mask=BIT), "efficient"),
    (HOPPER, BF16, (8, 8), (128, 128), MASKED, "efficient"),
    (HOPPER, BF16, (64, 64), (128, 128), TileArgs(0.3, mask=BIT, bias=ZERO), "efficient"),
    (HOPPER, F32, (64, 64), (128, 128), MASKED, "efficient"),
    (HOPPER, BF16, (64, 64), (64, 64), BIASED, "efficient"),
    (HOPPER, F32, (64, 64), (64, 64), FULL, "efficient"),
    (HOPPER, F32, (64, 64), (64, 64), CAUSAL, "efficient"),
    (HOPPER, F64, (64, 64), (64, 64), FULL, "plain"),
    (HOPPER, BF16, (64, 64), (64, 64), LEARNED, "plain"),
    (HOPPER, BF16, (64, 64), (64, 64), DROPPED, "plain"),
    (TURING, F16, (64, 64), (64, 64), FULL, "efficient"),
    (TURING, F32, (64, 64), (64, 64), MASKED, "efficient"),
    (TURING, BF16, (64, 64), (64, 64), FULL, "plain"),
    ((0, 0), BF16, (64, 64), (64, 64), FULL, "plain"),  # ROCm
]


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: f"{row[5]} {row[0]} {row[1]} {row[2]} {row[3]}")
def test_choices(
    row: tuple[tuple[int, int], torch.dtype, tuple[int, int], tuple[int, int], TileArgs, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capability, dtype, widths, lengths, args, name = row
    monkeypatch.setattr(kernels_cuda, "capability", lambda device: capability)
    assert choose(torch.device("cuda"), dtype, widths, lengths, args) == name


@pytest.mark.parametrize(
    ("capability", "width", "args", "name"),
    [
        (HOPPER, 64, CAUSAL, "flash"),
        (HOPPER, 256, FULL, "flash"),
        (HOPPER, 264, FULL, "efficient"),
        (HOPPER, 64, MASKED, "efficient"),
        (BLACKWELL, 64, CAUSAL, "cudnn"),  # FlashAttention-3 runs on sm90 only
    ],
)
def test_an_active_flash_attention_3_comes_first(
    capability: tuple[int, int], width: int, args: TileArgs, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_cuda, "capability", lambda device: capability)
    assert torch_features.flash_implementation() == "FA2"
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    assert torch_features.flash_implementation() == "FA3"
    assert choose(torch.device("cuda"), BF16, (width, width), (64, 64), args) == name
    assert choose(torch.device("cuda"), F32, (width, width), (64, 64), args) == "efficient"


def test_no_capability_without_cuda() -> None:
    assert kernels_cuda.capability(torch.device("cpu")) == (0, 0)


def test_the_last_kernel_takes_every_tile() -> None:
    assert [*KERNELS][-1] == "plain" and KERNELS["plain"] == kernels.KernelSpec(plain, plain_backward)


# --- on fake CUDA tensors ---------------------------------------------------------------------------------------------

SHAPES = {  # heads (H, G), lengths (Lq, Lk), widths (D, Dv)
    "square": ((4, 4), (64, 64), (64, 64)),
    "grouped": ((6, 2), (37, 53), (64, 64)),
    "odd": ((4, 1), (37, 53), (20, 20)),
    "wide": ((2, 2), (33, 33), (200, 200)),
    "values": ((4, 2), (37, 53), (64, 36)),
}
TAKEN = {"flash": (BF16, F16), "cudnn": (BF16, F16), "efficient": (BF16, F16, F32), "plain": (BF16, F32, F64)}


def fake(shape: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of out, rows first as a model's projections give them."""
    (heads, groups), (rows, keys), (width, value_width) = SHAPES[shape]
    sizes = (heads, rows, width), (groups, keys, width), (groups, keys, value_width), (heads, rows, value_width)
    made = [torch.empty(2, n, h, d, dtype=dtype, device="cuda").transpose(1, 2) for h, n, d in sizes]
    return made[0], made[1], made[2], made[3]


def check(name: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, args: TileArgs) -> None:
    """Runs a kernel; its results have the promised shapes and dtypes."""
    out, lse = KERNELS[name].forward(q, k, v, args)
    assert out.shape == grad.shape and out.dtype == (accumulator(q.dtype) if name == "plain" else q.dtype)
    assert lse.shape == q.shape[:3] and lse.dtype == accumulator(q.dtype)
    dq, dk, dv, dbias = KERNELS[name].backward(grad, q, k, v, out.to(q.dtype), lse, args)
    assert (dq.shape, dk.shape, dv.shape, dbias) == (q.shape, k.shape, v.shape, None)
    assert all(x.device.type == "cuda" for x in (out, lse, dq, dk, dv))


SAME_WIDTH = ("flash", "cudnn")  # never given values of another width
CASES = [
    (name, dtype, shape)
    for name, dtypes in TAKEN.items()
    for dtype in dtypes
    for shape in SHAPES
    if not (shape == "values" and name in SAME_WIDTH)
]


@pytest.mark.parametrize(("name", "dtype", "shape"), CASES)
def test_shapes_on_fake_cuda(name: str, dtype: torch.dtype, shape: str) -> None:
    with FakeTensorMode():
        q, k, v, grad = fake(shape, dtype)
        check(name, q, k, v, grad, FULL)
        if name in ("efficient", "plain"):
            mask = torch.empty(2, 1, 1, k.shape[2], dtype=torch.bool, device="cuda")
            bias = torch.empty(q.shape[1], q.shape[2], 1, dtype=torch.float32, device="cuda").unsqueeze(0)
            check(name, q, k, v, grad, TileArgs(0.3, mask=mask, bias=bias))
        if q.shape[2] == k.shape[2]:
            check(name, q, k, v, grad, CAUSAL)


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "cudnn"), (F32, "efficient"), (F64, "plain")])
def test_chosen_kernel_runs_on_fake_cuda(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_cuda, "capability", lambda device: HOPPER)
    called: list[str] = []
    spec = KERNELS[name]

    def noted(*given: Any) -> Any:
        called.append(name)
        return spec.forward(*given) if len(given) == 4 else spec.backward(*given)

    monkeypatch.setitem(KERNELS, name, replace(spec, forward=noted, backward=noted))
    with FakeTensorMode():
        q, k, v, grad = fake("square", dtype)
        out, lse = forward(q, k, v, CAUSAL)
        dq, dk, dv, _ = backward(grad, q, k, v, out, lse, CAUSAL)
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    assert called == [name, name]


def test_flash_refuses_a_causal_tile_that_is_not_square() -> None:
    with FakeTensorMode():
        q, k, v, _ = fake("grouped", BF16)
        with pytest.raises(AssertionError, match="bottom-right"):
            kernels_cuda.flash(q, k, v, CAUSAL)


@pytest.mark.parametrize(("width", "padded"), [(8, 8), (20, 24), (192, 192), (200, 256), (256, 256)])
def test_widths_flash_sees(width: int, padded: int) -> None:
    assert kernels_cuda._flash_width(torch.empty(1, 1, 1, width)) == padded


def test_inputs_are_copied_only_where_they_are_not_aligned() -> None:
    rows_first = torch.randn(2, 7, 3, 16, dtype=BF16).transpose(1, 2)
    flat = torch.randn(1 + rows_first.numel(), dtype=BF16)
    shifted = flat[1:].view(2, 3, 7, 16)
    thin = torch.randn(2, 3, 7, 18, dtype=BF16)[..., :16]
    for x in (rows_first, rows_first.narrow(2, 3, 4)):
        assert kernels_cuda._fit(x, 16) is x
    for x in (shifted, thin, rows_first.contiguous().mT.contiguous().mT):
        fitted = kernels_cuda._fit(x, 16)
        assert fitted.is_contiguous() and fitted.storage_offset() == 0 and torch.equal(fitted, x)
    wider = kernels_cuda._fit(thin, 24)
    assert torch.equal(wider[..., :16], thin) and not wider[..., 16:].any()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_cudnn_gets_operands_as_they_lie(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """No operand is copied that has the strides of q; the others get them."""
    given: list[Tensor] = []

    class Noted(Imitation):
        def _scaled_dot_product_cudnn_attention_backward(self, *inputs: Any, scale: float) -> tuple[Tensor, ...]:
            given.extend(inputs[:5])
            return super()._scaled_dot_product_cudnn_attention_backward(*inputs, scale=scale)

    monkeypatch.setattr(kernels_cuda, "aten", Noted())
    sizes = [(2, 4, 7, 8)[i] for i in order]
    grad, q, k, v, out = (noise(*sizes, seed=s).permute(order) for s in range(5))
    kernels_cuda.cudnn_backward(grad, q, k, v, out, noise(2, 4, 7), FULL)
    assert all(a is b for a, b in zip(given, (grad, q, k, v, out), strict=True))
    del given[:]
    longer = noise(2, 9, 4, 8).transpose(1, 2)
    kernels_cuda.cudnn_backward(longer[:, :, 1:8], q, k, v, out, noise(2, 4, 7), FULL)
    assert torch.equal(given[0], longer[:, :, 1:8]) and given[4] is out


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (1, 4, 7, 1), (1, 1, 1, 1), (2, 4, 7, 9), (2, 1, 7, 16)])
def test_rows_of_an_additive_mask_are_aligned(shape: tuple[int, ...]) -> None:
    keys = max(shape[3], 9)
    q, k, added = torch.empty(2, 4, 7, 8), torch.empty(2, 4, keys, 8), torch.randn(shape)
    bias = kernels_cuda._bias_rows(added, q, k)
    assert torch.equal(bias, added.expand(2, 4, 7, keys))
    assert bias.stride(3) == 1 and all(stride % 16 == 0 for stride in bias.stride()[:3])


# --- on imitations of the ops -----------------------------------------------------------------------------------------


class Imitation:
    """CUDA's ATen ops as their sources read, on CPU: what they demand, and how they return lse.

    It shows that the wrappers feed and read them by these rules, not that the rules are right:
    tests/kernels/test_gpu.py does.
    """

    def _scaled_dot_product_flash_attention(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, *, scale: float
    ) -> tuple[Tensor, Tensor, None]:
        self.demand(8, q, k, v)
        return *plain(q, k, v, TileArgs(scale, causal)), None

    def _scaled_dot_product_flash_attention_backward(self, *given: Any, scale: float) -> tuple[Tensor, ...]:
        grad, q, k, v, out, lse, _, _, rows, keys, dropout, causal, _, _ = given
        self.demand(8, grad, q, k, v, out)
        assert (rows, keys, dropout) == (q.shape[2], k.shape[2], 0.0) and lse.is_contiguous()
        return plain_backward(grad, q, k, v, out, lse, TileArgs(scale, causal))[:3]

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: None, wanted: bool, dropout: float, causal: bool, *, scale: float
    ) -> tuple[Tensor, Tensor, None]:
        assert wanted and bias is None
        self.demand(8, q, k, v)
        out, lse = plain(q, k, v, TileArgs(scale, causal))
        return out, lse.unsqueeze(-1), None

    def _scaled_dot_product_cudnn_attention_backward(self, *given: Any, scale: float) -> tuple[Tensor, ...]:
        grad, q, k, v, out, lse, _, _, bias, _, _, rows, keys, dropout, causal = given
        self.demand(8, grad, q, k, v, out)
        assert (rows, keys, dropout, bias) == (q.shape[2], k.shape[2], 0.0, None)
        assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
        assert grad.stride() == out.stride() == torch.empty_like(q).stride(), "a plan is kept by q, k and v alone"
        return plain_backward(grad, q, k, v, out, lse.squeeze(-1), TileArgs(scale, causal))[:3]

    def _scaled_dot_product_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Any, wanted: bool, dropout: float, causal: bool, *, scale: float
    ) -> tuple[Tensor, Tensor, None]:
        assert wanted and q.shape[1] == k.shape[1] == v.shape[1]
        self.demand(16 // q.element_size(), q, k, v, *([] if bias is None else [bias]))
        out, lse = plain(q, k, v, TileArgs(scale, causal, bias=bias))
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        return out, F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf), None

    def _scaled_dot_product_efficient_attention_backward(self, *given: Any, scale: float) -> tuple[Tensor | None, ...]:
        grad, q, k, v, bias, out, lse, _, _, dropout, wanted, causal = given
        self.demand(16 // q.element_size(), grad, q, k, v, out, *([] if bias is None else [bias]))
        assert q.shape[1] == k.shape[1] == v.shape[1] and wanted == (True, True, True, False) and dropout == 0.0
        assert lse.shape[2] % 32 == 0 and lse.is_contiguous() and (lse[..., q.shape[2] :] == torch.inf).all()
        lse, args = lse[..., : q.shape[2]], TileArgs(scale, causal, bias=bias)
        return *plain_backward(grad, q, k, v, out, lse, args)[:3], None

    def demand(self, unit: int, *tensors: Tensor) -> None:
        """The last stride is 1 and rows are aligned; widths are multiples, but a bias ends anywhere."""
        for x in tensors:
            assert x.dim() == 4 and x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.dtype == tensors[0].dtype
            assert all(stride % unit == 0 for n, stride in zip(x.shape[:3], x.stride(), strict=False) if n > 1)
        assert tensors[0].shape[3] % unit == tensors[1].shape[3] % unit == 0


IMITATED = [
    (kernel, name)
    for kernel in ("flash", "cudnn", "efficient")
    for name, (args, sizes) in TILE_CASES.items()
    if args.keep is None
    and not args.learned
    and (kernel == "efficient" or (args.mask is None and args.bias is None and "widths" not in sizes))
]


@pytest.mark.parametrize(("kernel", "name"), IMITATED)
def test_wrappers_on_imitations(kernel: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_cuda, "aten", Imitation())
    monkeypatch.setattr(kernels, "choose", lambda *_: kernel)
    args, sizes = TILE_CASES[name]
    for widths in ((8, 8), (5, 5), (8, 3)) if kernel == "efficient" else ((8, 8), (5, 5)):
        q, k, v = random_qkv(**{**sizes, "widths": widths})
        grad = noise(*q.shape[:3], v.shape[3], seed=3)
        (want_out, want_lse), want = oracle_step(q, k, v, args, grad)
        out, lse = forward(q, k, v, args)
        torch.testing.assert_close((out, lse), (want_out, want_lse))
        got = backward(grad, q, k, v, out, rows_without_keys(lse), args)
        torch.testing.assert_close(got[:3], tuple(want[:3]))


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run for minutes")
def test_benchmark_says_that_it_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().out


def test_benchmark_knows_every_kernel_of_cuda() -> None:
    assert benchmark.KINDS.keys() == (KERNELS.keys() - {"flash_cpu"}) | {"flex"}
