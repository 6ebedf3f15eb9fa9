"""The ring: in step t, rank r receives from rank r - t and sends to rank r + t; one exchange per step."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ringpass.layouts.ranges import Ranges, rows, size
from ringpass.ops import primitives
from ringpass.ops.accumulate import RowAccumulator, fold_ranges, label
from ringpass.ops.transports.base import Served, Transport, peer_label, start_exchange, unpack
from ringpass.precision import accumulator
from ringpass.schedule.order import starts_early
from ringpass.schedule.program import Step, Transfer
from ringpass.schedule.site import Site


class RingTransport(Transport):
    """The ring: one exchange per step, started before the previous step's tiles; gradients return a step later."""

    pending: Step | None = None

    @property
    def returned_rows(self) -> Ranges:
        """Those that the rank sent, step by step."""
        return tuple(span for step in self.steps(0) for span in sent_rows(self.site, step))

    def blocks(self, backward: bool) -> Iterator[tuple[Served, list[Tensor]]]:
        """One block per step; the exchange of the next step is in flight."""
        block: tuple[Tensor, Tensor] = (self.k, self.v)
        arriving: Tensor | None = None
        steps = self.steps(0)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            if arriving is not None:
                with label(f"wait_step{step.shift}"):
                    block = unpack(primitives.wait(arriving), size(step.tokens), self.k.shape[1], self.k, self.v)
            early = following is not None and starts_early(step.shift, following.shift, backward)
            arriving = self._start(following) if following is not None and early else None
            yield [(0, step, block)], [arriving] if arriving is not None else []
            if following is not None and not early:
                arriving = self._start(following)

    def give_back(self, served: Served, grads: list[tuple[Tensor, ...]], local_sums: list[RowAccumulator]) -> None:
        """Sends dK and dV back to the owner of the block; those of the step before are waited for."""
        ((_, step, _),), (block_grads,) = served, grads
        back, home = _reverse(step.receive), _reverse(step.send)
        with label(f"send_gradients_step{step.shift}_{peer_label('to', back.dst if back else None)}"):
            nothing = self.k.new_empty(0, dtype=accumulator(self.k.dtype))
            sent = primitives.pack(list(block_grads), [0, block_grads[0].shape[2]]) if back else nothing
        started = self._exchange(2 * step.shift + 1, sent, back, home)
        self.finish(local_sums)
        self.returning, self.pending = [started], step

    def finish(self, local_sums: list[RowAccumulator]) -> None:
        """Waits for the return that is pending."""
        for arriving in self.returning:
            assert self.pending is not None
            self._take(arriving, self.pending, local_sums[0])
        self.returning = []

    def _start(self, step: Step) -> Tensor:
        with label(f"send_step{step.shift}_{peer_label('to', step.send.dst if step.send else None)}"):
            rows_sent = [edge for span in sent_rows(self.site, step) for edge in span]
            sent = primitives.pack([self.k, self.v], rows_sent) if step.send else self.k.new_empty(0)
        return self._exchange(2 * step.shift, sent, step.send, step.receive)

    def _exchange(self, tag: int, sent: Tensor, send: Transfer | None, receive: Transfer | None) -> Tensor:
        numel = receive.size * sum(math.prod(x.shape[:2]) * x.shape[3] for x in (self.k, self.v)) if receive else 0
        dst, src = send.dst if send else None, receive.src if receive else None
        return start_exchange(self.site, tag, sent, dst, src, numel)

    def _take(self, arriving: Tensor, step: Step, local_sums: RowAccumulator) -> None:
        with label(f"wait_gradients_step{step.shift}"):
            received = primitives.wait(arriving)
            if step.send is None:
                return
            grads = unpack(received, step.send.size, self.k.shape[1], self.k, self.v)
        fold_ranges(local_sums, sent_rows(self.site, step), grads, f"add_gradients_step{step.shift}")


def _reverse(transfer: Transfer | None) -> Transfer | None:
    return Transfer(transfer.dst, transfer.src, transfer.tokens) if transfer else None


def sent_rows(site: Site, step: Step) -> Ranges:
    """The local key rows that a step sends."""
    return rows(step.send.tokens, site.owned_keys) if step.send else ()
