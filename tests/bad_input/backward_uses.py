"""Odd uses of backward, of checkpoints and of hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.bad_input.block import gradients, loss_of, model, tokens
from tests.bad_input.rank_cases import Cases, OnRing, Values

BACKWARD = Cases()
use = BACKWARD.add


# --- backward


@use("`backward(retain_graph=True)`, then `backward()`")
def retained(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)
    loss = loss_of(on_ring(net)(x))
    loss.backward(retain_graph=True)
    loss.backward()
    assert x.grad is not None
    return [x.grad, *gradients(net)]


@use("`backward()` twice without `retain_graph`", fast=True)
def not_retained(on_ring: OnRing) -> Values:
    net = model()
    loss = loss_of(on_ring(net)(tokens()))
    loss.backward()
    loss.backward()
    return gradients(net)


@use("a second `backward` through an input that is no leaf", fast=True)
def non_leaf_input(on_ring: OnRing) -> Values:
    net, leaf = model(), tokens(True)
    run = on_ring(net)
    x = leaf * 2
    loss_of(run(x)).backward(retain_graph=True)
    loss_of(run(x)).backward()
    assert leaf.grad is not None
    return [leaf.grad, *gradients(net)]


@use("two losses of one output, two `backward` with `retain_graph`")
def two_losses(on_ring: OnRing) -> Values:
    net, leaf = model(), tokens(True)
    y = on_ring(net)(leaf * 2)
    y.pow(2).mean().backward(retain_graph=True)
    y.abs().mean().backward()
    assert leaf.grad is not None
    return [leaf.grad, *gradients(net)]


@use("the output of one call is the input of the next, `backward` of both")
def chained(on_ring: OnRing) -> Values:
    net, leaf = model(), tokens(True)
    run = on_ring(net)
    y = run(leaf)
    z = run(y)
    y.pow(2).mean().backward(retain_graph=True)
    z.pow(2).mean().backward()
    assert leaf.grad is not None
    return [leaf.grad, *gradients(net)]


@use(
    "double backward: `torch.autograd.grad(create_graph=True)`, then `backward`",
    "RuntimeError",
    "does not currently support double backward",
)
def double_backward(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)
    y = on_ring(net)(x)
    (g,) = torch.autograd.grad(loss_of(y), x, create_graph=True)
    g.pow(2).sum().backward()
    return gradients(net)


@use("`torch.autograd.grad` for one parameter")
def one_gradient(on_ring: OnRing) -> Values:
    net = model()
    return torch.autograd.grad(loss_of(on_ring(net)(tokens())), [next(net.parameters())])


@use("`torch.autograd.grad` of an output with `grad_outputs`")
def given_cotangent(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)
    y = on_ring(net)(x)
    return torch.autograd.grad(y, [x], grad_outputs=torch.ones_like(y))


@use("`backward()` without a loss (`sum` of the output)")
def plain_sum(on_ring: OnRing) -> Values:
    net = model()
    on_ring(net)(tokens()).sum().backward()
    return gradients(net)


@use("`backward(inputs=[..])`")
def chosen_inputs(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)
    loss_of(on_ring(net)(x)).backward(inputs=[x])
    assert x.grad is not None
    return [x.grad, *gradients(net)]


@use("a step under `no_grad`, then one that trains")
def no_grad_then_grad(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(net)
    with torch.no_grad():
        first = run(x) + 0
    loss_of(run(x)).backward()
    return [first, *gradients(net)]


@use("a step that trains, then one under `no_grad`, then one that trains")
def grad_then_no_grad(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(net)
    loss_of(run(x)).backward()
    with torch.no_grad():
        second = run(x) + 0
    loss_of(run(x)).backward()
    return [second, *gradients(net)]


@use("`inference_mode`")
def inference(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    with torch.inference_mode():
        return [on_ring(net)(x) + 0]


@use("`inference_mode`, then a step that trains")
def inference_then_training(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(net)
    with torch.inference_mode():
        first = run(x) + 0
    loss_of(run(x)).backward()
    return [first, *gradients(net)]


@use("an output of `inference_mode` used outside")
def inference_output_outside(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    with torch.inference_mode():
        y = on_ring(net)(x)
    return [y + 1]


@use("`set_detect_anomaly`")
def anomaly(on_ring: OnRing) -> Values:
    net = model()
    with torch.autograd.detect_anomaly(check_nan=True):
        loss_of(on_ring(net)(tokens())).backward()
    return gradients(net)


@use("frozen parameters")
def frozen(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)
    net.requires_grad_(False)
    loss_of(on_ring(net)(x)).backward()
    assert x.grad is not None
    return [x.grad]


@use("a parameter frozen after the first step")
def frozen_later(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(net)
    loss_of(run(x)).backward()
    next(net.parameters()).requires_grad_(False)
    loss_of(run(x)).backward()
    return gradients(net)


@use("a parameter replaced after the first step")
def replaced_parameter(on_ring: OnRing) -> Values:
    net: Any = model()
    x, run = tokens(), on_ring(net)
    loss_of(run(x)).backward()
    net.mlp[0].weight = nn.Parameter(torch.randn_like(net.mlp[0].weight))
    y = run(x)
    loss_of(y).backward()
    return [y, *gradients(net)]


@use("`saved_tensors_hooks` around the call")
def saved_tensors(on_ring: OnRing) -> Values:
    net = model()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        y = on_ring(net)(tokens())
    loss_of(y).backward()
    return gradients(net)


@use("`save_on_cpu` around the call")
def on_cpu(on_ring: OnRing) -> Values:
    net = model()
    with torch.autograd.graph.save_on_cpu():
        y = on_ring(net)(tokens())
    loss_of(y).backward()
    return gradients(net)


@use("compiled autograd (`torch._dynamo.compiled_autograd._enable`) with `aot_eager` around `backward`")
def compiled_autograd(on_ring: OnRing) -> Values:
    return under_compiled_autograd(on_ring, torch.compile(backend="aot_eager"))


@use("compiled autograd with Inductor around `backward`")
def compiled_autograd_by_inductor(on_ring: OnRing) -> Values:
    return under_compiled_autograd(on_ring, torch.compile(backend="inductor"))


@use('compiled autograd with `backend="ring_dilated"` around `backward`: its graph runs as it is')
def compiled_autograd_by_ringpass(on_ring: OnRing) -> Values:
    return under_compiled_autograd(on_ring, torch.compile(backend="ring_dilated"))


def under_compiled_autograd(on_ring: OnRing, compiler: Any) -> Values:
    """The gradients of two steps whose backward compiled autograd traces and `compiler` compiles."""
    net, x = model(), tokens()
    run = on_ring(net)
    for _ in range(2):
        loss = loss_of(run(x))
        with torch._dynamo.compiled_autograd._enable(compiler):
            loss.backward()
    return gradients(net)


@use("`torch._dynamo.config.compiled_autograd` and `backward` inside a function compiled by `ring_dilated`")
def compiled_step(on_ring: OnRing) -> Values:
    net, x = model(), tokens()

    def train(x: Tensor) -> Any:
        loss = loss_of(net(x))
        loss.backward()
        return loss

    with torch._dynamo.config.patch(compiled_autograd=True):
        loss = on_ring(train)(x)
    return [loss + 0, *gradients(net)]


# --- checkpoints


@use("`checkpoint(use_reentrant=False)` around a compiled model", fast=True)
def checkpoint_around(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)
    y: Any = checkpoint(on_ring(net), x, use_reentrant=False)
    loss_of(y).backward()
    assert x.grad is not None
    return [x.grad, *gradients(net)]


@use("`checkpoint(use_reentrant=False)` around two calls and ops between them")
def checkpoint_around_two(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)
    run = on_ring(net)
    y: Any = checkpoint(lambda z: run(run(z) * 2) + 1, x, use_reentrant=False)
    loss_of(y).backward()
    assert x.grad is not None
    return [x.grad, *gradients(net)]


@use('`checkpoint(use_reentrant=False)` around a model with `outputs="gathered"`')
def checkpoint_around_gathered(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)
    y: Any = checkpoint(on_ring(net, outputs="gathered"), x, use_reentrant=False)
    loss_of(y).backward()
    assert x.grad is not None
    return [x.grad, *gradients(net)]


@use("`checkpoint(use_reentrant=True)` around a compiled model")
def reentrant_around(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)
    y: Any = checkpoint(on_ring(net), x, use_reentrant=True)
    loss_of(y).backward()
    assert x.grad is not None
    return [x.grad, *gradients(net)]


class Inside(nn.Module):
    """A block under a checkpoint, inside the model."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.block, self.how = model(), how

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, **self.how)


