"""The FLOPs of one node of a captured graph, as torch counts them."""

from __future__ import annotations

import torch
from torch.fx import Node, map_arg
from torch.utils.flop_counter import FlopCounterMode

from ringpass.nodes import hint_of, tensors_of


def flops_of(node: Node) -> int:
    """Two for each multiply-add of a product (`torch.utils.flop_counter`); one per element of any other op's result.

    Of symbolic sizes, at the lengths of this compilation.
    """
    elements = sum(hint_of(x.numel()) for x in tensors_of(node))
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if not isinstance(node.target, torch._ops.OpOverload):
        return elements
    with tensors_of(node)[0].fake_mode, torch.no_grad(), FlopCounterMode(display=False) as counter:  # type: ignore[attr-defined]
        node.target(*args, **kwargs)
    return int(hint_of(counter.get_total_flops())) or elements
