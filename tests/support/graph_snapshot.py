"""Writes what ringpass makes of five public models, so that two versions of it can be compared.

    torchrun --nproc-per-node 2 -m tests.support.graph_snapshot before     # in a checkout of the old version
    torchrun --nproc-per-node 2 -m tests.support.graph_snapshot after      # in one of the new version
    diff -r --exclude stages.txt before after

For each model: the dump of every stage, the code that Inductor generates, the loss and a digest of all gradients.  It
uses public names of ringpass alone; a change that should keep behaviour leaves no difference, at P = 2 and 3.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from torch._inductor.graph import GraphLowering

TOKENS, VOCABULARY = 37, 61
IDS = torch.arange(2 * TOKENS).reshape(2, TOKENS) * 7 % VOCABULARY
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
Made = tuple[Any, dict[str, torch.Tensor]]


def gpt2() -> Made:
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, **SPECIAL)
    return hf.GPT2LMHeadModel(config), {"input_ids": IDS, "labels": IDS}


def llama() -> Made:
    config = hf.LlamaConfig(**SIZES, **SPECIAL, vocab_size=VOCABULARY, num_key_value_heads=2)
    mask = torch.ones_like(IDS).masked_fill(torch.arange(TOKENS) > 30, 0)
    return hf.LlamaForCausalLM(config), {"input_ids": IDS, "attention_mask": mask, "labels": IDS}


def mistral() -> Made:
    config = hf.MistralConfig(**SIZES, **SPECIAL, vocab_size=VOCABULARY, num_key_value_heads=2, sliding_window=9)
    return hf.MistralForCausalLM(config), {"input_ids": IDS, "labels": IDS}


def t5() -> Made:
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    config = hf.T5Config(**sizes, dropout_rate=0.1, decoder_start_token_id=0, pad_token_id=0)
    return hf.T5ForConditionalGeneration(config), {"input_ids": IDS, "labels": IDS[:, :29].contiguous()}


def vit() -> Made:
    config = hf.ViTConfig(**SIZES, image_size=28, patch_size=4)
    pixels = torch.linspace(0, 1, 2 * 3 * 784).reshape(2, 3, 28, 28)
    return hf.ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


MODELS: dict[str, Callable[[], Made]] = {"gpt2": gpt2, "llama": llama, "mistral": mistral, "t5": t5, "vit": vit}


def normalised(code: str) -> str:
    """Generated code without paths, comments that number graphs, and digests."""
    code = re.sub(r"/\S*/(torchinductor_\w+|tmp\w*)/\S+", "PATH", code)
    code = re.sub(r"# (AOT ID|kernel path|Topologically Sorted).*", "", code)
    return re.sub(r"\b[a-z0-9]{40,}\b", "HASH", code)


def snapshot(name: str, folder: Path, codes: list[str]) -> None:
    """The files of one model on this rank."""
    rank = folder / f"rank{dist.get_rank()}"
    torch._dynamo.reset()
    codes.clear()
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    compiled: Any = torch.compile(model.train(), backend="ring_dilated", options={"dump": str(folder)})
    loss = compiled(**batch).loss
    loss.backward()
    rank.mkdir(parents=True, exist_ok=True)
    for i, code in enumerate(codes):
        (rank / f"code{i}.py").write_text(normalised(code))
    grads = b"".join(p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None)
    (rank / "numbers.txt").write_text(f"{loss.item()!r} {hashlib.sha256(grads).hexdigest()}\n")


def main(out: str) -> None:
    """A folder for each model and number of ranks."""
    dist.init_process_group("gloo")
    torch._inductor.config.force_disable_caches = True
    codes: list[str] = []
    GraphLowering.save_output_code = staticmethod(codes.append)
    for name in MODELS:
        snapshot(name, Path(out) / name / f"P{dist.get_world_size()}", codes)
        if dist.get_rank() == 0:
            print(f"{name} on {dist.get_world_size()} ranks: {len(codes)} graphs", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
