"""Expert routing: pairs of (token, expert) that are sorted by expert, multiplied in groups, and put back in order.

    ids, order = sort(experts)                         rows: the pairs in an order that each rank has of its own
    rows = x[order // k]                               k experts per token
    rows = grouped_mm(rows, weights, cumsum(histc(ids)))
    back[order] = arange(n)
    y = rows[back]                                     the pairs again, in their first order

Each row depends on its own pair alone, so on shards of the pairs this gives shards of y, whatever the order of rows.
Rows are a factor of their own; `order`, `back` and the counts of each expert are numbers that mean something on their
rank only, and `closed` proves that nothing else reads them: then rows are local where the pairs are.

Contract: rows that are not closed are no axis, and the sort needs all pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from ringpass.nodes import args_of, first_of, op_name, operands_of, tags_of
from ringpass.passes.op_rules.spec import OpRule, Placed, Writer
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Dims, Factor, Factors, Note, Sweep, product

aten = torch.ops.aten
SORT, COUNT, BACK, INDEX = aten.sort.default, aten.histc.default, aten.index_put.default, aten.index.Tensor
GROUPED = ("_grouped_mm.default", "transformers.grouped_mm_fallback.default")
READERS_OF_ORDER = (aten.floor_divide.default, aten.empty_like.default, BACK, INDEX)


def _sort(sweep: Sweep, node: Node, note: Note) -> tuple[Dims, ...]:
    """Values and indices: rows, if there is one dim; else as the operand, whose sorted dim is needed replicated."""
    dims, routing = sweep.dims(first_of(node)), sweep.routing
    if len(dims) == 1 and len(args_of(node)) < 3:
        rows = Factor(product(dims[0]))
        routing.pairs[rows] = dims[0]
        for user in node.users:
            if args_of(user)[1] == 1:
                routing.order[user] = rows, 1
        return ((rows,),), ((rows,),)
    named: dict[str, Any] = dict(node.kwargs)
    along = args_of(node)[1] if len(args_of(node)) > 1 else named.get("dim", -1)
    note.need_replication += dims[along]
    return dims, dims


def divided(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """The dims of order // k, the token of each row.  None: another division."""
    x, k = args_of(node)
    if x not in sweep.routing.order or not isinstance(k, int):
        return None
    rows, by = sweep.routing.order[x]
    sweep.routing.order[node] = rows, by * k
    return ((rows,),)


def picked(sweep: Sweep, source: Node, pick: Node) -> Dims | None:
    """The dims of x[order // k], of tokens, or of rows[back].  None: another index."""
    routing, dims = sweep.routing, sweep.dims(source)
    if pick in routing.order:
        rows, k = routing.order[pick]
        if _without(sweep.resolve(routing.pairs[rows]), k) == dims[0]:
            return ((rows,), *dims[1:])
    if pick in routing.back and dims[0] == (routing.back[pick],):
        return (sweep.resolve(routing.pairs[routing.back[pick]]), *dims[1:])
    return None


