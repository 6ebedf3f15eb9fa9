"""The ring of a dilated attention: one exchange for all of its groups."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from ringpass.kernels.blocks import cut
from ringpass.layouts.ranges import Ranges
from ringpass.ops import primitives
from ringpass.ops.accumulate import Rows, label
from ringpass.ops.row_ops import Place, added, flat, pack_rows, taken
from ringpass.ops.transports.base import Served, Transport, peer_label, start_exchange, unpack, zero_block
from ringpass.precision import accumulator
from ringpass.schedule.messages import Joint, Message, joints, key_heads, rows_of, tokens_of
from ringpass.schedule.program import Step
from ringpass.schedule.site import Site


class DilatedTransport(Transport):
    """The ring of a dilated site: one exchange serves all its lanes, each (token, K/V head) travels once."""

    def __init__(self, site: Site, heads: int, k: Tensor, v: Tensor) -> None:
        super().__init__(site, k, v)
        self.heads, self.joints = heads, joints(site, heads, k.shape[1])
        self.late: Joint | None = None
        self.returned: list[tuple[Place, tuple[Tensor, ...]]] = []

    @property
    def lanes(self) -> tuple[Site, ...]:
        return self.site.lanes(self.heads)

    @property
    def returned_rows(self) -> Ranges:
        return ()

    def key_heads(self, number: int) -> tuple[int, ...]:
        return key_heads(self.lanes[number], self.heads, self.k.shape[1])

    def blocks(self) -> Iterator[tuple[Served, list[Tensor]]]:
        own, *remote = self.joints
        block: tuple[Tensor, ...] = (self.k, self.v)
        arriving: Tensor | None = None
        for joint, following in zip(self.joints, [*remote, None], strict=True):
            if arriving is not None:
                with label(f"wait_step{joint.shift}"):
                    rows = joint.receive.rows if joint.receive else 0
                    block = unpack(primitives.wait(arriving), rows, 1, self.k, self.v)
            arriving = self._start(following) if following else None
            served = [(i, step, self._block(joint, i, step, block)) for i, step in joint.steps]
            yield served, [arriving] if arriving is not None else []

    def _block(self, joint: Joint, number: int, step: Step, block: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The keys and values of a lane's step, out of the own ones or of a message."""
        k, v = block
        heads, tokens = self.key_heads(number), tokens_of(self.lanes[number], step.tokens)
        with label(f"take_lane{number}_step{step.shift}"):
            if joint.receive is None or not len(tokens):
                rows = rows_of(self.site, tokens)
                return taken(self.k, heads, rows), taken(self.v, heads, rows)
            rows = joint.receive.find(heads, tokens)
            shapes = [(x.shape[0], len(heads), len(tokens), x.shape[3]) for x in (k, v)]
            return taken(k, [0], rows).view(shapes[0]), taken(v, [0], rows).view(shapes[1])

    def _start(self, joint: Joint) -> Tensor:
        with label(f"send_step{joint.shift}_{peer_label('to', joint.send.dst if joint.send else None)}"):
            sent = pack_rows([self.k, self.v], *flat(self._places(joint.send))) if joint.send else self.k.new_empty(0)
        dst, src = joint.send.dst if joint.send else None, joint.receive.src if joint.receive else None
        return start_exchange(self.site, 2 * joint.shift, sent, dst, src, self._numel(joint.receive))

    def _places(self, message: Message) -> list[Place]:
        """Where the parcels of a message that the rank sends stand in its block."""
        return [(parcel.heads, rows_of(self.site, parcel.tokens)) for parcel in message.parcels]

    def _numel(self, message: Message | None) -> int:
        """Numbers of K and V, or of their gradients, in a message."""
        return message.rows * sum(x.shape[0] * x.shape[3] for x in (self.k, self.v)) if message else 0

    def give_back(self, served: Served, given: list[tuple[Tensor, ...]], own: list[Rows]) -> None:
        joint = next(joint for joint in self.joints if joint.shift == served[0][1].shift)
        sent = self.k.new_empty(0, dtype=accumulator(self.k.dtype))
        with label(f"send_gradients_step{joint.shift}"):
            if joint.receive:
                places, parts = [], []
                for (i, step, _), grads in zip(served, given, strict=True):
                    if step.tokens:
                        tokens = tokens_of(self.lanes[i], step.tokens)
                        places.append(([0], joint.receive.find(self.key_heads(i), tokens)))
                        parts.append([g.flatten(1, 2).unsqueeze(1) for g in grads])
                sums = [added(xs, places, 1, joint.receive.rows) for xs in zip(*parts, strict=True)]
                sent = primitives.pack(sums, [0, joint.receive.rows])
        dst, src = joint.receive.src if joint.receive else None, joint.send.dst if joint.send else None
        started = start_exchange(self.site, 2 * joint.shift + 1, sent, dst, src, self._numel(joint.send))
        self.finish(own)
        self.returning, self.late = [started], joint

    def finish(self, own: list[Rows]) -> None:
        for arriving in self.returning:
            assert self.late is not None
            with label(f"wait_gradients_step{self.late.shift}"):
                received = primitives.wait(arriving)
                if self.late.send:
                    self._return(self.late.send, unpack(received, self.late.send.rows, 1, self.k, self.v))
        self.returning = []

    def _return(self, message: Message, grads: tuple[Tensor, ...]) -> None:
        """Notes the gradients of the parcels of `message`, which the rank sent."""
        offset = 0
        for place, parcel in zip(self._places(message), message.parcels, strict=True):
            shape = len(parcel.heads), len(parcel.tokens)
            parts = tuple(cut(g, (offset, offset + parcel.rows)).squeeze(1).unflatten(1, shape) for g in grads)
            self.returned.append((place, parts))
            offset += parcel.rows

    def collect(self, own: list[Rows]) -> tuple[Tensor, ...]:
        dtype = accumulator(self.k.dtype)
        found: list[tuple[Place, tuple[Tensor, ...]]] = []
        for i, lane in enumerate(self.lanes):
            heads = self.key_heads(i)
            k, v = (x.new_empty((x.shape[0], len(heads), 0, x.shape[3])) for x in (self.k, self.v))
            parts = own[i].join(partial(zero_block, k, v, dtype))
            found.append(((heads, rows_of(self.site, tokens_of(lane, lane.owned_keys))), parts))
        found += self.returned
        places = [place for place, _ in found]
        sums = zip(*(parts for _, parts in found), strict=True)
        return tuple(added(xs, places, self.k.shape[1], self.k.shape[2]) for xs in sums)
