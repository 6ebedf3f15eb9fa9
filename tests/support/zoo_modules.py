"""Modules of the zoo that no library has: layers of others with a loss, and handwritten attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, LAYERS = 61, 32, 4, 2


class Regression(nn.Module):
    """(output, mean squared error) of what `run` makes of the batch."""

    def forward(self, target: Tensor | None = None, **batch: Any) -> tuple[Tensor, ...]:
        y = self.run(**batch)
        return (y,) if target is None else (y, F.mse_loss(y, target))

    run: Callable[..., Tensor]


class Denoiser(Regression):
    """A model of diffusers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def run(self, **batch: Any) -> Tensor:
        y: Tensor = self.model(**batch).sample
        return y


class Features(Regression):
    """An encoder of pictures, the last hidden states of which are its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def run(self, **batch: Any) -> Tensor:
        y: Tensor = self.model(**batch).last_hidden_state
        return y


class Classifier(nn.Module):
    """(logits, cross entropy)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.model(x)
        return (logits,) if target is None else (logits, F.cross_entropy(logits, target))


class Encoder(Regression):
    """nn.TransformerEncoder; causal if asked."""

    def __init__(self, causal: bool = False, norm_first: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        sizes = WIDTH, HEADS, 2 * WIDTH, 0.0
        layer = nn.TransformerEncoderLayer(*sizes, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.causal, self.batch_first = causal, batch_first

    def run(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1) if self.causal else None
        x = x if self.batch_first else x.transpose(0, 1)
        y: Tensor = self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=self.causal)
        return y if self.batch_first else y.transpose(0, 1)


class Translator(Regression):
    """nn.Transformer with a causal decoder."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 2 * WIDTH, "dropout": 0.0}
        self.transformer = nn.Transformer(**sizes, num_encoder_layers=1, num_decoder_layers=LAYERS, batch_first=True)

    def run(self, x: Tensor, source: Tensor) -> Tensor:
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        y: Tensor = self.transformer(source, x, tgt_mask=mask, tgt_is_causal=True)
        return y


class Heads(Regression):
    """nn.MultiheadAttention, with or without the weights that nobody reads; sequence-first inside."""

    def __init__(self, need_weights: bool, causal: bool = False, returned: bool = False) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(LAYERS))
        self.need_weights, self.causal, self.returned = need_weights, causal, returned

    def forward(self, target: Tensor | None = None, **batch: Any) -> tuple[Tensor, ...]:
        y, maps = self.attended(**batch)
        found = (maps, y) if self.returned else (y,)
        return found if target is None else (*found, F.mse_loss(y, target))

    def attended(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output, and the last attention's map."""
        n = x.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1) if self.causal else None
        for attention in self.attentions:
            settings = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": self.need_weights}
            y, maps = attention(x, x, x, **settings)
            x = x + y
        return x, maps


class HandwrittenGPT(nn.Module):
    """A GPT as in Karpathy's minGPT: `attend` says how its attention is written."""

    def __init__(self, attend: str) -> None:
        super().__init__()
        self.attend = attend
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.merge = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.causal: Tensor
        self.register_buffer("causal", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64), persistent=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, ...]:
        batch, n = idx.shape
        x = self.tokens(idx) + self.positions(torch.arange(n, device=idx.device))
        for qkv, merge in zip(self.qkv, self.merge, strict=True):
            q, k, v = (t.view(batch, n, HEADS, -1).transpose(1, 2) for t in qkv(x).split(WIDTH, dim=2))
            y = getattr(self, self.attend)(q, k, v)
            x = x + merge(y.transpose(1, 2).contiguous().view(batch, n, WIDTH))
        if targets is None:
            return (self.head(x[:, [-1], :]),)
        logits = self.head(x)
        return logits, F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))

    def flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def manual(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.causal[:, :, :n, :n] == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ v

    def einsum(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5
        future = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.finfo(scores.dtype).max)
        return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v)
