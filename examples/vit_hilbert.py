"""A ViT whose attention is a window on the grid of its patches, in row-major order and along a Hilbert curve.

    torchrun --nproc-per-node 2 -m examples.vit_hilbert

Same model, same image, same numbers; along the curve the window falls into fewer tiles.  Under a minute; ends with

    hilbert 128x128 after 1: loss and gradients differ by <difference> <= 1e-04; <share> of row-major's pairs in tiles
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ringpass.patterns import grid_window

WIDTH, HEADS, PATCH = 32, 2, 4
BOUND = 1e-4
COUNTED = re.compile(r"^sites? .*?(?:x (\d+), )?on rank .*: (\d+) pairs, (\d+) key tokens received$", re.MULTILINE)


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm(x)).view(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(x)
        return x


class Vision(nn.Module):
    """Patches, a CLS token in front of them, positions, layers; the cross entropy of the image's class."""

    def __init__(self, grid: tuple[int, int], layers: int) -> None:
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.1 * torch.randn(1, grid[0] * grid[1] + 1, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(layers)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return F.cross_entropy(self.head(self.layers(x)[:, 0]), labels)


def main(argv: list[str] | None = None) -> int:
    """Both orders, one after the other; 1 where they disagree."""
    args = _arguments(argv)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    grid = (args.grid, args.grid)
    model = Vision(grid, args.layers)
    batch = torch.randn(1, 3, PATCH * args.grid, PATCH * args.grid), torch.randint(10, (1,))
    near: dict[str, Any] = {"mask": grid_window(grid, args.radius, skip=1), "compiler": "aot_eager"}
    with tempfile.TemporaryDirectory() as directory:
        shared: list[Any] = [directory]
        dist.broadcast_object_list(shared)  # one directory for the plans of all ranks
        rows = _run(model, batch, near, Path(shared[0], "rows"))
        along = _run(model, batch, {**near, "hilbert": grid}, Path(shared[0], "along"))
        dist.barrier()
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(along[0], rows[0], strict=True))
    if dist.get_rank() == 0:
        for name, (_, seconds, pairs, received) in (("row-major", rows), ("hilbert", along)):
            print(f"{name}: {seconds:.2f} s a step, {pairs:,} pairs in tiles, {received:,} key tokens received")
        sign = "<=" if difference <= BOUND else "above"
        share = f"{along[2] / rows[2]:.2f} of row-major's pairs in tiles"
        where = f"hilbert {args.grid}x{args.grid} after 1"
        print(f"{where}: loss and gradients differ by {difference:.1e} {sign} {BOUND:.0e}; {share}")
    dist.destroy_process_group()
    return int(not difference <= BOUND)


def _run(
    model: nn.Module, batch: tuple[Tensor, ...], options: dict[str, Any], dump: Path
) -> tuple[list[Tensor], float, int, int]:
    """([loss, gradients], median seconds of a step, pairs in tiles and key tokens received on all ranks)."""
    torch._dynamo.reset()
    run: Any = torch.compile(model, backend="ring_dilated", options={**options, "dump": str(dump)})
    seconds = []
    for _ in range(3):
        model.zero_grad()
        begun = time.perf_counter()
        loss = run(*batch)
        loss.backward()
        seconds.append(time.perf_counter() - begun)
    dist.barrier()
    found = [x for path in dump.glob("graph*/rank*/schedule.txt") for x in COUNTED.findall(path.read_text())]
    counts = [(int(times or 1) * int(pairs), int(times or 1) * int(tokens)) for times, pairs, tokens in found]
    results = [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return results, statistics.median(seconds[1:]), sum(n for n, _ in counts), sum(n for _, n in counts)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=128, help="patches on each side of the image")
    parser.add_argument("--radius", type=int, default=8, help="of the window, in patches")
    parser.add_argument("--layers", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
