"""Ring attention, written once: the loop over steps and tiles, forward and backward.

Shapes: B batch, H query heads, G key/value heads, D head width, Lq and Lk local query and key tokens.

    for each step of the program (own keys first):
        take the step's key block: the own one, or what the exchange brought
        start the exchange of the next step                  <- before the tiles of this one
        for each tile: attend, merge into the rows' running (out, lse)

The backward passes K and V round again and sends each block's dK, dV back to its owner, one step behind.  K and V (dK
and dV) travel as one message.  Partial results are merged in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ringpass import dropout, kernels, mask, p2p
from ringpass.kernels import TileArgs, accumulator
from ringpass.layout import Layout, Ranges, size
from ringpass.schedule import CAUSAL_TILE, PARTIAL, Problem, Program, Step, Tile, Transfer, program, rows


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
    learned: tuple[int, ...] = ()  # the leaves that need a gradient

    @property
    def program(self) -> Program:
        layouts = Layout(self.query_layout, self.world), Layout(self.key_layout, self.world)
        cut_all = self.dropout > 0 or bool(self.learned)
        return program(Problem(self.mask, self.queries, self.keys, *layouts, self.tile, cut_all), self.rank)


def forward(
    site: Site, q: Tensor, k: Tensor, v: Tensor, leaves: Sequence[Tensor], seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the local queries over all keys: (B, H, Lq, Dv) in q's dtype, (B, H, Lq) in the accumulator's."""
    steps = site.program.steps
    state = Rows(q.shape[2], [tile.q for step in steps for tile in step.tiles])
    for step, k_block, v_block in _blocks(site, k, v):
        for tile in step.tiles:
            args = _tile_args(site, step, tile, q, leaves, seed)
            out, lse = kernels.forward(_cut(q, tile.q), _cut(k_block, tile.k), _cut(v_block, tile.k), args)
            state.fold(tile.q, (out.to(accumulator(q.dtype)), lse), lambda old, new: kernels.merge(*old, *new))
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
    steps, dtype = site.program.steps, accumulator(q.dtype)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    dq = Rows(q.shape[2], [tile.q for step in steps for tile in step.tiles])
    own = Rows(k.shape[2], [*(t.k for t in steps[0].tiles), *(r for s in steps for r in _sent_rows(site, s))])
    dleaves = [torch.zeros_like(leaves[i], dtype=dtype) for i in site.learned]
    returning: tuple[p2p.Exchange, Step] | None = None
    for index, (step, k_block, v_block) in enumerate(_blocks(site, k, v)):
        block = own if index == 0 else Rows(k_block.shape[2], [tile.k for tile in step.tiles])
        for tile in step.tiles:
            args = _tile_args(site, step, tile, q, leaves, seed)
            row_tensors = [_cut(x, tile.q) for x in (grad, q)], [_cut(x, tile.q) for x in (out, lse)]
            tile_dq, tile_dk, tile_dv, dbias = kernels.backward(
                *row_tensors[0], _cut(k_block, tile.k), _cut(v_block, tile.k), *row_tensors[1], args
            )
            dq.fold(tile.q, (tile_dq.to(dtype),), _add)
            block.fold(tile.k, (tile_dk.to(dtype), tile_dv.to(dtype)), _add)
            if dbias is not None:
                dleaves = [a + b for a, b in zip(dleaves, _leaf_grads(site, step, tile, q, leaves, dbias), strict=True)]
        if index:
            started = _start_return(site, step, block.join(lambda n: _zero_block(k, v, n, dtype)), k, v)
            if returning:
                _take_return(site, *returning, own, k, v)
            returning = (started, step)
    if returning:
        _take_return(site, *returning, own, k, v)
    dk, dv = own.join(lambda n: _zero_block(k, v, n, dtype))
    (dq_out,) = dq.join(lambda n: (q.new_zeros((*q.shape[:2], n, q.shape[3]), dtype=dtype),))
    return (
        dq_out.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        [g.to(leaves[i].dtype) for g, i in zip(dleaves, site.learned, strict=True)],
    )


