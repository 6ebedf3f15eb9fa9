"""flex: a call of FlexAttention -> its site, with what it does to the scaled scores as expressions.

In the captured graph a call is one node of the higher-order operator `flex_attention`, whose `score_mod` and `mask_mod`
are bodies: graphs over the scalars (score,) b, h, q, k and the tensors that the functions capture.  Its block mask is
two lists of key blocks per row of query blocks, those where mask_mod decides and those that are wholly visible:

    mask  = partial[b, h, q // BQ, k // BK] & mask_mod(b, h, q, k) | full[b, h, q // BQ, k // BK]
    score = score_mod(q @ k * scale, b, h, q, k)

`partial` and `full` are boolean tables of blocks, written into the graph before the call from its lists.  One
block over both lengths, which a call without a block mask has too, says nothing that mask_mod does not.  Of score_mod,
`where(c, .., -inf)` goes to the mask, `score + f(b, h, q, k)` is a bias, and the rest stays a function of the score.

Contract: exact, or the reason why the call is unsupported, in words.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE

from ringpass.masks.expr import FALSE, SCORE, TRUE, B, Const, Expr, H, K, Q, call
from ringpass.masks.from_graph import Puller, numbered
from ringpass.masks.scores import Scores, rows_with_keys, separated
from ringpass.nodes import Size, args_of, first_of, insert_before, traced
from ringpass.passes.detect.site import AttentionSite
from ringpass.precision import accumulator

FLEX = torch.ops.higher_order.flex_attention
OTHERS = {1: "log-sum-exp", 2: "maximum"}  # results beside the attention's output


@dataclass(frozen=True)
class Functions:
    """What a call does to its scaled scores."""

    scores: Scores
    leaves: tuple[Node, ...]
    block_sparse: bool  # whether the mask reads lists of blocks


def read(index: int, node: Node) -> AttentionSite | None:
    """Site number `index`, if `node` is the output of such a call; else None.  Writes block tables before the call."""
    if node.target is not operator.getitem or first_of(node).target is not FLEX or node.args[1] != 0:
        return None
    q, k, v, *_, scale, _, _, _ = args_of(first_of(node))
    found = _scores(first_of(node))
    if isinstance(found, str):
        number = math.nan if isinstance(scale, Node) else scale
        return AttentionSite(index, node, q, k, v, TRUE, None, (), number, 0.0, unsupported=found)
    known = found.scores.mask, found.scores.bias, found.leaves, scale, 0.0, found.scores.score
    site = AttentionSite(index, node, q, k, v, *known, found.scores.unsupported, block_sparse=found.block_sparse)
    return site.with_keyless(found.scores.keyless)


def _scores(node: Node) -> Functions | str:
    """What the call `node` does to its scores, or why that cannot be said."""
    q, _, _, score_mod, block_mask, scale, _, score_buffers, mask_buffers = args_of(node)
    if isinstance(scale, Node):
        return f"its scale is computed in the graph ({scale.name})"
    if also := [name for n in node.users if n.users for i, name in OTHERS.items() if args_of(n)[1] == i]:
        return f"its {' and its '.join(also)} is read"
    puller, dtype = Puller(), accumulator(q.meta["val"].dtype)
    at = B, H, Q, K
    score = _body(puller, node, score_mod, {SCORE: dtype} | dict.fromkeys(at, torch.int64), score_buffers)
    allowed = _body(puller, node, block_mask[-1], dict.fromkeys(at, torch.int64), mask_buffers)
    if inside := [leaf for leaf in puller.leaves if leaf.graph is not node.graph]:
        return f"its score_mod or mask_mod is not elementwise, or uses ops that are not known: {_named(inside)}"
    blocks = _blocks(puller, node, allowed)
    if blocks is None:
        return "its block mask has a symbolic length, and lists of another"
    rows = rows_with_keys(*(x.meta["val"].shape[-2] for x in args_of(node)[:2]))
    scores = separated(score, dtype == q.meta["val"].dtype, dtype, rows, within=blocks)
    return Functions(*numbered(puller, scores), block_sparse=blocks != allowed)


def _named(nodes: Sequence[Node]) -> str:
    return ", ".join(dict.fromkeys(str(n.target) for n in nodes))


# --- bodies -----------------------------------------------------------------------------------------------------------


def _body(puller: Puller, node: Node, holder: Node, indices: dict[Any, torch.dtype], buffers: Sequence[Any]) -> Expr:
    """The expression of a body of the call `node`, over `indices` and the captured `buffers`."""
    gm: Any = node.graph.owning_module
    body = _traced(getattr(gm, str(holder.target)), node.args[0].meta["val"], [*indices.values()], buffers)  # type: ignore[union-attr]
    places = body.graph.find_nodes(op="placeholder")
    for place, index in zip(places, indices, strict=False):
        puller.known[place, ()] = index
    puller.bound.update(zip(places[len(indices) :], buffers, strict=True))
    return puller.element(body.graph.output_node().args[0], ())


def _traced(body: GraphModule, q: Any, dtypes: Sequence[torch.dtype], buffers: Sequence[Any]) -> GraphModule:
    """A body as plain ATen on scalars; indexing by scalars loads elements, as FlexAttention defines it."""
    values = [b.meta["val"] if isinstance(b, Node) else b for b in buffers]
    values = [int(v) if isinstance(v, torch.SymInt) else v for v in values]
    with q.fake_mode, torch.no_grad(), TransformGetItemToIndex():
        scalars = [torch.zeros((), dtype=dtype, device=q.device) for dtype in dtypes]
        return make_fx(body)(*scalars, *values)


# --- block masks ------------------------------------------------------------------------------------------------------


def _blocks(puller: Puller, node: Node, allowed: Expr) -> Expr | None:
    """The mask of a call whose mask_mod is `allowed`; None where a length is symbolic."""
    block_mask: Any = node.args[4]
    partial, full, sizes = block_mask[2:4], block_mask[4:6], block_mask[-3:-1]
    lengths = [x.meta["val"].shape[-2] for x in args_of(node)[:2]]
    if all(size == _LARGE_SPARSE_BLOCK_SIZE for size in sizes):
        return allowed
    fixed = all(type(n) is int for n in (*lengths, *sizes))
    if fixed and all(size >= length for size, length in zip(sizes, lengths, strict=True)):
        return allowed
    if not fixed and not all(_covers(columns, lengths[1], sizes[1]) for _, columns in (partial, full) if columns):
        return None
    parts = [_in_block_list(puller, node, lists, sizes) if lists[0] is not None else FALSE for lists in (partial, full)]
    return call("or", call("and", parts[0], allowed), parts[1])


def _in_block_list(puller: Puller, node: Node, lists: Sequence[Node], sizes: Sequence[int]) -> Expr:
    """Whether the block of (q, k) is in one of the call's lists."""
    q, k = (x.meta["val"].shape for x in args_of(node)[:2])
    width = -(-k[-2] // sizes[1]) if type(k[-2]) is int else None
    table = insert_before(node, traced(lambda counts, columns: block_table(counts, columns, width), lists), lists)
    lead = [
        index if n in (1, full) else call("mod", index, Const(n))
        for index, n, full in zip((B, H), table.meta["val"].shape, q, strict=False)
    ]
    row, column = (call("floordiv", at, Const(size)) for at, size in zip((Q, K), sizes, strict=True))
    return puller.leaf(table, puller.clip(table, (*lead, row, column)))


def _covers(columns: Node, keys: Size, size: int) -> bool:
    """Whether a call's lists have room for every block of `keys`: true of what `create_block_mask` makes.

    Of symbolic lengths it becomes a guard.
    """
    room = columns.meta["val"].shape[-1]
    return type(size) is int and bool(guard_or_false(room * size >= keys))


def block_table(counts: Tensor, columns: Tensor, width: int | None) -> Tensor:
    """(B, H, R, `width`) of bools: whether a row of blocks lists a column, among the first counts[row] of columns[row].

    `counts`: (B, H, R); `columns`: (B, H, R, C).  `width` None: C.

    >>> block_table(torch.tensor([[[1, 2]]]), torch.tensor([[[[2, 0], [0, 1]]]]), 3)
    tensor([[[[False, False,  True],
              [ True,  True, False]]]])
    """
    listed = torch.arange(columns.shape[-1], device=columns.device) < counts.unsqueeze(-1)
    width = columns.shape[-1] if width is None else width
    at = torch.where(listed, columns, width).long()
    table = torch.zeros((*counts.shape, width + 1), dtype=torch.bool, device=counts.device)
    return table.scatter(-1, at, True)[..., :width]
