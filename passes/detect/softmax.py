"""softmax: an attention that a model writes out -> its site.

    scores = matmul(q, k^T)                      matmul, bmm, baddbmm
    scores = f(scores)                           any elementwise function: scale, mask, bias, tanh
    scores = cat([scores, sink], -1)             maybe: one score more for each row, of which no value comes
    probabilities = softmax(scores, -1)          views and changes of dtype may stand anywhere between
    probabilities = probabilities[..., :-1]      where there is a sink
    out = matmul(dropout(probabilities), v)      the site's node

f is read like the functions of FlexAttention: an element of the softmax's operand is rewritten to an expression in
which the product of query and key is `score`; a factor goes to the site's scale, conditions to its mask, what is added
to its bias, and the rest stays a function of the score.

Contract: `out` of the site equals `out` of the model.  The probabilities themselves, where the model returns them, are
computed as written, from gathered queries and keys.  What is not of this form is left as it is (None).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ringpass.masks.expr import SCORE, TRUE, Call, Const, Expr, K, Q, call, cast_dtype
from ringpass.masks.from_graph import COORDINATES, Puller, numbered, regrouped
from ringpass.masks.operators import DTYPES
from ringpass.masks.rewrite import substitute
from ringpass.masks.scores import rows_with_keys, scored, separated
from ringpass.nodes import args_of
from ringpass.passes.detect.site import AttentionSite

aten = torch.ops.aten
PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
"""Ops that multiply queries and keys, or probabilities and values, and the positions of their factors."""
SOFTMAX = (aten.softmax.int, aten._softmax.default)
RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.type_as.default, aten._to_copy.default, aten.to.other)
SAME = (aten.contiguous.default, aten.clone.default, aten.alias.default, *CASTS)


def read(index: int, node: Node) -> AttentionSite | None:
    """Site number `index`, if `node` is the output of such an attention; else None.

    May write a transpose before the scores.
    """
    if node.target not in (aten.matmul.default, aten.bmm.default):
        return None
    probabilities, v = args_of(node)
    softmax, dropout, cut_off = _softmax_of(probabilities)
    if softmax is None:
        return None
    operand, sink = _without_sink(args_of(softmax)[0]) if cut_off else (args_of(softmax)[0], None)
    scores = _scores_of(operand)
    if scores is None or not _fits(node, operand, scores, v):
        return None
    if dropout and _others_read(softmax, node):
        return None  # the probabilities that the model returns share their dropout mask with those that it uses
    puller, expr, beside = _element(operand, scores, sink)
    function = _without_casts(expr)
    if not scored(function) or (beside is not None and scored(beside)):
        return None
    scale, function = _scaled(_unshifted(function))
    product = scores.meta["val"]
    found = separated(function, True, product.dtype, rows_with_keys(*product.shape[-2:]))
    if beside is not None:
        found = replace(found, sink=beside, keyless=None)  # beside a sink, a row of fills gives 0
    found, leaves = numbered(puller, found)
    if any(_rests_on(leaf, scores) for leaf in leaves):
        return None
    q, k = (args_of(scores)[i] for i in PRODUCTS[scores.target])
    k = _transposed(k, scores)
    known = found.mask, found.bias, leaves, scale, dropout, found.score, found.unsupported
    site = AttentionSite(index, node, q, k, v, *known, handwritten=True, sink=found.sink)
    return site.with_keyless(found.keyless)


# --- the pieces -------------------------------------------------------------------------------------------------------


def _softmax_of(node: Node) -> tuple[Node | None, float, bool]:
    """The softmax over the last dim that `node` is, but for views, casts and dropout; the dropout's rate; and whether
    the last column of the softmax is cut off.
    """
    rate, cut_off = 0.0, False
    while isinstance(node, Node) and node.op == "call_function":
        if node.target in SOFTMAX:
            last = args_of(node)[1] in (-1, node.meta["val"].ndim - 1)
            return (node if last else None), rate, cut_off
        if node.target is aten.dropout.default:
            _, p, train = args_of(node)
            if train and (rate or not isinstance(p, float | int)):
                break
            rate = float(p) if train else rate
        elif node.target is aten.slice.Tensor:
            if cut_off or not _cuts_one_off(node):
                break
            cut_off = True
        elif node.target not in (*SAME, *RESHAPES):
            break
        node = args_of(node)[0]
    return None, 0.0, False


def _cuts_one_off(node: Node) -> bool:
    """Whether a slice is `x[..., :-1]`."""
    x, dim, start, _, *step = args_of(node)
    before, after = x.meta["val"].shape, node.meta["val"].shape
    last = dim % len(before) == len(before) - 1
    return bool(last and start in (0, None) and step in ([], [1]) and after[-1] == before[-1] - 1)


def _without_sink(node: Any) -> tuple[Any, Node | None]:
    """(scores, sink) of what is `cat([scores, sink], -1)`, but for what is the same in all of a row, as its maximum."""
    while isinstance(node, Node) and node.target in (*SAME, aten.sub.Tensor):
        if node.target is aten.sub.Tensor and not (_is_column(node.args[1]) and node.kwargs.get("alpha", 1) == 1):
            return None, None
        node = args_of(node)[0]
    if not isinstance(node, Node) or node.target is not aten.cat.default:
        return None, None
    parts, dim = args_of(node)
    last = dim in (-1, node.meta["val"].ndim - 1)
    return tuple(parts) if last and len(parts) == 2 and _is_column(parts[1]) else (None, None)


def _is_column(x: Any) -> bool:
    """Whether `x` is a node of a tensor (.., 1)."""
    return isinstance(x, Node) and x.meta["val"].ndim > 1 and x.meta["val"].shape[-1] == 1


def _scores_of(node: Any) -> Node | None:
    """The one product of queries and keys under `node`, through elementwise ops on tensors of its size."""
    if not isinstance(node, Node):
        return None
    size = node.meta["val"].numel()
    found: dict[Node, None] = {}
    stack, met = [node], set[Node]()
    while stack:
        node = stack.pop()
        if node in met or not _is_size(node, size):
            continue
        met.add(node)
        if node.target in PRODUCTS:
            found[node] = None
        elif node.op == "call_function":
            stack += node.all_input_nodes
    return next(iter(found)) if len(found) == 1 else None


def _is_size(node: Node, size: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and bool(value.numel() == size)


def _fits(node: Node, operand: Node, scores: Node, v: Any) -> bool:
    """Whether shapes and dtypes are those of an attention: out (.., Sq, Dv), scores (.., Sq, Sk), v (.., Sk, Dv)."""
    if not isinstance(v, Node):
        return False
    q, k = (args_of(scores)[i].meta["val"] for i in PRODUCTS[scores.target])
    out, product, values, soft = node.meta["val"], scores.meta["val"], v.meta["val"], operand.meta["val"]
    one_rank = q.ndim == k.ndim == values.ndim == product.ndim == out.ndim and out.ndim in COORDINATES
    same_ends = one_rank and soft.shape[-2:] == product.shape[-2:] and out.shape[-2] == product.shape[-2]
    return bool(
        same_ends
        and q.dtype == k.dtype == values.dtype == out.dtype
        and q.shape[:-2] == product.shape[:-2] == out.shape[:-2]
        and values.shape[-2] == product.shape[-1]
    )


def _others_read(softmax: Node, node: Node) -> bool:
    """Whether anything but `node` reads the probabilities."""
    chain = {softmax}
    for inner in _between(node):
        chain.add(inner)
    return any(user not in chain and user is not node and (user.users or user.op == "output")
               for inner in chain for user in inner.users)  # fmt: skip


def _between(node: Node) -> Iterator[Node]:
    """The nodes from the probabilities that `node` multiplies back to their softmax."""
    inner = args_of(node)[0]
    while inner.target not in SOFTMAX:
        yield inner
        inner = args_of(inner)[0]


def _transposed(k: Node, scores: Node) -> Node:
    """The keys (.., Sk, D) of which `k` is the transpose."""
    rank, args = k.meta["val"].ndim, args_of(k)
    swaps = k.target is aten.transpose.int and {args[1] % rank, args[2] % rank} == {rank - 1, rank - 2}
    ends = [*range(rank - 2), rank - 1, rank - 2]
    swaps = swaps or (k.target is aten.permute.default and [d % rank for d in args[1]] == ends)
    if swaps or k.target is aten.mT.default:
        keys: Node = args[0]
        return keys
    with k.graph.inserting_before(scores):
        new = k.graph.call_function(aten.transpose.int, (k, -2, -1))
    new.meta = {**scores.meta, "val": k.meta["val"].transpose(-2, -1)}
    return new


# --- the function of the scores ---------------------------------------------------------------------------------------


def _element(operand: Node, scores: Node, sink: Node | None) -> tuple[Puller, Expr, Expr | None]:
    """An element of `operand`, over the coordinates of `scores`, whose element is `score`; and one of `sink`."""
    puller = Puller()
    at = puller.clip(scores, COORDINATES[scores.meta["val"].ndim])
    factor: Expr = SCORE
    if scores.target is aten.baddbmm.default:
        added, kwargs = args_of(scores)[0], dict[str, Any](scores.kwargs)
        factor = call("mul", SCORE, Const(kwargs.get("alpha", 1)))
        beta = kwargs.get("beta", 1)
        if beta != 0:
            bias = puller.element(added, puller.clip(added, at))
            factor = call("add", factor, call("mul", bias, Const(beta)))
    puller.products[scores] = (at, factor)
    where = regrouped(at, scores.meta["val"].shape, operand.meta["val"].shape)
    if where is None:
        return puller, TRUE, None
    beside = None if sink is None else puller.element(sink, puller.clip(sink, where))
    return puller, puller.element(operand, where), beside


def _rests_on(node: Node, scores: Node) -> bool:
    """Whether `node` is computed from the scores."""
    stack, met = [node], set[Node]()
    while stack:
        node = stack.pop()
        if node is scores:
            return True
        if node not in met:
            met.add(node)
            stack += node.all_input_nodes
    return False


def _unshifted(expr: Expr) -> Expr:
    """`expr` without what is added to all of a row, such as its maximum subtracted: softmax does not see it."""
    if isinstance(expr, Call) and expr.op in ("add", "sub"):
        left, right = expr.args
        if not scored(right) and substitute(right, K, Q) == right:
            return _unshifted(left)
        if expr.op == "add" and not scored(left) and substitute(left, K, Q) == left:
            return _unshifted(right)
    return expr


def _without_casts(expr: Expr) -> Expr:
    """`expr` with conversions of the score between floating-point dtypes left out: the ring keeps the wider one."""
    if not isinstance(expr, Call):
        return expr
    if expr.op == "cast" and scored(expr.args[0]) and DTYPES[cast_dtype(expr)].is_floating_point:
        return _without_casts(expr.args[0])
    return Call(expr.op, tuple(map(_without_casts, expr.args)))


def _scaled(expr: Expr) -> tuple[float, Expr]:
    """(scale, f) where `expr` is f(scale * score)."""
    factors = set(_factors(expr))
    if len(factors) != 1 or None in factors:
        return 1.0, expr
    (factor,) = factors
    return (float(factor), _unscaled(expr)) if factor is not None else (1.0, expr)


def _factor(expr: Expr) -> float | None:
    """c where `expr` is score * c, c * score or score / c."""
    if not isinstance(expr, Call) or expr.op not in ("mul", "div"):
        return None
    left, right = expr.args
    if left == SCORE and isinstance(right, Const) and right.value != 0:
        return 1.0 / right.value if expr.op == "div" else float(right.value)
    return float(left.value) if expr.op == "mul" and right == SCORE and isinstance(left, Const) else None


def _factors(expr: Expr) -> Iterator[float | None]:
    """The factor of each place where the score stands; None where it stands alone."""
    if expr == SCORE:
        yield None
    elif (factor := _factor(expr)) is not None:
        yield factor
    elif isinstance(expr, Call):
        for arg in expr.args:
            yield from _factors(arg)


def _unscaled(expr: Expr) -> Expr:
    """`expr` with each scaled score replaced by the score."""
    if _factor(expr) is not None:
        return SCORE
    return Call(expr.op, tuple(map(_unscaled, expr.args))) if isinstance(expr, Call) else expr
