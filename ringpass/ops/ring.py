"""Ring attention: the loop over steps and tiles, forward and backward, in terms of the ops of `primitives`.

When run, it is the body of the rolled operator; when traced, it gives the unrolled graph.  Shapes: B batch, H query
heads, G key/value heads, D head width, Lq and Lk local query and key tokens.

    for each step of the program (local keys first):
        wait for the step's key block, unless it is local
        start the exchange of the next step                  <- before the tiles of this one
        for each launch of its tiles: attend, merge into the accumulated (out, lse) of its rows

While the loop is traced, each tile and each exchange comes after what was merged last.  So, in any order that code
generation chooses, at most two exchanges are in flight, and the results of one launch wait to be merged.

The backward sends K and V round again and returns each block's dK, dV to its owner, one step behind; the tiles of the
local keys are divided in two, so that both the first and the last exchange overlap with some.  K and V (dK and dV) are
sent as one message.  Partial results are merged in float32 (float64 for float64 inputs).

Where all ranks have all queries, few of them, each attends to its own keys, and the results are merged over ranks: a
*split* site.  Its dq is the sum over ranks.

A `Transport` brings the keys and returns their gradients.  A dilated site consists of one site per head group, each
with tiles of its rows, which share their exchanges; their results are merged once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ringpass.kernels.blocks import join_rows, row_slice, stacked, unstacked
from ringpass.layouts.ranges import Ranges, tokens
from ringpass.masks.intervals import PARTIAL
from ringpass.ops import boundary, masked_steps, primitives
from ringpass.ops.accumulate import RowAccumulator, add, label, merge, row_accumulator
from ringpass.ops.merge_ranks import merge_ranks
from ringpass.ops.row_ops import BlockIndex, added, merged, taken
from ringpass.ops.transports.base import Block, Served, Transport, zero_block
from ringpass.ops.transports.table import make_transport
from ringpass.precision import accumulator
from ringpass.profiling import site_label
from ringpass.schedule.launches import Launch, whole_step
from ringpass.schedule.messages import rows_of
from ringpass.schedule.program import Step, divided
from ringpass.schedule.site import Site
from ringpass.schedule.tiles import CAUSAL_TILE, MIRRORED

MOST_NAMED = 4  # ranges of keys in the name of a node


def forward(
    site: Site, q: Tensor, k: Tensor, v: Tensor, leaves: Sequence[Tensor], seed: Tensor | None, index: int = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the local queries over all keys: (B, H, Lq, Dv) in q's dtype, (B, H, Lq) in the accumulator's.

    `index`: the number of the attention in the graph, for a profiler.
    """
    transport, dtype = make_transport(site, k, v, site_label(index)), accumulator(q.dtype)
    queries = [_queries(group_site, q) for group_site in transport.sites]
    states = [row_accumulator(x.shape[2], dtype, partial(_query_spans, transport, i, x)) for i, x in enumerate(queries)]
    for served, in_flight in transport.blocks(backward=False):
        _attend(transport, served, queries, in_flight, (leaves, seed), states)
    with label("join_rows"):
        joined = [state.join(partial(_nothing, x, v)) for state, x in zip(states, queries, strict=True)]
        out, lse = _merged(transport.sites, joined, q) if site.dilation else joined[0]
    if site.split:
        with label("merge_ranks"):
            out, lse = merge_ranks(out, lse, site.world, site.rank, site.group)
    if site.sink:
        out, lse = _with_sink(site, out, lse, leaves)
    return out.to(q.dtype), lse


