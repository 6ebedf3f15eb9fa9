"""Attention of all tiles of a step at once, under a mask that is a function: torch's FlexAttention.

A *step mask* says which rows see which keys, as a function that the kernel calls for each pair, and as the lists of the
128 x 128 squares that hold some pair (*mixed*) or all (*full*); the other squares are skipped.  Both cost no memory of
the size of the mask.  Rows and keys may be of any number.

The operators below FlexAttention's public function are called, since these alone take the *global* out and lse of the
rows in the backward, so that no forward runs again.  Their lse is a logarithm to the base 2; here it is a natural one.
They are compiled for CUDA, once for each kind of shapes; elsewhere they run as torch's dense arithmetic.  A row that
sees no key gives out 0 and lse -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ringpass.kernels.compiled import compiled, top_level
from ringpass.kernels.cuda import capability

MaskMod = Callable[..., Tensor]
"""(b, h, row, key, *buffers), each index a scalar tensor -> whether the row sees the key, a scalar tensor."""
SQUARE = 128  # edge of the squares of the block lists
WIDTHS = 16, 256  # narrowest and widest head
LN2 = math.log(2)
OPTIONS = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,  # a row may see nothing
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
}
"""The options of the kernels, as the public function gives them."""


@dataclass(frozen=True)
class StepMask:
    """Which rows see which keys.

    mask_mod: the function; equal masks should share it, since a kernel is compiled for each.
    lists: what `block_lists` makes of it.
    buffers: the tensors that it reads.
    """

    mask_mod: MaskMod
    lists: Sequence[Tensor]
    buffers: Sequence[Tensor] = ()


def takes_step(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether FlexAttention is the kernel for a masked step: on CUDA, sm80 or newer, in float16 or bfloat16."""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and half and WIDTHS[0] <= width <= WIDTHS[1] and capability(device) >= (8, 0)


def flex_step(q: Tensor, k: Tensor, v: Tensor, mask: StepMask, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of a step: (B, H, Lq, Dv) in q's dtype, (B, H, Lq) in float32 or better."""
    run = _runner(_forward, mask.mask_mod, q.device.type)
    out, lse = run(q, k, _wide(v), *mask.lists, *mask.buffers, scale)
    return out.narrow(3, 0, v.shape[3]), lse


def flex_step_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: StepMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a step from the rows' global `out` and `lse`; a row with lse +inf gives no gradient."""
    run = _runner(_backward, mask.mask_mod, q.device.type)
    dq, dk, dv = run(_wide(grad), q, k, _wide(v), _wide(out), lse, *mask.lists, *mask.buffers, scale)
    return dq, dk, dv.narrow(3, 0, v.shape[3])


# --- torch's operators ------------------------------------------------------------------------------------------------

LISTS = 8


def _forward(mask_mod: MaskMod, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from torch._higher_order_ops.flex_attention import flex_attention

    *given, scale = rest
    blocks = _block_mask(mask_mod, given[:LISTS], q, k)
    out, lse, *_ = flex_attention(q, k, v, _score, blocks, scale, OPTIONS, (), tuple(given[LISTS:]))
    return out, lse * LN2


def _backward(
    mask_mod: MaskMod, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from torch._higher_order_ops.flex_attention import flex_attention_backward

    *given, scale = rest
    blocks, of_lse = _block_mask(mask_mod, given[:LISTS], q, k), torch.zeros_like(lse)
    back: Any = _score_backward  # torch's own caller passes a graph
    dq, dk, dv, _ = flex_attention_backward(
        q, k, v, out, lse / LN2, grad, of_lse, _score, back, blocks, scale, OPTIONS, (), tuple(given[LISTS:])
    )
    return dq, dk, dv


def _score(score: Tensor, *index: Tensor) -> Tensor:
    return score


def _score_backward(score: Tensor, *index_and_grad: Tensor) -> list[Tensor | None]:
    """The gradients of the score and of the four indices."""
    return [index_and_grad[-1], None, None, None, None]


def _block_mask(mask_mod: MaskMod, lists: Sequence[Tensor], q: Tensor, k: Tensor) -> tuple[Any, ...]:
    from torch.nn.attention.flex_attention import BlockMask

    lengths, (a, b, c, d, e, f, g, h) = (q.shape[2], k.shape[2]), lists
    return BlockMask(lengths, a, b, c, d, e, f, g, h, BLOCK_SIZE=(SQUARE, SQUARE), mask_mod=mask_mod).as_tuple()


@cache
def _runner(function: Callable[..., Any], mask_mod: MaskMod, device_type: str) -> Callable[..., Any]:
    """`function` for one mask, compiled on CUDA.

    Dynamo puts the call into its graph as it is: the operators are for the stages after it.
    """

    def run(*given: Any) -> Any:
        return function(mask_mod, *given)

    def dense(*given: Any) -> Any:
        with top_level():
            return run(*given)

    if device_type != "cuda":
        return dense
    opaque = torch.compiler.allow_in_graph(run)
    return compiled(lambda *given: opaque(*given))


def _wide(x: Tensor) -> Tensor:
    """Values, padded with zeros where they are narrower than the kernels' products."""
    return x if x.shape[3] >= WIDTHS[0] else F.pad(x, (0, WIDTHS[0] - x.shape[3]))


# --- block lists ------------------------------------------------------------------------------------------------------


def squares(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(some, all): of each square of an evaluated mask (B, H, Lq, Lk), whether it has some pair, and whether all."""
    rows, keys = mask.shape[2:]
    padded = F.pad(mask, (0, -keys % SQUARE, 0, -rows % SQUARE))
    apart = padded.unflatten(3, (-1, SQUARE)).unflatten(2, (-1, SQUARE))
    return apart.any(5).any(3), apart.all(5).all(3)


def block_lists(some: Tensor, every: Tensor) -> list[Tensor]:
    """The lists of a BlockMask from the `squares` (B or 1, H or 1, rows, columns): int32.

    Counts and indices of the mixed squares of each row of squares, of the full ones, then both of each column.
    """
    mixed = some & ~every
    given = (mixed, every, mixed.transpose(2, 3), every.transpose(2, 3))
    return [x for present in given for x in _ordered(present)]


def _ordered(present: Tensor) -> tuple[Tensor, Tensor]:
    """(count, indices) of the squares present in each row, present ones first."""
    ones = present.to(torch.int32)
    order = torch.argsort(ones, dim=-1, descending=True, stable=True)
    return ones.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()
