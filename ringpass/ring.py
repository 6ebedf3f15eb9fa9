"""Ring attention, written once: the loop over steps and tiles, forward and backward, over the ops of `primitives`.

Run, it is the body of the rolled operator; traced, it is the unrolled graph.  Shapes: B batch, H query heads, G
key/value heads, D head width, Lq and Lk local query and key tokens.

    for each step of the program (own keys first):
        take the step's key block: the own one, or what the exchange brought
        start the exchange of the next step                  <- before the tiles of this one
        for each tile: attend, merge into the rows' running (out, lse)

The backward passes K and V round again and sends each block's dK, dV back to its owner, one step behind; the tiles of
the own keys are divided, so that the first exchange and the last one both have some to hide behind.  K and V (dK and
dV) travel as one message.  Partial results are merged in float32 (float64 for float64 inputs).

How keys come and their gradients go is a `Transport`: `Exchanges` as above, or, to measure against, `AllGather`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ringpass import primitives
from ringpass.kernels import accumulator
from ringpass.known import Known
from ringpass.layout import Layout, Ranges, size, tokens
from ringpass.mask import PARTIAL
from ringpass.schedule import MIRRORED, TRIANGLES, Problem, Program, Step, Tile, Transfer, divided, program, rows

LABEL = "ringpass_label"
Combine = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Site:
    """One attention call as one rank runs it: all that is not a tensor.  Texts are expressions of `ringpass.mask`."""

    mask: str
    bias: str
    scale: float
    dropout: float
    stream: int
    queries: int
    keys: int
    query_layout: str
    key_layout: str
    tile: int
    rank: int
    world: int
    group: str
    comm: str = "ring"
    score: str = ""  # any other function of the scaled scores, in place of the bias
    learned: tuple[int, ...] = ()  # the leaves that need a gradient
    pruning: tuple[int, ...] = ()  # the leaves whose values, in each call, prune the schedule
    known: tuple[tuple[int, Known], ...] = ()  # their values in this call

    @property
    def program(self) -> Program:
        layouts = Layout(self.query_layout, self.world), Layout(self.key_layout, self.world)
        cut_all = self.dropout > 0 or bool(self.learned) or bool(self.score)
        problem = Problem(self.mask, self.queries, self.keys, *layouts, self.tile, cut_all, self.known)
        return program(problem, self.rank)

    def knowing(self, leaves: Sequence[Tensor]) -> Site:
        """The site in a call with these leaves.  All ranks hold the same ones, so their schedules fit together."""
        return replace(self, known=tuple((i, Known(leaves[i])) for i in self.pruning))

    @property
    def orders(self) -> list[str]:
        """The curves along which queries and keys are; empty: their own order."""
        return [str(Layout(name, self.world).order or "") for name in (self.query_layout, self.key_layout)]

    @property
    def owned_queries(self) -> Ranges:
        return Layout(self.query_layout, self.world).ranges(self.rank, self.queries)

    @property
    def owned_keys(self) -> Ranges:
        return Layout(self.key_layout, self.world).ranges(self.rank, self.keys)


def forward(
    site: Site, q: Tensor, k: Tensor, v: Tensor, leaves: Sequence[Tensor], seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the local queries over all keys: (B, H, Lq, Dv) in q's dtype, (B, H, Lq) in the accumulator's."""
    steps = site.program.steps
    state = Rows(q.shape[2], [tile.q for step in steps for tile in step.tiles])
    op = primitives.scored_tile if site.score else primitives.attention_tile
    for step, (k_block, v_block), flying in transport(site, k, v).blocks():
        for tile in step.tiles:
            args = _tile_args(site, step, tile, q, leaves, seed, flying)
            with label(f"attention_{_name(step, tile)}"):
                parts = _cut(q, tile.q), _cut(k_block, tile.k), _cut(v_block, tile.k)
                out, lse = _turned(tile, op(*_turned(tile, parts), *args))
            state.fold(tile.q, (out.to(accumulator(q.dtype)), lse), _merge, f"merge_{_name(step, tile)}")
    with label("join_rows"):
        out, lse = state.join(lambda n: _nothing(q, v, n))
        return out.to(q.dtype), lse


