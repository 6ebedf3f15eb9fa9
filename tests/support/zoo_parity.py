"""One step of a model of the zoo on the ring beside eager on one device.

>>> workers.run(zoo_parity, 2, "gpt2", "eager", labels=True)[0].error < 1e-9
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import GraphModule

from ringpass import rank_program
from ringpass.nodes import bound_of
from ringpass.passes.partition.partitioned import Gather, Partitioned
from tests.support.model_parity import after_backward, compiled, relative
from tests.support.zoo import ZOO
from tests.support.zoo_entry import wide

LENGTH = 23  # prime, odd: nothing divides it
FLOOR = 1e-3  # a gradient that is zero but for rounding, such as that of a key's bias, is not divided by itself


@dataclass
class Report:
    """How far the ring is from one device, at worst and where; what it made of the model's graphs."""

    error: float
    where: str
    sites: int = 0  # attentions on the ring
    gathers: list[Gather] = field(default_factory=list)  # but for outputs
    flops: float = 0.0  # of this rank's linear layers and convolutions
    whole_flops: float = 0.0  # of one device
    peak: int = 0  # bytes that a step of this rank holds at most, but for parameters and their gradients
    whole_peak: int = 0  # of one device

    def add(self, captured: Any, plan: Any, local: Partitioned) -> None:
        """Counts one graph."""
        self.sites += sum(site.problem is not None for site in plan.sites)
        self.gathers += [g for g in local.gathers if g.reason != "output"]
        self.flops += flops(local.gm)
        self.whole_flops += flops(captured.gm)


def local_fraction(reports: list[Report]) -> float:
    """The fraction of the FLOPs on local tokens: 1 where the ranks together do what one device does."""
    done = sum(r.flops for r in reports) / max(reports[0].whole_flops, 1.0)
    return (len(reports) - done) / (len(reports) - 1)


def zoo_parity(
    group: dist.ProcessGroup,
    name: str,
    attention: str,
    labels: bool = True,
    padding: bool = False,
    train: bool = True,
    length: int = LENGTH,
    memory: bool = False,
    **options: Any,
) -> Report:
    """Relative error of every output, the loss and every parameter gradient; `memory`: the peaks of a step, too."""
    torch._dynamo.reset()
    entry = ZOO[name]
    model, batch = entry.make(attention, train), entry.batch(length, labels, padding)
    report = Report(0.0, "")

    def partition(captured: Any, placement: Any, plan: Any, *args: Any) -> Partitioned:
        local = original(captured, placement, plan, *args)
        report.add(captured, plan, local)
        return local

    original = rank_program.partition  # type: ignore[attr-defined]
    with wide() if entry.dtype == torch.float64 else nullcontext(), patch.object(rank_program, "partition", partition):
        run = compiled(model, group, **options)
        want, got = (step(model, how, batch) for how in (model, run))
        if memory:
            report.whole_peak, report.peak = (_peak(model, how, batch) for how in (model, run))
    assert got.keys() == want.keys()
    errors = {key: relative(got[key], want[key], FLOOR) for key in want}
    report.where = max(errors, key=lambda key: errors[key])
    report.error = errors[report.where]
    return report


def step(model: nn.Module, run: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Each output, the loss (or a number that depends on all outputs), the gradient of each parameter that has one."""
    model.zero_grad()
    tensors = dict(named_tensors(run(**batch), ""))
    numbers = [t for t in tensors.values() if not t.ndim and t.requires_grad]
    return after_backward(model, tensors, numbers[-1] if numbers else None)


def strict_error(
    group: dist.ProcessGroup, make: Callable[[], nn.Module], batch: dict[str, Tensor], **options: Any
) -> float:
    """The largest relative error of the outputs and gradients of a step in float64, under `strict`."""
    torch.manual_seed(0)
    model = make().double()
    want, got = (step(model, run, batch) for run in (model, compiled(model, group, strict=True, **options)))
    assert got.keys() == want.keys()
    return max(relative(got[key], want[key], 1e-6) for key in want)


def _peak(model: nn.Module, run: Any, batch: dict[str, Any]) -> int:
    from benchmarks.memory import peak_bytes

    return peak_bytes(lambda: step(model, run, batch), lambda: [p.grad for p in model.parameters()])


def named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in outputs of any kind: tuples, model outputs, caches."""
    if isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "cross_attention_cache"):
        yield from named_tensors((value.self_attention_cache, value.cross_attention_cache), name)
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from named_tensors(item, f"{name}.{i}")
    elif hasattr(value, "items"):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}.{key}")
    elif hasattr(value, "layers"):
        yield from named_tensors([vars(layer) for layer in value.layers], name)  # keys, values, states of recurrences


PRODUCTS = {
    "aten::linear": 0, "aten::mm": 0, "aten::addmm": 1, "aten::_grouped_mm": 0, "transformers::grouped_mm_fallback": 0,
}  # fmt: skip
"""Positions of the left factor."""
CONVOLUTIONS = ("aten::conv1d", "aten::conv2d", "aten::conv3d")


def flops(gm: GraphModule) -> float:
    """FLOPs of the linear layers and convolutions of a graph, experts included."""
    total = 0.0
    for node in gm.graph.nodes:
        name = node.target.name().split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""
        if name in PRODUCTS:
            total += 2.0 * node.meta["val"].numel() * node.args[PRODUCTS[name]].meta["val"].shape[-1]
        elif name in CONVOLUTIONS:
            total += 2.0 * node.meta["val"].numel() * bound_of(node)["weight"].meta["val"][0].numel()
    return total
