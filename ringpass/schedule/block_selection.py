"""Content-dependent block selection: approximate attention that reads only the most promising blocks of keys.

    run = torch.compile(model, backend="ring_dilated", options={"approximate": top_blocks(128, density=0.25)})

Queries and keys are averaged over blocks of tokens.  The weight of a pair of blocks is estimated by the scaled product
of their means, with softmax over key blocks and mean over heads.  Each block of queries keeps

    density    this fraction of the key blocks that the mask allows, those of largest weight; 1.0 is exact attention
    mass       the fewest key blocks that hold this fraction of the weight, up to rounding

and, in any case, the key block of the same tokens.  Under the option `along_curve`, blocks are intervals of the curve.
The part of the mask that does not depend on data is respected.  Padding that comes with the batch is masked too, but
its blocks may be chosen.  All heads of a batch element share one selection.  It is made in each forward, from block
means summed over all ranks, so all ranks choose the same blocks; the backward reuses it.  No gradient flows through the
choice.  Blocks that are not selected are neither computed nor sent.

Similar: MInference (arXiv 2407.02490), SeerAttention (2410.13276), XAttention (2503.16428).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ringpass.errors import OptionError
from ringpass.kernels.tile import per_query_head
from ringpass.layouts.hilbert import Order
from ringpass.layouts.ranges import Ranges
from ringpass.masks.constants import Array, DeviceCopies
from ringpass.masks.expr import B, Const, Expr, K, Load, Q, call, parse
from ringpass.masks.intervals import EMPTY_CODE, classify_all
from ringpass.patterns import MOST
from ringpass.precision import accumulator


@dataclass(frozen=True)
class TopBlocks:
    """The value of the option `approximate`, made by `top_blocks`.

    `block`: edge of a block in tokens; exactly one of `density` and `mass` is set.
    """

    block: int
    density: float | None
    mass: float | None

    def __post_init__(self) -> None:
        if type(self.block) is not int or not 1 <= self.block < MOST:
            raise OptionError(f"top_blocks: block must be an int of at least 1 and below 2**40, got {self.block!r}")
        given = {name: x for name, x in (("density", self.density), ("mass", self.mass)) if x is not None}
        if len(given) != 1:
            raise OptionError(
                f"top_blocks takes one of density and mass, got {len(given)} of them: "
                f"such as top_blocks({self.block}, density=0.25)"
            )
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise OptionError(f"top_blocks: {name} must be a number above 0 and at most 1, got {value!r}")

    def __str__(self) -> str:
        target = f"density={self.density:g}" if self.density is not None else f"mass={self.mass:g}"
        return f"top_blocks({self.block}, {target})"


def top_blocks(block: int = 128, *, density: float | None = None, mass: float | None = None) -> TopBlocks:
    """The option `approximate`: block selection by pooled products.

    >>> print(top_blocks(64, mass=0.9))
    top_blocks(64, mass=0.9)

    block: edge of a block, in tokens, at least 1.
    density: fraction of the blocks to keep, above 0 and at most 1.
    mass: fraction of the estimated attention weight to keep, above 0 and at most 1.

    Raises OptionError if an argument is out of range, or unless exactly one of `density` and `mass` is given.
    """
    return TopBlocks(block, density, mass)


def block_sums(x: Tensor, block: int, owned: Ranges, tokens: int, order: Order | None = None) -> Tensor:
    """(B, H, N, D): for each of N blocks, the sum of its tokens in `x` (B, H, L, D), which holds the tokens `owned`.

    With an `order`, `owned` are positions along it; blocks are still of tokens.  Summed in the accumulator's dtype.
    """
    spans = [torch.arange(start, stop, device=x.device) for start, stop in owned]
    at = torch.cat([torch.arange(0, device=x.device), *spans])
    at = (order.permutation.tensor(at)[at] if order else at) // block
    sums = x.new_zeros((*x.shape[:2], -(-tokens // block), x.shape[3]), dtype=accumulator(x.dtype))
    return sums.index_add_(2, at, x.to(sums.dtype))


def means(sums: Tensor, block: int, tokens: int) -> Tensor:
    """(B, H, N, D): the means of blocks, of which the last may be short, from their `sums` of the same shape."""
    starts = torch.arange(0, tokens, block, device=sums.device)
    return sums / (starts + block).clamp(max=tokens).sub(starts).unsqueeze(-1)


def choose(q: Tensor, k: Tensor, scale: float, mask: str, tokens: tuple[int, int], selection: TopBlocks) -> Tensor:
    """(B, Nq, Nk) bools: True where a pair of blocks is kept, from block means q (B, H, Nq, D) and k (B, G, Nk, D).

    `tokens`: number of queries and of keys.
    """
    allowed = _open_blocks(mask, tokens, selection.block).tensor(q)
    scores = (q @ per_query_head(k, q).mT * scale).masked_fill(~allowed, -torch.inf)
    weight = scores.softmax(-1).nan_to_num(0.0).mean(1)
    rank = weight + allowed  # masked blocks come last
    if tokens[0] == tokens[1]:
        rank = rank + allowed * torch.eye(len(allowed), device=q.device)  # the diagonal block comes first
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    if selection.density is not None:
        count = (allowed.sum(-1, keepdim=True).double() * selection.density - 1e-9).ceil()  # 0.07 * 100 is 7
        keep = torch.arange(order.shape[-1], device=q.device) < count
    else:
        ranked = weight.gather(-1, order)
        keep = ranked.cumsum(-1) - ranked < float(selection.mass or 0)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, keep.expand_as(order))
    return kept & allowed


def chosen_blocks(mask: Expr, leaf: int, selection: TopBlocks) -> Expr:
    """`mask` restricted to the pairs of blocks that leaf number `leaf` (B, Nq, Nk) keeps."""
    at = [call("floordiv", x, Const(selection.block)) for x in (Q, K)]
    return call("and", mask, Load(leaf, (B, *at)))


@lru_cache(maxsize=64)
def _open_blocks(mask: str, tokens: tuple[int, int], block: int) -> DeviceCopies:
    return DeviceCopies(open_blocks(parse(mask), tokens, block))


def open_blocks(expr: Expr, tokens: tuple[int, int], block: int) -> Array:
    """(Nq, Nk) bools: False where the mask of `tokens` (queries, keys) is empty in all of a pair of blocks."""
    edges = [(np.arange(0, n, block), np.minimum(np.arange(0, n, block) + block, n)) for n in tokens]
    (q, k), shape = edges, (len(edges[0][0]), len(edges[1][0]))
    pairs = [np.repeat(x, shape[1]) for x in q], [np.tile(x, shape[0]) for x in k]
    kinds = classify_all(expr, (pairs[0][0], pairs[0][1]), (pairs[1][0], pairs[1][1]))
    found: Array = (kinds != EMPTY_CODE).reshape(shape)
    return found