def backward(
    site: Site,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    leaves: Sequence[Tensor],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(dq, dk, dv, gradients of the learned leaves), each in its input's dtype, for the local tokens."""
    keys, dtype = transport(site, k, v), accumulator(q.dtype)
    local, *remote = keys.steps
    first, last = divided(local.tiles) if remote else (local.tiles, ())
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dq = Rows(q.shape[2], [tile.q for tile in (*first, *last, *(tile for step in remote for tile in step.tiles))])
    own = Rows(k.shape[2], [*(tile.k for tile in (*first, *last)), *keys.returned_rows])
    dleaves = [torch.zeros_like(leaves[i], dtype=dtype) for i in site.learned]

    def attend(step: Step, tile: Tile, blocks: tuple[Tensor, Tensor], flying: list[Tensor], dkv: Rows) -> None:
        op = primitives.scored_tile_backward if site.score else primitives.attention_tile_backward
        args = _tile_args(site, step, tile, q, leaves, seed, flying)
        with label(f"attention_backward_{_name(step, tile)}"):
            ours, theirs = [_cut(x, tile.q) for x in (grad, q, out, lse)], [_cut(x, tile.k) for x in blocks]
            parts = _turned(tile, (*ours[:2], *theirs, *ours[2:]))
            tile_dq, tile_dk, tile_dv, *others = _turned(tile, op(*parts, *args))
        dq.fold(tile.q, (tile_dq,), _add, f"add_gradients_{_name(step, tile)}")
        dkv.fold(tile.k, (tile_dk, tile_dv), _add, f"add_gradients_{_name(step, tile)}")
        if others:
            dleaves[:] = _add_leaf_grads(site, step, tile, q, leaves, others, dleaves)

    for step, blocks, flying in keys.blocks():
        dkv = own if step is local else Rows(blocks[0].shape[2], [tile.k for tile in step.tiles])
        for tile in first if step is local else step.tiles:
            attend(step, tile, blocks, [*flying, *keys.returning], dkv)
        if step is not local:
            keys.give_back(step, dkv.join(lambda n: _zero_block(k, v, n, dtype)), own)
    for tile in last:
        attend(local, tile, (k, v), keys.returning, own)
    keys.finish(own)
    with label("join_gradients"):
        dk, dv = own.join(lambda n: _zero_block(k, v, n, dtype))
        (dq_out,) = dq.join(lambda n: (q.new_zeros((*q.shape[:2], n, q.shape[3]), dtype=dtype),))
        learned = [g.to(leaves[i].dtype) for g, i in zip(dleaves, site.learned, strict=True)]
        return dq_out.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), learned


# --- labels -----------------------------------------------------------------------------------------------------------


@contextmanager
def label(text: str) -> Iterator[None]:
    """While the loop is traced: the nodes written inside carry `text`, after which the lowered graph names them."""
    mode = get_proxy_mode()
    if mode is None:
        yield
        return
    graph = mode.tracer.graph
    last = next(reversed(graph.nodes), None)
    yield
    for node in reversed(graph.nodes):
        if node is last:
            break
        node.meta.setdefault(LABEL, text)


def _name(step: Step, tile: Tile) -> str:
    """No underscore before the last number: a graph that holds the name already, from an earlier site, appends one."""
    return f"step{step.shift}_q{tile.q[0]}to{tile.q[1]}_k{tile.k[0]}to{tile.k[1]}"


# --- rows -------------------------------------------------------------------------------------------------------------


