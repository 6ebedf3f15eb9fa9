"""detect: captured graph -> attention sites, each with its mask as a scalar function of (b, h, q, k).

A *site* is the output of one attention call: an `aten.scaled_dot_product_attention` node, the first result of a
`flex_attention` operator, or the last product of an attention that the model writes out.  The `attn_mask` of the first,
given as an input or built in the graph, is pulled back to an expression of `ringpass.masks.expr` (`pull`): element
[b, h, q, k] of the mask node, rewritten until it rests on positions, constants and loads from *leaves*, the tensors
that hold data.  The functions of the second are read by `flex`, what the third does to its scores by `handwritten`.

Contract: the expressions equal mask, bias and score function for every element.  A call that is not read stays as the
model wrote it, and runs replicated.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ringpass.errors import UnsupportedError
from ringpass.masks.expr import CAUSAL, TRUE, Expr, call
from ringpass.masks.from_graph import COORDINATES, Puller, numbered
from ringpass.masks.scores import rows_with_keys, split_bias
from ringpass.masks.simplify import simplify
from ringpass.nodes import args_of, first_of
from ringpass.passes.detect import flex
from ringpass.passes.detect import softmax as handwritten
from ringpass.passes.detect.grouped_heads import unrepeated
from ringpass.passes.detect.site import AttentionSite
from ringpass.patterns import Pattern, everything

SDPA = torch.ops.aten.scaled_dot_product_attention.default
EVERYTHING = everything()


def detect(gm: GraphModule, pattern: Pattern = EVERYTHING) -> tuple[AttentionSite, ...]:
    """The sites of `gm`, in graph order; `pattern` is ANDed with the mask of each.

    Raises UnsupportedError for an attention call that cannot be read, OptionError for a pattern of another length.
    """
    readers = [(reader, node) for node in list(gm.graph.nodes) if (reader := _reader(node)) is not None]
    sites = [_grouped(_one_sequence(reader(index, node))) for index, (reader, node) in enumerate(readers)]
    return tuple(narrowed(site, pattern) for site in sites)


def narrowed(site: AttentionSite, pattern: Pattern) -> AttentionSite:
    """`site` with its mask ANDed with `pattern`.  Raises OptionError for a pattern of another length."""
    if pattern != EVERYTHING:
        shape, keys = site.q.meta["val"].shape, site.k.meta["val"].shape[-2]
        batch, heads = {4: shape[:2], 3: (shape[0], 1)}.get(len(shape), (1, 1))
        pattern.check(batch, heads, shape[-2], keys)
    return replace(site, mask=simplify(call("and", site.mask, pattern.expr)))


def _one_sequence(site: AttentionSite) -> AttentionSite:
    """Keys and values are as many: where their lengths are two symbols, these become one."""
    torch._check(site.k.meta["val"].shape[-2] == site.v.meta["val"].shape[-2])
    return site


def _grouped(site: AttentionSite) -> AttentionSite:
    k, v = unrepeated(site.k, site.v)
    return replace(site, k=k, v=v)


def _reader(node: Node) -> Callable[[int, Node], AttentionSite] | None:
    if node.op != "call_function":
        return None
    if node.target is operator.getitem and first_of(node).target is flex.FLEX and node.args[1] == 0:
        return _flex_site
    if (found := handwritten.read(node)) is not None:
        return lambda index, node: _written_site(index, node, found)
    return _site if node.target is SDPA else None


def _flex_site(index: int, node: Node) -> AttentionSite:
    q, k, v, *_, scale, _, _, _ = args_of(first_of(node))
    found = flex.read(first_of(node))
    if isinstance(found, str):
        number = math.nan if isinstance(scale, Node) else scale
        return AttentionSite(index, node, q, k, v, TRUE, None, (), number, 0.0, unread=found)
    scores = found.mask, found.bias, found.leaves
    return AttentionSite(index, node, q, k, v, *scores, scale, 0.0, found.score, listed=found.listed)


def _written_site(index: int, node: Node, found: handwritten.Written) -> AttentionSite:
    scores = found.mask, found.bias, found.leaves
    rest = found.scale, found.dropout, found.score
    return AttentionSite(index, node, found.q, found.k, found.v, *scores, *rest, written=True, sink=found.sink)


def _site(index: int, node: Node) -> AttentionSite:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    width = q.meta["val"].shape[-1]
    scale, dropout = given.get("scale"), given.get("dropout_p", 0.0)
    for name, value in (("scale", scale), ("dropout_p", dropout)):
        if isinstance(value, Node):
            raise UnsupportedError(f"{node.name}: {name} is computed in the graph ({value.name}); pass a Python number")
    allowed: Expr = TRUE
    bias: Expr | None = None
    leaves: tuple[Node, ...] = ()
    if given.get("attn_mask") is not None:
        allowed, bias, leaves = _mask(given["attn_mask"], q, k)
    if given.get("is_causal", False):
        allowed = simplify(call("and", CAUSAL, allowed))
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    return AttentionSite(index, node, q, k, v, allowed, bias, leaves, scale, float(dropout))


def _mask(node: Node, q: Node, k: Node) -> tuple[Expr, Expr | None, tuple[Node, ...]]:
    """(boolean mask, additive bias, leaves) of an attn_mask node, which broadcasts to the scores of the queries."""
    puller = Puller()
    scores = COORDINATES.get(q.meta["val"].ndim, ())
    rank = node.meta["val"].ndim
    if not 2 <= rank <= len(scores):
        raise UnsupportedError(
            f"attention mask {node.name} has {rank} dims, expected 2 to {len(scores)} for such queries"
        )
    expr = puller.element(node, puller.clip(node, scores[len(scores) - rank :]))
    allowed, bias = (
        (expr, None)
        if node.meta["val"].dtype == torch.bool
        else split_bias(expr, rows_with_keys(*(x.meta["val"].shape[-2] for x in (q, k))))
    )
    (mask, bias), leaves = numbered(puller, simplify(allowed), bias)
    assert mask is not None
    return mask, bias, leaves
