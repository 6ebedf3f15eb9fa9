"""Odd values and masks; inputs that are returned, and written in place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bad_input.block import gradients, model, once, step, tokens
from tests.bad_input.rank_cases import Cases, OnRing, Values
from tests.support.models import WIDTH

VALUES = Cases()
use = VALUES.add
ROWS, LENGTH, HEADS = 2, 13, 4


class Masked(nn.Module):
    """Attention under a mask that comes with the call: (B, S, D), and bools that broadcast to (B, 1, S, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


# --- values


def finite(tensors: Values) -> Values:
    """Whether each is finite: which rows are not depends on the tiles, since 0 times a value that is not finite is NaN,
    and a tile that the mask leaves empty is not computed."""
    return [torch.tensor([bool(x.isfinite().all()) for x in tensors])]


@use("NaN in one token: the rows that attend to it are NaN; on one device earlier rows, too (0 times NaN)", fast=True)
def nan(on_ring: OnRing) -> Values:
    x = tokens()
    x[0, 5, 3] = torch.nan
    y, *others = once(on_ring, x)
    return [y[0, 5:], y[1], *finite(others)]


@use("NaN in a token of float32 and of float64, in tiles of 1 to 40 keys: the same rows as above")
def nan_in_short_tiles(on_ring: OnRing) -> Values:
    found = []
    for dtype in (torch.float32, torch.float64):
        for length in (17, 23, 29, 40):
            x = tokens(length=length, dtype=dtype)
            x[0, 5, 3] = torch.nan
            y, *others = once(on_ring, x)
            found += [y[0, 5:], y[1], *finite(others)]
    return found


@use("NaN in a query of raw attention: its row is NaN")
def nan_query(on_ring: OnRing) -> Values:
    q = torch.randn(1, 2, LENGTH, 8).double()
    k = q.clone()
    q[0, 0, 4, 1] = torch.nan
    return [on_ring(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True))(q, k) + 0]


@use("infinity in one token: outputs and gradients are not finite; rows may differ")
def infinite(on_ring: OnRing) -> Values:
    x = tokens()
    x[0, 5, 3] = torch.inf
    return finite(once(on_ring, x))


@use("NaN in a key of raw attention: the rows that attend to it are NaN")
def nan_key(on_ring: OnRing) -> Values:
    q = torch.randn(1, 2, LENGTH, 8).double()
    k = q.clone()
    k[0, 0, 4, 1] = torch.nan
    return [on_ring(lambda q, k: F.scaled_dot_product_attention(q, k, q, is_causal=True))(q, k) + 0]


@use("an infinite value of raw attention: the output is not finite; rows may differ")
def infinite_value(on_ring: OnRing) -> Values:
    q = torch.randn(1, 2, LENGTH, 8).double()
    v = q.clone()
    v[0, 0, 4, 1] = torch.inf
    return finite([on_ring(lambda q, v: F.scaled_dot_product_attention(q, q, v, is_causal=True))(q, v) + 0])


@use("denormal and huge values")
def extreme(on_ring: OnRing) -> Values:
    x = tokens() * torch.logspace(-300, 100, LENGTH, dtype=torch.float64)[:, None]
    return once(on_ring, x)


@use("all zeros")
def zeros(on_ring: OnRing) -> Values:
    return once(on_ring, torch.zeros(ROWS, LENGTH, WIDTH).double())


# --- masks


def masked(on_ring: OnRing, mask: Tensor) -> Values:
    """A step under a mask."""
    net = Masked().double()
    return step(net, on_ring(net), tokens(), mask)


@use("a mask of all False", fast=True)
def all_false(on_ring: OnRing) -> Values:
    return masked(on_ring, torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool))


@use("a mask with some rows of False")
def rows_of_false(on_ring: OnRing) -> Values:
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    mask[..., 3:6, :] = False
    return masked(on_ring, mask)


@use("a mask of all True")
def all_true(on_ring: OnRing) -> Values:
    return masked(on_ring, torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool))


