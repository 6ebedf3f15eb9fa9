"""traffic: the bytes that one rank receives, node by node of its lowered graphs.

    for move in moves(graph): print(move.kind, move.bytes)

`bytes` of an exchange, a gather or an all-to-all: what arrives from other ranks.  Of a sum over ranks (`SUMS`): the
message that is summed, whatever way the process group takes.  Each rule reads the arguments of its op, as the op's body
does; `tests/explain/test_traffic.py` counts the same on ranks.

Contract: every op of the package that talks to other ranks has a rule; an op without one is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from ringpass import ops
from ringpass.comm.all_reduce import by_sum_dtype
from ringpass.comm.collectives import HaloRanges, Shard
from ringpass.comm.pooling import contents
from ringpass.layouts.pooling import Pooling
from ringpass.layouts.ranges import size
from ringpass.layouts.redistribution import among, between
from ringpass.nodes import hint_of
from ringpass.ops import gradient_sums, pooling, primitives
from ringpass.ops.attention import INDEX, site_of
from ringpass.ops.pooling import message_dtype
from ringpass.ops.transports.table import make_transport
from ringpass.passes.lower.lower import OF_SITE, SITE
from ringpass.precision import accumulator
from ringpass.schedule.site import Site

ATTENTION, HEADS = "attention", "all-to-all of heads"
SUMS = ("reduce", "parameter sum", "reduce-scatter", "block means")
"""Kinds whose bytes are those of the message that is summed."""


@dataclass(frozen=True)
class Move:
    """What one node receives: the kind of boundary, `ATTENTION` for K, V and their gradients, and the bytes.

    `site`: the number of the attention to which it belongs; None: to none.
    """

    node: Node
    kind: str
    bytes: int
    site: int | None = None


Rule = Callable[[list[Any]], int]
"""The arguments of an op, fake tensors for tensors -> bytes."""


def moves(graph: Graph, rank: int) -> Iterator[Move]:
    """What the nodes of a lowered graph receive on `rank`, in graph order; those that receive nothing are left out."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is pooling.start_all_to_all:
            kind, received = HEADS, _start_all_to_all(_values(node), rank)
        elif node.target in RULES:
            kind, rule = RULES[node.target]
            received = rule(_values(node))
        else:
            continue
        if received:
            site = site_number(node)
            yield Move(node, kind if site is None else ATTENTION, received, site)


def site_number(node: Node) -> int | None:
    """The number of the attention that a node of a lowered graph belongs to."""
    found: Any = node.args[SITE[node.target] + INDEX] if node.target in SITE else node.meta.get(OF_SITE)
    return None if found is None else int(found)


def _values(node: Node) -> list[Any]:
    """The arguments of a node by position, with values for nodes; those that go by name alone are left out."""
    schema = [a for a in node.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]
    given = [*node.args, *(node.kwargs[a.name] for a in schema[len(node.args) :] if a.name in node.kwargs)]
    return [_value(x) for x in given]


def _value(x: Any) -> Any:
    if isinstance(x, Node):
        return x.meta["val"]
    return [_value(y) for y in x] if isinstance(x, list | tuple) else x


def _bytes(x: Tensor) -> int:
    return hint_of(x.numel()) * x.element_size()


# --- rules ------------------------------------------------------------------------------------------------------------


def _row_bytes(x: Tensor, shard: Shard, tokens: Any) -> int:
    """Bytes of one token of `x`, which has `tokens` tokens in the dim of `shard`."""
    count = hint_of(tokens)
    if not count:
        other = math.prod(hint_of(n) for i, n in enumerate(x.shape) if i != shard.dim)
        return hint_of(shard.outer) * other * x.element_size()
    return _bytes(x) // count


def _lengths(shard: Shard) -> list[int]:
    return [size(shard.layout.ranges(rank, hint_of(shard.tokens))) for rank in range(shard.world)]


def _gather(given: list[Any]) -> int:
    x, *where, _ = given
    shard = Shard(*where)
    return (shard.world - 1) * max(_lengths(shard)) * _row_bytes(x, shard, shard.length)


def _reduce_scatter(given: list[Any]) -> int:
    x, *where, _ = given
    shard = Shard(*where)
    return shard.world * max(_lengths(shard)) * _row_bytes(x, shard, shard.tokens)


def _redistribute(given: list[Any]) -> int:
    x, dim, outer, tokens, layout, other, world, rank, _ = given
    shard = Shard(dim, outer, tokens, layout, world, rank)
    plan = between(layout, other, world, hint_of(tokens), rank)
    return sum(plan.received) * _row_bytes(x, shard, shard.length)


def _all_to_all(given: list[Any]) -> int:
    x, dim, outer, tokens, layout, to_dim, to_outer, to_tokens, to_layout, world, rank, _ = given
    held = Shard(dim, outer, tokens, layout, world, rank)
    wanted = Shard(to_dim, to_outer, to_tokens, to_layout, world, rank)
    others = sum(n for r, n in enumerate(_lengths(held)) if r != rank)
    each = _row_bytes(x, held, held.length) * hint_of(wanted.length)
    return others * each // hint_of(wanted.tokens)