@use("`checkpoint(use_reentrant=False)` inside the model")
def checkpoint_inside(on_ring: OnRing) -> Values:
    net = Inside(use_reentrant=False)
    loss_of(on_ring(net)(tokens())).backward()
    return gradients(net)


@use("`checkpoint(use_reentrant=True)` inside the model")
def reentrant_inside(on_ring: OnRing) -> Values:
    net, x = Inside(use_reentrant=True), tokens(True)
    loss_of(on_ring(net)(x)).backward()
    return gradients(net)


@use("`checkpoint` with a `context_fn` inside the model", "SelectiveCheckpointError", "without context_fn")
def selective_inside(on_ring: OnRing) -> Values:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    def keep() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    net = Inside(use_reentrant=False, context_fn=keep)
    loss_of(on_ring(net)(tokens())).backward()
    return gradients(net)


@use("`checkpoint_sequential` over compiled pieces")
def sequential(on_ring: OnRing) -> Values:
    net, x = nn.Sequential(model(), model()), tokens(True)
    y: Any = checkpoint_sequential([on_ring(part) for part in net], 2, x, use_reentrant=False)
    loss_of(y).backward()
    return gradients(net)


# --- hooks


@use("forward hooks on modules that change the output")
def forward_hook(on_ring: OnRing) -> Values:
    net: Any = model()
    net.mlp.register_forward_hook(lambda module, args, out: out * 2)
    return [on_ring(net)(tokens()) + 0]