def _attend(
    transport: Transport,
    served: Served,
    queries: Sequence[Tensor],
    in_flight: list[Tensor],
    data: tuple[Sequence[Tensor], Tensor | None],
    states: Sequence[RowAccumulator],
) -> None:
    """Merges attention over each block into the state of its site.  `data`: the leaves and the seed."""
    for i, step, block in served:
        site, q, (leaves, seed) = transport.sites[i], queries[i], data
        tile_op = primitives.scored_tile if site.score else primitives.attention_tile
        for launch in _launches(site, step, q):
            name = _name(site, step, launch)
            args = _tile_args(site, step, launch, q, leaves, seed, [*in_flight, *transport.merged])
            op, text = masked_steps.attention_step if launch.whole else tile_op, f"attention_{name}"
            with label(text):
                keys = (_keys(x, launch) for x in block)
                found = op(_rows(q, launch), *keys, *args, label=f"{transport.name} {text}")
                found = tuple(unstacked(x, launch.count) for x in found)
            transport.note(states[i].fold(launch.q, found, merge, f"merge_{name}"))


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
    index: int = 0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(dq, dk, dv, gradients of the learned leaves), each in its input's dtype, for the local tokens."""
    transport = make_transport(site, k, v, site_label(index))
    sums = _Gradients(site, transport, [grad, q, out, lse.masked_fill(lse == -torch.inf, torch.inf)], leaves, seed)
    blocks = transport.blocks(backward=True)
    served, in_flight = next(blocks)
    local = [*served]  # the local keys
    local_sums = [row_accumulator(k.shape[2], sums.dtype, partial(sums.local_spans, i)) for i, _, (k, _) in local]
    for block, dkv in zip(local, local_sums, strict=True):
        sums.accumulate(block, sums.halves[block[0]][0], in_flight, dkv)
    for served, in_flight in blocks:
        transport.give_back(served, [sums.of_block(block, in_flight) for block in served], local_sums)
    for block, dkv in zip(local, local_sums, strict=True):
        sums.accumulate(block, sums.halves[block[0]][1], [], dkv)
    transport.finish(local_sums)
    if site.sink and site.learned and not (site.split and site.rank):  # a split site's rows are on every rank
        sums.dleaves = _add_sink_grads(site, grad, out, lse, leaves, sums.dleaves)
    with label("join_gradients"):
        dk, dv = transport.collect(local_sums)
        dq = _dq(site, transport.sites, sums.dqs, q)
        dq = boundary.reduce(dq, site.group) if site.split else dq
        learned = [g.to(leaves[i].dtype) for g, i in zip(sums.dleaves, site.learned, strict=True)]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), learned


