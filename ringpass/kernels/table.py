"""Attention of one tile: the table of kernels, forward and backward.

    >>> import torch
    >>> q = k = v = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    >>> out, lse = forward(q, k, v, TileArgs(scale=0.5, causal=True))
    >>> dq, dk, dv, _ = backward(torch.ones_like(out), q, k, v, out, lse, TileArgs(scale=0.5, causal=True))

q is (B, H, Lq, D), k (B, G, Lk, D), v (B, G, Lk, Dv), H a multiple of G: query head j reads key/value head j // (H/G).
`lse` is the log of the sum of exponentials of each row's scores, (B, H, Lq), float32 (float64 for float64 inputs).
A row that sees no key gives out 0 and lse -inf.  The backward takes the *global* out and lse of the rows, so that the
gradients of several tiles add up to the exact gradient; a row with lse +inf there gives no gradient.

    flash_cpu   CPU, all dtypes but float16: every tile that has no dropout, no learned bias, V as wide as Q
    cudnn       CUDA, float16 and bfloat16, sm90 or newer, widths to 128: full and causal tiles, V as wide as Q; not on
                sm90 while FlashAttention-3 is active
    flash       CUDA, float16 and bfloat16, sm80 or newer: full and causal tiles, widths to 256, V as wide as Q
    efficient   CUDA, float32, float16, bfloat16 (sm80): any tile with a mask or a bias, and those the others refuse
    plain       ATen arithmetic: dropout, a bias that needs its gradient, any other function of the scores, float64 on
                CUDA, other devices, ROCm

On CUDA in float16 and bfloat16, all tiles of a step that need a mask and nothing else are one call of FlexAttention
(`ringpass.kernels.flex`), not tiles of this table.

A mirrored tile (row i sees keys i and after) is computed with all rows in reverse, as a causal one; `flash_cpu` takes
it as it is.

No CUDA kernel has been run on a device yet: `pytest tests/kernels/test_gpu.py` and `python -m benchmarks.kernels` do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringpass import torch_features
from ringpass.kernels import cpu as kernels_cpu
from ringpass.kernels import cuda as kernels_cuda
from ringpass.kernels.plain import plain, plain_backward
from ringpass.kernels.tile import Grads, TileArgs
from ringpass.precision import accumulator

# --- the table --------------------------------------------------------------------------------------------------------

Forward = Callable[[Tensor, Tensor, Tensor, TileArgs], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, TileArgs], Grads]
Capability = tuple[int, int]
WIDE = torch.float64, torch.float32
HALF = torch.float16, torch.bfloat16
MASKED = frozenset({"causal", "mask", "bias"})
ANYTHING = MASKED | {"dropout", "learned", "score"}


@dataclass(frozen=True)
class KernelSpec:
    """A kernel and the tiles that it supports.

    forward, backward: as `forward` and `backward` below.
    device: the type of device, None: any.
    dtypes: those of q, k and v, each with the least compute capability that it needs; None: all.
    takes: what may act on the scores, beside the scale.
    widths: narrowest and widest head.
    wide_values: V may be wider or narrower than Q.
    long_causal: causal tiles may have Lq != Lk.
    mirrors: takes mirrored tiles as they are.
    narrow_gradients: its gradients come in the dtype of q; else in the accumulator's.
    yields_to_fa3: is left out on sm90 while FlashAttention-3, which `flash` then calls, is active.
    """

    forward: Forward
    backward: Backward
    device: str | None = None
    dtypes: Mapping[torch.dtype, Capability] | None = None
    takes: frozenset[str] = ANYTHING
    widths: tuple[int, int] = (0, sys.maxsize)
    wide_values: bool = True
    long_causal: bool = True
    mirrors: bool = False
    narrow_gradients: bool = False
    yields_to_fa3: bool = False


def _since(capability: Capability, *dtypes: torch.dtype) -> dict[torch.dtype, Capability]:
    return dict.fromkeys(dtypes, capability)


KERNELS: dict[str, KernelSpec] = {
    "flash_cpu": KernelSpec(
        kernels_cpu.flash_cpu,
        kernels_cpu.flash_cpu_backward,
        device="cpu",
        dtypes=_since((0, 0), *WIDE, torch.bfloat16),
        takes=MASKED,
        widths=(1, 1 << 16),
        wide_values=False,
        mirrors=True,
    ),
    "cudnn": KernelSpec(
        kernels_cuda.cudnn,
        kernels_cuda.cudnn_backward,
        device="cuda",
        dtypes=_since((9, 0), *HALF),
        takes=frozenset({"causal"}),
        widths=(1, 128),
        wide_values=False,
        narrow_gradients=True,
        yields_to_fa3=True,
    ),
    "flash": KernelSpec(
        kernels_cuda.flash,
        kernels_cuda.flash_backward,
        device="cuda",
        dtypes=_since((8, 0), *HALF),
        takes=frozenset({"causal"}),
        widths=(1, 256),
        wide_values=False,
        long_causal=False,
        narrow_gradients=True,
    ),
    "efficient": KernelSpec(
        kernels_cuda.efficient,
        kernels_cuda.efficient_backward,
        device="cuda",
        dtypes={**_since((5, 0), torch.float32, torch.float16), **_since((8, 0), torch.bfloat16)},
        takes=MASKED,
        widths=(1, 1 << 16),
    ),
    "plain": KernelSpec(plain, plain_backward),
}
"""In order of preference; the last one takes every tile."""


def choose(
    device: torch.device, dtype: torch.dtype, head_widths: tuple[int, int], lengths: tuple[int, int], args: TileArgs
) -> str:
    """Name of the kernel for a tile with (Q, V) `head_widths` and (query, key) `lengths`.

    Depends on nothing but its arguments, the device's compute capability, and the implementation of flash attention
    that is active, so all ranks choose alike if their devices are alike: they compare the last before a call.
    """
    acting = {
        "causal": args.causal or args.mirrored,
        "mask": args.mask is not None,
        "bias": args.bias is not None,
        "dropout": args.keep is not None,
        "learned": args.learned,
        "score": args.score is not None,
    }
    present = {name for name, acts in acting.items() if acts}
    for name, spec in KERNELS.items():
        width = spec.widths[0] <= min(head_widths) and max(head_widths) <= spec.widths[1]
        values = spec.wide_values or head_widths[0] == head_widths[1]
        long = spec.long_causal or not args.causal or lengths[0] == lengths[1]
        if present <= spec.takes and width and values and long and _runs_on(spec, device, dtype):
            return name
    raise AssertionError("the last kernel takes every tile")


def _runs_on(spec: KernelSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a kernel supports the device and, on it, the dtype."""
    if spec.device not in (None, device.type) or (spec.dtypes is not None and dtype not in spec.dtypes):
        return False
    capability = kernels_cuda.capability(device)
    if spec.yields_to_fa3 and capability[0] == 9 and torch_features.flash_implementation() == "FA3":
        return False
    return spec.dtypes is None or capability >= spec.dtypes[dtype]


