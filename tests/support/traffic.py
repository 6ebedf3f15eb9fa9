"""What ranks receive, counted where transfers start, and what they have to receive by the dense mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ringpass.comm import p2p
from ringpass.layouts.layout import Layout


@contextmanager
def received_bytes() -> Iterator[list[int]]:
    """Bytes that this rank receives inside: of keys and values, and of their gradients."""
    totals, start = [0, 0], p2p.start

    def counting(sent: Tensor, dst: Any, received: Tensor, src: Any, tag: int, *names: str) -> p2p.PendingExchange:
        totals[tag % 2] += received.nbytes
        return start(sent, dst, received, src, tag, *names)

    with patch.object(p2p, "start", counting):
        yield totals


def remote_keys_needed(ranks: int, length: int, window: int, layout: str) -> list[int]:
    """Distinct remote keys that some query of each rank sees, from the dense mask."""
    at = torch.arange(length)
    seen = at[None, :] <= at[:, None]
    if window:
        seen &= at[:, None] - at[None, :] < window
    counts = []
    for rank in range(ranks):
        local = torch.cat([at[a:b] for a, b in Layout(layout, ranks).ranges(rank, length)])
        remote = torch.ones(length, dtype=torch.bool)
        remote[local] = False
        counts.append(int((seen[local].any(0) & remote).sum()))
    return counts
