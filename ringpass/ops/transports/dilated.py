"""The ring of a dilated attention: one exchange for all of its head groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ringpass.kernels.blocks import row_slice
from ringpass.layouts.ranges import Ranges
from ringpass.ops import primitives
from ringpass.ops.accumulate import RowAccumulator, label
from ringpass.ops.row_ops import BlockIndex, added, flat, pack_rows, taken
from ringpass.ops.transports.base import Served, Transport, peer_label, zero_block
from ringpass.precision import accumulator
from ringpass.schedule.dilation import HeadGroup
from ringpass.schedule.messages import Exchange, Message, StridedSpec, exchanges, rows_of
from ringpass.schedule.order import starts_early
from ringpass.schedule.program import Step
from ringpass.schedule.site import Site


class DilatedTransport(Transport):
    """The ring of a dilated site: its head groups share one exchange, each (token, K/V head) is sent once."""

    def __init__(self, site: Site, k: Tensor, v: Tensor) -> None:
        super().__init__(site, k, v)
        self.exchanges = exchanges(site.group_problems, site.rank, site.own_heads, k.shape[1])
        self.pending: Exchange | None = None
        self.returned_parts: list[tuple[BlockIndex, Sequence[Tensor]]] = []

    @property
    def returned_rows(self) -> Ranges:
        """None: returned gradients are added in `collect`."""
        return ()

    def _head_group(self, index: int) -> HeadGroup:
        found = self.sites[index].head_group
        assert found is not None
        return found

    def key_heads(self, index: int) -> tuple[int, ...]:
        """The K/V heads that the query heads of a group read."""
        return self._head_group(index).key_heads(self.site.own_heads, self.k.shape[1])

    def _rows(self, tokens: NDArray[np.int64]) -> StridedSpec:
        """The rows of `tokens` in this rank's block."""
        return rows_of(self.site.problem, self.site.rank, tokens)

    def blocks(self, backward: bool) -> Iterator[tuple[Served, list[Tensor]]]:
        """The blocks of all head groups that one exchange brought; the next exchange is in flight."""
        _, *remote = self.exchanges
        arriving: Tensor | None = None
        for exchange, following in zip(self.exchanges, [*remote, None], strict=True):
            received: list[Tensor] = []
            if arriving is not None:
                with label(f"wait_step{exchange.shift}"):
                    pairs = exchange.receive.rows if exchange.receive else 0
                    received = primitives.unpack(primitives.wait(arriving), self._by_head(), pairs)
            early = following is not None and starts_early(exchange.shift, following.shift, backward)
            arriving = self._start(following) if following is not None and early else None
            served: Served = [(i, step, self._block(exchange, i, step, received)) for i, step in exchange.steps]
            del received
            yield served, [arriving] if arriving is not None else []
            served.clear()  # the blocks are free before others are received
            if following is not None and not early:
                arriving = self._start(following)

    def _by_head(self) -> list[Tensor]:
        """K and V with one head: a message goes by (token, head)."""
        return [self.k[:, :1], self.v[:, :1]]

    def _block(self, exchange: Exchange, index: int, step: Step, received: Sequence[Tensor]) -> list[Tensor]:
        """The keys and values of a site's step, from the local ones or from a message."""
        heads, tokens = self.key_heads(index), self._head_group(index).tokens(step.tokens)
        with label(f"take_group{index}_step{step.shift}"):
            if exchange.receive is None or not len(tokens):
                rows = self._rows(tokens)
                return [taken(x, heads, rows) for x in (self.k, self.v)]
            rows = exchange.receive.find(heads, tokens)
            shape = len(heads), len(tokens)
            return [taken(x, [0], rows).squeeze(1).unflatten(1, shape) for x in received]

    def _start(self, exchange: Exchange) -> Tensor:
        with label(f"send_step{exchange.shift}_{peer_label('to', exchange.send.dst if exchange.send else None)}"):
            sent = self._packed(exchange.send) if exchange.send else self.k.new_empty(0)
        peers = exchange.send.dst if exchange.send else None, exchange.receive.src if exchange.receive else None
        return self.start_exchange(2 * exchange.shift, sent, peers, self._numel(exchange.receive), self.k.dtype)

    def _packed(self, message: Message) -> Tensor:
        """The keys and values of a message; two of the same rows are packed once."""
        heads, rows, sizes = flat(self._block_indices(message))
        held = *heads, *rows, *sizes
        if held not in self.packed:
            self.packed[held] = pack_rows([self.k, self.v], heads, rows, sizes)
        return self.packed[held]

    def _block_indices(self, message: Message) -> list[BlockIndex]:
        """The block index of each part of a message that the rank sends."""
        return [(part.heads, self._rows(part.tokens)) for part in message.parts]

    def _numel(self, message: Message | None) -> int:
        """Number of elements of K and V, or of their gradients, in a message."""
        return message.rows * sum(x.shape[0] * x.shape[3] for x in (self.k, self.v)) if message else 0

    def received_bytes(self, backward: bool) -> int:
        """K and V of other ranks; in a backward again, and the gradients of what it sent."""
        wide = accumulator(self.k.dtype).itemsize if backward else 0
        each = [self._numel(x.receive) * self.k.itemsize + self._numel(x.send) * wide for x in self.exchanges[1:]]
        return sum(each)

    def give_back(self, served: Served, grads: list[tuple[Tensor, ...]], local_sums: list[RowAccumulator]) -> None:
        """Sends dK and dV of all head groups back in one message; those of the exchange before are waited for."""
        steps = [(i, step) for i, step, _ in served]
        served.clear()
        exchange = next(exchange for exchange in self.exchanges if exchange.shift == steps[0][1].shift)
        arrived, before, wide = self.returned(), self.pending, accumulator(self.k.dtype)
        sent = self.k.new_empty(0)
        with label(f"send_gradients_step{exchange.shift}"):
            if exchange.receive:
                block_indices, parts = [], []
                for (i, step), block_grads in zip(steps, grads, strict=True):
                    if step.tokens:
                        tokens = self._head_group(i).tokens(step.tokens)
                        block_indices.append(([0], exchange.receive.find(self.key_heads(i), tokens)))
                        parts.append([g.flatten(1, 2).unsqueeze(1) for g in block_grads])
                sums = [added(xs, block_indices, 1, exchange.receive.rows) for xs in zip(*parts, strict=True)]
                sent = primitives.pack(sums, [0, exchange.receive.rows])
        peers = exchange.receive.src if exchange.receive else None, exchange.send.dst if exchange.send else None
        self.start_exchange(2 * exchange.shift + 1, sent, peers, self._numel(exchange.send), wide, arrived)
        self._record(arrived, before)
        self.pending = exchange

    def finish(self, local_sums: list[RowAccumulator]) -> None:
        """Waits for the return that is pending."""
        self._record(self.returned(), self.pending)

    def _record(self, arrived: Sequence[Tensor], exchange: Exchange | None) -> None:
        """Records gradients that came back for the keys that `exchange` sent; adds them up when they fill a block."""
        for message in arrived:
            assert exchange is not None
            if exchange.send is not None:
                with label(f"wait_gradients_step{exchange.shift}"):
                    grads = primitives.unpack(message, self._by_head(), exchange.send.rows)
                    self._return(exchange.send, grads)
        groups, length = self.k.shape[1:3]
        if sum(x.shape[1] * x.shape[2] for _, (x, _) in self.returned_parts[1:]) > groups * length:
            with label("add_gradients"):
                sums = self._sum(self.returned_parts)
            self.returned_parts = [((range(groups), [0, length, 1]), sums)]
            self.note(list(sums))

    def _return(self, message: Message, grads: Sequence[Tensor]) -> None:
        """Records the gradients of the parts of `message`, which the rank sent."""
        offset = 0
        for block_index, part in zip(self._block_indices(message), message.parts, strict=True):
            shape = len(part.heads), len(part.tokens)
            parts = [row_slice(g, (offset, offset + part.rows)).squeeze(1).unflatten(1, shape) for g in grads]
            self.returned_parts.append((block_index, parts))
            offset += part.rows

    def _sum(self, found: Sequence[tuple[BlockIndex, Sequence[Tensor]]]) -> tuple[Tensor, ...]:
        """The sums of dK and of dV over parts of the local block."""
        block_indices = [block_index for block_index, _ in found]
        sums = zip(*(parts for _, parts in found), strict=True)
        return tuple(added(xs, block_indices, self.k.shape[1], self.k.shape[2]) for xs in sums)

    def collect(self, local_sums: list[RowAccumulator]) -> tuple[Tensor, ...]:
        """(dk, dv) of the local keys: those of each head group's local queries, and those that came back."""
        dtype = accumulator(self.k.dtype)
        found: list[tuple[BlockIndex, Sequence[Tensor]]] = [*self.returned_parts]
        for i, group_site in enumerate(self.sites):
            heads = self.key_heads(i)
            k, v = (x.new_empty((x.shape[0], len(heads), 0, x.shape[3])) for x in (self.k, self.v))
            parts = local_sums[i].join(partial(zero_block, k, v, dtype))
            found.append(((heads, self._rows(self._head_group(i).tokens(group_site.owned_keys))), parts))
        return self._sum(found)