def forward(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile; out in q's dtype for fused kernels, in the accumulator's for `plain`."""
    spec = _chosen(q, k, v, args)
    if not args.mirrored or spec.mirrors:
        return spec.forward(q, k, v, args)
    out, lse = spec.forward(q.flip(2), k.flip(2), v.flip(2), _unmirrored(args))
    return out.flip(2), lse.flip(2)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs) -> Grads:
    """(dq, dk, dv, dbias, *dparameters) of one tile, given the rows' global `out` and `lse`.

    dbias has the shape of the bias, and is None if the bias needs no gradient.
    """
    spec = _chosen(q, k, v, args)
    if not args.mirrored or spec.mirrors:
        return spec.backward(grad, q, k, v, out, lse, args)
    grad, q, k, v, out, lse = (x.flip(2) for x in (grad, q, k, v, out, lse))
    grads = spec.backward(grad, q, k, v, out, lse, _unmirrored(args))
    return *(g.flip(2) for g in grads[:3]), None


def gradient_dtype(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> torch.dtype:
    """The dtype of dq, dk and dv of a tile: that of q where its kernel computes them so, else the accumulator's."""
    return q.dtype if _chosen(q, k, v, args).narrow_gradients else accumulator(q.dtype)


def _unmirrored(args: TileArgs) -> TileArgs:
    """The arguments for a causal tile that equals the mirrored one with all rows in reverse."""
    assert args.keep is None and args.score is None and not args.learned, "the schedule mirrors fused tiles only"
    mask, bias = (None if x is None else x.flip(2, 3) for x in (args.mask, args.bias))
    return replace(args, causal=True, mirrored=False, mask=mask, bias=bias)


def _chosen(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> KernelSpec:
    return KERNELS[choose(q.device, q.dtype, (q.shape[3], v.shape[3]), (q.shape[2], k.shape[2]), args)]
