"""What is only moved between ranks arrives unchanged in every dtype, as bytes where NCCL has no such number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ringpass import ops
from ringpass.comm import collectives, p2p
from ringpass.layouts.layout import Layout
from ringpass.ops import primitives
from tests.support.process_ranks import Workers

S, RANKS = 23, 3
NUMBERS = (torch.bool, torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)
OTHERS = (torch.uint64, torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.complex64)
NCCL = {torch.uint8, torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.float64}


@contextmanager
def travelling() -> Iterator[set[torch.dtype]]:
    """The dtypes of the tensors that reach torch.distributed inside."""
    seen: set[torch.dtype] = set()
    run, start = collectives.run_collective, dist.batch_isend_irecv

    def collective(of: Any, out: Tensor, *args: object, group: str, what: str) -> None:
        seen.update(x.dtype for x in (out, *args) if isinstance(x, Tensor))
        run(of, out, *args, group=group, what=what)

    def exchange(pairs: list[dist.P2POp]) -> list[dist.Work]:
        seen.update(pair.tensor.dtype for pair in pairs)
        return start(pairs)

    with patch.object(collectives, "run_collective", collective), patch.object(dist, "batch_isend_irecv", exchange):
        yield seen


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def moved(group: dist.ProcessGroup, dtype: torch.dtype) -> tuple[dict[str, bool], set[torch.dtype]]:
    """Whether each operator that moves tokens brings the right ones, and the dtypes that travelled."""
    rank, world, name = group.rank(), group.size(), group.group_name
    full = (torch.arange(2 * S * 3).view(2, S, 3) % 5 * 50).to(dtype)
    layout = Layout("zigzag", world)

    def rows(ranges: Any) -> Tensor:
        return torch.cat([full[:, a:b] for a, b in ranges], 1)

    where = 1, 1, S, "zigzag", world, rank
    local = rows(layout.ranges(rank, S)).contiguous()
    other = rows(Layout("contiguous", world).ranges(rank, S))
    widened, most = rows((max(a - 1, 0), b) for a, b in layout.ranges(rank, S)), local.shape[1] + 2
    edge = widened.new_zeros(2, int(rank == 0), 3)  # before the first token
    widened = torch.cat([edge, widened, widened.new_zeros(2, most - edge.shape[1] - widened.shape[1], 3)], 1)
    given, following, before = full[0].reshape(-1), (rank + 1) % world, (rank - 1) % world
    with travelling() as seen:
        gathered = ops.gather(local, *where, name)
        redistributed = ops.redistribute(local, 1, 1, S, "zigzag", "contiguous", world, rank, name)
        halo = ops.halo(local, *where, 2, 1, 0, name)
        (received,) = primitives.exchange([given], given.numel(), dtype, following, before, 0, [], "", name)
        primitives.wait(received)
    pairs = {
        "gather": (gathered, full),
        "redistribute": (redistributed, other),
        "halo": (halo, widened),
        "exchange": (received, given),
    }
    return {what: torch.equal(bits(a), bits(b)) for what, (a, b) in pairs.items()}, seen


@pytest.mark.parametrize("dtype", (*NUMBERS, *OTHERS), ids=lambda x: str(x).removeprefix("torch."))
def test_every_dtype_arrives(workers: Workers, dtype: torch.dtype) -> None:
    for right, seen in workers.run(moved, RANKS, dtype):
        assert all(right.values()), right
        assert seen == {dtype if dtype in NCCL else torch.uint8}


def test_bytes_are_a_view() -> None:
    """No copy: what arrives in the bytes of a buffer is in the buffer."""
    x = torch.zeros(4, dtype=torch.int16)
    p2p.sendable(x)[0] = 1
    assert x.tolist() == [1, 0, 0, 0]
