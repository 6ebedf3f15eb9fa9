"""An unmodified GPT-2 learns with dilated attention, on longer and longer texts.

    torchrun --nproc-per-node 2 -m examples.dilated_training
    torchrun --nproc-per-node 2 -m examples.dilated_training --lengths 4096 16384 65536

One model goes from length to length; `auto` finds the patterns for each, within a share of all pairs that shrinks as
the length grows, so that the pairs of a token stay as many.  Nothing in the model knows of them.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

from examples.train_rank import corpus

SHARE, RECEIVED = re.compile(r"; (\S+) of all pairs"), re.compile(r"receives at most .* (\d+) bytes")


@dataclass(frozen=True)
class Stage:
    """What training at one length cost and gave; pairs and bytes are those of a forward, as planned."""

    tokens: int
    share: float  # of all pairs of an attention
    received: int  # bytes of K and V, by the rank that receives most
    losses: list[float]
    seconds: list[float]

    def __str__(self) -> str:
        step = min(self.seconds[1:] or self.seconds)
        return (
            f"{self.tokens:>9,} tokens: {self.share:.3f} of all pairs, {self.received:>11,} bytes received, "
            f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}, {step:.2f} s a step"
        )


def main(argv: list[str] | None = None) -> None:
    """Train at each length in turn; rank 0 tells."""
    args = _arguments(argv)
    dist.init_process_group("gloo")
    torch.manual_seed(0)  # the same weights on every rank
    sizes = {"n_positions": max(args.lengths), "n_embd": 128, "n_layer": args.layers, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, **sizes, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    text = corpus()
    for tokens in args.lengths:
        with tempfile.TemporaryDirectory() as dump:
            stage = train(model, optimizer, text, tokens, args, dump)
        if dist.get_rank() == 0:
            print(stage, flush=True)
    dist.destroy_process_group()


def train(
    model: Any, optimizer: torch.optim.Optimizer, text: torch.Tensor, tokens: int, args: argparse.Namespace, dump: str
) -> Stage:
    """Some steps at one length, on another stretch of the text in each."""
    torch._dynamo.reset()  # compiled anew, for patterns of this length
    budget = args.budget * min(1, args.lengths[0] / tokens)
    options = {"dilation": args.dilation, "dilation_budget": budget, "compiler": args.compiler, "dump": dump}
    compiled: Any = torch.compile(model, backend="ring_dilated", options=options)
    losses, seconds = [], []
    for step in range(args.steps):
        begun = time.perf_counter()
        ids = text[step * tokens :][:tokens].long()[None]
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begun)
    plan = next(Path(dump).glob("graph*/plan.txt")).read_text()
    shares = [float(share) for share in SHARE.findall(plan)]
    return Stage(tokens, max(shares), sum(map(int, RECEIVED.findall(plan))), losses, seconds)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="tokens, one after the other"
    )
    parser.add_argument("--steps", type=int, default=6, help="at each length")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dilation", default="auto", help="auto, or a preset's name")
    parser.add_argument(
        "--budget", type=float, default=0.25, help="share of all pairs that auto may compute at the first length"
    )
    parser.add_argument("--compiler", choices=("aot_eager", "inductor"), default="aot_eager")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
