"""Entries of the zoo for pictures, films and sound: encoders, models of picture and text, diffusion transformers.

>>> ZOO["flux"].make("sdpa")                          # `tests.support.zoo` merges PICTURES into ZOO

Pictures are a few patches, of unequal height and width where the model takes both; films three frames.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.support.zoo_entry import (
    GROUPED,
    ONE,
    PICTURE,
    ROWS,
    SIZES,
    Batch,
    Entry,
    diffusers,
    floats,
    generator,
    mask,
    pictures,
    tokens,
)
from tests.support.zoo_modules import HEADS, LAYERS, VOCAB, WIDTH, Denoiser, Features

HEAD = WIDTH // HEADS
FRAMES, HEIGHT, WIDE = 3, 9, 11  # patches of a film; a picture is a frame of it


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# --- encoders of pictures ---------------------------------------------------------------------------------------------

VISION = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
          "num_attention_heads": HEADS}  # fmt: skip


def patches(length: int, labels: bool, padding: bool) -> Batch:
    """Pictures of 3 x 5 and 5 x 4 patches, cut up beforehand and padded to 20; a class each."""
    shapes = torch.tensor([[3, 5], [5, 4]])
    batch = {
        "pixel_values": _normal(ROWS, 20, 48),
        "pixel_attention_mask": (torch.arange(20) < shapes.prod(1, keepdim=True)).long(),
        "spatial_shapes": shapes,
    }
    return batch | ({"labels": torch.tensor([1, 0])} if labels else {})


def _siglip2(attention: str) -> nn.Module:
    vision = hf.Siglip2VisionConfig(**VISION, num_patches=16, patch_size=4, vision_use_head=False)
    text = {"bos_token_id": 0, "eos_token_id": 1}
    config = hf.Siglip2Config(text_config=text, vision_config=vision.to_dict(), num_labels=2)
    config._attn_implementation = attention
    model: nn.Module = hf.Siglip2ForImageClassification(config)
    return model


def seen(length: int, labels: bool, padding: bool) -> Batch:
    """Pictures of 5 x 5 patches, and what is to come of each patch, the class token and four registers."""
    return pictures(length, False, False) | ({"target": floats(30, 1)} if labels else {})


def _dinov3(attention: str) -> nn.Module:
    registers = {"num_register_tokens": 4, "pos_embed_rescale": None}
    config = hf.DINOv3ViTConfig(**VISION, **PICTURE, **registers, attn_implementation=attention)
    return Features(hf.DINOv3ViTModel(config))


def segmented(length: int, labels: bool, padding: bool) -> Batch:
    """Pictures of 12 x 8 patches, and what is to come of each of the 6 x 4 that are left after pooling."""
    batch = {"pixel_values": _normal(ROWS, 3, 48, 32)}
    return batch | ({"target": _normal(ROWS, 6, 4, 2 * WIDTH, seed=1)} if labels else {})


def _sam2(attention: str) -> nn.Module:
    stages = {
        "hidden_size": WIDTH, "embed_dim_per_stage": [WIDTH, 2 * WIDTH], "num_attention_heads_per_stage": [2, 4],
        "blocks_per_stage": [1, 3], "window_size_per_stage": [4, 2], "global_attention_blocks": [2],
        "num_query_pool_stages": 1, "mlp_ratio": 2.0, "window_positional_embedding_background_size": [3, 3],
    }  # fmt: skip
    config = hf.Sam2HieraDetConfig(**stages, image_size=[48, 32], attn_implementation=attention)
    return Features(hf.models.sam2.modeling_sam2.Sam2HieraDetModel(config))


# --- pictures in a text -----------------------------------------------------------------------------------------------

IMAGE = VOCAB - 1  # the id that image features take the place of


def _with_places(batch: Batch, start: int, places: int) -> Batch:
    """Row r of the text with `places` places for image features, from token `start` + r on; no labels there."""
    ids = batch["input_ids"].clamp_max(IMAGE - 3)
    for row in range(ROWS):
        ids[row, start + row : start + row + places] = IMAGE
    labels = (
        {"labels": batch["labels"].masked_fill(ids == IMAGE, -100).clamp_max(IMAGE - 3)} if "labels" in batch else {}
    )
    return batch | {"input_ids": ids} | labels


def read(length: int, labels: bool, padding: bool) -> Batch:
    """Texts, each with a picture of 6 x 6 patches that become 9 tokens."""
    batch = _with_places(tokens(length + 6, labels, padding), 4, 9)
    return batch | {"pixel_values": _normal(ROWS, 3, 24, 24), "token_type_ids": (batch["input_ids"] == IMAGE).long()}


def _gemma3_vision(attention: str) -> nn.Module:
    text = {**SIZES, **GROUPED, "head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 9}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text, **layers).to_dict(),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=24, patch_size=4, vision_use_head=False).to_dict(),
        mm_tokens_per_image=9, image_token_index=IMAGE, boi_token_index=IMAGE - 2, eoi_token_index=IMAGE - 1,
        attn_implementation=attention,
    )  # fmt: skip
    model: nn.Module = hf.Gemma3ForConditionalGeneration(config)
    return model


def ordered(length: int, labels: bool, padding: bool) -> Batch:
    """Texts, each with a picture of 8 x 8 patches in the order of Qwen's processor, that become 16 tokens."""
    batch = _with_places(tokens(length + 6, labels, padding), 4, 16)
    vision = {"pixel_values": _normal(ROWS * 64, 96), "image_grid_thw": torch.tensor([[1, 8, 8]] * ROWS)}
    return batch | vision | {"mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}


QWEN = {"image_token_id": IMAGE, "video_token_id": IMAGE - 1, "vision_start_token_id": IMAGE - 2,
        "vision_end_token_id": IMAGE - 3}  # fmt: skip
SEEN = {"depth": LAYERS, "num_heads": HEADS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "patch_size": 4,
        "spatial_merge_size": 2, "out_hidden_size": WIDTH}  # fmt: skip


def _qwen_vl(
    version: str, sections: list[int], text: dict[str, Any], vision: dict[str, Any], attention: str
) -> nn.Module:
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    config = getattr(hf, f"{version}Config")(
        text_config={**SIZES, **GROUPED, **text, "rope_parameters": rotary}, vision_config={**SEEN, **vision}, **QWEN
    )
    config._attn_implementation = attention
    model: nn.Module = getattr(hf, f"{version}ForConditionalGeneration")(config)
    return model


def _qwen2_5_vl(attention: str) -> nn.Module:
    windows = {"window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen_vl("Qwen2_5_VL", [2, 1, 1], {}, windows, attention)


def _qwen3_vl(attention: str) -> nn.Module:
    features = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return _qwen_vl("Qwen3VL", [2, 1, 1], {"head_dim": HEAD}, features, attention)


# --- diffusion --------------------------------------------------------------------------------------------------------


def _film(seed: int = 0) -> Tensor:
    return _normal(ROWS, 4, FRAMES, 2 * HEIGHT, 2 * WIDE, seed=seed)


def _still(seed: int = 0) -> Tensor:
    return _normal(ROWS, 4, 2 * HEIGHT, 2 * WIDE, seed=seed)


def _denoised(made: Batch, target: Tensor, labels: bool) -> Batch:
    """A batch of a denoiser: also a step for each row."""
    return {"timestep": torch.tensor([3, 70]), **made} | ({"target": target} if labels else {})


def _rotations(n: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `n` positions."""
    angles = _normal(n, width, seed=5)
    return angles.cos(), angles.sin()


HEADED = {"num_attention_heads": HEADS, "attention_head_dim": HEAD, "num_layers": LAYERS}
CHANNELS = {"in_channels": 4, "out_channels": 4}


def filmed(length: int, labels: bool, padding: bool) -> Batch:
    """Latents of a film, and a text."""
    return _denoised({"hidden_states": _film(), "encoder_hidden_states": floats(length, 2)}, _film(1), labels)


def _wan(attention: str) -> nn.Module:
    sizes = {"text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 2 * WIDTH, "rope_max_seq_len": 32}
    return Denoiser(diffusers().WanTransformer3DModel(**HEADED, **CHANNELS, **sizes))


def framed(length: int, labels: bool, padding: bool) -> Batch:
    """Latents of a film, frames first, a text, and the rotations of the film's patches."""
    batch = {"hidden_states": _film().transpose(1, 2), "encoder_hidden_states": floats(length, 2)}
    rotary = {"image_rotary_emb": _rotations(FRAMES * HEIGHT * WIDE, HEAD)}
    return _denoised(batch | rotary, _film(1).transpose(1, 2), labels)


def _cogvideox(attention: str) -> nn.Module:
    sizes = {"sample_width": 2 * WIDE, "sample_height": 2 * HEIGHT, "sample_frames": 9, "text_embed_dim": WIDTH}
    special = {"time_embed_dim": 16, "use_rotary_positional_embeddings": True}
    return Denoiser(diffusers().CogVideoXTransformer3DModel(**HEADED, **CHANNELS, **sizes, **special))


def described(length: int, labels: bool, padding: bool) -> Batch:
    """Latents of a film, and a text with its mask, one vector of which stands for all."""
    batch = {"hidden_states": _film(), "encoder_hidden_states": floats(length, 2)}
    exists = mask(length) if padding else torch.ones(ROWS, length, dtype=torch.long)
    pooled = {"pooled_projections": floats(1, 3)[:, 0], "guidance": torch.tensor([1.0, 3.5])}
    return _denoised(batch | {"encoder_attention_mask": exists} | pooled, _film(1), labels)


def _hunyuan_video(attention: str) -> nn.Module:
    sizes = {"num_single_layers": LAYERS, "num_refiner_layers": 1, "text_embed_dim": WIDTH, "mlp_ratio": 2.0}
    special = {"pooled_projection_dim": WIDTH, "rope_axes_dim": (4, 2, 2)}
    return Denoiser(diffusers().HunyuanVideoTransformer3DModel(**HEADED, **CHANNELS, **sizes, **special))


def packed(length: int, labels: bool, padding: bool) -> Batch:
    """Latents as a sequence of patches, a text, and the positions of both."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDE), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).double()
    batch = {
        "hidden_states": _normal(ROWS, HEIGHT * WIDE, 16), "encoder_hidden_states": floats(length, 2),
        "img_ids": places, "txt_ids": torch.zeros(length, 3), "guidance": torch.tensor([1.0, 3.5]),
        "pooled_projections": floats(1, 3)[:, 0], "timestep": torch.tensor([0.1, 0.7]),
    }  # fmt: skip
    return _denoised(batch, _normal(ROWS, HEIGHT * WIDE, 16, seed=1), labels)


def _flux(attention: str) -> nn.Module:
    sizes = {"in_channels": 16, "num_single_layers": LAYERS, "joint_attention_dim": WIDTH}
    special = {"pooled_projection_dim": WIDTH, "guidance_embeds": True, "axes_dims_rope": (4, 2, 2)}
    return Denoiser(diffusers().FluxTransformer2DModel(**HEADED, **sizes, **special))


def pictured(length: int, labels: bool, padding: bool) -> Batch:
    """Latents of a picture, and a text with its mask."""
    exists = mask(length) if padding else torch.ones(ROWS, length, dtype=torch.long)
    batch = {"hidden_states": _still(), "encoder_hidden_states": floats(length, 2), "encoder_attention_mask": exists}
    return _denoised(batch, _still(1), labels)


def _lumina2(attention: str) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_layers": LAYERS, "num_refiner_layers": 1, "num_attention_heads": HEADS}
    special = {"num_kv_heads": HEADS // 2, "multiple_of": 8, "cap_feat_dim": WIDTH}
    rotary = {"axes_dim_rope": (4, 2, 2), "axes_lens": (64, 16, 16)}
    return Denoiser(diffusers().Lumina2Transformer2DModel(**CHANNELS, **sizes, **special, **rotary))


def heard(length: int, labels: bool, padding: bool) -> Batch:
    """Latents of a sound, a text, one vector for all, and the rotations of the sound's tokens and that vector."""
    batch = {
        "hidden_states": _normal(ROWS, 8, length), "encoder_hidden_states": floats(length + 6, 2),
        "global_hidden_states": floats(1, 3), "rotary_embedding": _rotations(length + 1, HEAD // 2),
    }  # fmt: skip
    exists = {"attention_mask": mask(length).bool()} if padding else {}
    return _denoised(batch | exists, _normal(ROWS, 8, length, seed=1), labels)


def _stable_audio(attention: str) -> nn.Module:
    sizes = {"in_channels": 8, "out_channels": 8, "num_key_value_attention_heads": HEADS // 2, "time_proj_dim": 16}
    widths = {"cross_attention_dim": WIDTH, "cross_attention_input_dim": WIDTH, "global_states_input_dim": WIDTH}
    return Denoiser(diffusers().StableAudioDiTModel(**HEADED, **sizes, **widths))


PICTURES: dict[str, Entry] = {
    "siglip2": Entry(_siglip2, patches),
    "dinov3": Entry(_dinov3, seen),
    "sam2": Entry(_sam2, segmented),
    "gemma3_vision": Entry(_gemma3_vision, read, padding=True),
    "qwen2_5_vl": Entry(_qwen2_5_vl, ordered, padding=True),
    "qwen3_vl": Entry(_qwen3_vl, ordered, padding=True),
    "wan": Entry(_wan, filmed, attentions=ONE, needs=diffusers),
    "cogvideox": Entry(_cogvideox, framed, attentions=ONE, needs=diffusers),
    "hunyuan_video": Entry(_hunyuan_video, described, padding=True, attentions=ONE, needs=diffusers),
    "flux": Entry(_flux, packed, attentions=ONE, needs=diffusers),
    "lumina2": Entry(_lumina2, pictured, padding=True, attentions=ONE, needs=diffusers),
    "stable_audio": Entry(_stable_audio, heard, padding=True, attentions=ONE, needs=diffusers),
}
