"""The dtype in which gradients of keys return: the model's where one launch gives each row, else the accumulator's."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ringpass.ops.transports.ring import RingTransport
from ringpass.precision import accumulator
from tests.support import thread_ranks
from tests.support.attention_parity import dense_step, one_thread, ring_step, tensors, worst

WORLD = 4
ONE_LAUNCH = {"causal": ("k <= q", "zigzag"), "everything": ("True", "contiguous")}
SEVERAL = {"window": ("q - k < 7 & k <= q", "contiguous")}


def messages(mask: str, layout: str, dtype: torch.dtype) -> tuple[set[torch.dtype], float]:
    """The dtypes of the gradient messages of all ranks, and the largest relative error of their results."""
    seen: set[torch.dtype] = set()
    real = thread_ranks.Mailboxes.start

    def start(self: Any, sent: Tensor, dst: Any, received: Tensor, src: Any, tag: int, *names: str) -> Any:
        if tag % 2:
            seen.update(x.dtype for x, peer in ((sent, dst), (received, src)) if peer is not None)
        return real(self, sent, dst, received, src, tag, *names)

    given = tensors(64, (4, 2), 8, dtype, "cpu")
    with one_thread(), patch.object(thread_ranks.Mailboxes, "start", start):
        found = ring_step(mask, layout, WORLD, 4, *given)
    return seen, worst(found, dense_step(mask, *given), layout)


@pytest.mark.parametrize("name", ONE_LAUNCH)
def test_one_launch_sends_the_models_dtype(name: str) -> None:
    seen, error = messages(*ONE_LAUNCH[name], torch.bfloat16)
    assert seen == {torch.bfloat16}
    with patch.object(RingTransport, "gradient_dtype", lambda self, transfer: accumulator(self.k.dtype)):
        wide, least = messages(*ONE_LAUNCH[name], torch.bfloat16)
    assert wide == {torch.float32} and error <= 1.1 * least


@pytest.mark.parametrize("name", SEVERAL)
def test_several_launches_send_the_accumulators(name: str) -> None:
    """Both ends must find this out alike: messages of another dtype than expected fail in the mailboxes."""
    seen, _ = messages(*SEVERAL[name], torch.bfloat16)
    assert torch.float32 in seen


@pytest.mark.parametrize("name", [*ONE_LAUNCH, *SEVERAL])
def test_wide_dtypes_stay(name: str) -> None:
    seen, error = messages(*{**ONE_LAUNCH, **SEVERAL}[name], torch.float64)
    assert seen == {torch.float64} and error < 1e-12