class _Gradients:
    """The sums of one backward: `dqs`, of the queries of each site, and `dleaves`, of the learned leaves."""

    def __init__(
        self,
        site: Site,
        transport: Transport,
        query_side: Sequence[Tensor],
        leaves: Sequence[Tensor],
        seed: Tensor | None,
    ) -> None:
        self.transport, self.leaves, self.seed = transport, leaves, seed
        self.dtype = accumulator(query_side[1].dtype)
        self.op = primitives.scored_tile_backward if site.score else primitives.attention_tile_backward
        # grad, q, out, lse of each site
        self.query_sides = [[_queries(group_site, x) for x in query_side] for group_site in transport.sites]
        self.halves = [
            self._halves(i) for i in range(len(transport.sites))
        ]  # launches of local tiles: first ones, last ones
        self.dqs = [
            row_accumulator(x[1].shape[2], self.dtype, partial(self._spans, i)) for i, x in enumerate(self.query_sides)
        ]
        self.dleaves = [torch.zeros_like(leaves[i], dtype=self.dtype) for i in site.learned]

    def _halves(self, index: int) -> tuple[list[Launch], list[Launch]]:
        group_site, local = self.transport.sites[index], self.transport.steps(index)[0]
        q = self.query_sides[index][1]
        if not self.transport.remote or masked_steps.runs_whole(group_site, local.tiles, q):
            return _launches(group_site, local, q), []
        first, last = divided(local.tiles)
        return group_site.launches(first, q.shape[0]), group_site.launches(last, q.shape[0])

    def _spans(self, index: int) -> list[tuple[int, int]]:
        """The rows to which gradients of a site's queries are added."""
        local = [launch.q for half in self.halves[index] for launch in half]
        return [*local, *_query_spans(self.transport, index, self.query_sides[index][1], first=1)]

    def local_spans(self, index: int) -> list[tuple[int, int]]:
        """The rows to which gradients of the local keys are added."""
        return [*_key_spans(launch for half in self.halves[index] for launch in half), *self.transport.returned_rows]

    def of_block(self, block: Block, in_flight: list[Tensor]) -> tuple[Tensor, ...]:
        """dK and dV of a received block."""
        i, step, (k, v) = block
        found = _launches(self.transport.sites[i], step, self.query_sides[i][1])
        dtype = self.transport.gradient_dtype(step.receive)
        dkv = row_accumulator(k.shape[2], dtype, partial(_key_spans, found))
        self.accumulate(block, found, in_flight, dkv)
        return dkv.join(partial(zero_block, k, v, dtype))

    def accumulate(self, block: Block, some: Sequence[Launch], in_flight: list[Tensor], dkv: RowAccumulator) -> None:
        """Adds the gradients of `some` launches of a block; dK and dV to `dkv`."""
        i, step, blocks = block
        group_site, query_side = self.transport.sites[i], self.query_sides[i]
        for launch in some:
            name = _name(group_site, step, launch)
            after = [*in_flight, *self.transport.returning, *self.transport.merged]
            args = _tile_args(group_site, step, launch, query_side[1], self.leaves, self.seed, after)
            text = f"attention_backward_{name}"
            with label(text):
                rows, keys = [_rows(x, launch) for x in query_side], [_keys(x, launch) for x in blocks]
                op = masked_steps.attention_step_backward if launch.whole else self.op
                dq, dk, dv, *others = op(*rows[:2], *keys, *rows[2:], *args, label=f"{self.transport.name} {text}")
                dq = unstacked(dq, launch.count)
            combined = self.dqs[i].fold(launch.q, (dq,), add, f"add_gradients_{name}")
            combined += _fold_keys(dkv, launch, (dk, dv), f"add_gradients_{name}")
            self.transport.note(combined)
            if others:
                self.dleaves = _add_leaf_grads(
                    group_site, step, launch, query_side[1], self.leaves, others, self.dleaves
                )


# --- launches ---------------------------------------------------------------------------------------------------------


def _launches(group_site: Site, step: Step, q: Tensor) -> list[Launch]:
    """The launches of a step."""
    if masked_steps.runs_whole(group_site, step.tiles, q):
        return [whole_step(step)]
    return group_site.launches(step.tiles, q.shape[0])


def _rows(x: Tensor, launch: Launch) -> Tensor:
    """The query rows of a launch."""
    return stacked(x, launch.tiles[0].q, launch.rows, launch.count)


def _keys(block: Tensor, launch: Launch) -> Tensor:
    """The key rows of a launch."""
    parts = [stacked(block, tile.k, by, launch.count) for tile, by in zip(launch.tiles, launch.shifts, strict=True)]
    return parts[0] if len(parts) == 1 else join_rows(parts)


def _fold_keys(into: RowAccumulator, launch: Launch, grads: tuple[Tensor, ...], text: str) -> list[Tensor]:
    """Adds `grads` of the key rows of a launch to those of the block; returns what `RowAccumulator.fold` does."""
    offset, combined = 0, list[Tensor]()
    for tile, by, spans in zip(launch.tiles, launch.shifts, launch.k, strict=True):
        length = tile.k[1] - tile.k[0]
        part = tuple(row_slice(x, (offset, offset + length)) for x in grads)
        offset += length
        if len(spans) > 1:  # apart, or overlapping
            for span, *values in zip(spans, *(_each(x, launch).unbind(1) for x in part), strict=True):
                combined += into.fold(span, tuple(values), add, text)
        elif by or launch.count == 1:
            combined += into.fold(spans[0], tuple(unstacked(x, launch.count) for x in part), add, text)
        else:
            repeated = tuple(_each(x, launch).sum(1, dtype=accumulator(x.dtype)) for x in part)
            combined += into.fold(spans[0], repeated, add, text)
    return combined


