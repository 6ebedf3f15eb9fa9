"""Writing an attention site: ring attention over the ranks, or over this one alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch.fx import Node

from ringpass import ops
from ringpass.layouts.pooling import heads_text
from ringpass.layouts.reindex import of_curve_positions
from ringpass.masks.expr import TRUE, Expr, call
from ringpass.nodes import size_of
from ringpass.passes.op_rules.spec import GraphSize, Rank, Writer
from ringpass.passes.partition.placement_plan import PlacementPlan
from ringpass.passes.plan.plan import RingPlan, SitePlan
from ringpass.precision import accumulator
from ringpass.profiling import site_label
from ringpass.schedule.block_selection import TopBlocks, chosen_blocks
from ringpass.schedule.site import Site, register

aten = torch.ops.aten
Operands = tuple[tuple[Node, Node, Node], list[Any], int, list[Any]]
"""Queries, keys and values; leaves; the stream of dropout; the numbers of all queries and keys."""


class AttentionWriter(Writer, Protocol):
    """What writing an attention needs beside what op records do: `passes.partition.writer.Writer`."""

    plan: RingPlan

    @property
    def placement(self) -> PlacementPlan:
        """Where each node runs."""

    def broadcast(self, node: Node, reason: str) -> Any:
        """`node` replicated, for ops on an axis: its gradients are summed over ranks."""

    def host_copy(self, value: Node) -> Node:
        """`value` on the host: one copy for all sites that read it."""

    def ordered(self, replicated: Node, shard_args: tuple[Any, ...], inverse: bool) -> Node:
        """All tokens in the order of the layout's curve, or, inverse, back in their own."""


def write_site(writer: AttentionWriter, plan: SitePlan) -> Node:
    """Ring attention over the ranks; where the site is replicated, over this rank alone, which has all tokens."""
    site, problem, reason = plan.ordered, plan.problem, f"attention {plan.site.node.name}"
    assert problem is not None
    q = writer.sharded(site.q, plan.query_axis) if plan.query_axis else writer.replicated(site.q, reason)
    k, v = (_keys(writer, x, plan, reason) for x in (site.k, site.v))
    read = writer.broadcast if plan.sharded else writer.replicated
    leaves = [read(leaf, f"mask of {site.node.name}") for leaf in site.leaves]
    missing = 4 - site.q.meta["val"].ndim  # (B, S, D) has one head, (S, D) one batch too
    for _ in range(missing):
        q, k, v = (writer.emit(aten.unsqueeze.default, x, min(1, x.meta["val"].ndim - 2)) for x in (q, k, v))
    batch = q.meta["val"].shape[0]
    k, v = (
        writer.emit(aten.expand.default, x, [batch, -1, -1, -1]) if x.meta["val"].shape[0] != batch else x
        for x in (k, v)
    )
    names = problem.query_layout.name, problem.key_layout.name
    lengths = [writer.size(size_of(x.meta["val"].shape[-2])) for x in (site.q, site.k)]
    if not plan.sharded:  # sharded ones are in their order already
        sides = list(zip((q, k, v), (0, 1, 1), strict=True))
        q, k, v = (writer.ordered(x, (2, 1, lengths[i], names[i], 1, 0), inverse=False) for x, i in sides)
    if writer.plan.approximate:
        leaves.append(_choose_blocks(writer, writer.plan.approximate, plan, q, k, lengths))
    if plan.moves_queries:
        q = writer.emit(ops.gather, q, *_all_queries(writer, plan, lengths), name=f"{site.q.name}_of_ranks")
    pooled = _pooled(writer, plan, (q, k, v), lengths)
    operands = pooled, leaves, writer.next_stream() if site.dropout else 0, lengths
    call = _ring(writer, plan, *operands, name=f"ring_attention_{site.index}")
    out = _returned(writer, plan, writer.emit(operator.getitem, call, 0, name=site.node.name), lengths)
    if plan.keyless is not None:
        out = _with_keyless_rows(writer, plan, plan.keyless, call, out, (q, k, v), operands)
    if plan.moves_queries:
        out = writer.emit(ops.shard, out, *_all_queries(writer, plan, lengths), name=f"{site.node.name}_local")
    if not plan.sharded:
        out = writer.ordered(out, (2, 1, lengths[0], names[0], 1, 0), inverse=True)
    for _ in range(missing):
        out = writer.emit(aten.squeeze.dim, out, min(1, out.meta["val"].ndim - 3))
    return out