def _halo(given: list[Any]) -> int:
    x, *where, _, left, right, _ = given
    shard = Shard(*where)
    each = hint_of(x.shape[shard.dim]) // hint_of(shard.length)
    ranges = HaloRanges(shard, each, left, right)
    plan = among(tuple(ranges.held), tuple(ranges.wanted), shard.rank)
    return sum(plan.received) * (_row_bytes(x, shard, shard.length) // each)


def _halo_backward(given: list[Any]) -> int:
    grad, *where, each, left, right, _ = given
    shard = Shard(*where)
    ranges = HaloRanges(shard, each, left, right)
    plan = among(tuple(ranges.held), tuple(ranges.wanted), shard.rank)
    row = hint_of(grad.numel()) // hint_of(grad.shape[shard.dim])
    return sum(plan.sent) * row * accumulator(grad.dtype).itemsize


def _sum(xs: list[Tensor]) -> int:
    """The messages of a sum of several tensors: one for each dtype in which they are added."""
    found = by_sum_dtype([x.dtype for x in xs])
    counts = {dtype: sum(hint_of(xs[i].numel()) * (1 + xs[i].is_complex()) for i in of) for dtype, of in found.items()}
    return sum(n * dtype.itemsize for dtype, n in counts.items())


def _block_means(given: list[Any]) -> int:
    x, block, *where, _ = given
    shard = Shard(*where)
    if shard.layout.replicated or shard.world == 1:
        return 0
    blocks = -(-hint_of(shard.tokens) // block)
    elements = math.prod(map(hint_of, x.shape[:2])) * blocks * hint_of(x.shape[3])
    return int(elements * accumulator(x.dtype).itemsize)


def _of_other_ranks(elements: int, itemsize: int, world: int) -> int:
    return int((world - 1) * elements * itemsize)


def _extremum(given: list[Any]) -> int:
    x, dims, _, _, world, *_ = given
    kept = math.prod(hint_of(n) for d, n in enumerate(x.shape) if d not in dims)
    return _of_other_ranks(kept, x.element_size(), int(world))


def _first_extremum(given: list[Any]) -> int:
    x, _, dim, _, _, _, world, *_ = given
    kept = math.prod(hint_of(n) for d, n in enumerate(x.shape) if d != dim)
    return _of_other_ranks(kept, x.element_size() + 8, world)


def _merge_ranks(given: list[Any]) -> int:
    out, lse, world, *_ = given
    return _of_other_ranks(hint_of(out.numel()) + hint_of(lse.numel()), out.element_size(), world)


def _pooled(given: list[Any], back: bool) -> int:
    xs, *about, _, _ = given  # the label and the group
    how = Pooling(*about[back:])
    received, _ = contents(xs).splits(how, back) if not how.layout.replicated else ([0] * how.world, [])
    return (sum(received) - received[how.rank]) * message_dtype(xs[0].dtype, how, back).itemsize


def _start_all_to_all(given: list[Any], rank: int) -> int:
    (message,), received, *_ = given
    return int((sum(received) - received[rank]) * message.element_size())


def _attention(site: Site, k: Tensor, v: Tensor, backward: bool) -> int:
    return make_transport(site, k, v).received_bytes(backward)


def _ring_attention(given: list[Any]) -> int:
    q, k, v, _, *about = given
    site = site_of(about)[1]
    found = _attention(site, k, v, backward=False)
    if site.split:
        wide = accumulator(q.dtype).itemsize
        rows = hint_of(q.numel()) // hint_of(q.shape[3])
        found += _of_other_ranks(rows * (hint_of(v.shape[3]) + 1), wide, site.world)
    return found


def _ring_attention_backward(given: list[Any]) -> int:
    _, q, k, v, _, _, _, *about = given
    site = site_of(about)[1]
    found = _attention(site, k, v, backward=True)
    wide = accumulator(q.dtype).itemsize
    if site.comm == "allgather" and site.world > 1 and not site.split and not site.problem.key_layout.replicated:
        longest = max(site.problem.key_layout.length(r, site.problem.keys) for r in range(site.world))
        found += site.world * longest * primitives.token_size((k, v)) * wide
    return found + (hint_of(q.numel()) * wide if site.split else 0)


RULES: Mapping[Any, tuple[str, Rule]] = {
    ops.shard: ("shard", lambda given: 0),
    ops.gather: ("gather", _gather),
    ops.reduce_scatter: ("reduce-scatter", _reduce_scatter),
    ops.redistribute: ("redistribute", _redistribute),
    ops.all_to_all: ("all-to-all", _all_to_all),
    ops.halo: ("halo", _halo),
    ops.halo_backward: ("halo", _halo_backward),
    ops.reduce: ("reduce", lambda given: _sum([given[0]])),
    ops.reduce_list: ("parameter sum", lambda given: _sum(given[0])),
    gradient_sums.start_sum: (
        "parameter sum",
        lambda given: sum(hint_of(x.numel()) * (1 + x.is_complex()) for x in given[0]) * given[2].itemsize,
    ),
    ops.replicate: ("replicate", lambda given: 0),
    ops.block_means: ("block means", _block_means),
    ops.extremum: ("extremum", _extremum),
    ops.first_extremum: ("extremum", _first_extremum),
    ops.send_states: ("state", lambda given: 0),
    ops.receive_states: ("state", lambda given: math.prod(given[1]) * given[2].itemsize),
    ops.merge_ranks: ("merge of ranks", _merge_ranks),
    ops.pool_tokens: (HEADS, lambda given: _pooled(given, back=False)),
    ops.return_tokens: (HEADS, lambda given: _pooled(given, back=True)),
    primitives.exchange: (ATTENTION, lambda given: given[1] * given[2].itemsize),
    primitives.start_gather: (ATTENTION, lambda given: (given[1] - 1) * _bytes(given[0][0])),
    ops.ring_attention: (ATTENTION, _ring_attention),
    ops.ring_attention_backward: (ATTENTION, _ring_attention_backward),
}
"""For each op that talks to other ranks, the kind of boundary, and the bytes by its arguments."""
