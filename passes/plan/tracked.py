"""gradients: which values of a captured graph may need a gradient."""

from __future__ import annotations

import torch
from torch.fx import Node

from ringpass.nodes import tensors_of
from ringpass.passes.capture.capture import Captured
from ringpass.passes.op_rules.table import reads, rule_for


def differentiable(t: torch.Tensor) -> bool:
    """Whether a tensor of this dtype can carry a gradient."""
    return t.is_floating_point() or t.is_complex()


def tracked(captured: Captured) -> frozenset[Node]:
    """The nodes that depend on an input or constant that requires a gradient."""
    found: set[Node] = set()
    fakes = iter(captured.inputs)
    for node in captured.gm.graph.nodes if torch.is_grad_enabled() else ():
        if node.op == "placeholder":
            needs = getattr(next(fakes), "requires_grad", False)
        elif node.op == "get_attr":
            needs = getattr(getattr(captured.gm, str(node.target), None), "requires_grad", False)
        else:
            inherits = not rule_for(node).detaches and any(n in found for n in reads(node))
            needs = inherits and any(differentiable(t) for t in tensors_of(node))
        if needs:
            found.add(node)
    return frozenset(found)
