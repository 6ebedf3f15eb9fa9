"""Patterns as boolean tensors, and a model that takes a pattern as its mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ringpass.masks.evaluate import evaluate
from ringpass.patterns import Pattern

TOKENS = 24


def dense_mask(pattern: Pattern, length: int = TOKENS) -> Tensor:
    """(S, S): which keys each query sees."""
    at = torch.arange(length)
    one = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    where = {"b": one, "h": one, "q": at.view(1, 1, -1, 1), "k": at.view(1, 1, 1, -1)}
    return evaluate(pattern.expr, where, []).to(torch.bool).expand(1, 1, length, length)[0, 0]


class SelfAttention(nn.Module):
    """Attention with a mask of its own, which the option's pattern is ANDed with."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.project, self.causal = nn.Linear(8, 24), causal

    def forward(self, x: Tensor, also: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        if also is None:
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=also)
        return out.transpose(1, 2).reshape(*x.shape[:2], 8)


def out_and_grad(out: Tensor, model: SelfAttention) -> tuple[Tensor, Tensor]:
    """The output and the gradient of its square."""
    return out, torch.autograd.grad(out.square().sum(), model.project.weight)[0]
