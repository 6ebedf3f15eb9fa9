"""Small models that once gave wrong numbers or an obscure error: each must equal one device, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.model_parity import compiled, relative
from tests.support.models import HEADS, ROWS, WIDTH, Block
from tests.support.process_ranks import Workers

LENGTH = 13
Case = Callable[[Any, Tensor], Any]
CASES: dict[str, Case] = {}


def case(fn: Case) -> Case:
    CASES[fn.__name__] = fn
    return fn


class Parts(nn.Module):
    """A model made of a case and the parts that it uses."""

    def __init__(self, fn: Case) -> None:
        super().__init__()
        self.fn = fn
        self.block, self.second = Block(causal=False), Block(causal=True)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(1, LENGTH + 9, WIDTH))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Any:
        return self.fn(self, x)


def heads(x: Any) -> Any:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@case
def table_longer_than_the_sequence(m: Any, x: Tensor) -> Any:
    return m.block(x + m.table[:, : x.shape[1]])


@case
def a_token_in_front(m: Any, x: Tensor) -> Any:
    return m.block(torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1))[:, 0]


@case
def a_slice_that_makes_the_sequence(m: Any, x: Tensor) -> Any:
    z = m.linear(x)[:, 1:]
    return F.scaled_dot_product_attention(z, z, z, is_causal=True).pow(2).mean()


@case
def a_shift_by_padding(m: Any, x: Tensor) -> Any:
    x = m.block(x)
    return m.second(x + F.pad(x, (0, 0, 1, -1)))


@case
def a_learned_bias_per_head(m: Any, x: Tensor) -> Any:
    q = heads(m.linear(x))
    return F.scaled_dot_product_attention(q, q, q, attn_mask=m.bias).transpose(1, 2).flatten(2)


@case
def a_metric_under_no_grad(m: Any, x: Tensor) -> Any:
    pooled = m.linear(m.block(x).mean(1, keepdim=True))
    with torch.no_grad():
        metric = (x * pooled).cumsum(1).mean()
    return m.second(x * pooled) + metric


@case
def few_queries_over_many_keys(m: Any, x: Tensor) -> Any:
    k = heads(m.block(x))
    q = heads(m.token.expand(x.shape[0], -1, -1))
    return F.scaled_dot_product_attention(q, k, k).flatten(1)


@case
def autocast_inside(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        return m.block(x)


@case
def new_zeros_and_type_as(m: Any, x: Tensor) -> Any:
    x = m.block(x)
    return x * m.token.type_as(x) + x.new_zeros(()) + x.new_zeros(x.shape[0], 1, WIDTH)


@case
def losses_in_the_graph(m: Any, x: Tensor) -> Any:
    y = m.block(x)
    return F.mse_loss(y, x) + F.l1_loss(y, x, reduction="sum") + F.binary_cross_entropy_with_logits(y, x.sigmoid())


@case
def complex_values(m: Any, x: Tensor) -> Any:
    z = torch.view_as_complex(m.block(x).unflatten(-1, (-1, 2)))
    turn = torch.view_as_complex(m.token.unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * turn).flatten(-2)


@case
def checkpointed(m: Any, x: Tensor) -> Any:
    return checkpoint(m.second, checkpoint(m.block, x, use_reentrant=False), use_reentrant=False)


def step(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.pow(2).mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"out": out.detach().clone(), "x": x.grad, **grads}


def corner(group: dist.ProcessGroup, name: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = Parts(CASES[name]).double()
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    want, got = step(model, model, x), step(model, compiled(model, group), x)
    assert got.keys() == want.keys()
    return {k: relative(got[k], want[k]) for k in want if want[k].norm() > 1e-12}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_device(workers: Workers, name: str) -> None:
    for errors in workers.run(corner, 2, name):
        assert max(errors.values()) < 1e-10, errors


class Squared(torch.autograd.Function):
    """A user's own fused loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.pow(2).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = grad * 2 * x
        return result


def lazily(group: dist.ProcessGroup) -> list[float]:
    """An output touched under no_grad first, then in a custom Function and in the loss."""
    torch.manual_seed(0)
    model = Block(causal=True).double()
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64)
    grads = []
    for run in (model, compiled(model, group)):
        model.zero_grad()
        y: Any = run(x)
        with torch.no_grad():
            assert float(y.abs().max()) > 0
        (Squared.apply(y) + y.logsumexp(-1).mean()).backward()  # type: ignore[no-untyped-call]
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return [relative(got, want) for want, got in zip(*grads, strict=True) if want.norm() > 1e-9]


def test_outputs_in_autograd(workers: Workers) -> None:
    for errors in workers.run(lazily, 3):
        assert errors and max(errors) < 1e-10, errors


def drawn(group: dist.ProcessGroup) -> Any:
    """Noise drawn in the graph by ranks whose generators differ."""

    def noisy(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.block(x) * 0 + torch.rand(x.shape[0], 1, 1, dtype=x.dtype)
        return y

    torch.manual_seed(0)
    run = compiled(Parts(noisy).double(), group)
    torch.manual_seed(group.rank())
    return run(torch.ones(ROWS, LENGTH, WIDTH, dtype=torch.float64)).detach().clone()


def test_other_random_ops_draw_alike(workers: Workers) -> None:
    first, second, third = workers.run(drawn, 3)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert (first == first[:, :1]).all() and first.unique().numel() == ROWS