@use("an additive mask of all -inf")
def all_minus_infinity(on_ring: OnRing) -> Values:
    return masked(on_ring, torch.full((1, 1, LENGTH, LENGTH), -torch.inf, dtype=torch.float64))


@use("an additive mask with NaN")
def nan_mask(on_ring: OnRing) -> Values:
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64)
    mask[..., 4, 4] = torch.nan
    return masked(on_ring, mask)


@use("an additive mask with +inf")
def plus_infinity(on_ring: OnRing) -> Values:
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64)
    mask[..., 4, 4] = torch.inf
    return masked(on_ring, mask)


@use("a mask of another length")
def wrong_mask(on_ring: OnRing) -> Values:
    return masked(on_ring, torch.ones(1, 1, LENGTH, LENGTH + 1, dtype=torch.bool))


@use("a mask of integers")
def integer_mask(on_ring: OnRing) -> Values:
    return masked(on_ring, torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.int64))


@use("a mask (B, S) that does not broadcast")
def unbroadcast_mask(on_ring: OnRing) -> Values:
    return masked(on_ring, torch.ones(ROWS, LENGTH, dtype=torch.bool))


@use("a mask that needs a gradient")
def learned_mask(on_ring: OnRing) -> Values:
    net = Masked().double()
    mask = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64, requires_grad=True)
    found = step(net, on_ring(net), tokens(), mask)
    assert mask.grad is not None
    return [*found, mask.grad]


@use("a mask and `is_causal=True` together")
def mask_and_causal(on_ring: OnRing) -> Values:
    q, mask = torch.randn(1, 2, LENGTH, 8).double(), torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    run = on_ring(lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m, is_causal=True))
    return [run(q, mask) + 0]


@use("`dropout_p` of 1")
def all_dropped(on_ring: OnRing) -> Values:
    q = torch.randn(1, 2, LENGTH, 8).double()
    return [on_ring(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=1.0))(q) + 0]


@use("`dropout_p` above 1", "UnsupportedError", "between 0 and 1", fast=True)
def too_much_dropout(on_ring: OnRing) -> Values:
    q = torch.randn(1, 2, LENGTH, 8).double()
    return [on_ring(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=1.5))(q) + 0]


@use("`scale` of 0 and negative")
def scales(on_ring: OnRing) -> Values:
    q = torch.randn(1, 2, LENGTH, 8).double()
    runs = [on_ring(lambda q, s=s: F.scaled_dot_product_attention(q, q, q, scale=s)) for s in (0.0, -0.5)]
    return [run(q) + 0 for run in runs]


@use("heads that `enable_gqa` cannot group")
def wrong_heads(on_ring: OnRing) -> Values:
    q, k = torch.randn(1, 4, LENGTH, 8).double(), torch.randn(1, 3, LENGTH, 8).double()
    return [on_ring(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True))(q, k) + 0]


# --- outputs that are inputs, writes in place


