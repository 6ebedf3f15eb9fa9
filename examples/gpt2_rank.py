"""What each rank runs: an unmodified Hugging Face GPT-2 learns Python's standard library, byte by byte.

    torchrun --nproc-per-node 2 -m examples.gpt2_rank --steps 16

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
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.memory import peak_bytes

LENGTH = 4096


def main(argv: list[str] | None = None) -> None:
    """Train, one JSON line per step; then measure the peak of activation memory on one step more."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo")
    report = Report(args.report)
    model = make_model(args.seed)
    report.write(parameters=sum(p.numel() for p in model.parameters()))
    compiled = torch.compile(model, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4)
    text = corpus()
    torch.manual_seed(args.seed)  # the same dropout on every rank
    for step in range(args.steps):
        start = time.perf_counter()
        ids = batch(text, step, args.seed)
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report.write(step=step, loss=loss.item(), seconds=time.perf_counter() - start)
    ids = batch(text, args.steps, args.seed)
    peak = peak_bytes(
        lambda: compiled(input_ids=ids, labels=ids).loss.backward(),
        kept=lambda: [p.grad for p in model.parameters()],
    )
    report.write(peak=peak)
    dist.destroy_process_group()


def make_model(seed: int) -> torch.nn.Module:
    """About 10M parameters, random start, dropout as configured by default."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=480, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model: torch.nn.Module = GPT2LMHeadModel(config)
    return model.train()


def corpus() -> torch.Tensor:
    """The bytes of the standard library's top-level modules, in order of name."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def batch(text: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """One window of the text, drawn by (seed, step) alone: input ids of shape (1, LENGTH)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    start = int(torch.randint(len(text) - LENGTH, (), generator=generator))
    return text[start : start + LENGTH].long().unsqueeze(0)


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
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--backend", default="ring_dilated")
    parser.add_argument("--report", metavar="DIRECTORY", help="write rank<r>.jsonl here instead of to standard output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
