"""Tiny models that move what attention does not: halos, states of scans, few queries, frozen layers.

>>> MODELS["halos"].make()                          # float64; entries as those of `tests.support.zoo`
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import HEADS, WIDTH, Attention, Block
from tests.support.zoo_entry import ONE, Batch, Entry, floats


class Halos(nn.Module):
    """Convolutions along the sequence, centred and causal, around an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv1d(WIDTH, WIDTH, 5, padding=2), nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH)
        self.block = Block(causal=True)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        y = self.block(F.gelu(self.before(x.transpose(1, 2))).transpose(1, 2))
        y = self.after(F.pad(y.transpose(1, 2), (3, 0))).transpose(1, 2)
        return y, F.mse_loss(y, target)


class Scan(nn.Module):
    """An attention, then a state that passes from chunk to chunk of eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.queries, self.norm = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.LayerNorm(WIDTH)
        self.block = Block(causal=True)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(x)
        q, k, v = (self._chunks(y) for y in (self.queries(x), self.keys(x).sigmoid(), x))
        state, out = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]), torch.zeros_like(v)
        for i in range(q.shape[2]):
            out[:, :, i] = q[:, :, i] @ state + (q[:, :, i] @ k[:, :, i].mT).tril() @ v[:, :, i]
            state = state * 0.5 + k[:, :, i].mT @ v[:, :, i]
        y = self.norm(x + out.flatten(2, 3)[:, :, : x.shape[1]].transpose(1, 2).flatten(2))
        return y, F.mse_loss(y, target)

    def _chunks(self, x: Tensor) -> Tensor:
        """(B, S, H * D) -> (B, H, chunks, 8, D), padded."""
        x = x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)
        x = F.pad(x, (0, 0, 0, -x.shape[2] % 8))
        return x.reshape(*x.shape[:2], -1, 8, x.shape[-1])


class FewQueries(nn.Module):
    """Learned queries that read a long sequence, as a Perceiver's."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.block, self.attention = Block(causal=False), Attention(causal=False)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x = self.block(x)
        y = self.attention(self.queries.expand(x.shape[0], -1, -1), x)
        return y, F.mse_loss(x * y.sum(1, keepdim=True), target)


class ShortDecoder(nn.Module):
    """A short sequence that reads a long one with one head: its queries move, not the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.kv = nn.ModuleList(Block(causal=True) for _ in range(2)), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        y, memory = self.blocks[0](target), self.blocks[1](x)
        q, (k, v) = y.unsqueeze(1), (z.unsqueeze(1) for z in self.kv(memory).chunk(2, -1))
        z = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return z, F.mse_loss(z, target)


class Frozen(nn.Module):
    """Two equal layers; nothing before the second one learns."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(2))
        self.blocks[0].requires_grad_(False)

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        return x, F.mse_loss(x, target)


def _vectors(length: int, labels: bool, padding: bool) -> Batch:
    return {"x": floats(length), "target": floats(length, 1)}


def _translated(length: int, labels: bool, padding: bool) -> Batch:
    return {"x": floats(8 * length), "target": floats(length, 1)}


MODELS: dict[str, Entry] = {
    "halos": Entry(lambda _: Halos(), _vectors, attentions=ONE),
    "scan": Entry(lambda _: Scan(), _vectors, attentions=ONE),
    "few_queries": Entry(lambda _: FewQueries(), _vectors, attentions=ONE),
    "short_decoder": Entry(lambda _: ShortDecoder(), _translated, attentions=ONE),
    "frozen": Entry(lambda _: Frozen(), _vectors, attentions=ONE),
}
