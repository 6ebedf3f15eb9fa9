"""curve_order: which sequences of a graph follow the option `hilbert`, and what their attentions become.  An analysis.

    hilbert=(14, 14)    the sequence of the graph's attentions that holds the 196 cells of the grid, after a prefix
    prefix              named by `hilbert_prefix`; else what `cat` puts before 196 tokens, or at most INFERRED tokens

Every query or key dim of that many tokens is along the curve; others, such as the text of a cross-attention, stay in
their own order.  Masks, biases and score functions are rewritten to positions along the curve, so the numbers are those
of the model; under `along_curve`, the patterns of options count curve positions instead of tokens.

Contract: depends on the graph and the options alone.  A grid that matches no sequence, or one of several, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from ringpass.config import RingConfig
from ringpass.errors import OptionError
from ringpass.layouts.hilbert import Order
from ringpass.layouts.reindex import of_curve_positions
from ringpass.nodes import hint_of
from ringpass.passes.detect.detect import narrowed
from ringpass.passes.detect.site import AttentionSite

INFERRED = 16  # CLS, distillation and register tokens


def find_order(sites: Sequence[AttentionSite], config: RingConfig) -> Order | None:
    """The order that the option asks for.  Raises OptionError where no sequence, or more than one, is meant."""
    if config.hilbert is None:
        return None
    grid, prefix = math.prod(config.hilbert), config.hilbert_prefix
    lengths = sorted({n for site in sites if not site.unsupported for n in _lengths(site)})
    joined = _joined(sites[0].node.graph, grid) if sites else set()
    if prefix is None:
        fits = [n for n in lengths if grid <= n <= grid + INFERRED or n in joined]
    else:
        fits = [n for n in lengths if n == grid + prefix]
    if len(fits) == 1:
        return Order(config.hilbert, fits[0] - grid)
    asked = f"hilbert={config.hilbert}, {grid} tokens{f', after hilbert_prefix={prefix}' if prefix is not None else ''}"
    found = f"the attentions of this graph have {', '.join(map(str, lengths)) or 'no readable number of'} tokens"
    if fits:
        raise OptionError(
            f"{asked}: {found}, and {' and '.join(map(str, fits))} could each be that grid after other tokens: name "
            "their number by the option 'hilbert_prefix'"
        )
    raise OptionError(
        f"{asked}, matches no sequence: {found}. Give the (H, W) or (T, H, W) of the model's tokens; others (CLS, "
        "registers, text) stand before them, and their number is the option 'hilbert_prefix'"
    )


def _lengths(site: AttentionSite) -> list[int]:
    return [hint_of(x.meta["val"].shape[-2]) for x in (site.q, site.k)]


def _joined(graph: Graph, grid: int) -> set[int]:
    """Lengths that a `cat` makes of other tokens and, last, those of the grid."""
    found = set()
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.cat.default:
            *before, last = node.args[0]
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            if before and hint_of(last.meta["val"].shape[dim]) == grid:
                found.add(hint_of(node.meta["val"].shape[dim]))
    return found


def of_length(order: Order | None, x: Node) -> Order | None:
    """`order`, if the queries or keys `x` (.., S, D) have as many tokens as it; else None."""
    return order if order and x.meta["val"].shape[-2] == order.tokens else None


def in_curve_order(site: AttentionSite, orders: Sequence[Order | None], config: RingConfig) -> AttentionSite:
    """`site` with its queries and its keys in these two orders; None: in their own.

    Raises OptionError where a pattern of the options is of another length.
    """
    permuted = {name: order for name, order in zip("qk", orders, strict=True) if order}
    if permuted:
        site = site.functions(lambda e: of_curve_positions(e, permuted))
    return narrowed(site, config.mask) if config.along_curve else site