# --- rows -------------------------------------------------------------------------------------------------------------


class Rows:
    """Running values of a block of rows, cut where tiles begin and end, so that each tile touches whole pieces.

    A value is a tuple of tensors with the rows in dim 2.  Functional: no tensor is written in place.
    """

    def __init__(self, length: int, spans: Sequence[tuple[int, int]]) -> None:
        cuts = sorted({0, length, *(edge for span in spans for edge in span)})
        self.pieces = list(zip(cuts[:-1], cuts[1:], strict=True))
        self.values: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def fold(self, span: tuple[int, int], new: tuple[Tensor, ...], combine: Callable[..., tuple[Tensor, ...]]) -> None:
        """Combines `new`, the values of rows `span`, with what these rows hold."""
        for piece in self.pieces:
            if span[0] <= piece[0] and piece[1] <= span[1]:
                part = tuple(_cut(x, (piece[0] - span[0], piece[1] - span[0])) for x in new)
                self.values[piece] = combine(self.values[piece], part) if piece in self.values else part

    def join(self, missing: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """All rows in order; `missing(n)` stands in for n rows that no tile touched."""
        if not self.pieces:
            return missing(0)
        parts = [self.values[p] if p in self.values else missing(p[1] - p[0]) for p in self.pieces]
        return tuple(xs[0] if len(xs) == 1 else torch.cat(xs, dim=2) for xs in zip(*parts, strict=True))


def _add(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(old, new, strict=True))


def _nothing(q: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
    dtype = accumulator(q.dtype)
    lse = torch.full((*q.shape[:2], n), -torch.inf, dtype=dtype, device=q.device)
    return q.new_zeros((*q.shape[:2], n, v.shape[3]), dtype=dtype), lse


def _zero_block(k: Tensor, v: Tensor, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return k.new_zeros((*k.shape[:2], n, k.shape[3]), dtype=dtype), v.new_zeros(
        (*v.shape[:2], n, v.shape[3]), dtype=dtype
    )


def _cut(x: Tensor, span: tuple[int, int]) -> Tensor:
    return x if span == (0, x.shape[2]) else x.narrow(2, span[0], span[1] - span[0])


# --- key blocks on the move -------------------------------------------------------------------------------------------


def _blocks(site: Site, k: Tensor, v: Tensor):  # type: ignore[no-untyped-def]
    """Yields (step, keys, values) of each step; the next step's exchange starts before a block is handed out."""
    steps = site.program.steps
    block, arriving = (k, v), None
    for index, step in enumerate(steps):
        if arriving is not None:
            block = _unpack(arriving.wait(), size(step.tokens), k, v)
        if index + 1 < len(steps):
            arriving = _start_step(site, steps[index + 1], k, v)
        yield step, *block


def _start_step(site: Site, step: Step, k: Tensor, v: Tensor) -> p2p.Exchange:
    sent = _pack([_take(x, _sent_rows(site, step)) for x in (k, v)]) if step.send else None
    return _exchange(site, 2 * step.shift, sent, step.send, step.receive, k, v)


def _start_return(site: Site, step: Step, grads: tuple[Tensor, ...], k: Tensor, v: Tensor) -> p2p.Exchange:
    """Sends dK, dV of the received block to its owner; receives those of the tokens that were sent out."""
    sent = _pack(list(grads)) if step.receive else None
    back, home = _reverse(step.receive), _reverse(step.send)
    like = k.new_empty(0, dtype=accumulator(k.dtype))
    return _exchange(site, 2 * step.shift + 1, sent, back, home, k, v, like)


def _take_return(site: Site, exchange: p2p.Exchange, step: Step, own: Rows, k: Tensor, v: Tensor) -> None:
    received = exchange.wait()
    if step.send is None:
        return
    grads = _unpack(received, step.send.size, k, v)
    offset = 0
    for start, stop in _sent_rows(site, step):
        own.fold((start, stop), tuple(x.narrow(2, offset, stop - start) for x in grads), _add)
        offset += stop - start


def _exchange(
    site: Site,
    tag: int,
    sent: Tensor | None,
    send: Transfer | None,
    receive: Transfer | None,
    k: Tensor,
    v: Tensor,
    like: Tensor | None = None,
) -> p2p.Exchange:
    numel = receive.size * k.shape[0] * (k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3]) if receive else 0
    dst, src = send.dst if send else None, receive.src if receive else None
    return p2p.start(sent, dst, numel, src, k if like is None else like, tag, site.group)


def _reverse(transfer: Transfer | None) -> Transfer | None:
    return Transfer(transfer.dst, transfer.src, transfer.tokens) if transfer else None


def _sent_rows(site: Site, step: Step) -> Ranges:
    owned = Layout(site.key_layout, site.world).ranges(site.rank, site.keys)
    return rows(step.send.tokens, owned) if step.send else ()


def _take(x: Tensor, spans: Ranges) -> Tensor:
    parts = [_cut(x, span) for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _pack(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _unpack(flat: Tensor, tokens: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shapes = [(*x.shape[:2], tokens, x.shape[3]) for x in (k, v)]
    split = shapes[0][0] * shapes[0][1] * tokens * shapes[0][3]
    return flat[:split].view(shapes[0]), flat[split:].view(shapes[1])


# --- what a tile's scores go through ----------------------------------------------------------------------------------


def _tile_args(
    site: Site, step: Step, tile: Tile, q: Tensor, leaves: Sequence[Tensor], seed: Tensor | None
) -> TileArgs:
    where = _positions(site, step, tile, q) if tile.kind == PARTIAL or site.bias or site.dropout else {}
    return TileArgs(
        scale=site.scale,
        causal=tile.kind == CAUSAL_TILE,
        mask=mask.evaluate(mask.parse(site.mask), where, leaves) if tile.kind == PARTIAL else None,
        bias=mask.evaluate(mask.parse(site.bias), where, leaves) if site.bias else None,
        keep=_kept(site, where, seed) if site.dropout else None,
        dropout=site.dropout,
        learned=bool(site.learned),
    )


def _kept(site: Site, where: dict[str, Tensor], seed: Tensor | None) -> Tensor:
    assert seed is not None
    return dropout.keep(seed, site.stream, site.dropout, [where[name].reshape(-1) for name in "bhqk"])


def _positions(site: Site, step: Step, tile: Tile, q: Tensor) -> dict[str, Tensor]:
    """Global b, h, q, k indices of a tile, as `mask.evaluate` takes them."""
    queries = Layout(site.query_layout, site.world).ranges(site.rank, site.queries)
    return {
        "b": torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1),
        "h": torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1),
        "q": _tokens(queries, tile.q, q.device).view(1, 1, -1, 1),
        "k": _tokens(step.tokens, tile.k, q.device).view(1, 1, 1, -1),
    }


def _tokens(ranges: Ranges, span: tuple[int, int], device: torch.device) -> Tensor:
    """Positions of rows `span` of a block that holds the tokens `ranges`."""
    parts, offset = [], 0
    for start, stop in ranges:
        low, high = max(span[0], offset), min(span[1], offset + stop - start)
        if low < high:
            parts.append(torch.arange(start + low - offset, start + high - offset, device=device))
        offset += stop - start
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _leaf_grads(site: Site, step: Step, tile: Tile, q: Tensor, leaves: Sequence[Tensor], dbias: Tensor) -> list[Tensor]:
    """Gradients of the learned leaves through this tile's bias."""
    where = _positions(site, step, tile, q)

    def bias(*learned: Tensor) -> Tensor:
        swapped = list(leaves)
        for i, leaf in zip(site.learned, learned, strict=True):
            swapped[i] = leaf
        return mask.evaluate(mask.parse(site.bias), where, swapped).to(dbias.dtype)

    _, pull = torch.func.vjp(bias, *(leaves[i].to(dbias.dtype) for i in site.learned))
    return list(pull(dbias))