def _all_queries(writer: AttentionWriter, plan: SitePlan, lengths: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of `gather`, for the queries, and of `shard`, for what they give."""
    assert plan.query_axis is not None
    rank = writer.rank
    return 2, 1, lengths[0], plan.query_axis.layout.name, rank.world, rank.rank, rank.group


def _pooled(
    writer: AttentionWriter, plan: SitePlan, qkv: tuple[Node, Node, Node], lengths: Sequence[Any]
) -> tuple[Node, Node, Node]:
    """What the rank's share of the heads attends with: queries, and keys and values in one message."""
    if plan.degree == 1:
        return qkv
    q, k, v = qkv
    side = _pooling(writer, plan, lengths, 0, "queries"), _pooling(writer, plan, lengths, 1, "keys")
    queries = writer.emit(ops.pool_tokens, [q], *side[0], name=f"{plan.site.q.name}_pooled")
    keys = writer.emit(ops.pool_tokens, [k, v], *side[1], name=f"{plan.site.k.name}_pooled")
    found = (queries, 0), (keys, 0), (keys, 1)
    q, k, v = (writer.emit(operator.getitem, *x) for x in found)
    return q, k, v


def _returned(writer: AttentionWriter, plan: SitePlan, out: Node, lengths: Sequence[Any]) -> Node:
    """The rank's tokens of all heads, from what its share of the heads gave."""
    if plan.degree == 1:
        return out
    args = plan.site.heads[0], *_pooling(writer, plan, lengths, 0, "results")
    returned = writer.emit(ops.return_tokens, [out], *args, name=f"{out.name}_returned")
    return writer.emit(operator.getitem, returned, 0)


def _pooling(writer: AttentionWriter, plan: SitePlan, lengths: Sequence[Any], side: int, what: str) -> tuple[Any, ...]:
    """The arguments of `pool_tokens` after `what` is pooled: queries or results (side 0), keys and values (side 1)."""
    assert plan.problem is not None
    layout = (plan.problem.query_layout, plan.problem.key_layout)[side]
    heads = heads_text([(share.heads, share.key_heads)[side] for share in plan.shares])
    rank, label = writer.rank, f"{site_label(plan.site.index)} {what}"
    return heads, lengths[side], layout.name, rank.world, rank.rank, label, rank.group


def _with_keyless_rows(
    writer: AttentionWriter,
    plan: SitePlan,
    keyless: SitePlan,
    call: Node,
    out: Node,
    qkv: tuple[Node, Node, Node],
    operands: Operands,
) -> Node:
    """`out`, of the `call` of ring attention, with the rows that see no key as `keyless` says."""
    lengths = operands[-1]
    if keyless.problem is None:
        rows = _means(writer, keyless, *qkv, lengths[1])
    else:
        name = f"ring_attention_{plan.site.index}_keyless"
        rows = writer.emit(operator.getitem, _ring(writer, keyless, *operands, name=name), 0)
        rows = _returned(writer, plan, rows, lengths)
    lse = writer.emit(aten.unsqueeze.default, writer.emit(operator.getitem, call, 1), -1)
    empty = writer.emit(aten.eq.Scalar, _returned(writer, plan, lse, lengths), -math.inf)
    return writer.emit(aten.where.self, empty, rows, out)


def _means(writer: AttentionWriter, plan: SitePlan, q: Node, k: Node, v: Node, tokens: GraphSize) -> Node:
    """The mean of all values, for each query: attention under equal scores.

    Where these are scores that are lost in a fill, s = scale q . k has a gradient, ds[i, j] = g[i] . (v[j] - mean) / n.
    It is that of t = scale q M for M = sum over j of k[j] (v[j] - mean) / n, which adds t - t = 0 to the output.
    """
    site, dtype = plan.ordered, accumulator(q.meta["val"].dtype)
    q, k, v = (x if x.meta["val"].dtype == dtype else writer.emit(aten.to.dtype, x, dtype) for x in (q, k, v))

    def over_ranks(total: Node) -> Node:
        return writer.emit(ops.reduce, total, writer.rank.group) if plan.key_axis else total

    total = over_ranks(writer.emit(aten.sum.dim_IntList, v, [2], True))
    found = [writer.emit(aten.div.Tensor, total, tokens, name=f"{site.node.name}_mean")]
    if site.uniform == "added":
        apart = writer.emit(aten.detach.default, writer.emit(aten.sub.Tensor, v, found[0]))
        moments = writer.emit(aten.matmul.default, writer.emit(aten.transpose.int, k, -2, -1), apart)
        found.append(writer.emit(aten.div.Tensor, over_ranks(moments), tokens, name=f"{site.node.name}_moments"))
    if plan.key_axis and not plan.split:
        equal = writer.emit(ops.replicate, found, 0, writer.rank.rank, writer.rank.group)
        found = [writer.emit(operator.getitem, equal, i) for i in range(len(found))]
    repeats = site.heads[0] // site.heads[1]
    mean, *others = (writer.emit(aten.repeat_interleave.self_int, x, repeats, 1) if repeats > 1 else x for x in found)
    for moments in others:
        t = writer.emit(aten.mul.Tensor, writer.emit(aten.matmul.default, q, moments), site.scale)
        nothing = writer.emit(aten.sub.Tensor, t, writer.emit(aten.detach.default, t))
        mean = writer.emit(aten.add.Tensor, mean, nothing)
    values = site.v.meta["val"].dtype
    return mean if dtype == values else writer.emit(aten.to.dtype, mean, values)


def _ring(
    writer: AttentionWriter,
    plan: SitePlan,
    qkv: Sequence[Node],
    leaves: list[Any],
    stream: int,
    lengths: Any,
    name: str,
) -> Node:
    """[out, log-sum-exp] of the queries over all keys; all with batch and heads."""
    site, problem, pruning, leaves = plan.ordered, plan.problem, plan.pruning, [*leaves]
    assert problem is not None
    rank = _rank_of(writer, plan)
    if writer.plan.approximate:
        problem = replace(problem, mask=str(_chosen(writer, plan, len(leaves) - 1)))
        pruning = *pruning, len(leaves) - 1
    leaves += [writer.host_copy(leaves[i]) for i in pruning]
    share = plan.share(rank.rank)
    bias, score, sink = ("" if x is None else share.text(str(x)) for x in (site.bias, site.score, site.sink))
    planned = Site(
        share.problem(problem), rank.rank, rank.group, site.scale, site.dropout, stream, bias, score, sink, plan.comm,
        plan.dilation, site.heads[0], share.heads if plan.degree > 1 else None, plan.learned, pruning,
        writer.plan.prove,
    )  # fmt: skip
    seed = writer.seed if site.dropout else None
    args = *qkv, leaves, seed, register(planned), *lengths, site.index, rank.group
    return writer.emit(ops.ring_attention, *args, name=name)


def _rank_of(writer: AttentionWriter, plan: SitePlan) -> Rank:
    """This rank, or, where every rank computes the site alone, the only one."""
    assert plan.problem is not None
    return replace(writer.rank, rank=writer.rank.rank if plan.sharded else 0, world=plan.problem.world)


def _keys(writer: AttentionWriter, x: Node, plan: SitePlan, reason: str) -> Any:
    if plan.key_axis:
        return writer.sharded(x, plan.key_axis)
    return writer.broadcast(x, reason) if plan.query_axis else writer.replicated(x, reason)


def _choose_blocks(writer: AttentionWriter, how: TopBlocks, plan: SitePlan, q: Node, k: Node, lengths: Any) -> Node:
    """The pairs of blocks that attend, the same on every rank: blocks of tokens, or of curve positions."""
    assert plan.problem is not None
    rank = _rank_of(writer, plan)
    layouts = plan.problem.query_layout, plan.problem.key_layout
    names = [layout.assignment if writer.plan.along_curve else layout.name for layout in layouts]
    site = plan.ordered if writer.plan.along_curve else plan.site
    means = []
    for side, x, tokens, layout in zip("qk", (q, k), lengths, names, strict=True):
        where = 2, 1, tokens, layout, rank.world, rank.rank, rank.group
        detached = writer.emit(aten.detach.default, x)
        means.append(writer.emit(ops.block_means, detached, how.block, *where, name=f"block_means_{side}"))
    about = site.scale, str(site.mask), *lengths, how.block, how.density, how.mass
    return writer.emit(ops.choose_blocks, *means, *about, name=f"chosen_blocks_{site.index}")


def _chosen(writer: AttentionWriter, plan: SitePlan, leaf: int) -> Expr:
    """The mask of a site, restricted to the pairs of blocks that leaf number `leaf` keeps."""
    assert plan.problem is not None and writer.plan.approximate is not None
    chosen = chosen_blocks(TRUE, leaf, writer.plan.approximate)
    if not writer.plan.along_curve:
        layouts = (("q", plan.problem.query_layout), ("k", plan.problem.key_layout))
        chosen = of_curve_positions(chosen, {name: layout.order for name, layout in layouts if layout.order})
    return call("and", plan.ordered.mask, chosen)
