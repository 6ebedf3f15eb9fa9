"""The ring's loop on thread ranks, against dense attention: what tests/kernels/test_gpu.py does on one GPU."""

from __future__ import annotations

import pytest
import torch

from ringpass.comm import p2p
from ringpass.errors import PeerError
from tests.support import thread_ranks
from tests.support.attention_parity import MASKS, check_ranks, dense_step, ring_step, tensors, worst


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", MASKS)
def test_ring_on_threads_is_dense_attention(mask: str, layout: str, world: int) -> None:
    given = tensors(23, (4, 2), 8, torch.float64, "cpu")
    found = ring_step(mask, layout, world, 4, *given)
    assert worst(found, dense_step(mask, *given), layout) < 1e-12


@pytest.mark.parametrize("world", [2, 3])
def test_a_batch_of_no_samples(world: int) -> None:
    """Messages have tokens, but no elements."""
    given = [x[:0] for x in tensors(23, (4, 2), 8, torch.float64, "cpu")]
    wanted = dense_step("k <= q", *given)
    assert not sum(x.numel() for x in wanted)
    check_ranks(ring_step("k <= q", "zigzag", world, 4, *given), wanted, "zigzag", 0.0, "an empty batch")


def test_messages_arrive_in_order_and_late() -> None:
    """What is in the buffer when the message is waited for, is what arrives."""

    def job(rank: int, group: str) -> list[float]:
        sent = [torch.full((3,), float(10 * rank + i)) for i in range(2)]
        under_way = [p2p.start(x, 1 - rank, torch.empty(3), 1 - rank, 0, group) for x in sent]
        for exchange in under_way:
            exchange.wait()
        return [exchange.received[0].item() for exchange in under_way]

    assert thread_ranks.run(2, job) == [[10.0, 11.0], [0.0, 1.0]]


def test_an_error_of_a_rank_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_ranks, "TIMEOUT", 0.2)

    def job(rank: int, group: str) -> None:
        if rank == 1:
            raise ZeroDivisionError
        p2p.start(torch.ones(1), 1, torch.empty(1), 1, 0, group).wait()

    with pytest.raises((ZeroDivisionError, PeerError)):
        thread_ranks.run(2, job)


def test_a_message_that_nobody_waits_for_is_noticed() -> None:
    def job(rank: int, group: str) -> None:
        p2p.start(torch.ones(1), 1 - rank, torch.empty(1), 1 - rank, 0, group)

    with pytest.raises(AssertionError):
        thread_ranks.run(2, job)
