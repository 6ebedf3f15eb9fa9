"""A rank that waits too long says for whom, at which site and step, in which call; once per wait."""

from __future__ import annotations

import logging
import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ringpass
from ringpass import OptionError, metrics
from ringpass.comm.ring import ring_of
from ringpass.kernels import table as kernels
from tests.support.process_ranks import Workers

WORLD, SPAN, STALL = 3, 1.5, 4.0  # seconds of `watch`, and of a rank that is late


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Model(nn.Module):
    """One attention to all tokens, down to a number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(1, -1, 3, 4, 4).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v).square().mean()


def heard(group: dist.ProcessGroup, late: str) -> tuple[list[str], int, int]:
    """The warnings of this rank, the stalls that it counted, and the number of the call in which rank 1 is late."""
    handler, log = Heard(), logging.getLogger("ringpass.stalls")
    options: Any = {"group": group, "compiler": "aot_eager"}
    torch.manual_seed(0)
    model: Any = torch.compile(Model(), backend="ring_dilated", options=options)
    x = torch.ones(1, 24, 16)
    model(x).backward()
    dist.barrier(group=group)
    stop = ringpass.watch(SPAN)
    log.addHandler(handler)
    forward = kernels.forward

    def slow(*args: Any) -> Any:
        if not slept:
            slept.append(True)
            time.sleep(STALL)
        return forward(*args)

    slept: list[bool] = []
    try:
        if late == "call" and group.rank() == 1:
            time.sleep(STALL)
        with patch.object(kernels, "forward", slow if late == "tile" and group.rank() == 1 else forward):
            model(x).backward()
        dist.barrier(group=group)
        return handler.texts, metrics.snapshot()["stalls"], ring_of(group).calls
    finally:
        log.removeHandler(handler)
        stop()
        metrics.disable()


def test_a_rank_that_comes_late(workers: Workers) -> None:
    found = workers.run(heard, WORLD, "call")
    for rank, (texts, stalls, call) in enumerate(found):
        if rank == 1:
            continue
        late = f"for the other ranks (compare the ranks), in call {call}: "
        (text,) = [text for text in texts if late in text]  # once per wait
        assert f"rank 1 is in call {call - 1} (behind) and waits for nobody" in text
        assert f"rank {2 - rank} is in call {call} and waits for the other ranks" in text
        assert stalls == len(texts)


def test_a_rank_that_computes_for_long(workers: Workers) -> None:
    """The neighbour that needs its message waits for it by name."""
    found = workers.run(heard, WORLD, "tile")
    texts, call = [text for texts, *_ in found for text in texts], found[0][2]
    assert any("site0 receive" in text and f"from_rank1, in call {call}: " in text for text in texts), texts
    assert any(f"rank 1 is in call {call} and waits for nobody" in text for text in texts), texts


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), True, "30"])
def test_the_span_is_checked(seconds: Any) -> None:
    with pytest.raises(OptionError, match="a number of seconds above 0, such as 30"):
        ringpass.watch(seconds)