@use("forward pre-hooks on the compiled model")
def pre_hook(on_ring: OnRing) -> Values:
    run = on_ring(model())
    run.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return [run(tokens()) + 0]


@use("a full backward hook on a module inside")
def module_backward_hook(on_ring: OnRing) -> Values:
    net: Any = model()
    net.mlp.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 2,))
    loss_of(on_ring(net)(tokens(True))).backward()
    return gradients(net)


@use("a tensor hook on an output")
def output_hook(on_ring: OnRing) -> Values:
    net, seen = model(), []
    y = on_ring(net)(tokens())
    y.register_hook(lambda grad: seen.append(grad + 0))
    loss_of(y).backward()
    return [*seen, *gradients(net)]


@use("a tensor hook on an input that changes its gradient")
def input_hook(on_ring: OnRing) -> Values:
    net, leaf = model(), tokens(True)
    x = leaf * 1
    x.register_hook(lambda grad: grad * 3)
    loss_of(on_ring(net)(x)).backward()
    assert leaf.grad is not None
    return [leaf.grad]


@use("a tensor hook on a value inside the model", fast=True)
def inner_hook(on_ring: OnRing) -> Values:
    net, x = model(), tokens(True)

    def run(z: Tensor) -> Tensor:
        y: Tensor = net(z)
        y.register_hook(lambda grad: grad * 3)
        return y * 2

    loss_of(on_ring(run)(x)).backward()
    return gradients(net)


@use("a hook on a parameter that scales its gradient")
def parameter_hook(on_ring: OnRing) -> Values:
    net = model()
    next(net.parameters()).register_hook(lambda grad: grad * 3)
    loss_of(on_ring(net)(tokens())).backward()
    return gradients(net)


@use("`register_post_accumulate_grad_hook` that steps the optimiser")
def post_accumulate(on_ring: OnRing) -> Values:
    net, seen = model(), []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda q: seen.append(q.grad.clone()))
    loss_of(on_ring(net)(tokens())).backward()
    return sorted(seen, key=lambda g: (g.shape, float(g.abs().sum())))


@use("`retain_grad` on an output")
def retained_output(on_ring: OnRing) -> Values:
    y = on_ring(model())(tokens())
    y.retain_grad()
    loss_of(y).backward()
    return [y.grad]
