"""The ring: in step t, rank r receives from rank r - t and sends to rank r + t; one exchange per step.

The rows that any step sends are packed once, in order; the message of a step is a range of them, unless its rows are
apart there.  Gradients travel in the dtype of K and V where one launch gives each row, else in the accumulator's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ringpass.layouts.ranges import Ranges, rows, union
from ringpass.ops import primitives
from ringpass.ops.accumulate import RowAccumulator, fold_ranges, label
from ringpass.ops.masked_steps import runs_whole
from ringpass.ops.transports.base import Served, Transport, peer_label
from ringpass.precision import accumulator
from ringpass.schedule.order import starts_early
from ringpass.schedule.program import Step, Transfer, tiles_between
from ringpass.schedule.site import Site, one_launch_per_key


class RingTransport(Transport):
    """The ring: one exchange per step, started before the previous step's tiles; gradients return a step later."""

    pending: Step | None = None

    @property
    def returned_rows(self) -> Ranges:
        """Those that the rank sent, step by step."""
        return tuple(span for step in self.steps(0) for span in sent_rows(self.site, step))

    def blocks(self, backward: bool) -> Iterator[tuple[Served, list[Tensor]]]:
        """One block per step; the exchange of the next step is in flight."""
        steps = self.steps(0)
        served: Served = [(0, steps[0], (self.k, self.v))]
        arriving: Tensor | None = None
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            if arriving is not None:
                with label(f"wait_step{step.shift}"):
                    tokens = step.receive.size if step.receive else 0
                    served = [(0, step, primitives.unpack(primitives.wait(arriving), (self.k, self.v), tokens))]
            early = following is not None and starts_early(step.shift, following.shift, backward)
            arriving = self._start(following) if following is not None and early else None
            yield served, [arriving] if arriving is not None else []
            served.clear()  # the block is free before the next one is received
            if following is not None and not early:
                arriving = self._start(following)

    def give_back(self, served: Served, grads: list[tuple[Tensor, ...]], local_sums: list[RowAccumulator]) -> None:
        """Sends dK and dV back to the owner of the block, after those of the step before have arrived."""
        step, (block_grads,) = served.pop()[1], grads
        arrived, before = self.returned(), self.pending
        back, home = _reverse(step.receive), _reverse(step.send)
        with label(f"send_gradients_step{step.shift}_{peer_label('to', back.dst if back else None)}"):
            sent = primitives.pack(list(block_grads), [0, block_grads[0].shape[2]]) if back else self.k.new_empty(0)
        dtype = self.gradient_dtype(step.send)
        self._exchange(2 * step.shift + 1, sent, back, home, dtype, arrived)
        self._add(arrived, before, local_sums)
        self.pending = step

    def finish(self, local_sums: list[RowAccumulator]) -> None:
        """Waits for the return that is pending."""
        self._add(self.returned(), self.pending, local_sums)

    def received_bytes(self, backward: bool) -> int:
        """K and V of other ranks; in a backward again, and the gradients of what it sent."""
        tokens = 0
        for step in self.steps(0)[1:]:
            tokens += step.receive.size * self.k.itemsize if step.receive else 0
            if backward and step.send:
                tokens += step.send.size * self.gradient_dtype(step.send).itemsize
        return tokens * primitives.token_size((self.k, self.v))

    def gradient_dtype(self, transfer: Transfer | None) -> torch.dtype:
        """The dtype in which the gradients of what a transfer brought return.

        Both ends find it from the tiles of the rank that computes them: the keys' own where one launch gives each row.
        """
        wide = accumulator(self.k.dtype)
        if transfer is None or wide == self.k.dtype:
            return self.k.dtype
        tiles = tiles_between(self.site.problem, transfer.dst, transfer.src)
        whole = runs_whole(self.site, tiles, self.k)
        alone = whole or one_launch_per_key(self.site, transfer.dst, transfer.src, self.k.shape[0])
        return self.k.dtype if alone else wide

    def _start(self, step: Step) -> Tensor:
        with label(f"send_step{step.shift}_{peer_label('to', step.send.dst if step.send else None)}"):
            sent = self._message(step) if step.send else self.k.new_empty(0)
        return self._exchange(2 * step.shift, sent, step.send, step.receive, self.k.dtype)

    def _message(self, step: Step) -> Tensor:
        """The rows that a step sends, of those packed once for all steps, if they are next to each other there."""
        everything, wanted = union(self.returned_rows), union(sent_rows(self.site, step))
        found = union(rows(wanted, everything))
        if len(found) > 1:
            return self._packed(wanted)
        each, (start, stop) = primitives.token_size((self.k, self.v)), found[0]
        return self._packed(everything)[start * each : stop * each]

    def _packed(self, of: Ranges) -> Tensor:
        flat = tuple(edge for span in of for edge in span)
        if flat not in self.packed:
            with label("pack_keys"):
                self.packed[flat] = primitives.pack([self.k, self.v], list(flat))
        return self.packed[flat]

    def _exchange(
        self,
        tag: int,
        sent: Tensor,
        send: Transfer | None,
        receive: Transfer | None,
        dtype: torch.dtype,
        after: Sequence[Tensor] = (),
    ) -> Tensor:
        numel = receive.size * primitives.token_size((self.k, self.v)) if receive else 0
        peers = send.dst if send else None, receive.src if receive else None
        return self.start_exchange(tag, sent, peers, numel, dtype, after)

    def _add(self, arrived: Sequence[Tensor], step: Step | None, local_sums: list[RowAccumulator]) -> None:
        """Adds gradients that came back for the keys that `step` sent."""
        for message in arrived:
            assert step is not None
            if step.send is not None:
                with label(f"wait_gradients_step{step.shift}"):
                    grads = primitives.unpack(message, (self.k, self.v), step.send.size)
                text = f"add_gradients_step{step.shift}"
                self.note(fold_ranges(local_sums[0], sent_rows(self.site, step), tuple(grads), text))


def _reverse(transfer: Transfer | None) -> Transfer | None:
    return Transfer(transfer.dst, transfer.src, transfer.tokens) if transfer else None


def sent_rows(site: Site, step: Step) -> Ranges:
    """The local key rows that a step sends."""
    return rows(step.send.tokens, site.owned_keys) if step.send else ()
