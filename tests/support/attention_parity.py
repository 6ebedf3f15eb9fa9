"""Ring attention on thread ranks beside dense attention on one: what CPU and GPU tests compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ringpass.layouts.layout import Layout
from ringpass.ops import ring
from tests.support import thread_ranks
from tests.support.sites import site

SCALE = 0.3
MASKS = ("True", "k <= q", "q - k < 7 & k <= q", "k <= q & bool(x0[b, k])", "bool(x0[b, k])")


def tensors(tokens: int, heads: tuple[int, int], width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v, the gradient of out, and the keys that exist: all but the first of batch 0 (so causal row 0 is dead)."""
    g = torch.Generator().manual_seed(0)
    sizes = (heads[0], heads[1], heads[1], heads[0])
    made = [torch.randn(2, h, tokens, width, generator=g, dtype=torch.float64).to(device, dtype) for h in sizes]
    exists = torch.ones(2, tokens, dtype=torch.bool, device=device)
    exists[0, 0] = False
    return [*made, exists]


@contextmanager
def one_thread() -> Iterator[None]:
    """For tensors so small that threads only cost."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_ranks(found: Sequence[list[Tensor]], wanted: list[Tensor], layout: str, tolerance: float, where: str) -> None:
    """Whether [out, dq, dk, dv] of each rank are its tokens of those wanted."""
    for rank, results in enumerate(found):
        for name, got, full in zip(("out", "dq", "dk", "dv"), results, wanted, strict=True):
            want = of_rank(full, layout, rank, len(found))
            assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), f"{name} of rank {rank}: {where}"


def of_rank(x: Tensor, layout: str, rank: int, world: int) -> Tensor:
    owned = Layout(layout, world).ranges(rank, x.shape[2])
    return torch.cat([x[:, :, a:b] for a, b in [(0, 0), *owned]], 2)


def ring_step(
    mask: str, layout: str, world: int, tile: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, exists: Tensor
) -> list[list[Tensor]]:
    """[out, dq, dk, dv] of each rank."""

    def job(rank: int, group: str) -> list[Tensor]:
        here = site(mask, q.shape[2], layout, rank, world, tile, group=group, scale=SCALE)
        mine = [of_rank(x, layout, rank, world) for x in (q, k, v, grad)]
        leaves = [exists] if "x0" in mask else []
        with torch.no_grad():
            out, lse = ring.forward(here, mine[0], mine[1], mine[2], leaves, None)
            dq, dk, dv, _ = ring.backward(here, mine[3], mine[0], mine[1], mine[2], out, lse, leaves, None)
        return [out, dq, dk, dv]

    return thread_ranks.run(world, job)


def dense_step(mask: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, exists: Tensor) -> list[Tensor]:
    """[out, dq, dk, dv] of torch's SDPA on all tokens, in float64."""
    at = torch.arange(q.shape[2], device=q.device)
    row, column = at.view(-1, 1), at.view(1, -1)
    allowed = {
        "True": torch.ones_like(row <= column),
        "k <= q": column <= row,
        "q - k < 7 & k <= q": (column <= row) & (row - column < 7),
        "k <= q & bool(x0[b, k])": (column <= row) & exists[:, None, None],
        "bool(x0[b, k])": exists[:, None, None],
    }[mask]
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        inputs[0], inputs[1], inputs[2], attn_mask=allowed, scale=SCALE, enable_gqa=grouped
    )
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.double())]


def worst(found: Sequence[Sequence[Tensor]], want: Sequence[Tensor], layout: str) -> float:
    """Largest relative error of [out, dq, dk, dv] over the ranks; NaN counts as infinite."""
    world = len(found)
    errors: list[float] = []
    for rank, results in enumerate(found):
        for got, full in zip(results, want, strict=True):
            error = (got.double() - of_rank(full, layout, rank, world)).norm() / full.norm()
            errors.append(error.nan_to_num(torch.inf).item())
    return max(errors)
