"""The GPT-2 that several benchmarks train: 256 words, heads of 64, no dropout, for which one rank would hold S x S."""

from __future__ import annotations

from typing import Any


def gpt2(length: int, width: int, layers: int = 2) -> Any:
    """A model for sequences of up to `length` tokens, ready to train.

    >>> gpt2(1024, 128)(input_ids=ids, labels=ids).loss
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": length, "n_embd": width, "n_layer": layers, "n_head": max(1, width // 64)}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, **sizes, **rates, bos_token_id=0, eos_token_id=0)).train()
