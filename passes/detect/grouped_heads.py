"""grouped_heads: the keys and values that a model computed, where it repeats each head before an attention.

Most models with fewer key/value heads than query heads write the repetition out:

    repeated = reshape(expand(unsqueeze(x, 2), (B, G, n, S, D)), (B, G * n, S, D))      # query head j reads head j // n
    repeated = repeat_interleave(x, n, 1)

The ring reads `x` itself: G heads travel, not G * n, and their gradients are summed where they are computed.

Contract: attention of H query heads over what is returned is attention over what was given.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from ringpass.nodes import args_of

aten = torch.ops.aten
COPIES = (aten.clone.default, aten.contiguous.default)
MERGES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def unrepeated(k: Node, v: Node) -> tuple[Node, Node]:
    """Keys and values (B, G, S, D) of which those given repeat each head equally often; else those given."""
    keys, values = _source(k), _source(v)
    if keys is None or values is None or keys.meta["val"].shape[1] != values.meta["val"].shape[1]:
        return k, v
    return keys, values


def _source(node: Node) -> Node | None:
    """What `node` repeats along dim 1, or None."""
    merged = _past_copies(node)
    if merged.target is aten.repeat_interleave.self_int and merged.meta["val"].ndim == 4:
        repeated, times, dim = (*args_of(merged), None)[:3]
        return repeated if isinstance(times, int) and dim in (1, -3) else None
    if merged.target not in MERGES or merged.meta["val"].ndim != 4:
        return None
    expanded = _past_copies(args_of(merged)[0])
    if expanded.target is not aten.expand.default or expanded.meta["val"].ndim != 5:
        return None
    spread = args_of(expanded)[0]
    if spread.target is not aten.unsqueeze.default or args_of(spread)[1] % 5 != 2:
        return None
    source: Node = args_of(spread)[0]
    batch, heads, n, _, width = expanded.meta["val"].shape
    into = merged.meta["val"].shape
    kept = expanded.meta["val"].shape[:2] == source.meta["val"].shape[:2]
    return source if kept and (into[0], into[1], into[3]) == (batch, heads * n, width) else None


def _past_copies(node: Node) -> Node:
    while node.target in COPIES:
        node = args_of(node)[0]
    return node
