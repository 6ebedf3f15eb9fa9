"""What each rank runs: an unmodified Hugging Face model learns Python's standard library, byte by byte.

    torchrun --nproc-per-node 2 -m examples.train_rank --model gpt2 --steps 16

    gpt2    multi-head attention, learned positions, dropout
    llama   grouped K/V heads, rotary positions; two texts of different length, the shorter one padded

Every rank passes the same full batch and gets the same full loss. Nothing here imports ringpass or knows of the ring.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.memory import peak_bytes
from examples.device import CHOICES, start

TOKENS = 4096  # in a batch, padding included
SHAPES = {"gpt2": (1, TOKENS), "llama": (2, TOKENS // 2)}


def main(argv: list[str] | None = None) -> None:
    """Train, one JSON line per step; then measure the peak of activation memory on one step more."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    device = start(args.device)
    report = Report(args.report)
    model = make_model(args.model, args.seed).to(device)
    report.write(parameters=sum(p.numel() for p in model.parameters()))
    compiled = torch.compile(model, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
    text = corpus()
    torch.manual_seed(args.seed)  # the same dropout on every rank
    for step in range(args.steps):
        began = time.perf_counter()
        loss = compiled(**on(device, batch(args.model, text, step, args.seed))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report.write(step=step, loss=loss.item(), seconds=time.perf_counter() - began)
    last = on(device, batch(args.model, text, args.steps, args.seed))
    peak = peak_bytes(
        lambda: compiled(**last).loss.backward(),
        kept=lambda: [p.grad for p in model.parameters()],
        device=device.type,
    )
    report.write(peak=peak)
    dist.destroy_process_group()


def make_model(name: str, seed: int) -> torch.nn.Module:
    """About 10M parameters, random start, otherwise as configured by default."""
    torch.manual_seed(seed)
    length = SHAPES[name][1]
    if name == "gpt2":
        sizes = {"n_positions": length, "n_embd": 480, "n_layer": 3, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=256, **sizes, bos_token_id=0, eos_token_id=0))
    else:
        sizes = {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 3,
            "max_position_embeddings": length,
        }
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads, bos_token_id=0, eos_token_id=0))
    trained: torch.nn.Module = model.train()
    return trained


def corpus() -> torch.Tensor:
    """The bytes of the standard library's top-level modules, in order of name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def batch(name: str, text: torch.Tensor, step: int, seed: int) -> dict[str, torch.Tensor]:
    """Windows of the text, drawn by (seed, step) alone; for llama, the second one ends in padding."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows, length = SHAPES[name]
    starts = torch.randint(len(text) - length, (rows,), generator=generator).tolist()
    ids = torch.stack([text[start : start + length].long() for start in starts])
    if name == "gpt2":
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[1, int(torch.randint(length // 2, length, (), generator=generator)) :] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def on(device: torch.device, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors on `device`."""
    return {name: x.to(device) for name, x in tensors.items()}


class Report:
    """Lines of JSON: to ``directory/rank<r>.jsonl``, or from rank 0 to standard output."""

    def __init__(self, directory: str | None) -> None:
        rank = dist.get_rank()
        self.file = open(Path(directory, f"rank{rank}.jsonl"), "w") if directory else sys.stdout  # noqa: SIM115
        self.silent = not directory and rank != 0

    def write(self, **values: float) -> None:
        if not self.silent:
            print(json.dumps(values), file=self.file, flush=True)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="gpt2")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--backend", default="ring_dilated")
    parser.add_argument("--device", choices=CHOICES, default="auto")
    parser.add_argument("--report", metavar="DIRECTORY", help="write rank<r>.jsonl here instead of to standard output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