class Rows:
    """Running values of a block of rows, cut where tiles begin and end, so that each tile touches whole pieces.

    A value is a tuple of tensors with the rows in dim 2.  Functional: no tensor is written in place.
    """

    def __init__(self, length: int, spans: Sequence[tuple[int, int]]) -> None:
        cuts = sorted({0, length, *(edge for span in spans for edge in span)})
        self.pieces = list(zip(cuts[:-1], cuts[1:], strict=True))
        self.values: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def fold(self, span: tuple[int, int], new: tuple[Tensor, ...], combine: Combine, text: str) -> None:
        """Combines `new`, the values of rows `span`, with what these rows hold; `text` labels the nodes."""
        inside = [piece for piece in self.pieces if span[0] <= piece[0] and piece[1] <= span[1]]
        for piece in inside:
            with label(text if len(inside) == 1 else f"{text}_rows{piece[0]}to{piece[1]}"):
                part = tuple(_cut(x, (piece[0] - span[0], piece[1] - span[0])) for x in new)
                self.values[piece] = combine(self.values[piece], part) if piece in self.values else part

    def join(self, missing: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """All rows in order; `missing(n)` stands in for n rows that no tile touched."""
        if not self.pieces:
            return missing(0)
        parts = [self.values[p] if p in self.values else missing(p[1] - p[0]) for p in self.pieces]
        return tuple(xs[0] if len(xs) == 1 else torch.cat(xs, dim=2) for xs in zip(*parts, strict=True))


def _merge(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(primitives.merge(*old, *new))


def _add(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(old, new, strict=True))


def _fold_runs(into: Rows, runs: Ranges, grads: tuple[Tensor, ...], text: str) -> None:
    """Adds `grads`, whose rows are those `runs` of `into` one after the other."""
    offset = 0
    for start, stop in runs:
        into.fold((start, stop), tuple(_cut(x, (offset, offset + stop - start)) for x in grads), _add, text)
        offset += stop - start


def _nothing(q: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
    dtype = accumulator(q.dtype)
    lse = torch.full((*q.shape[:2], n), -torch.inf, dtype=dtype, device=q.device)
    return q.new_zeros((*q.shape[:2], n, v.shape[3]), dtype=dtype), lse


def _zero_block(k: Tensor, v: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    zeros = [x.new_zeros((*x.shape[:2], n, x.shape[3]), dtype=dtype) for x in (k, v)]
    return zeros[0], zeros[1]


def _cut(x: Tensor, span: tuple[int, int]) -> Tensor:
    return x if span == (0, x.shape[2]) else x.narrow(2, span[0], span[1] - span[0])


# --- key blocks on the move -------------------------------------------------------------------------------------------


def transport(site: Site, k: Tensor, v: Tensor) -> Transport:
    """How the keys of other ranks come, and their gradients go home."""
    return {"ring": Exchanges, "allgather": AllGather}[site.comm](site, k, v)


class Transport:
    """`blocks` yields (step, (keys, values), buffers in flight) of each step; after the tiles of each but the first,
    the backward calls `give_back` with the block's dK, dV, and `finish` at the end: together they add the gradients
    that other ranks computed to `own`, those of the own tokens.
    """

    def __init__(self, site: Site, k: Tensor, v: Tensor) -> None:
        self.site, self.k, self.v, self.steps = site, k, v, site.program.steps
        self.returning: list[Tensor] = []  # buffers of gradients in flight

    @property
    def returned_rows(self) -> Ranges:
        """The rows of the own block as `own` receives them."""
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[Step, tuple[Tensor, Tensor], list[Tensor]]]:
        raise NotImplementedError

    def give_back(self, step: Step, grads: tuple[Tensor, ...], own: Rows) -> None:
        raise NotImplementedError

    def finish(self, own: Rows) -> None:
        raise NotImplementedError


class Exchanges(Transport):
    """The ring: one exchange per step, started before the tiles of the step before; gradients return a step behind."""

    late: Step | None = None

    @property
    def returned_rows(self) -> Ranges:
        return tuple(span for step in self.steps for span in _sent_rows(self.site, step))

    def blocks(self) -> Iterator[tuple[Step, tuple[Tensor, Tensor], list[Tensor]]]:
        block, arriving = (self.k, self.v), None
        for index, step in enumerate(self.steps):
            if arriving is not None:
                with label(f"wait_step{step.shift}"):
                    block = _unpack(primitives.wait(arriving), size(step.tokens), self.k, self.v)
            if index + 1 < len(self.steps):
                arriving = self._start(self.steps[index + 1])
            yield step, block, [arriving] if arriving is not None and index + 1 < len(self.steps) else []

    def give_back(self, step: Step, grads: tuple[Tensor, ...], own: Rows) -> None:
        back, home = _reverse(step.receive), _reverse(step.send)
        with label(f"send_gradients_step{step.shift}_{_peer(back)}"):
            nothing = self.k.new_empty(0, dtype=accumulator(self.k.dtype))
            sent = primitives.pack(list(grads), [0, grads[0].shape[2]]) if back else nothing
        started = _exchange(self.site, 2 * step.shift + 1, sent, back, home, *grads)
        self.finish(own)
        self.returning, self.late = [started], step

    def finish(self, own: Rows) -> None:
        for arriving in self.returning:
            assert self.late is not None
            self._take(arriving, self.late, own)
        self.returning = []

    def _start(self, step: Step) -> Tensor:
        with label(f"send_step{step.shift}_{_peer(step.send)}"):
            rows_sent = [edge for span in _sent_rows(self.site, step) for edge in span]
            sent = primitives.pack([self.k, self.v], rows_sent) if step.send else self.k.new_empty(0)
        return _exchange(self.site, 2 * step.shift, sent, step.send, step.receive, self.k, self.v)

    def _take(self, arriving: Tensor, step: Step, own: Rows) -> None:
        with label(f"wait_gradients_step{step.shift}"):
            received = primitives.wait(arriving)
            if step.send is None:
                return
            grads = _unpack(received, step.send.size, self.k, self.v)
        _fold_runs(own, _sent_rows(self.site, step), grads, f"add_gradients_step{step.shift}")


class AllGather(Transport):
    """Every rank gathers all keys before its first tile; one reduce-scatter brings the gradients home.

    The tiles are the ring's own.  Holds K, V and their gradients at full length.
    """

    def __init__(self, site: Site, k: Tensor, v: Tensor) -> None:
        super().__init__(site, k, v)
        self.where = (2, 1, site.keys, site.key_layout, site.world, site.rank, site.group)
        self.remote = site.world > 1 and site.key_layout != "replicated"
        self.given: list[tuple[Ranges, tuple[Tensor, ...]]] = []

    @property
    def returned_rows(self) -> Ranges:
        return ()

    def blocks(self) -> Iterator[tuple[Step, tuple[Tensor, Tensor], list[Tensor]]]:
        full = [self.k, self.v]
        if self.remote:
            with label("gather_keys"):
                full = [torch.ops.ringpass.gather(x, *self.where) for x in full]
        for index, step in enumerate(self.steps):
            if index == 0:
                yield step, (self.k, self.v), []
            elif step.tokens:
                yield step, (_take(full[0], step.tokens), _take(full[1], step.tokens)), []

    def give_back(self, step: Step, grads: tuple[Tensor, ...], own: Rows) -> None:
        self.given.append((step.tokens, grads))

    def finish(self, own: Rows) -> None:
        if not self.remote:
            return
        whole = Rows(self.site.keys, [span for runs, _ in self.given for span in runs])
        for runs, grads in self.given:
            _fold_runs(whole, runs, grads, "add_gradients")
        dtype = accumulator(self.k.dtype)
        with label("reduce_scatter_gradients"):
            sums = whole.join(lambda n: _zero_block(self.k, self.v, n, dtype))
            home = tuple(torch.ops.ringpass.reduce_scatter(x, *self.where) for x in sums)
        own.fold((0, self.k.shape[2]), home, _add, "add_gradients_home")


def _exchange(
    site: Site, tag: int, sent: Tensor, send: Transfer | None, receive: Transfer | None, k: Tensor, v: Tensor
) -> Tensor:
    """Starts an exchange; returns the buffer that will hold what arrives."""
    numel = receive.size * k.shape[0] * (k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3]) if receive else 0
    dst, src = send.dst if send else primitives.NOBODY, receive.src if receive else primitives.NOBODY
    with label(f"receive{'_gradients' if tag % 2 else ''}_step{tag // 2}_{_peer(receive, source=True)}"):
        received: Tensor = primitives.exchange([sent], numel, dst, src, tag, site.group)[0]
    return received


def _peer(transfer: Transfer | None, source: bool = False) -> str:
    if transfer is None:
        return "nothing"
    return f"from_rank{transfer.src}" if source else f"to_rank{transfer.dst}"


def _reverse(transfer: Transfer | None) -> Transfer | None:
    return Transfer(transfer.dst, transfer.src, transfer.tokens) if transfer else None


def _sent_rows(site: Site, step: Step) -> Ranges:
    return rows(step.send.tokens, site.owned_keys) if step.send else ()


def _take(x: Tensor, spans: Ranges) -> Tensor:
    parts = [_cut(x, span) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _unpack(flat: Tensor, tokens: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shapes = [(*x.shape[:2], tokens, x.shape[3]) for x in (k, v)]
    split = shapes[0][0] * shapes[0][1] * tokens * shapes[0][3]
    return flat[:split].view(shapes[0]), flat[split:].view(shapes[1])


# --- what a tile's scores go through ----------------------------------------------------------------------------------


def _tile_args(
    site: Site, step: Step, tile: Tile, q: Tensor, leaves: Sequence[Tensor], seed: Tensor | None, flying: list[Tensor]
) -> tuple[Any, ...]:
    """The arguments of `attention_tile`, or of `scored_tile`, after q, k, v."""
    spans = _spans(site, step, tile, q)
    allowed = bias = keep = None
    with label(f"mask_{_name(step, tile)}"):
        if tile.kind == PARTIAL:
            allowed = primitives.mask_tile(list(leaves), q, site.mask, *spans)
        if site.bias:
            (bias,) = _turned(tile, [primitives.mask_tile(list(leaves), q, site.bias, *spans)], (2, 3))
    if site.dropout:
        with label(f"keep_{_name(step, tile)}"):
            keep = primitives.keep_tile(seed, site.stream, site.dropout, *site.orders, *spans)
    score = (site.score, list(leaves), list(site.learned), *spans[2:]) if site.score else ()
    causal, learned = tile.kind in TRIANGLES, bool(site.learned)
    return allowed, bias, keep, site.scale, causal, site.dropout, learned, *score, flying


def _turned(tile: Tile, tensors: Sequence[Tensor], dims: tuple[int, ...] = (2,)) -> Sequence[Tensor]:
    """`tensors` with their rows in reverse where the tile is mirrored: its triangle is then the kernels' causal one."""
    return [x.flip(dims) for x in tensors] if tile.kind == MIRRORED else tensors


def _spans(site: Site, step: Step, tile: Tile, q: Tensor) -> tuple[int, int, list[int], list[int]]:
    """(B, H, tokens of the query rows, tokens of the key rows) of a tile."""
    return q.shape[0], q.shape[1], _tokens(site.owned_queries, tile.q), _tokens(step.tokens, tile.k)


def _tokens(ranges: Ranges, span: tuple[int, int]) -> list[int]:
    """The tokens in rows `span` of a block that holds the tokens `ranges`, as a flat list of ranges."""
    return [edge for run in tokens(ranges, span) for edge in run]


def _add_leaf_grads(
    site: Site, step: Step, tile: Tile, q: Tensor, leaves: Sequence[Tensor], others: list[Tensor], dleaves: list[Tensor]
) -> list[Tensor]:
    """`dleaves` plus those of this tile: `others`, or, where that is the gradient of its bias, what follows from it."""
    spans = _spans(site, step, tile, q)
    with label(f"mask_backward_{_name(step, tile)}"):
        more = others
        if not site.score:
            more = primitives.mask_tile_backward(others[0], list(leaves), list(site.learned), q, site.bias, *spans)
    return [a + b for a, b in zip(dleaves, more, strict=True)]
