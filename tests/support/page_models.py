"""Small models for the page: layers of causal attention, with an op that gathers; and their reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ringpass
from ringpass.explain.report import Report


class Layer(nn.Module):
    """Pre-norm attention and feed-forward of (B, S, width)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        y: Tensor = x + self.feed(x)
        return y


class Layers(nn.Module):
    """Layers down to a number; `gathers`: an op before the last one that no rule covers."""

    def __init__(self, layers: int = 2, width: int = 16, causal: bool = True, gathers: bool = False) -> None:
        super().__init__()
        self.layers, self.gathers = nn.ModuleList(Layer(width, 2, causal) for _ in range(layers)), gathers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.gathers:
            x = torch.linalg.qr(x).Q
        return x.square().mean()


def step(model: nn.Module, tokens: int, width: int = 16) -> None:
    """A forward and a backward."""
    model(torch.randn(1, tokens, width, requires_grad=True)).backward()


def explained(model: nn.Module, tokens: int, world: int, rank: int = 0, width: int = 16, **options: Any) -> Report:
    """The report of a step, with the graphs as AOTAutograd hands them on."""
    x = torch.empty(1, tokens, width, requires_grad=True)
    chosen = {"compiler": "aot_eager", **options}
    return ringpass.explain(model, x, world_size=world, rank=rank, options=chosen)
