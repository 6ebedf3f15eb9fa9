"""Key blocks on the move: how those of other ranks come, and how their gradients go home."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ringpass.kernels.blocks import cut
from ringpass.kernels.table import accumulator
from ringpass.layouts.layout import Ranges, size
from ringpass.ops import primitives
from ringpass.ops.accumulate import Rows, add, fold_runs, label, running
from ringpass.ops.row_ops import Place, added, flat, pack_rows, taken
from ringpass.schedule.messages import Joint, Message, joints, key_heads, rows_of, tokens_of
from ringpass.schedule.program import Step, Transfer, rows
from ringpass.schedule.site import Site

Block = tuple[int, Step, tuple[Tensor, Tensor]]  # number of a lane, its step, its keys and values
Served = list[Block]


def transport(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Transport:
    """How the keys of other ranks come, and their gradients go home."""
    if site.dilation:
        return Parcels(site, q.shape[1], k, v)
    return {"ring": Exchanges, "allgather": AllGather}[site.comm](site, k, v)


class Transport:
    """`blocks` yields the steps that are served together, the own keys first, and the buffers in flight.

    After the tiles of each but the first, the backward calls `give_back` with the dK, dV of each block, and `finish` at
    the end: then `collect` knows the gradients of the own keys, `own`, those of this rank's queries, and of others.
    """

    def __init__(self, site: Site, k: Tensor, v: Tensor) -> None:
        self.site, self.k, self.v = site, k, v
        self.returning: list[Tensor] = []  # buffers of gradients in flight

    @property
    def lanes(self) -> tuple[Site, ...]:
        """The sites whose loop this is: the one itself, or its lanes."""
        return (self.site,)

    def steps(self, number: int) -> tuple[Step, ...]:
        """Those of one lane."""
        return self.lanes[number].program.steps

    @property
    def remote(self) -> bool:
        """Whether keys of other ranks come."""
        return any(len(self.steps(i)) > 1 for i in range(len(self.lanes)))

    @property
    def returned_rows(self) -> Ranges:
        """The rows of the own block as `own` receives them."""
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[Served, list[Tensor]]]:
        raise NotImplementedError

    def give_back(self, served: Served, grads: list[tuple[Tensor, ...]], own: list[Rows]) -> None:
        raise NotImplementedError

    def finish(self, own: list[Rows]) -> None:
        raise NotImplementedError

    def collect(self, own: list[Rows]) -> tuple[Tensor, ...]:
        """(dk, dv) of the own keys, in the accumulator's dtype."""
        return own[0].join(partial(zero_block, self.k, self.v, accumulator(self.k.dtype)))


class Exchanges(Transport):
    """The ring: one exchange per step, started before the tiles of the step before; gradients return a step behind."""

    late: Step | None = None

    @property
    def returned_rows(self) -> Ranges:
        return tuple(span for step in self.steps(0) for span in _sent_rows(self.site, step))

    def blocks(self) -> Iterator[tuple[Served, list[Tensor]]]:
        block, arriving = (self.k, self.v), None
        for index, step in enumerate(steps := self.steps(0)):
            if arriving is not None:
                with label(f"wait_step{step.shift}"):
                    block = unpack(primitives.wait(arriving), size(step.tokens), self.k.shape[1], self.k, self.v)
            if index + 1 < len(steps):
                arriving = self._start(steps[index + 1])
            yield [(0, step, block)], [arriving] if arriving is not None and index + 1 < len(steps) else []

    def give_back(self, served: Served, given: list[tuple[Tensor, ...]], own: list[Rows]) -> None:
        ((_, step, _),), (grads,) = served, given
        back, home = _reverse(step.receive), _reverse(step.send)
        with label(f"send_gradients_step{step.shift}_{_peer('to', back.dst if back else None)}"):
            nothing = self.k.new_empty(0, dtype=accumulator(self.k.dtype))
            sent = primitives.pack(list(grads), [0, grads[0].shape[2]]) if back else nothing
        started = self._exchange(2 * step.shift + 1, sent, back, home)
        self.finish(own)
        self.returning, self.late = [started], step

    def finish(self, own: list[Rows]) -> None:
        for arriving in self.returning:
            assert self.late is not None
            self._take(arriving, self.late, own[0])
        self.returning = []

    def _start(self, step: Step) -> Tensor:
        with label(f"send_step{step.shift}_{_peer('to', step.send.dst if step.send else None)}"):
            rows_sent = [edge for span in _sent_rows(self.site, step) for edge in span]
            sent = primitives.pack([self.k, self.v], rows_sent) if step.send else self.k.new_empty(0)
        return self._exchange(2 * step.shift, sent, step.send, step.receive)

    def _exchange(self, tag: int, sent: Tensor, send: Transfer | None, receive: Transfer | None) -> Tensor:
        numel = receive.size * sum(math.prod(x.shape[:2]) * x.shape[3] for x in (self.k, self.v)) if receive else 0
        dst, src = send.dst if send else None, receive.src if receive else None
        return _exchange(self.site, tag, sent, dst, src, numel)

    def _take(self, arriving: Tensor, step: Step, own: Rows) -> None:
        with label(f"wait_gradients_step{step.shift}"):
            received = primitives.wait(arriving)
            if step.send is None:
                return
            grads = unpack(received, step.send.size, self.k.shape[1], self.k, self.v)
        fold_runs(own, _sent_rows(self.site, step), grads, f"add_gradients_step{step.shift}")


