"""Exchanges between two ranks of a ring: start a send and a receive together, wait later.

Built on torch.distributed.  `start` returns at once with the tensor that will hold the received data; `wait` blocks
until it does, and until the sent buffer may be reused.  Both ends post their exchanges in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringpass.errors import PeerError
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
    """The process group called `name`, as torch's functional collectives resolve it."""
    c10d: Any = dist.distributed_c10d
    group: dist.ProcessGroup = c10d._resolve_process_group(name)
    return group


@dataclass
class PendingExchange:
    """An exchange that has been started.  Keeps the sent buffer alive until `wait`.

    `peers`: the ranks sent to and received from; None: there is none; none at all: those of the whole group.
    """

    received: Tensor
    sent: Tensor | None
    works: list[dist.Work]
    peers: tuple[int | None, ...]

    def wait(self) -> None:
        """Returns when `received` is complete.  Raises PeerError if the other rank died or the time limit passed."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise lost(self.peers, error) from error
        self.sent = None


def start(sent: Tensor, dst: int | None, received: Tensor, src: int | None, tag: int, group: str) -> PendingExchange:
    """Starts sending `sent` (1-D) to group rank `dst` and filling `received` (1-D) from `src`.

    `dst` None: nothing to send; `src` None: nothing to receive.  Messages between two ranks match by `tag`.
    Raises PeerError if another rank died.
    """
    pg = process_group(group)
    ops = []
    if dst is not None:
        ops.append(dist.P2POp(dist.isend, sendable(sent), group=pg, tag=tag, group_peer=dst))
    if src is not None:
        ops.append(dist.P2POp(dist.irecv, sendable(received), group=pg, tag=tag, group_peer=src))
    moved("exchange", received.nbytes if src is not None else 0)
    try:
        return PendingExchange(received, sent, dist.batch_isend_irecv(ops), (dst, src))
    except RuntimeError as error:
        raise lost((dst, src), error) from error


def lost(peers: tuple[int | None, ...], error: Exception) -> PeerError:
    """The error for an exchange that broke with `error`; `peers`: the ranks at its other ends, if known."""
    names = ", ".join(str(p) for p in sorted({p for p in peers if p is not None}))
    return PeerError(
        f"an exchange with {'rank ' + names if names else 'the other ranks'} of the ring broke: {error}. A rank died, "
        "raised an error, or did not arrive in time: look for the first error in the other ranks' output. The limit is "
        "the process group's timeout, init_process_group(timeout=...)."
    )