def _each(x: Tensor, launch: Launch) -> Tensor:
    """(B count, H, n, D) as (B, count, H, n, D)."""
    apart: Tensor = x.unflatten(0, (-1, launch.count))
    return apart


def _query_spans(transport: Transport, index: int, q: Tensor, first: int = 0) -> list[tuple[int, int]]:
    return [
        launch.q for step in transport.steps(index)[first:] for launch in _launches(transport.sites[index], step, q)
    ]


def _key_spans(some: Iterable[Launch]) -> list[tuple[int, int]]:
    return [span for launch in some for spans in launch.k for span in spans]


# --- head groups ------------------------------------------------------------------------------------------------------


def _queries(group_site: Site, x: Tensor) -> Tensor:
    """The rows of a site's queries in `x`: q, the gradient, out or lse."""
    if group_site.head_group is None:
        return x
    with label(f"take_group{group_site.group_index}"):
        return taken(x, *_block_index(group_site))


def _block_index(group_site: Site) -> BlockIndex:
    """A group's query heads, and the rows of its queries in the rank's block."""
    head_group = group_site.head_group
    assert head_group is not None
    queries = head_group.tokens(group_site.owned_queries)
    return list(head_group.members), rows_of(group_site.problem, group_site.rank, queries)


def _merged(sites: Sequence[Site], parts: Sequence[tuple[Tensor, ...]], q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of all queries from those of the head groups: one log-sum-exp merge over the patterns."""
    patterns = [group_site.head_group.pattern for group_site in sites if group_site.head_group]
    first = patterns.count(patterns[0])
    with label("merge_groups"):
        out, lse = merged(parts, [_block_index(group_site) for group_site in sites], first, *q.shape[1:3])
    return out, lse


def _dq(site: Site, sites: Sequence[Site], dqs: Sequence[RowAccumulator], q: Tensor) -> Tensor:
    """The gradient of all queries from those of the head groups."""

    def zeros(heads: int, n: int) -> tuple[Tensor, ...]:
        return (q.new_zeros((q.shape[0], heads, n, q.shape[3]), dtype=accumulator(q.dtype)),)

    if not site.dilation:
        return dqs[0].join(partial(zeros, q.shape[1]))[0]
    block_indices = [_block_index(group_site) for group_site in sites]
    parts = [x.join(partial(zeros, len(heads)))[0] for x, (heads, _) in zip(dqs, block_indices, strict=True)]
    return added(parts, block_indices, *q.shape[1:3])


def _nothing(q: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(out, lse) of n rows of `q` without tiles."""
    dtype = accumulator(q.dtype)
    lse = torch.full((*q.shape[:2], n), -torch.inf, dtype=dtype, device=q.device)
    return q.new_zeros((*q.shape[:2], n, v.shape[3]), dtype=dtype), lse


# --- names ------------------------------------------------------------------------------------------------------------


def _name(site: Site, step: Step, launch: Launch) -> str:
    """Does not end in an underscore and a number, which graphs append to names that are taken."""
    prefix = f"group{site.group_index}_" if site.head_group else ""
    rows, keys = launch.tiles[0].q, [f"k{tile.k[0]}to{tile.k[1]}" for tile in launch.tiles]
    if len(keys) > MOST_NAMED:
        keys = [*keys[:MOST_NAMED], f"and{len(keys) - MOST_NAMED}more"]
    stack = f"_stack{launch.count}" if launch.count > 1 else ""
    return f"{prefix}step{step.shift}_q{rows[0]}to{rows[1]}_{'_'.join(keys)}{stack}"


# --- what a tile's scores go through ----------------------------------------------------------------------------------


def _tile_args(
    site: Site,
    step: Step,
    launch: Launch,
    q: Tensor,
    leaves: Sequence[Tensor],
    seed: Tensor | None,
    after: list[Tensor],
) -> tuple[Any, ...]:
    """The arguments of `attention_tile`, `scored_tile` or `attention_step` after q, k, v."""
    if launch.whole:
        with label(f"block_lists_{_name(site, step, launch)}"):
            return masked_steps.step_args(site, _spans(site, step, launch, q), leaves, q.device, after)
    kind, name = launch.kind, _name(site, step, launch)
    spans: tuple[Any, ...] = _spans(site, step, launch, q) if kind == PARTIAL or site.depends_on_tokens else ()
    allowed = bias = keep = None
    with label(f"mask_{name}"):
        if kind == PARTIAL:
            allowed = primitives.mask_tile(list(leaves), q, site.mask, *spans)
        if site.bias:
            bias = primitives.mask_tile(list(leaves), q, site.bias, *spans)
    if site.dropout:
        with label(f"keep_{name}"):
            keep = primitives.keep_tile(seed, site.stream, site.dropout, site.dropout_indices, *spans)
    score = (site.score, list(leaves), list(site.learned), *spans[2:]) if site.score else ()
    triangle = kind == CAUSAL_TILE, kind == MIRRORED
    return allowed, bias, keep, site.scale, *triangle, site.dropout, site.learns, *score, after


def _spans(site: Site, step: Step, launch: Launch, q: Tensor) -> tuple[int, int, list[int], list[int]]:
    """(B, H, tokens of the query rows, tokens of the key rows) of a launch that is no stack."""
    assert launch.count == 1, launch
    keys = [edge for tile in launch.tiles for edge in _tokens(step.tokens, tile.k)]
    return q.shape[0], q.shape[1], _tokens(site.owned_queries, launch.q), keys


def _tokens(ranges: Ranges, span: tuple[int, int]) -> list[int]:
    """The tokens in rows `span` of a block that holds the tokens `ranges`, as a flat list of ranges."""
    return [edge for part in tokens(ranges, span) for edge in part]


def _add_leaf_grads(
    site: Site,
    step: Step,
    launch: Launch,
    q: Tensor,
    leaves: Sequence[Tensor],
    others: list[Tensor],
    dleaves: list[Tensor],
) -> list[Tensor]:
    """`dleaves` plus those of this tile: `others`, or, without a score function, those through its bias."""
    spans = _spans(site, step, launch, q)
    with label(f"mask_backward_{_name(site, step, launch)}"):
        more = others
        if not site.score:
            more = primitives.mask_tile_backward(others[0], list(leaves), list(site.learned), q, site.bias, *spans)
    return [a + b for a, b in zip(dleaves, more, strict=True)]


# --- sinks ------------------------------------------------------------------------------------------------------------


def _with_sink(site: Site, out: Tensor, lse: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) with one extra key per row, whose score is the sink and whose value is 0."""
    with label("sink"):
        sink = primitives.mask_tile(list(leaves), out, site.sink, *_sink_spans(site, out)).to(lse.dtype)[..., 0]
        share = torch.sigmoid(lse - sink).masked_fill(lse == -torch.inf, 0.0)
        return out * share.unsqueeze(-1), torch.logaddexp(lse, sink)


def _add_sink_grads(
    site: Site, grad: Tensor, out: Tensor, lse: Tensor, leaves: Sequence[Tensor], dleaves: list[Tensor]
) -> list[Tensor]:
    """`dleaves` plus the gradient through the sink, whose weight in a row is exp(sink - lse): -weight (grad . out)."""
    spans = _sink_spans(site, out)
    with label("sink_backward"):
        sink = primitives.mask_tile(list(leaves), out, site.sink, *spans).to(lse.dtype)
        weight = torch.exp(sink - lse.unsqueeze(-1)).masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
        through = -weight * (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
        more = primitives.mask_tile_backward(
            through.sum_to_size(sink.shape), list(leaves), list(site.learned), out, site.sink, *spans
        )
        return [a + b for a, b in zip(dleaves, more, strict=True)]


def _sink_spans(site: Site, q: Tensor) -> tuple[int, int, list[int], list[int]]:
    return q.shape[0], q.shape[1], [edge for span in site.owned_queries for edge in span], [0, 1]
