"""The log-sum-exp merge in place, one kernel on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor

from ringpass.kernels.compiled import compiled
from ringpass.kernels.tile import merge_by_lse


def merge_in_place(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merges (more, more_lse) into (out, lse): (B, H, L, D) and (B, H, L), `more` in any dtype.

    On CUDA the arithmetic is one kernel, compiled once for all sizes; elsewhere it is five ATen ops.
    """
    if out.device.type == "cuda":
        fused_merge()(out, lse, more, more_lse)
    else:
        merge_by_lse(out, lse, more.to(out.dtype), more_lse, in_place=True)


@cache
def fused_merge() -> Callable[..., None]:
    """The merge as a compiled function."""
    return compiled(written_merge, dynamic=True)


def written_merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """The merge as the compiler gets it: computed, then written."""
    merged, total = merge_by_lse(out, lse, more.to(out.dtype), more_lse)
    out.copy_(merged)
    lse.copy_(total)