class AllGather(Transport):
    """Every rank gathers all keys before its first tile; one reduce-scatter brings the gradients home.

    The tiles are the ring's own.  Holds K, V and their gradients at full length.
    """

    def __init__(self, site: Site, k: Tensor, v: Tensor) -> None:
        super().__init__(site, k, v)
        self.where = (2, 1, site.keys, site.key_layout, site.world, site.rank, site.group)
        self.gathers = site.world > 1 and site.key_layout != "replicated"
        self.given: list[tuple[Ranges, tuple[Tensor, ...]]] = []

    @property
    def returned_rows(self) -> Ranges:
        return ()

    def blocks(self) -> Iterator[tuple[Served, list[Tensor]]]:
        full = [self.k, self.v]
        if self.gathers:
            with label("gather_keys"):
                full = [torch.ops.ringpass.gather(x, *self.where) for x in full]
        for index, step in enumerate(self.steps(0)):
            if index == 0:
                yield [(0, step, (self.k, self.v))], []
            elif step.tokens:
                yield [(0, step, (_take(full[0], step.tokens), _take(full[1], step.tokens)))], []

    def give_back(self, served: Served, given: list[tuple[Tensor, ...]], own: list[Rows]) -> None:
        self.given.append((served[0][1].tokens, given[0]))

    def finish(self, own: list[Rows]) -> None:
        if not self.gathers:
            return
        whole = running(self.site.keys, lambda: [span for runs, _ in self.given for span in runs])
        for runs, grads in self.given:
            fold_runs(whole, runs, grads, "add_gradients")
        dtype = accumulator(self.k.dtype)
        with label("reduce_scatter_gradients"):
            sums = whole.join(partial(zero_block, self.k, self.v, dtype))
            home = tuple(torch.ops.ringpass.reduce_scatter(x, *self.where) for x in sums)
        own[0].fold((0, self.k.shape[2]), home, add, "add_gradients_home")


class Parcels(Transport):
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
        with label(f"send_step{joint.shift}_{_peer('to', joint.send.dst if joint.send else None)}"):
            sent = pack_rows([self.k, self.v], *flat(self._places(joint.send))) if joint.send else self.k.new_empty(0)
        dst, src = joint.send.dst if joint.send else None, joint.receive.src if joint.receive else None
        return _exchange(self.site, 2 * joint.shift, sent, dst, src, self._numel(joint.receive))

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
        started = _exchange(self.site, 2 * joint.shift + 1, sent, dst, src, self._numel(joint.send))
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


def _exchange(site: Site, tag: int, sent: Tensor, dst: int | None, src: int | None, numel: int) -> Tensor:
    """Starts an exchange; returns the buffer that will hold the `numel` numbers that arrive."""
    ranks = [primitives.NOBODY if rank is None else rank for rank in (dst, src)]
    with label(f"receive{'_gradients' if tag % 2 else ''}_step{tag // 2}_{_peer('from', src)}"):
        received: Tensor = primitives.exchange([sent], numel, *ranks, tag, site.group)[0]
    return received


def _peer(way: str, rank: int | None) -> str:
    return "nothing" if rank is None else f"{way}_rank{rank}"


def _reverse(transfer: Transfer | None) -> Transfer | None:
    return Transfer(transfer.dst, transfer.src, transfer.tokens) if transfer else None


def _sent_rows(site: Site, step: Step) -> Ranges:
    return rows(step.send.tokens, site.owned_keys) if step.send else ()


def _take(x: Tensor, spans: Ranges) -> Tensor:
    parts = [cut(x, span) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def unpack(flat: Tensor, tokens: int, heads: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of a message of `tokens` rows and `heads` heads."""
    shapes = [(x.shape[0], heads, tokens, x.shape[3]) for x in (k, v)]
    split = math.prod(shapes[0])
    return flat[:split].view(shapes[0]), flat[split:].view(shapes[1])


def zero_block(k: Tensor, v: Tensor, dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    """Zeros for n rows of keys and values."""
    zeros = [x.new_zeros((*x.shape[:2], n, x.shape[3]), dtype=dtype) for x in (k, v)]
    return zeros[0], zeros[1]
