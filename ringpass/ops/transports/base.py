"""The interface of a transport, and how one exchange is started and unpacked.

A transport brings the keys and values of other ranks to the loop of ring attention, block by block, and returns their
gradients.  Shapes: k (B, G, Lk, D), v (B, G, Lk, Dv) of the Lk local keys; a received block has the tokens of its step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ringpass.layouts.ranges import Ranges
from ringpass.ops import primitives
from ringpass.ops.accumulate import RowAccumulator, label
from ringpass.precision import accumulator
from ringpass.schedule.program import Step, Transfer
from ringpass.schedule.site import Site

Block = tuple[int, Step, Sequence[Tensor]]  # index of a site, its step, its keys and values
Served = list[Block]


class Transport(ABC):
    """How the loop uses it, forward and backward (`site`: the call as this rank runs it):

        for served, in_flight in transport.blocks(backward):  # local keys first
            compute the tiles of each served block
            transport.give_back(served, grads, local_sums)    # backward, of every block but the local one
        transport.finish(local_sums)                          # backward
        dk, dv = transport.collect(local_sums)                # backward

    `local_sums` accumulates dK and dV of the local keys, one accumulator per site of `sites`.
    """

    name = ""  # of the site, as profilers show it

    def __init__(self, site: Site, k: Tensor, v: Tensor) -> None:
        self.site, self.k, self.v = site, k, v
        self.returning: list[Tensor] = []  # buffers of gradients in flight
        self.returning_shift = 0  # of their step
        self.merged: list[Tensor] = []  # while the loop is traced: what was merged or added last
        self.packed: dict[tuple[int, ...], Tensor] = {}  # messages of keys by what they hold: each is packed once

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that the loop computes: the site itself, or those of its head groups."""
        return self.site.groups

    def steps(self, index: int) -> tuple[Step, ...]:
        """The steps of one site."""
        return self.sites[index].program.steps

    @property
    def remote(self) -> bool:
        """Whether any keys are received."""
        return any(len(self.steps(i)) > 1 for i in range(len(self.sites)))

    @property
    @abstractmethod
    def returned_rows(self) -> Ranges:
        """The ranges of rows at which `local_sums` gets gradients from other ranks."""

    @abstractmethod
    def blocks(self, backward: bool) -> Iterator[tuple[Served, list[Tensor]]]:
        """(the blocks that one exchange brought, the buffers in flight while their tiles are computed), step by step.

        The local keys are first.  The next exchange is started before a block is yielded; in a backward whose next step
        leaves out a shift, after `give_back`, so that all ranks start exchanges in one order (`schedule.order`).
        """

    @abstractmethod
    def give_back(self, served: Served, grads: list[tuple[Tensor, ...]], local_sums: list[RowAccumulator]) -> None:
        """Starts the return of (dK, dV) of the served blocks to the ranks that hold the keys, and empties `served`.

        Gradients that arrived meanwhile, of keys that this rank sent, are added to `local_sums`.
        """

    @abstractmethod
    def finish(self, local_sums: list[RowAccumulator]) -> None:
        """Waits for the gradients that are still under way, and adds them to `local_sums`."""

    @abstractmethod
    def received_bytes(self, backward: bool) -> int:
        """The bytes that this rank receives in a forward, or in a backward, without those of a sum over ranks."""

    def gradient_dtype(self, transfer: Transfer | None) -> torch.dtype:
        """The dtype in which the gradients of what a transfer brought return: by default, that of the accumulator."""
        return accumulator(self.k.dtype)

    def note(self, combined: list[Tensor]) -> None:
        """Notes what was merged last, which the next tile and the next exchange then come after.

        So what is in flight and not yet merged is bounded in any order that a compiler may choose.
        """
        self.merged = combined

    def start_exchange(
        self,
        tag: int,
        sent: Tensor,
        peers: tuple[int | None, int | None],
        numel: int,
        dtype: torch.dtype,
        after: Sequence[Tensor] = (),
    ) -> Tensor:
        """Starts an exchange, after what was merged last; returns the buffer for what is received.

        `tag`: 2 t for the keys of step t, 2 t + 1 for their gradients, which are then `returning`; `peers`: the ranks
        sent to and received from, None: there is none; `numel` elements of `dtype` are received; `after`: what else
        must be complete.
        """
        dst, src = peers
        ranks = [primitives.NOBODY if rank is None else rank for rank in (dst, src)]
        text = f"receive{'_gradients' if tag % 2 else ''}_step{tag // 2}_{peer_label('from', src)}"
        elements, earlier = numel if src is not None else 0, [*self.merged, *after]
        with label(text):
            received: Tensor = primitives.exchange(
                [sent], elements, dtype, *ranks, tag, earlier, f"{self.name} {text}", self.site.group
            )[0]
        if tag % 2:
            self.returning, self.returning_shift = [received], tag // 2
        return received

    def returned(self) -> list[Tensor]:
        """The gradients that were in flight, complete."""
        arriving, self.returning = self.returning, []
        with label(f"wait_gradients_step{self.returning_shift}"):
            return [primitives.wait(x) for x in arriving]

    def collect(self, local_sums: list[RowAccumulator]) -> tuple[Tensor, ...]:
        """(dk, dv) of the local keys, in the accumulator's dtype."""
        return local_sums[0].join(partial(zero_block, self.k, self.v, accumulator(self.k.dtype)))


def peer_label(way: str, rank: int | None) -> str:
    """`from_rank3`, or `nothing`: the end of a node's name."""
    return "nothing" if rank is None else f"{way}_rank{rank}"


def zero_block(k: Tensor, v: Tensor, dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    """Zeros for n rows of keys and values."""
    zeros = [x.new_zeros((*x.shape[:2], n, x.shape[3]), dtype=dtype) for x in (k, v)]
    return zeros[0], zeros[1]
