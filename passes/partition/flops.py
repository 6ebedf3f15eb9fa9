"""The FLOPs of nodes of a captured graph, as torch counts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node, map_arg
from torch.utils.flop_counter import FlopCounterMode

from ringpass.nodes import hint_of, op_name, tensors_of
from ringpass.passes.partition.partitioned import WholeWork


def flops_of(node: Node) -> int:
    """Two for each multiply-add of a product (`torch.utils.flop_counter`); one per element of any other op's result.

    Of symbolic sizes, at the lengths of this compilation.
    """
    elements = sum(hint_of(x.numel()) for x in tensors_of(node))
    if not isinstance(node.target, torch._ops.OpOverload):
        return elements
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    fake_mode: Any = tensors_of(node)[0].fake_mode  # type: ignore[attr-defined]
    with fake_mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            node.target(*args, **kwargs)
        except RuntimeError:  # the op reads values, which fake tensors have not
            return elements
    return int(hint_of(counter.get_total_flops())) or elements


def whole_work(flops: Mapping[Node, int]) -> tuple[WholeWork, ...]:
    """The FLOPs of nodes that every rank computes on all tokens, by op."""
    by_op: dict[str, list[int]] = {}
    for node, count in flops.items():
        by_op.setdefault(op_name(node), []).append(count)
    return tuple(WholeWork(name, len(calls), sum(calls)) for name, calls in by_op.items())
