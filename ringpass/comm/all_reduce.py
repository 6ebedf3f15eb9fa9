"""Sums over ranks of several tensors in one message: at once, or started now and waited for later.

    flat = pack(gradients, silent=(), dtype)      # one buffer in the dtype in which they are added
    pending = start(flat, group)                  # the sum is under way: nobody may touch `flat`
    pending.wait()                                # `flat` holds the sum over ranks
    unpack(flat, sizes, dtypes)                   # in the dtypes that are asked for

All ranks start their sums in the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ringpass.comm import collectives
from ringpass.comm.p2p import PendingExchange
from ringpass.precision import accumulator

GRADIENTS = "sum of gradients"


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype in which tensors of `dtype` are added: float32 or float64; int64 for integers and bools.

    >>> sum_dtype(torch.bfloat16), sum_dtype(torch.complex128), sum_dtype(torch.int32)
    (torch.float32, torch.float64, torch.int64)
    """
    real = dtype.to_real() if dtype.is_complex else dtype
    return accumulator(real) if real.is_floating_point else torch.int64


def pack(xs: Sequence[Tensor], silent: Collection[int], dtype: torch.dtype) -> Tensor:
    """All elements of `xs` as one new 1-D tensor of `dtype`; a complex one counts two.  Zeros for `xs[i]`, i silent."""
    parts = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in xs]
    flat = xs[0].new_empty(sum(part.numel() for part in parts), dtype=dtype)
    places = [place.view(p.shape) for place, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
    for i in silent:
        places[i].zero_()
    heard = [i for i in range(len(xs)) if i not in silent]
    if heard:
        torch._foreach_copy_([places[i] for i in heard], [parts[i] for i in heard])
    return flat


def unpack(flat: Tensor, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The inverse of `pack`: new 1-D tensors of `sizes` elements and the given dtypes."""
    widths = [2 * n if dtype.is_complex else n for n, dtype in zip(sizes, dtypes, strict=True)]
    return [_cast(part, dtype) for part, dtype in zip(flat.split(widths), dtypes, strict=True)]


def _cast(part: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_complex:
        return torch.view_as_complex(part.view(-1, 2).to(dtype.to_real(), copy=True))
    return part.to(dtype, copy=True)


def reduce(xs: Sequence[Tensor], group: str, silent: Collection[int] = ()) -> list[Tensor]:
    """Sums over ranks, added in float32 (float64) and returned in each tensor's dtype: one all-reduce per dtype.

    This rank's `xs[i]`, i silent, count as zeros.  Raises PeerError if a rank died or did not arrive in time.
    """
    out: dict[int, Tensor] = {}
    for dtype, mine in by_sum_dtype([x.dtype for x in xs]).items():
        flat = pack([xs[i] for i in mine], [mine.index(i) for i in silent if i in mine], dtype)
        collectives.run_collective(dist.all_reduce, flat, group=group, what="sum")
        sums = unpack(flat, [xs[i].numel() for i in mine], [xs[i].dtype for i in mine])
        out |= {i: total.view(xs[i].shape) for i, total in zip(mine, sums, strict=True)}
    return [out[i] for i in range(len(xs))]


def by_sum_dtype(dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, list[int]]:
    """The positions of tensors of `dtypes` that are added in one message, in an order that ranks share."""
    found = sorted({sum_dtype(dtype) for dtype in dtypes}, key=str)
    return {dtype: [i for i, one in enumerate(dtypes) if sum_dtype(one) == dtype] for dtype in found}


def start(flat: Tensor, group: str) -> PendingExchange:
    """Starts to replace `flat` by its sum over the ranks of `group`.  Raises PeerError if a rank is lost."""
    work = collectives.start_collective(dist.all_reduce, flat, group=group, what=GRADIENTS)
    return PendingExchange(flat, flat, [work], (), group, GRADIENTS)
