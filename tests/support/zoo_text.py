"""Newer language models of the zoo, and models that alternate attention with another mixer of tokens."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from tests.support.zoo_entry import EXPERTS, GROUPED, ROWS, SIZES, Batch, Entry, generator, ids, of, tokens, translated
from tests.support.zoo_modules import HEADS, LAYERS, VOCAB, WIDTH

LATENT_HEADS = {
    "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": HEADS,
}  # fmt: skip
ROUTED = {
    "n_routed_experts": 4, "num_local_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
}  # fmt: skip
MIXED = ["linear_attention", "full_attention"]
WINDOWS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
STATES = {"mamba_d_state": 8, "mamba_expand": 2}
MAMBA2 = {"mamba_n_heads": 4, "mamba_n_groups": 2, "mamba_chunk_size": 8}
NEMOTRON = {
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 8, "head_dim": 8,
}  # fmt: skip
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}


def embedded(length: int, labels: bool, padding: bool) -> Batch:
    """Ids alone: embeddings are the output."""
    return tokens(length, False, padding)


def heard(length: int, labels: bool, padding: bool) -> Batch:
    """A wave that becomes six tokens more than the transcript has."""
    samples = 384 * (length + 6) + 511  # what three convolutions leave of it
    wave = torch.randn(ROWS, samples, generator=generator(), dtype=torch.float64)
    return {"input_values": wave, "labels" if labels else "decoder_input_ids": ids(length, 1)}


def _t5gemma(attention: str) -> nn.Module:
    side = SIZES | GROUPED | WINDOWS | {"head_dim": 8, "attn_implementation": attention}
    config = hf.T5GemmaConfig(
        encoder=hf.T5GemmaModuleConfig(**side), decoder=hf.T5GemmaModuleConfig(**side), vocab_size=VOCAB,
        decoder_start_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    model: nn.Module = hf.T5GemmaForConditionalGeneration(config)
    return model


def _moonshine(attention: str) -> nn.Module:
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder")
             for key, n in (("num_hidden_layers", LAYERS), ("num_attention_heads", HEADS))}  # fmt: skip
    drop = ("num_hidden_layers", "num_attention_heads")
    sizes: dict[str, Any] = {key: n for key, n in SIZES.items() if key not in drop} | sides
    model: nn.Module = hf.MoonshineForConditionalGeneration(
        hf.MoonshineConfig(**sizes, decoder_start_token_id=0, attn_implementation=attention)
    )
    return model


TEXT: dict[str, Entry] = {
    "olmo3": Entry(of("Olmo3ForCausalLM", "Olmo3Config", **GROUPED, **WINDOWS), tokens, padding=True),
    "phi3": Entry(
        of("Phi3ForCausalLM", "Phi3Config", **GROUPED, partial_rotary_factor=0.5), tokens, padding=True
    ),
    "gemma4": Entry(
        of("Gemma4ForCausalLM", "Gemma4TextConfig", "num_hidden_layers", **GROUPED, head_dim=8, global_head_dim=16,
           sliding_window=9, num_hidden_layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
           vocab_size_per_layer_input=VOCAB, layer_types=2 * ["sliding_attention", "full_attention"]),
        tokens, padding=True,
    ),
    "gemma3n": Entry(
        of("Gemma3nForCausalLM", "Gemma3nTextConfig", **GROUPED, **WINDOWS, head_dim=8, num_kv_shared_layers=0,
           hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, laurel_rank=4, altup_coef_clip=0.02,
           activation_sparsity_pattern=[0.5, 0.0]),
        tokens, padding=True,
    ),
    "embedding_gemma": Entry(
        of("Gemma3TextModel", "Gemma3TextConfig", **GROUPED, **WINDOWS, head_dim=8, use_bidirectional_attention=True),
        embedded, labels=False, padding=True,
    ),
    "modernbert_decoder": Entry(
        of("ModernBertDecoderForCausalLM", "ModernBertDecoderConfig", local_attention=8, cls_token_id=0,
           sep_token_id=1, layer_types=["sliding_attention", "full_attention"]),
        tokens, padding=True,
    ),
    "t5gemma": Entry(_t5gemma, translated, padding=True, attentions=("eager",)),
    "moonshine": Entry(_moonshine, heard),
    "deepseek_v3": Entry(
        of("DeepseekV3ForCausalLM", "DeepseekV3Config", **ROUTED, **LATENT_HEADS, q_lora_rank=12, n_group=2,
           topk_group=1, first_k_dense_replace=1),
        tokens, padding=True, dtype=torch.float32,
    ),
    "glm4_moe": Entry(
        of("Glm4MoeForCausalLM", "Glm4MoeConfig", **GROUPED, **ROUTED, head_dim=8, use_qk_norm=True,
           first_k_dense_replace=1),
        tokens, padding=True, dtype=torch.float32,
    ),
    "llama4": Entry(
        of("Llama4ForCausalLM", "Llama4TextConfig", **GROUPED, head_dim=8, num_local_experts=4,
           intermediate_size_mlp=2 * WIDTH, attention_chunk_size=9, no_rope_layers=[1, 0], moe_layers=[1],
           floor_scale=8),
        tokens, padding=True,
    ),
    "qwen3_next": Entry(
        of("Qwen3NextForCausalLM", "Qwen3NextConfig", **GROUPED, **EXPERTS, **DELTA, head_dim=8, layer_types=MIXED,
           mlp_only_layers=[0, 1]),
        tokens, padding=True,
    ),
    "kimi_linear": Entry(
        of("KimiLinearForCausalLM", "KimiLinearConfig", **ROUTED, **LATENT_HEADS, linear_head_dim=8,
           linear_num_heads=HEADS, layer_types=MIXED, mlp_layer_types=["dense", "sparse"]),
        tokens, padding=True, dtype=torch.float32,
    ),
    "bamba": Entry(
        of("BambaForCausalLM", "BambaConfig", **GROUPED, **STATES, **MAMBA2, attn_layer_indices=[1]), tokens,
        padding=True,
    ),
    "jamba": Entry(
        of("JambaForCausalLM", "JambaConfig", **GROUPED, **STATES, num_experts=4, attn_layer_period=2,
           attn_layer_offset=1),
        tokens, padding=True, dtype=torch.float32,
    ),
    "nemotron_h": Entry(
        of("NemotronHForCausalLM", "NemotronHConfig", **GROUPED, **NEMOTRON, layer_types=[*MIXED, "mlp"]),
        tokens, padding=True,
    ),
}  # fmt: skip
