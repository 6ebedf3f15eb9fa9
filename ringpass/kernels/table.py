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
    flex        CUDA, float16 and bfloat16, sm80, widths 16 to 256: tiles of whole blocks of 128 with a mask and no bias
    efficient   CUDA, float32, float16, bfloat16 (sm80): any tile with a mask or a bias, and what the others do not take
    plain       ATen arithmetic: dropout, a bias that needs its gradient, any other function of the scores, float64 on
                CUDA, other devices, ROCm

A mirrored tile (row i sees keys i and after) is computed with all rows in reverse, as a causal one; `flash_cpu` takes
it as it is.

No CUDA kernel has been run on a device yet: `pytest tests/kernels/test_gpu.py` and `python -m benchmarks.kernels` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ringpass.kernels import cpu as kernels_cpu
from ringpass.kernels import cuda as kernels_cuda
from ringpass.kernels.tile import Grads, TileArgs, above_diagonal, accumulator, merge, per_key_head, per_query_head

__all__ = ["TileArgs", "accumulator", "backward", "choose", "forward", "merge"]

# --- the table --------------------------------------------------------------------------------------------------------

WIDE = torch.float64, torch.float32
HALF = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Row:
    """What a kernel is chosen for.  `takes`: what may act on the scores, beside the scale; `needs`: what must."""

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
    Row("flash_cpu", "cpu", (*WIDE, torch.bfloat16), MASKED),
    Row("flash", "cuda", HALF, frozenset({"causal"}), since=(8, 0), widths=(1, 256), long_causal=False),
    Row("cudnn", "cuda", HALF, frozenset({"causal"}), since=(9, 0), widths=(1, 128)),
    Row("flex", "cuda", HALF, MASKED - {"bias"}, frozenset({"mask"}), since=(8, 0), widths=(16, 256), block=128),
    Row("efficient", "cuda", (torch.float32, torch.float16), MASKED, since=(5, 0), wide_values=True),
    Row("efficient", "cuda", (torch.bfloat16,), MASKED, since=(8, 0), wide_values=True),
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
    for row in TABLE:
        served = device.type == row.device and dtype in row.dtypes and row.needs <= present <= row.takes
        values = row.wide_values or head_widths[0] == head_widths[1]
        width = row.widths[0] <= min(head_widths) and max(head_widths) <= row.widths[1]
        long = row.long_causal or not args.causal or lengths[0] == lengths[1]
        whole = all(n % row.block == 0 for n in lengths)
        if served and values and width and long and whole and kernels_cuda.capability(device) >= row.since:
            return row.kernel
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

    dbias has the bias's own shape, and is None where the bias needs no gradient.
    """
    name = _chosen(q, k, v, args)
    if not args.mirrored or name in MIRRORING:
        return KERNELS[name][1](grad, q, k, v, out, lse, args)
    rows = (x.flip(2) for x in (grad, q, k, v, out, lse))
    run: Callable[..., Grads] = KERNELS[name][1]
    return *(g.flip(2) for g in run(*rows, _unmirrored(args))[:3]), None


def _unmirrored(args: TileArgs) -> TileArgs:
    """What acts on the scores when all rows are in reverse."""
    assert args.keep is None and args.score is None and not args.learned, "the schedule mirrors fused tiles only"
    mask, bias = (None if x is None else x.flip(2, 3) for x in (args.mask, args.bias))
    return replace(args, causal=True, mirrored=False, mask=mask, bias=bias)


def _chosen(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> str:
    return choose(q.device, q.dtype, (q.shape[3], v.shape[3]), (q.shape[2], k.shape[2]), args)


# --- plain ------------------------------------------------------------------------------------------------------------


def _products(q: Tensor, k: Tensor, args: TileArgs) -> Tensor:
    """Scaled scores (B, H, Lq, Lk) in the accumulator's dtype."""
    dtype = accumulator(q.dtype)
    return torch.matmul(q.to(dtype), per_query_head(k, q).to(dtype).transpose(-1, -2)) * args.scale


def _scored(scores: Tensor, *parameters: Tensor, args: TileArgs) -> Tensor:
    """The scores through the tile's score function, in their own shape and dtype."""
    return scores if args.score is None else args.score(scores, *parameters).to(scores.dtype).expand(scores.shape)


def _pulled(products: Tensor, args: TileArgs) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """The scores, and how their gradient becomes that of the products and of the parameters."""
    if args.score is None:
        return products, lambda grad: (grad,)
    scores, pull, *_ = torch.func.vjp(partial(_scored, args=args), products, *args.parameters)
    return scores, pull


def _masked(scores: Tensor, q: Tensor, k: Tensor, args: TileArgs) -> Tensor:
    """The scores biased and masked."""
    if args.bias is not None:
        scores = scores + args.bias.to(scores.dtype)
    if args.causal:
        scores = scores.masked_fill(above_diagonal(q, k), -torch.inf)
    return scores if args.mask is None else scores.masked_fill(args.mask.logical_not(), -torch.inf)


def plain(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    scores = _masked(_scored(_products(q, k, args), *args.parameters, args=args), q, k, args)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return torch.matmul(_dropped(weights, args), per_query_head(v, q).to(weights.dtype)), lse


def plain_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, args: TileArgs) -> Grads:
    scores, pull = _pulled(_products(q, k, args), args)
    weights = torch.exp(_masked(scores, q, k, args) - lse.unsqueeze(-1))
    grad = grad.to(weights.dtype)
    dv = torch.matmul(_dropped(weights, args).transpose(-1, -2), grad)
    dweights = _dropped(torch.matmul(grad, per_query_head(v, q).to(grad.dtype).transpose(-1, -2)), args)
    delta = (grad * out.to(grad.dtype)).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta)
    dbias = dscores.sum_to_size(args.bias.shape) if args.learned and args.bias is not None else None
    dscores, *dparameters = pull(dscores)
    if args.score is not None:
        dscores = torch.where(weights == 0, 0.0, dscores)  # a slope without bound, where nothing is seen
    dq = torch.matmul(dscores, per_query_head(k, q).to(grad.dtype)) * args.scale
    dk = torch.matmul(dscores.transpose(-1, -2), q.to(grad.dtype)) * args.scale
    return dq, per_key_head(dk, k), per_key_head(dv, v), dbias, *dparameters


def _dropped(x: Tensor, args: TileArgs) -> Tensor:
    scale = 1.0 / (1.0 - args.dropout) if args.dropout < 1.0 else 0.0
    return x if args.keep is None else torch.where(args.keep, x * scale, 0.0)


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
