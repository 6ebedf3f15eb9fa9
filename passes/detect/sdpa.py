"""sdpa: a call of scaled_dot_product_attention -> its site.

The `attn_mask`, given as an input or built in the graph, is read as an expression of `ringpass.masks.expr`: element
[b, h, q, k] of the mask node, rewritten by `ringpass.masks.from_graph` until it rests on positions, constants and
loads from *leaves*, the tensors that hold data.

Contract: mask and bias equal the `attn_mask` for every element.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from ringpass.errors import UnsupportedError
from ringpass.masks.expr import CAUSAL, TRUE, Expr, call
from ringpass.masks.from_graph import COORDINATES, Puller, numbered
from ringpass.masks.scores import Scores, rows_with_keys, split_bias
from ringpass.passes.detect.site import AttentionSite
from ringpass.precision import accumulator

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def read(index: int, node: Node) -> AttentionSite | None:
    """Site number `index`, if `node` is such a call; else None, also if it has no heads or channels or is complex.

    Raises UnsupportedError if scale or dropout is computed in the graph, dropout is no probability, or the mask has too
    few or too many dims.
    """
    if node.target is not SDPA:
        return None
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    width = q.meta["val"].shape[-1]
    if q.meta["val"].is_complex() or any(type(n) is int and n == 0 for n in (width, *q.meta["val"].shape[-3:-2])):
        return None  # nothing to compute, or an error of torch's kernels
    scale, dropout = given.get("scale"), given.get("dropout_p", 0.0)
    for name, value in (("scale", scale), ("dropout_p", dropout)):
        if isinstance(value, Node):
            raise UnsupportedError(f"{node.name}: {name} is computed in the graph ({value.name}); pass a Python number")
    if not 0 <= dropout <= 1:
        raise UnsupportedError(f"{node.name}: dropout_p must be between 0 and 1, got {dropout}")
    within = CAUSAL if given.get("is_causal", False) else TRUE
    found, leaves = Scores(within), tuple[Node, ...]()
    if given.get("attn_mask") is not None:
        found, leaves = _mask(given["attn_mask"], q, k, within)
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    known = found.mask, found.bias, leaves, scale, float(dropout)
    return AttentionSite(index, node, q, k, v, *known, unsupported=found.unsupported).with_keyless(found.keyless)


def _mask(node: Node, q: Node, k: Node, within: Expr) -> tuple[Scores, tuple[Node, ...]]:
    """What an attn_mask node, which broadcasts to the scores of the queries, does to them; its leaves."""
    puller = Puller()
    scores = COORDINATES.get(q.meta["val"].ndim, ())
    rank = node.meta["val"].ndim
    if not 2 <= rank <= len(scores):
        raise UnsupportedError(
            f"attention mask {node.name} has {rank} dims, expected 2 to {len(scores)} for such queries"
        )
    expr = puller.element(node, puller.clip(node, scores[len(scores) - rank :]))
    if node.meta["val"].dtype == torch.bool:
        return numbered(puller, Scores(call("and", within, expr)))
    rows = rows_with_keys(*(x.meta["val"].shape[-2] for x in (q, k)))
    return numbered(puller, split_bias(expr, accumulator(q.meta["val"].dtype), rows, within))
