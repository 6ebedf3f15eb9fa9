"""Tiny seeded models that the numerics tests run, and their batches.

>>> model = MODELS["llama"].make()                                       # float64, 2 layers
>>> batch = batch_for("llama", 23, labels=True, padding=True)            # keyword arguments, batch of 2
>>> outputs = model(**batch)
>>> loss_of(outputs).backward()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

VOCAB, WIDTH, HEADS, LAYERS, LONGEST, ROWS = 61, 32, 4, 2, 64, 2
WINDOW = 9  # tokens that a sliding layer sees: for Mistral and Gemma-3 back to q - 8, for ModernBERT 4 on either side
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
Batch = dict[str, Tensor]


class Attention(nn.Module):
    """Self-attention, or attention to ``memory``; q, k, v and output projections."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if memory is None else memory).chunk(2, dim=-1)
        q, k, v = (t.view(*t.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2) for t in (self.q(x), k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        merged: Tensor = self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH))
        return merged


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(causal)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class NanoGPT(nn.Module):
    """A home-grown GPT: positions by arange, the head tied to the token table; ``(logits, loss)``."""

    def __init__(self, break_graph: bool = False) -> None:
        super().__init__()
        self.break_graph = break_graph
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(LONGEST, WIDTH)
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for i, block in enumerate(self.blocks):
            if self.break_graph and i == 1:
                torch._dynamo.graph_break()
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), ignore_index=-100)


class Conditioned(nn.Module):
    """DiT-like: an MLP of the condition scales and shifts every token, and also feeds the pooled head.

    So one replicated value has consumers that are sharded and consumers that are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.modulation = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(LAYERS))
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(LAYERS))
        self.pooled = nn.Linear(2 * WIDTH, WIDTH)

    def forward(
        self, x: Tensor, condition: Tensor, target: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        c = self.condition(condition)
        for modulation, block in zip(self.modulation, self.blocks, strict=True):
            scale, shift = modulation(c).unsqueeze(1).chunk(2, dim=-1)
            x = block(x * (1 + scale) + shift)
        pooled = self.pooled(torch.cat([x.mean(1), c], dim=-1))
        loss = None if target is None else F.mse_loss(x, target) + (pooled * c).pow(2).mean()
        return x, pooled, loss


class PositionTable(nn.Module):
    """ViT-like: a learned table (1, S, D) is added to float tokens; non-causal; mean over the sequence, then a head."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, length, WIDTH) * 0.1)
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = x + self.table
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean(1))
        return logits, None if target is None else F.cross_entropy(logits, target)


