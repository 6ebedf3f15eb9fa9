"""Tiny, randomly started models of the public classes that people train, and one batch for each.

>>> entry = ZOO["gpt2"]
>>> model = entry.make("eager")                       # float64; attention written out, or "sdpa"
>>> outputs = model(**entry.batch(23, labels=True, padding=False))

Sizes are a few tokens and channels; lengths are odd.  Models that compute in float32 whatever their dtype are run
inside `wide()`, which makes them keep float64.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VOCAB, WIDTH, HEADS, LAYERS, ROWS = 61, 32, 4, 2, 2
Batch = dict[str, Any]


class wide(TorchFunctionMode):  # noqa: N801  a context, used as a function
    """Inside, what a model writes as float32 is float64: norms, softmax, losses, rotary tables."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*(torch.float64 if a is torch.float32 else a for a in args), **named)


@dataclass(frozen=True)
class Entry:
    """`factory(attention)` builds the model; `make_batch(length, labels, padding)` its keyword arguments.

    `labels`, `padding`: whether the model takes them.  `attentions`: the ways in which it can be told to attend.
    """

    factory: Callable[[str], nn.Module]
    make_batch: Callable[[int, bool, bool], Batch]
    labels: bool = True
    padding: bool = False
    attentions: tuple[str, ...] = ("sdpa", "eager")
    needs: str = ""  # a package that may be missing
    dtype: torch.dtype = torch.float64  # float32 where an op of the model knows nothing wider

    @property
    def missing(self) -> str:
        """The package that the entry needs and that cannot be imported, or nothing."""
        try:
            importlib.import_module(self.needs or "torch")
        except ImportError:
            return self.needs
        return ""

    def make(self, attention: str = "sdpa", train: bool = True) -> nn.Module:
        """The model in its dtype, the same on every rank; the caller's random state is untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.factory(attention)
            with torch.no_grad():
                for parameter in model.parameters():  # biases and scales that start at 0 or 1 would hide faults
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        return model.to(self.dtype).train(train)

    def batch(self, length: int, labels: bool, padding: bool) -> Batch:
        """Keyword arguments for one call."""
        made = self.make_batch(length, labels, padding)
        floats = {k: v for k, v in made.items() if isinstance(v, Tensor) and v.is_floating_point()}
        return made | {key: value.to(self.dtype) for key, value in floats.items()}


# --- batches ----------------------------------------------------------------------------------------------------------


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, length), generator=_generator(seed))


def _mask(length: int) -> Tensor:
    """Row r lacks r + 3 tokens at its end."""
    return (torch.arange(length) < length - 3 - torch.arange(ROWS).unsqueeze(1)).long()


def tokens(length: int, labels: bool, padding: bool) -> Batch:
    """Ids, and the same as labels."""
    ids = _ids(length)
    batch = {"input_ids": ids} | ({"attention_mask": _mask(length)} if padding else {})
    return batch | ({"labels": ids.masked_fill(_mask(length) == 0, -100) if padding else ids} if labels else {})


def classified(length: int, labels: bool, padding: bool) -> Batch:
    """Ids, and one class for each row."""
    batch = tokens(length, False, padding)
    return batch | ({"labels": torch.tensor([1, 0])} if labels else {})


def translated(length: int, labels: bool, padding: bool) -> Batch:
    """A source that is six tokens longer than the target."""
    batch = tokens(length + 6, False, padding)
    return batch | {"labels" if labels else "decoder_input_ids": _ids(length, 1)}


def spoken(length: int, labels: bool, padding: bool) -> Batch:
    """A spectrogram of twice the length, and a transcript."""
    features = torch.randn(ROWS, 8, 2 * (length + 6), generator=_generator(), dtype=torch.float64)
    return {"input_features": features, "labels" if labels else "decoder_input_ids": _ids(length, 1)}


def _pixels() -> Tensor:
    return torch.randn(ROWS, 3, 20, 20, generator=_generator(), dtype=torch.float64)


def pictures(length: int, labels: bool, padding: bool) -> Batch:
    """Pictures of 5 x 5 patches."""
    return {"pixel_values": _pixels()} | ({"labels": torch.tensor([1, 0])} if labels else {})


def captioned(length: int, labels: bool, padding: bool) -> Batch:
    """Pictures and texts, to be matched."""
    return tokens(length, False, padding) | {"pixel_values": _pixels(), "return_loss": labels}


# --- Hugging Face -----------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": HEADS // 2}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PICTURE = {"image_size": 20, "patch_size": 4, "num_channels": 3}


def _of(name: str, config: str, *drop: str, **options: Any) -> Callable[[str], nn.Module]:
    """A factory of the class `name` with the sizes above, without those named in `drop`, and `options`."""

    def factory(attention: str) -> nn.Module:
        sizes = {key: value for key, value in SIZES.items() if key not in drop} | options
        made = getattr(hf, config)(**sizes, attn_implementation=attention)
        model: nn.Module = getattr(hf, name)(made)
        return model

    return factory


def _gpt2(attention: str) -> nn.Module:
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    model: nn.Module = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **rates, attn_implementation=attention))
    return model


def _bloom(attention: str) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    model: nn.Module = hf.BloomForCausalLM(hf.BloomConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0))
    return model


def _t5(attention: str) -> nn.Module:
    sizes = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 2 * WIDTH, "num_layers": LAYERS}
    distances = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    special = {"num_heads": HEADS, "decoder_start_token_id": 0, "pad_token_id": 2, "dropout_rate": 0.0}
    config = hf.T5Config(**sizes, **distances, **special, attn_implementation=attention)
    model: nn.Module = hf.T5ForConditionalGeneration(config)
    return model


def _pair(name: str) -> dict[str, Any]:
    """Sizes of an encoder and a decoder, in Bart's and Whisper's words."""
    sides = ("encoder", "decoder")
    sizes = {f"{side}_{key}": n for side in sides for key, n in
             (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", 2 * WIDTH))}  # fmt: skip
    special = {"decoder_start_token_id": 0, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    return {**sizes, **special, "vocab_size": VOCAB, "d_model": WIDTH, "dropout": 0.0, "attention_dropout": 0.0}


def _bart(attention: str) -> nn.Module:
    config = hf.BartConfig(
        **_pair("bart"), max_position_embeddings=64, forced_eos_token_id=1, attn_implementation=attention
    )
    model: nn.Module = hf.BartForConditionalGeneration(config)
    return model


def _whisper(attention: str) -> nn.Module:
    lengths = {"max_source_positions": 29, "max_target_positions": 64, "num_mel_bins": 8}
    config = hf.WhisperConfig(**_pair("whisper"), **lengths, attn_implementation=attention)
    model: nn.Module = hf.WhisperForConditionalGeneration(config)
    return model


def _clip(attention: str) -> nn.Module:
    shared = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    text = {**shared, "num_attention_heads": HEADS, "vocab_size": VOCAB, "max_position_embeddings": 64}
    vision = {**shared, **PICTURE, "num_attention_heads": HEADS}
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = hf.CLIPConfig(text_config={**text, **special}, vision_config=vision, projection_dim=16)
    config._attn_implementation = attention
    model: nn.Module = hf.CLIPModel(config)
    return model


# --- torch.nn, and attention as people write it -----------------------------------------------------------------------


def _floats(length: int, seed: int = 0) -> Tensor:
    return torch.randn(ROWS, length, WIDTH, generator=_generator(seed), dtype=torch.float64)


def vectors(length: int, labels: bool, padding: bool) -> Batch:
    """A sequence of vectors, and what is to come of it; padding as torch.nn wants it, True where nothing is."""
    batch = {"x": _floats(length)} | ({"padding": _mask(length) == 0} if padding else {})
    return batch | ({"target": _floats(length, 1)} if labels else {})


def two_sequences(length: int, labels: bool, padding: bool) -> Batch:
    """A source that is six tokens longer than the target."""
    return vectors(length, labels, False) | {"source": _floats(length + 6, 2)}


def texts(length: int, labels: bool, padding: bool) -> Batch:
    """Ids and targets."""
    return {"idx": _ids(length)} | ({"targets": _ids(length, 1)} if labels else {})


class Regression(nn.Module):
    """(output, mean squared error) of what `run` makes of the batch."""

    def forward(self, target: Tensor | None = None, **batch: Any) -> tuple[Tensor, ...]:
        y = self.run(**batch)
        return (y,) if target is None else (y, F.mse_loss(y, target))

    run: Callable[..., Tensor]


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


class WrittenGPT(nn.Module):
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


ONE = ("sdpa",)  # for models that have no choice
ZOO: dict[str, Entry] = {
    "gpt2": Entry(_gpt2, tokens, padding=True),
    "llama": Entry(_of("LlamaForCausalLM", "LlamaConfig", **GROUPED), tokens, padding=True),
    "qwen3": Entry(_of("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8), tokens, padding=True),
    "mistral": Entry(_of("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=9), tokens, padding=True),
    "gemma2": Entry(
        _of("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8, sliding_window=9), tokens, padding=True,
        attentions=("eager",),
    ),
    "gemma3": Entry(
        _of("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8, sliding_window=9,
            layer_types=["sliding_attention", "full_attention"]),
        tokens, padding=True,
    ),
    "mixtral": Entry(
        _of("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4, sliding_window=None), tokens,
        padding=True, dtype=torch.float32,
    ),
    "gpt_oss": Entry(
        _of("GptOssForCausalLM", "GptOssConfig", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=9),
        tokens, padding=True, attentions=("eager",), dtype=torch.float32,
    ),
    "gpt_neox": Entry(
        _of("GPTNeoXForCausalLM", "GPTNeoXConfig", hidden_dropout=0.0, attention_dropout=0.0), tokens, padding=True
    ),
    "bloom": Entry(_bloom, tokens, padding=True, attentions=("eager",)),
    "opt": Entry(
        _of("OPTForCausalLM", "OPTConfig", "intermediate_size", ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH,
            dropout=0.0),
        tokens, padding=True,
    ),
    "bert": Entry(_of("BertForMaskedLM", "BertConfig", **STILL), tokens, padding=True),
    "bert_classification": Entry(
        _of("BertForSequenceClassification", "BertConfig", **STILL), classified, padding=True
    ),
    "roberta": Entry(_of("RobertaForMaskedLM", "RobertaConfig", **STILL), tokens, padding=True),
    "modernbert": Entry(
        _of("ModernBertForMaskedLM", "ModernBertConfig", layer_types=["full_attention", "sliding_attention"],
            local_attention=8, cls_token_id=0, sep_token_id=1),
        tokens, padding=True,
    ),
    "t5": Entry(_t5, translated, padding=True),
    "bart": Entry(_bart, translated, padding=True),
    "whisper": Entry(_whisper, spoken),
    "vit": Entry(
        _of("ViTForImageClassification", "ViTConfig", "vocab_size", "max_position_embeddings", **STILL, **PICTURE),
        pictures,
    ),
    "dinov2": Entry(
        _of("Dinov2ForImageClassification", "Dinov2Config", "vocab_size", "max_position_embeddings",
            "intermediate_size", **STILL, **PICTURE),
        pictures,
    ),
    "clip": Entry(_clip, captioned, padding=True),
    "nn_transformer": Entry(lambda _: Translator(), two_sequences, attentions=ONE),
    "nn_encoder": Entry(lambda _: Encoder(), vectors, padding=True, attentions=ONE),
    "nn_encoder_causal": Entry(lambda _: Encoder(causal=True, norm_first=True), vectors, attentions=ONE),
    "nn_encoder_sequence_first": Entry(lambda _: Encoder(batch_first=False), vectors, padding=True, attentions=ONE),
    "nn_attention": Entry(lambda _: Heads(need_weights=False, causal=True), vectors, attentions=ONE),
    "nn_attention_weights": Entry(lambda _: Heads(need_weights=True), vectors, padding=True, attentions=ONE),
    "nn_attention_maps": Entry(lambda _: Heads(need_weights=True, returned=True), vectors, attentions=ONE),
    "nanogpt_flash": Entry(lambda _: WrittenGPT("flash"), texts, attentions=ONE),
    "nanogpt_manual": Entry(lambda _: WrittenGPT("manual"), texts, attentions=ONE),
    "nanogpt_einsum": Entry(lambda _: WrittenGPT("einsum"), texts, attentions=ONE),
}  # fmt: skip
