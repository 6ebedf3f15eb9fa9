"""What really travels between ranks: bytes, counted where messages start, against a brute-force mask."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.marks import slow
from tests.support.model_parity import compiled
from tests.support.process_ranks import Workers
from tests.support.traffic import received_bytes, remote_keys_needed

BATCH, KEY_HEADS, WIDTH = 2, 2, 4


class Grouped(nn.Module):
    """Four query heads over two key heads; causal, maybe with a window, as models write it."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.q, self.kv, self.window = nn.Linear(8, 16), nn.Linear(8, 16), window

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], 4, WIDTH).transpose(1, 2)
        k, v = self.kv(x).view(*x.shape[:2], 2, KEY_HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        attend = nn.functional.scaled_dot_product_attention
        if not self.window:
            return attend(q, k, v, is_causal=True, enable_gqa=True).square().mean()
        at = torch.arange(x.shape[1])
        mask = (at[None, :] <= at[:, None]) & (at[:, None] - at[None, :] < self.window)
        return attend(q, k, v, attn_mask=mask, enable_gqa=True).square().mean()


def received(group: dist.ProcessGroup, length: int, window: int, layout: str, tile: int) -> tuple[int, int]:
    """Bytes of keys and values, and of their gradients, that this rank receives in a step."""
    model, x = Grouped(window), torch.randn(BATCH, length, 8)
    run = compiled(model, group, layout=layout, tile=tile)
    with received_bytes() as totals:
        run(x).backward()
    return totals[0], totals[1]


@pytest.mark.parametrize("layout", (slow("contiguous"), "zigzag"))
@pytest.mark.parametrize(("length", "window", "tile"), [slow(97, 0, 1024), (1031, 350, 32)])
@pytest.mark.parametrize("ranks", (2, slow(5)))
def test_bytes_received_are_those_needed(
    workers: Workers, ranks: int, length: int, window: int, tile: int, layout: str
) -> None:
    token = 2 * BATCH * KEY_HEADS * WIDTH * 4  # keys and values, float32
    bounds = [2 * token * n for n in remote_keys_needed(ranks, length, window, layout)]  # in the forward and backward
    for (keys, _), bound in zip(workers.run(received, ranks, length, window, layout, tile), bounds, strict=True):
        assert bound <= keys <= 1.05 * bound if window else keys == bound


def test_gradients_travel_as_far_as_their_keys(workers: Workers) -> None:
    for ranks in (2, 3):
        results = workers.run(received, ranks, 97, 0, "zigzag", 1024)
        assert sum(keys for keys, _ in results) == 2 * sum(gradients for _, gradients in results)
