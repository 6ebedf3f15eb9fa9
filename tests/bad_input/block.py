"""The model and the tokens of most cases on ranks: one causal block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.models import WIDTH, Block

ROWS, LENGTH = 2, 13


def model(causal: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A block."""
    return Block(causal).to(dtype)


def tokens(
    needs_grad: bool = False, length: int = LENGTH, rows: int = ROWS, dtype: torch.dtype = torch.float64
) -> Tensor:
    """(rows, length, WIDTH)."""
    return torch.randn(rows, length, WIDTH, dtype=dtype).requires_grad_(needs_grad)


def gradients(net: nn.Module) -> list[Tensor]:
    """Those of a model's parameters, where there are any."""
    return [p.grad for p in net.parameters() if p.grad is not None]


def loss_of(y: Any) -> Any:
    """A number that depends on all of an output."""
    return y.pow(2).mean()


def step(net: nn.Module, run: Any, x: Tensor, *others: Any) -> list[Tensor]:
    """The output, the gradient of the input, and those of the parameters."""
    x = x.detach().requires_grad_(x.is_floating_point())
    y = run(x, *others)
    loss_of(y if y.dtype == torch.float64 else y.float()).backward()
    grads = [x.grad, *(p.grad for p in net.parameters())]
    return [y.detach() + 0, *(g for g in grads if g is not None)]


def once(on_ring: Callable[..., Any], x: Tensor, causal: bool = True) -> list[Tensor]:
    """A step of a block."""
    net = model(causal, x.dtype)
    return step(net, on_ring(net), x)
