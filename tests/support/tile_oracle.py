"""Attention of one tile by its definition, in float64, and the cases on which every kernel is tested."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ringpass.kernels.tile import TileArgs

SCALE = 0.3


def oracle(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> tuple[Tensor, Tensor]:
    """(out, lse) by the definition; a row that sees nothing gives 0 and -inf."""
    ratio = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
    scores = q @ k.transpose(-1, -2) * args.scale
    scores = scores if args.bias is None else scores + args.bias
    allowed = torch.ones_like(scores, dtype=torch.bool)
    allowed = allowed.tril() if args.causal else allowed
    allowed = allowed.triu() if args.mirrored else allowed
    allowed = allowed if args.mask is None else allowed & args.mask
    seen = allowed.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~allowed & seen, -torch.inf), -1) * seen
    lse = torch.logsumexp(scores.masked_fill(~allowed & seen, -torch.inf), -1).masked_fill(~seen[..., 0], -torch.inf)
    if args.keep is not None:
        weights = weights * args.keep / (1 - args.dropout)
    return weights @ v, lse


def random_qkv(
    heads: tuple[int, int] = (4, 4), lengths: tuple[int, int] = (7, 9), widths: tuple[int, int] = (8, 8), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a batch of two, for (query, key) heads, (query, key) lengths and (key, value) widths."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], lengths[0], widths[0]), (heads[1], lengths[1], widths[0]), (heads[1], lengths[1], widths[1])]
    q, k, v = (torch.randn(2, *shape, dtype=torch.float64, generator=g) for shape in shapes)
    return q, k, v


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def keep_mask(*shape: int, rate: float = 0.6) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) < rate


def empty_row(*shape: int) -> Tensor:
    """A mask whose row 2 sees nothing."""
    mask = keep_mask(*shape)
    mask[..., 2, :] = False
    return mask


TILE_CASES: dict[str, tuple[TileArgs, dict[str, Any]]] = {
    "plain": (TileArgs(SCALE), {}),
    "one row": (TileArgs(SCALE), {"lengths": (1, 9)}),
    "one key": (TileArgs(SCALE), {"lengths": (7, 1)}),
    "causal": (TileArgs(SCALE, causal=True), {"lengths": (7, 7)}),
    "grouped heads": (TileArgs(SCALE), {"heads": (6, 2)}),
    "one key head": (TileArgs(SCALE, causal=True), {"heads": (4, 1), "lengths": (7, 7)}),
    "mask": (TileArgs(SCALE, mask=keep_mask(2, 4, 7, 9)), {}),
    "key mask": (TileArgs(SCALE, mask=keep_mask(2, 1, 1, 9)), {}),
    "query mask": (TileArgs(SCALE, mask=keep_mask(1, 1, 7, 1)), {}),
    "one bit": (TileArgs(SCALE, mask=torch.ones(1, 1, 1, 1, dtype=torch.bool)), {}),
    "no bit": (TileArgs(SCALE, mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool)), {}),
    "bias": (TileArgs(SCALE, bias=noise(1, 4, 7, 9)), {}),
    "bias of keys": (TileArgs(SCALE, bias=noise(2, 1, 1, 9)), {}),
    "mask and bias": (TileArgs(SCALE, mask=empty_row(2, 1, 7, 9), bias=noise(1, 4, 7, 9)), {}),
    "causal and bias": (TileArgs(SCALE, causal=True, bias=noise(1, 4, 7, 7)), {"lengths": (7, 7)}),
    "grouped heads, mask and bias": (
        TileArgs(SCALE, mask=empty_row(2, 1, 7, 9), bias=noise(1, 6, 7, 9)), {"heads": (6, 3)},
    ),
    "rows without keys": (TileArgs(SCALE, mask=empty_row(2, 1, 7, 9)), {}),
    "learned bias": (TileArgs(SCALE, bias=noise(1, 4, 7, 9), learned=True), {}),
    "learned bias of heads": (TileArgs(SCALE, mask=empty_row(2, 1, 7, 9), bias=noise(1, 4, 1, 1), learned=True), {}),
    "learned bias of keys": (TileArgs(SCALE, causal=True, bias=noise(2, 1, 1, 7), learned=True), {"lengths": (7, 7)}),
    "dropout": (TileArgs(SCALE, keep=keep_mask(2, 4, 7, 9), dropout=0.4), {}),
    "dropout, causal, grouped heads": (
        TileArgs(SCALE, causal=True, keep=keep_mask(2, 4, 7, 7), dropout=0.4), {"heads": (4, 2), "lengths": (7, 7)},
    ),
    "dropout, mask and learned bias": (
        TileArgs(
            SCALE, False, empty_row(2, 1, 7, 9), noise(1, 4, 7, 9), keep_mask(2, 4, 7, 9), dropout=0.4, learned=True
        ), {},
    ),
    "wide values": (TileArgs(SCALE, mask=empty_row(2, 1, 7, 9)), {"widths": (8, 5), "heads": (4, 2)}),
    "mirrored": (TileArgs(SCALE, mirrored=True), {"lengths": (7, 7), "heads": (4, 2)}),
    "mirrored, mask and bias": (
        TileArgs(SCALE, mirrored=True, mask=empty_row(2, 1, 7, 7), bias=noise(1, 4, 7, 7)), {"lengths": (7, 7)},
    ),
    "triangle in strips": (TileArgs(SCALE, causal=True), {"lengths": (301, 301), "heads": (4, 2)}),
    "triangle in parts": (TileArgs(SCALE, causal=True), {"lengths": (519, 519), "heads": (4, 2)}),
    "mirrored in parts": (TileArgs(SCALE, mirrored=True), {"lengths": (517, 517), "heads": (2, 1)}),
    "narrow values": (TileArgs(SCALE, causal=True), {"widths": (4, 12), "lengths": (7, 7)}),
}  # fmt: skip


def oracle_step(
    q: Tensor, k: Tensor, v: Tensor, args: TileArgs, grad: Tensor
) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
    """(out, lse), and the gradients of q, k, v and of a learned bias (None without one)."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    if args.learned and args.bias is not None:
        args = replace(args, bias=args.bias.clone().requires_grad_())
        inputs.append(args.bias)  # type: ignore[arg-type]
    out, lse = oracle(inputs[0], inputs[1], inputs[2], args)
    grads: list[Tensor | None] = list(torch.autograd.grad(out, inputs, grad))
    return (out.detach(), lse.detach()), grads if args.learned else [*grads, None]


def rows_without_keys(lse: Tensor) -> Tensor:
    """lse as the ring hands it to the backward: +inf where a row sees no key."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
