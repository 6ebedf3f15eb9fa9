"""Exchanges between two ranks of a ring: start a send and a receive together, wait later.

Built on torch.distributed.  `start` returns at once with the tensor that will hold the received data; `wait` blocks
until it does, and until the sent buffer may be reused.  Both ends post their exchanges in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringpass.comm.lost import await_work, lost
from ringpass.comm.ring import RINGS, resolved
from ringpass.metrics.recorder import moved

SENDABLE = frozenset({
    torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
})  # fmt: skip
"""The dtypes that NCCL and gloo both send."""


def sendable(x: Tensor) -> Tensor:
    """The contiguous `x` of one dim or more, to be moved and not added: itself, or its bytes if NCCL lacks its dtype.

    >>> sendable(torch.ones(2, dtype=torch.int16))
    tensor([1, 0, 1, 0], dtype=torch.uint8)
    """
    return x if x.dtype in SENDABLE else x.view(torch.uint8)


def process_group(name: str) -> dist.ProcessGroup:
    """The process group called `name`, or the one that carries the messages of its ring after a failed call."""
    ring = RINGS.get(name)
    if ring is not None and ring.own is not None:
        return ring.own
    return resolved(name)


@dataclass
class PendingExchange:
    """An exchange that has been started.  Keeps the sent buffer alive until `wait`.

    `peers`: the ranks sent to and received from; None: there is none; none at all: those of the whole group.
    `group`: the name of the process group; `label`: what the exchange is, as profilers show it; `kind`: which
    collective, if it is one.
    """

    received: Tensor
    sent: Tensor | None
    works: list[dist.Work]
    peers: tuple[int | None, ...]
    group: str = ""
    label: str = ""
    kind: str = ""

    def wait(self) -> None:
        """Returns when `received` is complete.  Raises PeerError if the other rank died or the time limit passed."""
        try:
            await_work(self.works, RINGS.get(self.group), self.received.device, between_two=bool(self.peers))
        except RuntimeError as error:
            raise lost(self.peers, error, RINGS.get(self.group), self.label, self.kind) from error
        self.sent = None


IN_FLIGHT: dict[int, PendingExchange] = {}
"""What this process has started and not waited for, by the storage of its buffer (`ops.library.storage_key`)."""


def take_in_flight(group: str) -> list[PendingExchange]:
    """What is under way in a group; from now on nobody waits for it.  As long as the caller keeps it, it is alive."""
    found = {key: pending for key, pending in IN_FLIGHT.items() if pending.group == group}
    for key in found:
        del IN_FLIGHT[key]
    return list(found.values())


def start(
    sent: Tensor, dst: int | None, received: Tensor, src: int | None, tag: int, group: str, label: str = ""
) -> PendingExchange:
    """Starts sending `sent` (1-D) to group rank `dst` and filling `received` (1-D) from `src`.

    `dst` None: nothing to send; `src` None: nothing to receive.  Messages between two ranks match by `tag`,
    within a forward or a backward of one call (NCCL has no tags).  `label`: as in PendingExchange.  Raises PeerError if
    another rank died.
    """
    ring, pg = RINGS.get(group), process_group(group)
    tag += ring.running.tags if ring is not None else 0
    ops = []
    if dst is not None:
        ops.append(dist.P2POp(dist.isend, sendable(sent), group=pg, tag=tag, group_peer=dst))
    if src is not None:
        ops.append(dist.P2POp(dist.irecv, sendable(received), group=pg, tag=tag, group_peer=src))
    moved("exchange", received.nbytes if src is not None else 0)
    try:
        return PendingExchange(received, sent, dist.batch_isend_irecv(ops), (dst, src), group, label)
    except RuntimeError as error:
        raise lost((dst, src), error, ring, label) from error
