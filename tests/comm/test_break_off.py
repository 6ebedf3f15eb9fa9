"""What is under way on a group ends when a rank breaks it off, whatever other ranks have broken off before."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from threading import Timer

import torch
import torch.distributed as dist

from ringpass.comm.lost import break_off
from tests.support.process_ranks import spawn

RANKS, LIMIT, SOON = 3, 60.0, 30.0  # seconds


def waiting(group: dist.ProcessGroup) -> float:
    """Seconds for which rank 2 waits for rank 1, which sends nothing, after rank 0 has broken off the group."""
    pg, rank, seconds = dist.new_group(timeout=timedelta(seconds=LIMIT)), group.rank(), 0.0
    dist.barrier(pg)  # all are connected
    if rank == 0:
        break_off(pg)
    dist.barrier(group)
    if rank == 2:
        begun = time.monotonic()
        never = dist.irecv(torch.empty(1), group=pg, group_src=1)
        Timer(1.0, break_off, [pg]).start()
        with suppress(RuntimeError):
            assert never is not None
            never.wait(timedelta(seconds=LIMIT))
        seconds = time.monotonic() - begun
    dist.barrier(group)
    return seconds


def test_a_wait_ends_where_another_rank_broke_off_first() -> None:
    *_, last = spawn(waiting, RANKS, timeout=4 * LIMIT)
    assert last.error is None and last.result is not None, last
    assert 0.5 < last.result < SOON
