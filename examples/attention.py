"""One causal attention over P ranks, and the dump of what was compiled for each.

    torchrun --nproc-per-node 4 -m examples.attention --dump dump

docs/lowered_graph.md reads the dump of rank 1.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from examples.device import CHOICES, start


class Attention(nn.Module):
    """Two heads of 8 over the tokens of (1, S, 16), down to a number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(1, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()


def main(argv: list[str] | None = None) -> None:
    """One step on 64 tokens; rank 0 tells where to look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", default="dump", metavar="DIRECTORY")
    parser.add_argument("--device", choices=CHOICES, default="auto")
    args = parser.parse_args(argv)
    device = start(args.device)
    torch.manual_seed(0)
    options = {"compiler": "aot_eager", "layout": "zigzag", "dump": args.dump}
    model = torch.compile(Attention().to(device), backend="ring_dilated", options=options)
    loss = model(torch.randn(1, 64, 16).to(device))
    loss.backward()
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"loss {loss.item():.6f} on {dist.get_world_size()} ranks; see {args.dump}/graph0/rank1/forward.py")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
