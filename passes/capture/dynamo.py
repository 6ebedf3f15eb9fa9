"""dynamo: what is read from Dynamo's private state, and handed on to AOTAutograd, which reads it too.

    restart_with_constant_floats    `TensorifyState`: the floats that Dynamo made inputs
    fakify                          `TracingContext`: the fake mode, and the symbols of each input's sizes
    inherit                         `_dynamo_source`, `_param_name_to_source`: where inputs and constants come from

Torch has no public names for these; no other module of the passes reads them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import TensorifyState
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def restart_with_constant_floats(gm: fx.GraphModule) -> None:
    """Makes Dynamo trace again with a module's floats as constants, where `dynamic=True` made them inputs.

    A softmax scale or a dropout rate is a constant of the plan.  Inductor sends back the floats that it
    cannot keep in the same way: by raising TensorifyScalarRestartAnalysis, which Dynamo catches.
    """
    memos = [getattr(n.meta.get("example_value"), "item_memo", None) for n in gm.graph.nodes if n.op == "placeholder"]
    names = [m.node._expr.name for m in memos if isinstance(m, torch.SymFloat) and hasattr(m.node._expr, "name")]
    fresh = [name for name in names if not TensorifyState.should_specialize(name)]
    for name in fresh:
        TensorifyState.specialize(name)
    if fresh:
        raise TensorifyScalarRestartAnalysis


def fakify(example_inputs: Sequence[Any]) -> tuple[FakeTensorMode, tuple[Any, ...]]:
    """(fake mode, fake inputs) as AOTAutograd makes them, so that both see the same symbols and no new guard arises."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else detect_fake_mode(example_inputs)
    if mode is None:
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)

    def fake(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or (isinstance(x, FakeTensor) and x.fake_mode is mode):
            return x
        symbols = context.tensor_to_context.get(x) if context is not None else None
        if symbols is None:
            return mode.from_tensor(x, static_shapes=True)
        return mode.from_tensor(x, symbolic_context=symbols, source=symbols.tensor_source, trace=False)

    return mode, tuple(fake(x) for x in example_inputs)


def inherit(traced: fx.GraphModule, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Gives the traced graph the names, sources and module metadata of Dynamo's graph `gm`, which AOTAutograd reads.

    `inputs`: the fake value of each placeholder.
    """
    olds, news = gm.graph.find_nodes(op="placeholder"), traced.graph.find_nodes(op="placeholder")
    for old, new, value in zip(olds, news, inputs, strict=True):
        new._rename(old.name)
        new.target = old.target
        new.meta.update({k: v for k, v in old.meta.items() if k not in ("example_value", "grapharg")}, val=value)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    traced.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        constants = itertools.chain(traced.named_parameters(), traced.named_buffers())
        traced._param_name_to_source = {name: ConstantSource(name) for name, _ in constants}  # type: ignore[assignment]
