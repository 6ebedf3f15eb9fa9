"""What every transport does, and how one exchange is started and unpacked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ringpass.layouts.ranges import Ranges
from ringpass.ops import primitives
from ringpass.ops.accumulate import RowAccumulator, label
from ringpass.precision import accumulator
from ringpass.schedule.program import Step
from ringpass.schedule.site import Site

Block = tuple[int, Step, tuple[Tensor, Tensor]]  # index of a site, its step, its keys and values
Served = list[Block]


class Transport:
    """`blocks` yields the steps that share an exchange, local keys first, and the buffers in flight.

    After the tiles of each but the first, the backward calls `give_back` with the dK, dV of each block, and `finish` at
    the end.  `collect` then returns dK and dV of the local keys: `local_sums` (from local queries) plus the gradients
    that other ranks sent back.
    """

    def __init__(self, site: Site, k: Tensor, v: Tensor) -> None:
        self.site, self.k, self.v = site, k, v
        self.returning: list[Tensor] = []  # buffers of gradients in flight

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
    def returned_rows(self) -> Ranges:
        """The ranges of rows at which `local_sums` gets gradients from other ranks."""
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[Served, list[Tensor]]]:
        raise NotImplementedError

    def give_back(self, served: Served, grads: list[tuple[Tensor, ...]], local_sums: list[RowAccumulator]) -> None:
        raise NotImplementedError

    def finish(self, local_sums: list[RowAccumulator]) -> None:
        raise NotImplementedError

    def collect(self, local_sums: list[RowAccumulator]) -> tuple[Tensor, ...]:
        """(dk, dv) of the local keys, in the accumulator's dtype."""
        return local_sums[0].join(partial(zero_block, self.k, self.v, accumulator(self.k.dtype)))


def start_exchange(site: Site, tag: int, sent: Tensor, dst: int | None, src: int | None, numel: int) -> Tensor:
    """Starts an exchange; returns the buffer for the `numel` received elements."""
    ranks = [primitives.NOBODY if rank is None else rank for rank in (dst, src)]
    with label(f"receive{'_gradients' if tag % 2 else ''}_step{tag // 2}_{peer_label('from', src)}"):
        received: Tensor = primitives.exchange([sent], numel, *ranks, tag, site.group)[0]
    return received


def peer_label(way: str, rank: int | None) -> str:
    return "nothing" if rank is None else f"{way}_rank{rank}"


def unpack(flat: Tensor, tokens: int, heads: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of a message of `tokens` rows and `heads` heads."""
    shapes = [(x.shape[0], heads, tokens, x.shape[3]) for x in (k, v)]
    split = math.prod(shapes[0])
    return flat[:split].view(shapes[0]), flat[split:].view(shapes[1])


def zero_block(k: Tensor, v: Tensor, dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    """Zeros for n rows of keys and values."""
    zeros = [x.new_zeros((*x.shape[:2], n, x.shape[3]), dtype=dtype) for x in (k, v)]
    return zeros[0], zeros[1]
