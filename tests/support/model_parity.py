"""Jobs for the ranks of a pool: run a model on the ring and on one device, and measure the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.support.models import MODELS, batch_for, loss_of, tensors_of

Errors = dict[str, float]


def relative(got: Tensor, want: Tensor, floor: float = 1e-300) -> float:
    """Norm of the difference over that of what is wanted, `floor` at least; infinite for NaN and for other shapes."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.detach().double(), want.detach().double()
    return float(((got - want).norm() / want.norm().clamp_min(floor)).nan_to_num(torch.inf))


def compiled(model: Callable[..., Any], group: dist.ProcessGroup, **options: Any) -> Any:
    """The model on the ring of `group`; `dynamic` and `fullgraph` go to torch.compile itself."""
    own = {name: options.pop(name) for name in ("dynamic", "fullgraph") if name in options}
    settings: dict[str, Any] = {"compiler": "aot_eager", "timeout": 60.0, "group": group, **options}
    return torch.compile(model, backend="ring_dilated", options=settings, **own)


def parity(group: dist.ProcessGroup, name: str, length: int, labels: bool, padding: bool, **options: Any) -> Errors:
    """Relative errors of every output, the loss and every parameter gradient against eager on one device."""
    make: dict[str, Any] = {"length": length} if name == "position_table" else {}
    model = MODELS[name].make(**make)
    batch = batch_for(name, length, labels, padding)
    want = outputs_and_gradients(model, model, batch)
    got = outputs_and_gradients(model, compiled(model, group, **options), batch)
    assert got.keys() == want.keys()
    return {key: relative(got[key], want[key]) for key in want}


def outputs_and_gradients(model: nn.Module, run: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step: each output, and the gradient of each parameter that has one."""
    model.zero_grad()
    outputs = run(**batch)
    tensors = tensors_of(outputs)
    return after_backward(model, tensors, loss_of(outputs) if has_loss(batch) else None)


def after_backward(model: nn.Module, tensors: dict[str, Tensor], loss: Tensor | None) -> dict[str, Tensor]:
    """Outputs, the loss (None: a number that depends on all of them), and the gradients of `model` under it."""
    used = (
        sum((t.pow(2).mean() for t in tensors.values() if t.is_floating_point()), torch.zeros(()))
        if loss is None
        else loss
    )
    used.backward()
    grads = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**{k: t.detach().clone() for k, t in tensors.items()}, "loss used": used.detach().clone(), **grads}


def has_loss(batch: dict[str, Tensor]) -> bool:
    """Whether the batch makes the model compute its own loss."""
    return any(key in batch for key in ("labels", "targets", "target"))


def worst(results: list[Errors]) -> tuple[float, str]:
    """The largest error on any rank, and where it is."""
    return max((error, f"{key} on rank {rank}") for rank, errors in enumerate(results) for key, error in errors.items())
