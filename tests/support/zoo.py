"""Tiny, randomly started models of the public classes that people train, and one batch for each.

>>> entry = ZOO["gpt2"]
>>> model = entry.make("eager")                       # float64; handwritten attention, or "sdpa"
>>> outputs = model(**entry.batch(23, labels=True, padding=False))

Sizes are a few tokens and channels; lengths are odd.  Models that compute in float32 whatever their dtype are run
inside `wide()`, which makes them keep float64.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from typing import Any
from unittest.mock import MagicMock

import torch
import transformers as hf
from torch import Tensor, nn

from tests.support.zoo_entry import (
    EXPERTS,
    GROUPED,
    ONE,
    PICTURE,
    ROWS,
    Batch,
    Entry,
    diffusers,
    floats,
    generator,
    ids,
    mask,
    of,
    pictures,
    pixels,
    tokens,
    translated,
)
from tests.support.zoo_modules import (
    HEADS,
    LAYERS,
    VOCAB,
    WIDTH,
    Classifier,
    Denoiser,
    Encoder,
    HandwrittenGPT,
    Heads,
    Translator,
)
from tests.support.zoo_pictures import PICTURES
from tests.support.zoo_text import TEXT

# --- batches ----------------------------------------------------------------------------------------------------------


def classified(length: int, labels: bool, padding: bool) -> Batch:
    """Ids, and one class for each row."""
    batch = tokens(length, False, padding)
    return batch | ({"labels": torch.tensor([1, 0])} if labels else {})


def spoken(length: int, labels: bool, padding: bool) -> Batch:
    """A spectrogram of twice the length, and a transcript."""
    features = torch.randn(ROWS, 8, 2 * (length + 6), generator=generator(), dtype=torch.float64)
    return {"input_features": features, "labels" if labels else "decoder_input_ids": ids(length, 1)}


def captioned(length: int, labels: bool, padding: bool) -> Batch:
    """Pictures and texts, to be matched."""
    return tokens(length, False, padding) | {"pixel_values": pixels(), "return_loss": labels}


# --- Hugging Face -----------------------------------------------------------------------------------------------------

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


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


# --- diffusers, timm --------------------------------------------------------------------------------------------------


def noised(length: int, labels: bool, padding: bool) -> Batch:
    """Latents of 5 x 5 patches, a step and a class each."""
    batch = {"hidden_states": _latents(0), "timestep": torch.tensor([3, 70]), "class_labels": torch.tensor([1, 4])}
    return batch | ({"target": _latents(1)} if labels else {})


def prompted(length: int, labels: bool, padding: bool) -> Batch:
    """Latents of 5 x 5 patches, a step, and a text of `length` vectors, one of which stands for all."""
    text = {"encoder_hidden_states": floats(length, 2), "pooled_projections": floats(1, 3)[:, 0]}
    batch = {"hidden_states": _latents(0), "timestep": torch.tensor([3, 70]), **text}
    return batch | ({"target": _latents(1)} if labels else {})


def _latents(seed: int) -> Tensor:
    return torch.randn(ROWS, 4, 10, 10, generator=generator(seed), dtype=torch.float64)


LATENT = {"sample_size": 10, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": LAYERS}


def _dit(attention: str) -> nn.Module:
    from diffusers.models import attention_processor as how

    sizes = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "num_embeds_ada_norm": 8}
    model = diffusers().DiTTransformer2DModel(**LATENT, **sizes)
    for module in model.modules():
        if hasattr(module, "dropout_prob"):  # classes that are left out at random
            module.dropout_prob = 0.0
        if isinstance(module, how.Attention):
            module.set_processor(how.AttnProcessor2_0() if attention == "sdpa" else how.AttnProcessor())
    return Denoiser(model)


def _sd3(attention: str) -> nn.Module:
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "joint_attention_dim": WIDTH}
    widths = {"caption_projection_dim": WIDTH, "pooled_projection_dim": WIDTH, "pos_embed_max_size": 8}
    return Denoiser(diffusers().SD3Transformer2DModel(**LATENT, **sizes, **widths))


@cache
def timm() -> Any:
    """timm.  Only its data sets and their transforms need torchvision, whose builds each want one torch: where there is
    none, a stand-in serves the import."""
    missing = [] if importlib.util.find_spec("torchvision") else TORCHVISION
    sys.modules.update({name: MagicMock() for name in missing})
    try:
        return importlib.import_module("timm")
    finally:
        for name in missing:
            del sys.modules[name]


TORCHVISION = [f"torchvision{part}" for part in ("", ".datasets", ".ops", ".ops.misc", ".transforms",
               ".transforms.functional")]  # fmt: skip


def _timm(attention: str) -> nn.Module:
    sizes = {"img_size": 20, "patch_size": 4, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS}
    model: nn.Module = timm().models.VisionTransformer(**sizes, num_classes=7)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", attention == "sdpa")  # noqa: B010  a bool, which nn.Module's stub forbids
    return Classifier(model)


def labelled(length: int, labels: bool, padding: bool) -> Batch:
    """Pictures of 5 x 5 patches, and a class each."""
    return {"x": pixels()} | ({"target": torch.tensor([1, 0])} if labels else {})


# --- torch.nn ---------------------------------------------------------------------------------------------------------


def vectors(length: int, labels: bool, padding: bool) -> Batch:
    """A sequence of vectors, and what is to come of it; padding as torch.nn wants it, True where nothing is."""
    batch = {"x": floats(length)} | ({"padding": mask(length) == 0} if padding else {})
    return batch | ({"target": floats(length, 1)} if labels else {})


def two_sequences(length: int, labels: bool, padding: bool) -> Batch:
    """A source that is six tokens longer than the target."""
    return vectors(length, labels, False) | {"source": floats(length + 6, 2)}


def texts(length: int, labels: bool, padding: bool) -> Batch:
    """Ids and targets."""
    return {"idx": ids(length)} | ({"targets": ids(length, 1)} if labels else {})


ZOO: dict[str, Entry] = {
    "gpt2": Entry(_gpt2, tokens, padding=True),
    "llama": Entry(of("LlamaForCausalLM", "LlamaConfig", **GROUPED), tokens, padding=True),
    "qwen3": Entry(of("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=8), tokens, padding=True),
    "mistral": Entry(of("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=9), tokens, padding=True),
    "gemma2": Entry(
        of("Gemma2ForCausalLM", "Gemma2Config", **GROUPED, head_dim=8, sliding_window=9), tokens, padding=True,
        attentions=("eager",),
    ),
    "gemma3": Entry(
        of("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8, sliding_window=9,
            layer_types=["sliding_attention", "full_attention"]),
        tokens, padding=True,
    ),
    "mixtral": Entry(
        of("MixtralForCausalLM", "MixtralConfig", **GROUPED, num_local_experts=4, sliding_window=None), tokens,
        padding=True, dtype=torch.float32,
    ),
    "gpt_oss": Entry(
        of("GptOssForCausalLM", "GptOssConfig", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=9),
        tokens, padding=True, attentions=("eager",), dtype=torch.float32,
    ),
    "qwen3_moe": Entry(
        of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **GROUPED, head_dim=8, **EXPERTS), tokens, padding=True,
        dtype=torch.float32,
    ),
    "gpt_neox": Entry(
        of("GPTNeoXForCausalLM", "GPTNeoXConfig", hidden_dropout=0.0, attention_dropout=0.0), tokens, padding=True
    ),
    "bloom": Entry(_bloom, tokens, padding=True, attentions=("eager",)),
    "opt": Entry(
        of("OPTForCausalLM", "OPTConfig", "intermediate_size", ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH,
            dropout=0.0),
        tokens, padding=True,
    ),
    "bert": Entry(of("BertForMaskedLM", "BertConfig", **STILL), tokens, padding=True),
    "bert_classification": Entry(
        of("BertForSequenceClassification", "BertConfig", **STILL), classified, padding=True
    ),
    "roberta": Entry(of("RobertaForMaskedLM", "RobertaConfig", **STILL), tokens, padding=True),
    "modernbert": Entry(
        of("ModernBertForMaskedLM", "ModernBertConfig", layer_types=["full_attention", "sliding_attention"],
            local_attention=8, cls_token_id=0, sep_token_id=1),
        tokens, padding=True,
    ),
    "t5": Entry(_t5, translated, padding=True),
    "bart": Entry(_bart, translated, padding=True),
    "whisper": Entry(_whisper, spoken),
    "vit": Entry(
        of("ViTForImageClassification", "ViTConfig", "vocab_size", "max_position_embeddings", **STILL, **PICTURE),
        pictures,
    ),
    "dinov2": Entry(
        of("Dinov2ForImageClassification", "Dinov2Config", "vocab_size", "max_position_embeddings",
            "intermediate_size", **STILL, **PICTURE),
        pictures,
    ),
    "clip": Entry(_clip, captioned, padding=True),
    "dit": Entry(_dit, noised, needs=diffusers),
    "sd3": Entry(_sd3, prompted, attentions=("sdpa",), needs=diffusers),
    "timm_vit": Entry(_timm, labelled, needs=timm),
    "nn_transformer": Entry(lambda _: Translator(), two_sequences, attentions=ONE),
    "nn_encoder": Entry(lambda _: Encoder(), vectors, padding=True, attentions=ONE),
    "nn_encoder_causal": Entry(lambda _: Encoder(causal=True, norm_first=True), vectors, attentions=ONE),
    "nn_encoder_sequence_first": Entry(lambda _: Encoder(batch_first=False), vectors, padding=True, attentions=ONE),
    "nn_attention": Entry(lambda _: Heads(need_weights=False, causal=True), vectors, attentions=ONE),
    "nn_attention_weights": Entry(lambda _: Heads(need_weights=True), vectors, padding=True, attentions=ONE),
    "nn_attention_maps": Entry(lambda _: Heads(need_weights=True, returned=True), vectors, attentions=ONE),
    "nanogpt_flash": Entry(lambda _: HandwrittenGPT("flash"), texts, attentions=ONE),
    "nanogpt_manual": Entry(lambda _: HandwrittenGPT("manual"), texts, attentions=ONE),
    "nanogpt_einsum": Entry(lambda _: HandwrittenGPT("einsum"), texts, attentions=ONE),
    **TEXT,
    **PICTURES,
}  # fmt: skip
