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
    flash       CUDA, float16 and bfloat16, sm80 or newer: full and causal tiles, widths to 256, V as wide as Q
    cudnn       CUDA, float16 and bfloat16, sm90, widths to 128: full and causal tiles that flash does not take
    flex        CUDA, float16 and bfloat16, sm80, widths 16 to 256: tiles of 128 x 128 blocks with a mask and no bias
    efficient   CUDA, float32, float16, bfloat16 (sm80): any tile with a mask or a bias, and those the others refuse
    plain       ATen arithmetic: dropout, a bias that needs its gradient, any other function of the scores, float64 on
                CUDA, other devices, ROCm

A mirrored tile (row i sees keys i and after) is computed with all rows in reverse, as a causal one; `flash_cpu` takes
it as it is.

No CUDA kernel has been run on a device yet: `pytest tests/kernels/test_gpu.py` and `python -m benchmarks.kernels` do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringpass.kernels import cpu as kernels_cpu
from ringpass.kernels import cuda as kernels_cuda
from ringpass.kernels.plain import plain, plain_backward
from ringpass.kernels.tile import Grads, TileArgs

# --- the table --------------------------------------------------------------------------------------------------------

WIDE = torch.float64, torch.float32
HALF = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class KernelSpec:
    """What a kernel supports.  `takes`: what may act on the scores, beside the scale; `needs`: what must."""

    kernel: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    takes: frozenset[str]
    needs: frozenset[str] = frozenset()
    since: tuple[int, int] = (0, 0)  # compute capability
    widths: tuple[int, int] = (1, 1 << 16)  # narrowest and widest head
    block: int = 1  # lengths are multiples of it
    wide_values: bool = False  # V width != Q width
    long_causal: bool = True  # causal tiles with Lq != Lk


MASKED = frozenset({"causal", "mask", "bias"})
TABLE = (
    KernelSpec("flash_cpu", "cpu", (*WIDE, torch.bfloat16), MASKED),
    KernelSpec("flash", "cuda", HALF, frozenset({"causal"}), since=(8, 0), widths=(1, 256), long_causal=False),
    KernelSpec("cudnn", "cuda", HALF, frozenset({"causal"}), since=(9, 0), widths=(1, 128)),
    KernelSpec("flex", "cuda", HALF, MASKED - {"bias"}, frozenset({"mask"}), since=(8, 0), widths=(16, 256), block=128),
    KernelSpec("efficient", "cuda", (torch.float32, torch.float16), MASKED, since=(5, 0), wide_values=True),
    KernelSpec("efficient", "cuda", (torch.bfloat16,), MASKED, since=(8, 0), wide_values=True),
)
"""In order of preference; `plain` takes the rest."""


def choose(
    device: torch.device, dtype: torch.dtype, head_widths: tuple[int, int], lengths: tuple[int, int], args: TileArgs
) -> str:
    """Name of the kernel for a tile with (Q, V) `head_widths` and (query, key) `lengths`.

    Depends on nothing but its arguments and the device's compute capability, so all ranks choose alike if their devices
    are alike.
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
    for spec in TABLE:
        served = device.type == spec.device and dtype in spec.dtypes and spec.needs <= present <= spec.takes
        values = spec.wide_values or head_widths[0] == head_widths[1]
        width = spec.widths[0] <= min(head_widths) and max(head_widths) <= spec.widths[1]
        long = spec.long_causal or not args.causal or lengths[0] == lengths[1]
        blocks = all(n % spec.block == 0 for n in lengths)
        if served and values and width and long and blocks and kernels_cuda.capability(device) >= spec.since:
            return spec.kernel
    return "plain"


def forward(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) of one tile; out in q's dtype for fused kernels, in the accumulator's for `plain`."""
    name = _chosen(q, k, v, args)
    if not args.mirrored or name in MIRRORING:
        return KERNELS[name][0](q, k, v, args)
    out, lse = KERNELS[name][0](q.flip(2), k.flip(2), v.flip(2), _unmirrored(args))
    return out.flip(2), lse.flip(2)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs) -> Grads:
    """(dq, dk, dv, dbias, *dparameters) of one tile, given the rows' global `out` and `lse`.

    dbias has the shape of the bias, and is None if the bias needs no gradient.
    """
    name = _chosen(q, k, v, args)
    if not args.mirrored or name in MIRRORING:
        return KERNELS[name][1](grad, q, k, v, out, lse, args)
    rows = (x.flip(2) for x in (grad, q, k, v, out, lse))
    run: Callable[..., Grads] = KERNELS[name][1]
    return *(g.flip(2) for g in run(*rows, _unmirrored(args))[:3]), None


def _unmirrored(args: TileArgs) -> TileArgs:
    """The arguments for a causal tile that equals the mirrored one with all rows in reverse."""
    assert args.keep is None and args.score is None and not args.learned, "the schedule mirrors fused tiles only"
    mask, bias = (None if x is None else x.flip(2, 3) for x in (args.mask, args.bias))
    return replace(args, causal=True, mirrored=False, mask=mask, bias=bias)


def _chosen(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> str:
    return choose(q.device, q.dtype, (q.shape[3], v.shape[3]), (q.shape[2], k.shape[2]), args)


Forward = Callable[[Tensor, Tensor, Tensor, TileArgs], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, TileArgs], Grads]
KERNELS: dict[str, tuple[Forward, Backward]] = {
    "flash_cpu": (kernels_cpu.flash_cpu, kernels_cpu.flash_cpu_backward),
    "flash": (kernels_cuda.flash, kernels_cuda.flash_backward),
    "cudnn": (kernels_cuda.cudnn, kernels_cuda.cudnn_backward),
    "efficient": (kernels_cuda.efficient, kernels_cuda.efficient_backward),
    "flex": (kernels_cuda.flex, kernels_cuda.flex_backward),
    "plain": (plain, plain_backward),
}
MIRRORING = ("flash_cpu",)  # take mirrored tiles as they are
