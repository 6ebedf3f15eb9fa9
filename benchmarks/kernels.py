"""Speed of the tile kernels on a CUDA device, each against the others.

    python -m benchmarks.kernels [--repeats 20]

Per tile (full, causal, partial), size and dtype: median times of forward and backward with CUDA events, and TFLOP/s
of the scores that the tile really needs.  A star marks the kernel that the ring takes.  `flex` is timed as a masked
step, whose block lists are made before, once for all layers; the other kernels as tiles with the evaluated mask.
Prints tables and writes benchmarks/results/kernels_<device>.json.  What runs out of memory or refuses has no time, but
a reason.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ringpass.kernels.flex import takes_step
from ringpass.kernels.table import HALF, KERNELS, choose
from ringpass.kernels.tile import TileArgs
from ringpass.ops import masked_steps

RESULTS = Path(__file__).parent / "results"
ALL = (torch.bfloat16, torch.float16, torch.float32)
KINDS = {
    "flash": (HALF, ("full", "causal")),
    "cudnn": (HALF, ("full", "causal")),
    "efficient": (ALL, ("full", "causal", "partial")),
    "flex": (HALF, ("partial",)),
    "plain": (ALL, ("full", "causal", "partial")),
}
"""Kernel -> dtypes and tiles that it can serve."""
DOCUMENTS = "k <= q & q // {0} == k // {0}"  # the mask of a partial tile


@dataclass(frozen=True)
class Size:
    """B, H query heads, G key/value heads, L queries and keys, D."""

    batch: int
    heads: int
    groups: int
    length: int
    width: int

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} G{self.groups} L{self.length} D{self.width}"


SIZES = (
    Size(1, 16, 16, 1024, 64),
    Size(4, 16, 16, 1024, 64),
    Size(1, 32, 8, 1024, 128),
    Size(1, 16, 16, 4096, 64),
    Size(1, 32, 8, 8192, 128),
)


@dataclass(frozen=True)
class Timing:
    """One kernel on one tile, in milliseconds; no time where `problem` says why."""

    tile: str
    size: str
    dtype: str
    kernel: str
    chosen: bool
    forward: float | None = None
    backward: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    problem: str = ""


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each kernel (default 20)")
    repeats = parser.parse_args(arguments).repeats
    console = Console()
    if not torch.cuda.is_available():
        console.print("benchmarks.kernels needs a CUDA device: torch sees none")
        return 1
    timings = []
    for tile in ("full", "causal", "partial"):
        found = list(measure(tile, repeats))
        console.print(table(tile, found))
        timings += found
    console.print(f"written to {write(timings)}")
    return 0


def measure(tile: str, repeats: int) -> Iterator[Timing]:
    """Every kernel that serves such a tile, at every size and dtype."""
    for size in SIZES:
        for dtype in ALL:
            q, k, v, grad = inputs(size, dtype)
            args, share = tile_args(tile, size)
            lengths, widths = (size.length, size.length), (size.width, size.width)
            whole = tile == "partial" and takes_step(q.device, dtype, size.width)
            chosen = "flex" if whole else choose(q.device, dtype, widths, lengths, args)
            for kernel, (dtypes, tiles) in KINDS.items():
                if dtype in dtypes and tile in tiles:
                    name = str(dtype).removeprefix("torch.")
                    row = Timing(tile, str(size), name, kernel, kernel == chosen)
                    yield timed(row, size, share, (q, k, v, grad), args, repeats)


def timed(
    row: Timing, size: Size, share: float, given: tuple[Tensor, Tensor, Tensor, Tensor], args: TileArgs, repeats: int
) -> Timing:
    """`row` with its times."""
    q, k, v, grad = given
    try:
        forward, backward = calls(row.kernel, size, q.device)
        out, lse = forward(q, k, v, args)
        out, lse = out.to(q.dtype), lse.masked_fill(lse == -torch.inf, torch.inf)
        there = median(lambda: forward(q, k, v, args), repeats)
        back = median(lambda: backward(grad, q, k, v, out, lse, args), repeats)
    except Exception as error:  # a kernel that refuses is a result
        torch.cuda.empty_cache()
        return replace(row, problem=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    work = 4 * size.batch * size.heads * size.length**2 * size.width * share / 1e9  # two products, 2 flops each
    return replace(row, forward=there, backward=back, forward_tflops=work / there, backward_tflops=2.5 * work / back)


def calls(kernel: str, size: Size, device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the backward of a kernel, as functions of tensors and TileArgs."""
    if kernel != "flex":
        return KERNELS[kernel].forward, KERNELS[kernel].backward
    mask, span = DOCUMENTS.format(size.length // 2), [0, size.length]
    lists = masked_steps.block_lists([], mask, size.batch, size.heads, span, span, device)

    def forward(q: Tensor, k: Tensor, v: Tensor, args: TileArgs) -> Any:
        return masked_steps.attention_step(q, k, v, [], lists, mask, args.scale, [])

    def backward(*given: Any) -> Any:
        *tensors, args = given
        return masked_steps.attention_step_backward(*tensors, [], lists, mask, args.scale, [])

    return forward, backward


def median(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `run` on the device, after a few runs that do not count."""
    for _ in range(3):
        run()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in marks:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(stop) for start, stop in marks))


def inputs(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of out."""
    g = torch.Generator("cuda").manual_seed(0)
    heads = (size.heads, size.groups, size.groups, size.heads)
    made = [torch.randn(size.batch, h, size.length, size.width, device="cuda", generator=g).to(dtype) for h in heads]
    return made[0], made[1], made[2], made[3]


def tile_args(tile: str, size: Size) -> tuple[TileArgs, float]:
    """What acts on the scores, and the share of them that is needed.

    A partial tile is one of packed documents, each half as long as the tile, and causal.
    """
    scale = size.width**-0.5
    if tile == "full":
        return TileArgs(scale), 1.0
    if tile == "causal":
        return TileArgs(scale, causal=True), 0.5
    at = torch.arange(size.length, device="cuda")
    row, column, document = at.view(-1, 1), at.view(1, -1), at // (size.length // 2)
    mask = (column <= row) & (document.view(-1, 1) == document.view(1, -1))
    return TileArgs(scale, mask=mask.view(1, 1, size.length, size.length)), mask.double().mean().item()


def table(tile: str, timings: list[Timing]) -> Table:
    """One kind of tile, readable."""
    out = Table(title=f"{tile} tiles on {torch.cuda.get_device_name()}")
    for heading in ("size", "dtype", "kernel", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "problem"):
        out.add_column(heading, justify="right" if "ms" in heading or "/s" in heading else "left")
    for row in timings:
        figures = (row.forward, row.forward_tflops, row.backward, row.backward_tflops)
        texts = ["-" if x is None else f"{x:.3f}" if i % 2 == 0 else f"{x:.1f}" for i, x in enumerate(figures)]
        out.add_row(row.size, row.dtype, row.kernel + (" *" if row.chosen else ""), *texts, row.problem)
    return out


def write(timings: list[Timing]) -> Path:
    """The results file of this device."""
    device = torch.cuda.get_device_name()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kernels_{re.sub(r'[^A-Za-z0-9]+', '_', device).strip('_')}.json"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    about = {"device": device, "capability": torch.cuda.get_device_capability(), **versions}
    path.write_text(json.dumps({**about, "timings": [asdict(t) for t in timings]}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