def _put_back(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """back[order] = arange(n).  None: another write."""
    given: list[Any] = [*args_of(node), False]
    _, at, values, accumulate, *_ = given
    counted = isinstance(values, Node) and values.target is aten.arange.default and len(values.args) == 1
    if len(at) != 1 or at[0] not in sweep.routing.order or accumulate or not counted:
        return None
    rows, k = sweep.routing.order[at[0]]
    if k != 1:
        return None
    sweep.routing.back[node] = rows
    return (sweep.resolve(sweep.routing.pairs[rows]),)


def _count(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """histc: how many rows each expert has.  None: of other tensors."""
    dims = sweep.dims(first_of(node))
    if len(dims) != 1 or len(dims[0]) != 1 or dims[0][0] not in sweep.routing.pairs:
        return None
    sweep.routing.counts[node] = dims[0][0]
    return sweep.fresh(node.meta["val"].shape)


def counts_too(sweep: Sweep, node: Node) -> None:
    """Notes that `node`, made of the counts alone, is counts too."""
    (source,) = operands_of(node)
    if source in sweep.routing.counts:
        sweep.routing.counts[node] = sweep.routing.counts[source]


def _grouped(sweep: Sweep, node: Node, note: Note) -> Dims | None:
    """Rows times the matrix of their expert.  None: not of rows."""
    named: dict[str, Any] = {**dict(zip(("x", "weights", "offs"), node.args, strict=False)), **node.kwargs}
    x, weights = sweep.dims(named["x"]), sweep.dims(named["weights"])
    rows = sweep.routing.counts.get(named["offs"]) if "offs" in named else None
    if len(x) != 2 or len(weights) != 3 or x[0] != (rows,) or len(named) > 3:
        return None
    sweep.tie(x[1], weights[1], note)
    return (x[0], weights[2])


def closed(sweep: Sweep, rows: Factor, nodes: Iterable[Node]) -> bool:
    """Whether no node reads `rows`, or what is known of them, in another way than the module says."""
    return all(_reads_well(sweep, rows, node) for node in nodes)


def _reads_well(sweep: Sweep, rows: Factor, node: Node) -> bool:
    routing, note = sweep.routing, sweep.notes[node]
    operands = operands_of(node)
    if node.target is SORT or not any(_of(sweep, rows, n) for n in operands):
        return True
    random = torch.Tag.nondeterministic_seeded in tags_of(node)
    mixed = rows in sweep.resolve([*note.need_replication, *note.reduction])
    if node.op == "output" or random or mixed or not note.known:
        return False
    if any(n in routing.order for n in operands):
        put = node in routing.back or node in routing.order or node.target is aten.empty_like.default
        return node.target in READERS_OF_ORDER and (put or _picks(sweep, node))
    if any(n in routing.back for n in operands):
        return _picks(sweep, node)
    if any(n in routing.counts for n in operands):
        return node in routing.counts or op_name(node) in GROUPED
    return True


def _picks(sweep: Sweep, node: Node) -> bool:
    """Whether `node` is x[order] or rows[back], and reads them as its index alone."""
    if node.target is not INDEX:
        return False
    source, picks = args_of(node)[:2]
    return len(picks) == 1 and source is not picks[0] and picked(sweep, source, picks[0]) is not None


def _of(sweep: Sweep, rows: Factor, node: Node) -> bool:
    """Whether `node` holds rows, or what is known of them."""
    routing = sweep.routing
    known = routing.order.get(node, (None,))[0] is rows or routing.back.get(node) is rows
    return known or routing.counts.get(node) is rows or any(rows in d for d in sweep.operand_dims(node))


def _without(factors: Factors, k: int) -> Factors:
    """`factors` without the last ones, which make k."""
    size, rest = 1, list(factors)
    while rest and size < k:
        size = size * rest.pop().size
    return tuple(rest) if size == k else ()


# --- writing ----------------------------------------------------------------------------------------------------------


def _order_is_local(placement: Placed, node: Node) -> bool:
    """Whether the rows that a sort makes are an order that each rank has of its own."""
    sweep = placement.sweep
    rows = [f for d in sweep.operand_dims(node) for f in d if f in sweep.routing.pairs]
    return all(placement.is_axis(f) for f in rows)


def _write_put_back(writer: Writer, node: Node, axis: Axis) -> Node:
    """back[order] = arange(the number of local rows)."""
    args, kwargs = writer.operands(node, axis, f"operand of {op_name(node)}")
    if node in writer.placement.sweep.routing.back:
        rows = writer.local_shape(node, axis)[0]
        args = *args[:2], writer.emit(aten.arange.default, rows, device=node.meta["val"].device)
    return writer.copy(node, args, kwargs)


RULES = {
    "sort.default": OpRule(_sort, may_shard=_order_is_local),
    "histc.default": OpRule(_count),
    "index_put.default": OpRule(_put_back, write=_write_put_back),
    **dict.fromkeys(GROUPED, OpRule(_grouped)),
}