class CrossBlock(nn.Module):
    """Causal self-attention, attention to the encoder's output, MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm, self.attention = Block(causal=True), nn.LayerNorm(WIDTH), Attention(causal=False)

    def forward(self, y: Tensor, memory: Tensor) -> Tensor:
        y = self.block(y + self.attention(self.norm(y), memory))
        return y


class Cross(nn.Module):
    """Encoder and decoder over two float sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block(causal=False) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(CrossBlock() for _ in range(LAYERS))

    def forward(self, source: Tensor, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        for block in self.encoder:
            source = block(source)
        for block in self.decoder:
            x = block(x, source)
        return x, None if target is None else F.mse_loss(x, target)


class AttentionWithCache(nn.Module):
    """Attention that also returns some of its keys."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.project, self.part = nn.Linear(8, 24), part

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), k[:, :, self.part]


def nanogpt() -> nn.Module:
    """Learned positions, tied head, loss in the graph."""
    return NanoGPT()


def two_graphs() -> nn.Module:
    """NanoGPT with a graph break between its two attention blocks."""
    return NanoGPT(break_graph=True)


def gpt2(dropout: float = 0.0) -> nn.Module:
    """Hugging Face GPT-2; ``dropout`` sets its three rates."""
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    sizes = {"vocab_size": VOCAB, "n_positions": LONGEST, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0))
    return model


def llama() -> nn.Module:
    """Hugging Face Llama: rotary positions, RMS norm, two query heads to each key head."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=LONGEST,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}


def mistral(window: int = WINDOW) -> nn.Module:
    """Hugging Face Mistral: each query sees the last ``window`` tokens."""
    sizes = {**SIZES, "num_key_value_heads": HEADS // 2}
    model: nn.Module = MistralForCausalLM(MistralConfig(**sizes, sliding_window=window, attn_implementation="sdpa"))
    return model


def gemma3(window: int = WINDOW) -> nn.Module:
    """Hugging Face Gemma-3: a sliding layer, then a full one."""
    sizes = {**SIZES, "num_key_value_heads": HEADS // 2, "head_dim": WIDTH // HEADS}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": WIDTH // HEADS}
    config = Gemma3TextConfig(**sizes, **layers, **SPECIAL, sliding_window=window, attn_implementation="sdpa")
    model: nn.Module = Gemma3ForCausalLM(config)
    return model


def bert(longest: int = LONGEST) -> nn.Module:
    """Hugging Face BERT without dropout: every token sees every other."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**SIZES, **rates, max_position_embeddings=longest, attn_implementation="sdpa")
    model: nn.Module = BertForMaskedLM(config)
    return model


def modernbert(window: int = WINDOW) -> nn.Module:
    """Hugging Face ModernBERT: a full layer, then one that sees ``window`` tokens around each."""
    layers = {"layer_types": ["full_attention", "sliding_attention"], "local_attention": window - 1}
    special = {**SPECIAL, "cls_token_id": 0, "sep_token_id": 0}
    config = ModernBertConfig(**SIZES, **layers, **special, attn_implementation="sdpa")
    model: nn.Module = ModernBertForMaskedLM(config)
    return model


def t5() -> nn.Module:
    """Hugging Face T5 without dropout: encoder and decoder, a learned bias by distance."""
    sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 2 * WIDTH}
    layers = {"num_layers": LAYERS, "num_heads": HEADS, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    distances = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    config = T5Config(**sizes, **layers, **distances, pad_token_id=0, eos_token_id=0, attn_implementation="sdpa")
    model: nn.Module = T5ForConditionalGeneration(config)
    return model


def conditioned() -> nn.Module:
    """A condition that sharded and replicated layers read."""
    return Conditioned()


def position_table(length: int = 23) -> nn.Module:
    """A learned position table of exactly ``length`` tokens."""
    return PositionTable(length)


def cross() -> nn.Module:
    """Cross-attention: two sequence axes."""
    return Cross()


@dataclass(frozen=True)
class Case:
    """A model and its batches; ``padded``: whether it takes a padding mask."""

    factory: Callable[..., nn.Module]
    make_batch: Callable[[int, bool, bool, int], Batch]
    padded: bool = False

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> nn.Module:
        """The model in training mode, the same on every rank; the caller's random state is untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _perturbed(self.factory(**options)).to(dtype).train()
        return _widened(model) if dtype == torch.float64 else model


def _perturbed(model: nn.Module) -> nn.Module:
    """Biases and norm weights start at 0 and 1; noise there keeps a wrong gradient from hiding."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


class WideRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    """Llama's norm, also Mistral's and T5's, without its step down to float32."""

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
        return scaled


class WideGemmaNorm(Gemma3RMSNorm):  # type: ignore[misc]
    """Gemma's norm without its step down to float32."""

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self._norm(x) * (1.0 + self.weight)
        return scaled


def wide_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """Hugging Face's causal loss without its step down to float32."""
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    return F.cross_entropy(logits.view(-1, vocab_size), targets, ignore_index=-100)


def wide_masked_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The same of its loss without a shift."""
    return F.cross_entropy(logits.view(-1, vocab_size), labels.view(-1), ignore_index=-100)


def _widened(model: nn.Module) -> nn.Module:
    """Hugging Face's models round to float32 in the loss and in RMS norms, whatever their dtype; undo that."""
    if isinstance(model, GPT2LMHeadModel | LlamaForCausalLM | MistralForCausalLM | Gemma3ForCausalLM):
        model.loss_function = wide_loss
    elif isinstance(model, ModernBertForMaskedLM):
        model.loss_function = wide_masked_loss
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm | MistralRMSNorm | T5LayerNorm):
            module.__class__ = WideRMSNorm
        elif isinstance(module, Gemma3RMSNorm):
            module.__class__ = WideGemmaNorm
    return model


def batch_for(
    name: str,
    length: int,
    labels: bool = True,
    padding: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Keyword arguments for ``MODELS[name]``: ``ROWS`` rows of ``length`` tokens, floats in ``dtype``."""
    case = MODELS[name]
    if padding and not case.padded:
        raise ValueError(f"expected a model that takes a padding mask for padding=True, got {name!r}")
    batch = case.make_batch(length, labels, padding, seed)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def _token_batch(length: int, labels: bool, padding: bool, seed: int) -> Batch:
    """Hugging Face: labels are the ids, -100 under padding; the model shifts them."""
    ids = torch.randint(0, VOCAB, (ROWS, length), generator=_generator(seed))
    batch = {"input_ids": ids}
    if padding:
        batch["attention_mask"] = padding_mask(ROWS, length)
    if labels:
        batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, -100) if padding else ids.clone()
    return batch


def _sequence_batch(length: int, labels: bool, padding: bool, seed: int) -> Batch:
    """The encoder has six tokens more than the decoder, and its padding mask is the only one."""
    batch = _token_batch(length + 6, False, padding, seed)
    targets = torch.randint(0, VOCAB, (ROWS, length), generator=_generator(seed + 1))
    return batch | {"labels" if labels else "decoder_input_ids": targets}


def padding_mask(rows: int, length: int) -> Tensor:
    """1 where a token counts. Row r lacks r + 3 tokens at its end, row 1 two more at its start."""
    position = torch.arange(length)
    ends = length - 3 - torch.arange(rows).unsqueeze(1)
    starts = torch.zeros(rows, 1, dtype=torch.long)
    starts[1:2] = 2
    return ((position >= starts) & (position < ends)).long()


def _nanogpt_batch(length: int, labels: bool, padding: bool, seed: int) -> Batch:
    """Targets are the next ids; the last of each row counts for nothing."""
    ids = torch.randint(0, VOCAB, (ROWS, length), generator=_generator(seed))
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    return {"idx": ids, "targets": targets} if labels else {"idx": ids}


def _conditioned_batch(length: int, labels: bool, padding: bool, seed: int) -> Batch:
    x, target = _floats(seed, 2, length)
    condition = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=_generator(seed + 1))
    return {"x": x, "condition": condition} | ({"target": target} if labels else {})


def _position_table_batch(length: int, labels: bool, padding: bool, seed: int) -> Batch:
    (x,) = _floats(seed, 1, length)
    target = torch.randint(0, VOCAB, (ROWS,), generator=_generator(seed + 1))
    return {"x": x} | ({"target": target} if labels else {})


def _cross_batch(length: int, labels: bool, padding: bool, seed: int) -> Batch:
    """The source has six tokens more than the target."""
    x, target = _floats(seed, 2, length)
    (source,) = _floats(seed + 1, 1, length + 6)
    return {"source": source, "x": x} | ({"target": target} if labels else {})


def _floats(seed: int, count: int, length: int) -> tuple[Tensor, ...]:
    return torch.randn(count, ROWS, length, WIDTH, dtype=torch.float64, generator=_generator(seed)).unbind()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MODELS: dict[str, Case] = {
    "nanogpt": Case(nanogpt, _nanogpt_batch),
    "gpt2": Case(gpt2, _token_batch, padded=True),
    "llama": Case(llama, _token_batch, padded=True),
    "mistral": Case(mistral, _token_batch, padded=True),
    "gemma3": Case(gemma3, _token_batch, padded=True),
    "bert": Case(bert, _token_batch, padded=True),
    "modernbert": Case(modernbert, _token_batch, padded=True),
    "t5": Case(t5, _sequence_batch, padded=True),
    "conditioned": Case(conditioned, _conditioned_batch),
    "position_table": Case(position_table, _position_table_batch),
    "cross": Case(cross, _cross_batch),
    "two_graphs": Case(two_graphs, _nanogpt_batch),
}


def loss_of(outputs: Any) -> Tensor:
    """The loss that the model returned with its labels."""
    loss = outputs[-1] if isinstance(outputs, tuple) else outputs.loss
    if loss is None:
        raise ValueError("expected outputs with a loss, got none: make the batch with labels=True")
    assert isinstance(loss, Tensor)
    return loss


def tensors_of(outputs: Any) -> dict[str, Tensor]:
    """Every tensor of a model's outputs by name, each layer's K and V of a cache included."""
    items = enumerate(outputs) if isinstance(outputs, tuple) else outputs.items()
    return {name: tensor for key, value in items for name, tensor in _named(str(key), value)}


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "cross_attention_cache"):
        yield from _named(f"{name}.self", value.self_attention_cache)
        yield from _named(f"{name}.cross", value.cross_attention_cache)
    elif hasattr(value, "layers"):
        for i, layer in enumerate(value.layers):
            yield f"{name}.{i}.k", layer.keys
            yield f"{name}.{i}.v", layer.values
    elif value is not None:
        raise TypeError(f"expected a tensor, a cache or None as output {name!r}, got {type(value).__name__}")
