"""Masks given as Python functions of (b, h, q, k)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ringpass.errors import OptionError
from ringpass.masks.expr import B, Const, Expr, H, K, Q, table
from ringpass.masks.from_graph import Puller
from ringpass.masks.rewrite import replace_loads


def scalar_function(allowed: Callable[..., Any]) -> Expr:
    """The expression of `allowed`, a function of four int64 scalars (b, h, q, k) that gives a boolean scalar.

    Tensors of bools or integers that it captures become tables.  Raises OptionError for a function that branches on its
    arguments, is not elementwise, or gives something else.
    """
    scalars = [torch.zeros((), dtype=torch.int64) for _ in "bhqk"]
    try:
        with TransformGetItemToIndex():  # x[q] stays symbolic in q
            gm = make_fx(lambda *at: allowed(*at), pre_dispatch=True)(*scalars)
    except Exception as error:
        raise OptionError(
            f"the mask function cannot be traced on scalar indices: it may not branch on them ({error})"
        ) from error
    *indices, output = (n for n in gm.graph.nodes if n.op in ("placeholder", "output"))
    result = output.args[0]
    if isinstance(result, bool):
        return Const(result)
    if not isinstance(result, Node) or result.meta["val"].dtype != torch.bool or result.meta["val"].ndim:
        raise OptionError("the mask function must return a boolean scalar for scalar indices")
    puller = Puller()
    for node, index in zip(indices, (B, H, Q, K), strict=True):
        puller.known[node, ()] = index
    expr = puller.element(result, ())
    captured = [_captured(gm, leaf) for leaf in puller.leaves]
    return replace_loads(expr, lambda leaf, at: table(captured[leaf], *at))


def _captured(gm: GraphModule, leaf: Node) -> torch.Tensor:
    """A tensor of bools or integers that a mask function captures."""
    value = getattr(gm, str(leaf.target), None) if leaf.op == "get_attr" else None
    if not isinstance(value, torch.Tensor):
        raise OptionError(f"the mask function uses an op that has no closed form: {leaf.name} ({leaf.target})")
    if value.is_floating_point() or value.is_complex() or not value.ndim:
        raise OptionError(
            f"the mask function reads a tensor of {value.dtype} and shape {list(value.shape)}; it may read bools and "
            "integers, at its indices"
        )
    return value