@use("an input returned as it is")
def returned_input(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    y, same = on_ring(lambda x: (net(x), x))(x)
    assert same is x
    return [y + 0, same + 0]


@use("a view of an input returned", fast=True)
def returned_view(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    y, part = on_ring(lambda x: (net(x), x[:, 2:5]))(x)
    x.mul_(2)
    return [y + 0, part + 0]


@use("a transposed view of an input that needs a gradient returned")
def returned_grad_view(on_ring: OnRing) -> Values:
    net, x = model(), tokens().requires_grad_()
    y, part = on_ring(lambda x: (net(x), x.transpose(1, 2)))(x)
    (y.pow(2).mean() + part.pow(3).mean()).backward()
    assert x.grad is not None
    return [x.grad]


@use("a parameter returned")
def returned_parameter(on_ring: OnRing) -> Values:
    net: Any = model()
    y, weight = on_ring(lambda x: (net(x), net.mlp[0].weight))(tokens())
    (y.pow(2).mean() + weight.pow(2).sum()).backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@use("one output returned twice, and a view of it")
def returned_twice(on_ring: OnRing) -> Values:
    net = model()

    def call(x: Tensor) -> Any:
        y = net(x)
        return y, y, y[:, 1:]

    found = on_ring(call)(tokens())
    sum(y.pow(2).mean() for y in found).backward()
    return [y.detach() + 0 for y in found] + [p.grad for p in net.parameters() if p.grad is not None]


@use("nothing returned")
def returns_nothing(on_ring: OnRing) -> Values:
    net = model()

    def call(x: Tensor) -> None:
        net(x)

    assert on_ring(call)(tokens()) is None
    return [torch.ones(1)]


@use("a number and a shape returned beside the output")
def returns_numbers(on_ring: OnRing) -> Values:
    net = model()
    y, n, shape = on_ring(lambda x: (net(x), x.shape[1], x.shape))(tokens())
    return [y + 0, torch.tensor(n), torch.tensor(shape)]


@use("an input scaled in place before attention", fast=True)
def scaled_in_place(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    y = on_ring(lambda x: net(x.mul_(2)))(x)
    y.pow(2).mean().backward()
    return [y + 0, x, *(p.grad for p in net.parameters() if p.grad is not None)]


@use(
    "an input written in place after attention read it (on one rank: as `torch.compile` with any backend)",
    "RuntimeError",
    "has been modified by an inplace operation",
    as_one_device=(2, 3),
)
def written_after(on_ring: OnRing) -> Values:
    net, x = model(), tokens()

    def call(x: Tensor) -> Any:
        y = net(x)
        x.add_(y.detach())
        return y

    return [on_ring(call)(x) + 0, x]


@use("a slice of an input written in place")
def slice_written(on_ring: OnRing) -> Values:
    net, x = model(), tokens()

    def call(x: Tensor) -> Any:
        x[:, 3:5] = 0
        return net(x)

    return [on_ring(call)(x) + 0, x]


@use("an input that needs a gradient written in place")
def leaf_written(on_ring: OnRing) -> Values:
    net, x = model(), tokens().requires_grad_()
    return [on_ring(lambda x: net(x.mul_(2)))(x)]


@use("an input of stride 0 written in place", "RuntimeError", "more than one element of the written-to tensor")
def expanded_written(on_ring: OnRing) -> Values:
    net, x = model(), tokens(rows=1).expand(3, -1, -1)
    return [on_ring(lambda x: net(x.mul_(2)))(x)]


@use("a buffer updated in every call")
def buffer_written(on_ring: OnRing) -> Values:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model()
            self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))

        def forward(self, x: Tensor) -> Any:
            y = self.block(x)
            self.mean.mul_(0.9).add_(y.detach().mean((0, 1)), alpha=0.1)  # type: ignore[operator]
            return y

    net: Any = Counting()
    run = on_ring(net)
    return [*(run(tokens()) + 0 for _ in range(3)), net.mean]


@use("`x.data` assigned inside the model", "MutationError", "use an op that has a result")
def data_assigned(on_ring: OnRing) -> Values:
    net, x = model(), tokens()

    def call(x: Tensor) -> Any:
        x.data = x.data * 2
        return net(x)

    return [on_ring(call)(x) + 0]


@use("`resize_` of an input inside the model")
def resized(on_ring: OnRing) -> Values:
    net, x = model(), tokens()

    def call(x: Tensor) -> Any:
        y = net(x)
        x.resize_(1, 2)
        return y

    return [on_ring(call)(x) + 0]


@use("an input written between forward and backward", ranks=(1,))
def written_before_backward(on_ring: OnRing) -> Values:
    net, x = model(), tokens(needs_grad=True)
    y = on_ring(net)(x)
    with torch.no_grad():
        x.mul_(2)
    y.pow(2).mean().backward()
    return [x]


@use("an input written between forward and backward: gradients of what was passed", ranks=(2, 3))
def written_beside_local_tokens(on_ring: OnRing) -> Values:
    """One device refuses it, so there the input is not written."""
    net, x = model(), tokens(needs_grad=True)
    run = on_ring(net)
    y = run(x)
    if run is not net:
        with torch.no_grad():
            x.mul_(2)
    y.pow(2).mean().backward()
    assert x.grad is not None
    return [x.grad, *gradients(net)]
