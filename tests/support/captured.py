"""Runs functions through capture, and compares them with eager torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._ops import OpOverload

from ringpass.passes.capture.capture import Captured
from tests.support.pipeline_stages import captured_graph

aten = torch.ops.aten


class Backend:
    """A torch.compile backend that captures, then runs AOTAutograd without a compiler."""

    def __init__(self) -> None:
        self.captured: list[Captured] = []
        self.dynamo: list[fx.GraphModule] = []
        self.forwards: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before = str(gm.graph)
        captured = captured_graph(gm, example_inputs)
        assert str(gm.graph) == before, "capture changed Dynamo's graph"
        check_contract(gm, captured)
        self.dynamo.append(gm)
        self.captured.append(captured)
        backend = aot_autograd(
            fw_compiler=self.forward,
            bw_compiler=lambda g, _: make_boxed_func(g.forward),
            partition_fn=min_cut_rematerialization_partition,
        )
        compiled: Callable[..., Any] = backend(captured.gm, example_inputs)
        return compiled

    def forward(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        self.forwards.append(gm)
        boxed: Callable[..., Any] = make_boxed_func(gm.forward)
        return boxed

    @property
    def graph(self) -> fx.Graph:
        assert len(self.captured) == 1
        return self.captured[0].gm.graph

    def count(self, *targets: object) -> int:
        return sum(node.target in targets for node in self.graph.nodes)


def check_contract(gm: fx.GraphModule, captured: Captured) -> None:
    old, new = gm.graph.find_nodes(op="placeholder"), captured.gm.graph.find_nodes(op="placeholder")
    assert [(n.name, n.target) for n in old] == [(n.name, n.target) for n in new]
    for node, value in zip(new, captured.inputs, strict=True):
        assert node.meta["val"] is value
    for node in captured.gm.graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            assert not isinstance(value, Tensor) or getattr(value, "fake_mode", None) is captured.fake_mode, node
        if isinstance(node.target, OpOverload):
            assert "val" in node.meta and node.meta.get("stack_trace"), node.format_node()
            if node.target._schema.is_mutable:
                assert node.target is aten.copy_.default and node.args[0].op in ("placeholder", "get_attr")


def copies(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]


def total(out: Any) -> Tensor:
    parts = [t.float().square().sum() for t in torch.utils._pytree.tree_leaves(out) if t.requires_grad]
    return torch.stack(parts).sum()


def check(backend: Backend, f: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = None) -> Any:
    """`f` compiled gives what `f` gives: outputs, gradients, and changed inputs."""
    theirs, ours = copies(inputs), copies(inputs)
    want = f(*theirs)
    got = torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic)(*ours)
    torch.testing.assert_close(got, want)
    flat = torch.utils._pytree.tree_leaves
    assert [t.requires_grad for t in flat(got)] == [t.requires_grad for t in flat(want)]
    if any(t.requires_grad for t in flat(want)):
        total(want).backward()
        total(got).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a.grad, b.grad)
    return got


def grads(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


# -- regions and higher-order operators
