"""P ranks in one process: a thread each, and mailboxes in place of a process group.

>>> run(3, job)               # job(rank, group) on three threads -> [result, result, result]

A job passes its `group` on as the group's name.  A message is copied by whichever side waits first once both have
posted, at the latest moment that is legal: a buffer that is freed or written too early, or a wait too few, shows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from ringpass.comm import collectives, p2p, pooling
from ringpass.torch_features import gather_equal

TIMEOUT = 60.0
NAME = "thread"


@dataclass
class Message:
    """One message: what the sender posts, and the receiver."""

    sent: Tensor | None = None
    received: Tensor | None = None
    delivered: bool = False
    posted: threading.Condition = field(default_factory=threading.Condition)

    def post(self, **side: Tensor) -> None:
        with self.posted:
            for name, buffer in side.items():
                setattr(self, name, buffer)
            self.posted.notify_all()

    def wait(self) -> None:
        """As a process group's work: returns when both buffers are their owners' again."""
        with self.posted:
            if not self.posted.wait_for(lambda: self.delivered or self._both, TIMEOUT):
                raise RuntimeError(f"the other side posted nothing within {TIMEOUT:g} s")
            if self.delivered:
                return
            assert self.sent is not None and self.received is not None
            assert (self.sent.shape, self.sent.dtype) == (self.received.shape, self.received.dtype)
            self.received.copy_(self.sent)
            self.sent, self.received, self.delivered = None, None, True

    @property
    def _both(self) -> bool:
        return self.sent is not None and self.received is not None


class Mailboxes:
    """The messages between all ranks, first in, first out for each pair and tag."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.messages: dict[tuple[int, int, int, int], Message] = {}
        self.posted: dict[tuple[int, int, int, str], int] = {}

    def start(
        self, sent: Tensor, dst: int | None, received: Tensor, src: int | None, tag: int, group: str, label: str = ""
    ) -> p2p.PendingExchange:
        """In place of `p2p.start`."""
        rank = int(group.removeprefix(NAME))
        works: list[Any] = []
        if dst is not None:
            works.append(self._message(rank, dst, tag, "sent"))
            works[-1].post(sent=sent)
        if src is not None:
            works.append(self._message(src, rank, tag, "received"))
            works[-1].post(received=received)
        return p2p.PendingExchange(received, sent, works, (dst, src))

    def _message(self, src: int, dst: int, tag: int, side: str) -> Message:
        with self.lock:
            number = self.posted.get((src, dst, tag, side), 0)
            self.posted[src, dst, tag, side] = number + 1
            return self.messages.setdefault((src, dst, tag, number), Message())

    @property
    def undelivered(self) -> int:
        """Messages that nobody waited for."""
        return sum(not message.delivered for message in self.messages.values())


class Rendezvous:
    """Where all ranks show a tensor and see everyone's: in place of `collectives.run_collective`."""

    def __init__(self, world: int) -> None:
        self.shown: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=TIMEOUT)

    def __call__(self, collective: Any, out: Any, *given: Any, group: str, what: str = "") -> None:
        rank = int(group.removeprefix(NAME))
        if collective is dist.all_to_all_single:
            return self._all_to_all(rank, out, *given)
        everyone = self._shown(rank, given[0] if given else out.clone())
        if collective is gather_equal():
            out.copy_(torch.cat(everyone))
        else:
            total = torch.stack(everyone).sum(0)
            out.copy_(total if collective is dist.all_reduce else total.chunk(len(everyone))[rank])

    def _all_to_all(self, rank: int, out: Tensor, given: Tensor, received: list[int], sent: list[int]) -> None:
        """Each rank's part for `rank`, one after the other; the two sides must state the same lengths."""
        everyone = self._shown(rank, given, sent)
        parts = [rows.split(lengths)[rank] for rows, lengths in everyone]
        assert [len(part) for part in parts] == received
        out.copy_(torch.cat(parts))

    def _shown(self, rank: int, *shown: Any) -> list[Any]:
        """What each rank shows: a tensor, copied, alone or with what goes with it."""
        self.shown[rank] = shown
        self.barrier.wait()
        everyone = [(x.clone(), *rest) for x, *rest in self.shown]
        self.barrier.wait()
        return everyone if len(shown) > 1 else [x for (x,) in everyone]


def run(world: int, job: Callable[[int, str], Any]) -> list[Any]:
    """Results of `job(rank, group)` on each rank; raises the first error of a rank."""
    mailboxes = Mailboxes()

    def member(rank: int) -> Any:
        with torch.autograd.set_multithreading_enabled(False):  # else ranks on one device share a backward thread
            return job(rank, f"{NAME}{rank}")

    meeting = Rendezvous(world)

    def gathered(sent: Tensor, received: Tensor, group: str) -> p2p.PendingExchange:
        meeting(gather_equal(), received, sent, group=group)
        return p2p.PendingExchange(received, sent, [], ())

    def exchanged(message: Tensor, received: list[int], sent: list[int], group: str) -> p2p.PendingExchange:
        into = message.new_empty(sum(received))
        meeting(dist.all_to_all_single, into, message, received, sent, group=group)
        return p2p.PendingExchange(into, message, [], ())

    rendezvous = patch.multiple(collectives, run_collective=meeting, start_gather=gathered)
    starts = patch.object(pooling, "start", exchanged)
    with patch.object(p2p, "start", mailboxes.start), rendezvous, starts, ThreadPoolExecutor(world) as pool:
        results = list(pool.map(member, range(world)))
    assert mailboxes.undelivered == 0
    return results
