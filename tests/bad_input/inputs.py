"""Odd inputs: lengths, dtypes, strides and kinds of tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bad_input.block import gradients, loss_of, model, once, step, tokens
from tests.bad_input.rank_cases import Cases, OnRing, Values
from tests.support.models import WIDTH

INPUTS = Cases()
use = INPUTS.add
ROWS, LENGTH, HEADS = 2, 13, 4


# --- lengths


@use("a batch of 0", fast=True)
def batch_0(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(rows=0))


@use("a batch of 1")
def batch_1(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(rows=1))


@use("no tokens: S = 0", fast=True)
def length_0(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(length=0))


@use("S = 1", fast=True)
def length_1(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(length=1))


@use("S = 2")
def length_2(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(length=2))


@use("S = 3, which is P on three ranks and 2P - 1 on two")
def length_3(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(length=3))


@use("S = 5, which is 2P - 1 on three ranks")
def length_5(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(length=5))


@use("S = 7, which is 2P + 1 on three ranks")
def length_7(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(length=7))


@use("S = 13, then 0, 1, 5 and 14")
def lengths_that_change(on_ring: OnRing) -> Values:
    net = model()
    run = on_ring(net)
    return [x for n in (13, 0, 1, 5, 14) for x in step(net, run, tokens(length=n))]


@use("`dynamic=True`: S = 13, then 1, 5 and 14")
def dynamic_lengths(on_ring: OnRing) -> Values:
    net = model()
    run = on_ring(net, dynamic=True)
    return [x for n in (13, 1, 5, 14) for x in step(net, run, tokens(length=n))]


@use("a batch of 2, then of 0, then of 3")
def batches_that_change(on_ring: OnRing) -> Values:
    net = model()
    run = on_ring(net)
    return [x for n in (2, 0, 3) for x in step(net, run, tokens(rows=n))]


@use("queries without keys")
def no_keys(on_ring: OnRing) -> Values:
    q, k = torch.randn(2, 4, LENGTH, 8).double(), torch.randn(2, 4, 0, 8).double()
    return [on_ring(lambda q, k: F.scaled_dot_product_attention(q, k, k))(q, k) + 0]


@use("a head dim of 0")
def no_channels(on_ring: OnRing) -> Values:
    q = torch.randn(2, 4, LENGTH, 0).double()
    return [on_ring(lambda q: F.scaled_dot_product_attention(q, q, q))(q) + 0]


@use("no heads", fast=True)
def no_heads(on_ring: OnRing) -> Values:
    q = torch.randn(2, 0, LENGTH, 8).double()
    return [on_ring(lambda q: F.scaled_dot_product_attention(q, q, q))(q) + 0]


@use("q, k and v of two dims (S, D)")
def two_dims(on_ring: OnRing) -> Values:
    q = torch.randn(LENGTH, 8).double()
    return [on_ring(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True))(q) + 0]


@use("q, k and v of five dims")
def five_dims(on_ring: OnRing) -> Values:
    q = torch.randn(2, 3, 4, LENGTH, 8).double()
    return [on_ring(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True))(q) + 0]


# --- dtypes


@use("float32")
def single(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(dtype=torch.float32))


@use("float16 on a CPU")
def half(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(dtype=torch.float16))


@use("bfloat16")
def bfloat(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(dtype=torch.bfloat16))


@use("complex q, k and v")
def complex_attention(on_ring: OnRing) -> Values:
    q = torch.randn(2, 4, LENGTH, 8, dtype=torch.complex128)
    return [on_ring(lambda q: F.scaled_dot_product_attention(q, q, q))(q) + 0]


@use("a complex input, made real before attention")
def complex_input(on_ring: OnRing) -> Values:
    net, z = model(), torch.randn(ROWS, LENGTH, WIDTH // 2, dtype=torch.complex128)
    return [on_ring(lambda z: net(torch.view_as_real(z).flatten(-2)))(z) + 0]


@use("a conjugated view as an input", fast=True)
def conjugated(on_ring: OnRing) -> Values:
    net, z = model(), torch.randn(ROWS, LENGTH, WIDTH // 2, dtype=torch.complex128).conj()
    return [on_ring(lambda z: net(torch.view_as_real(z.resolve_conj()).flatten(-2)))(z) + 0]


@use("a negative view as an input")
def negated(on_ring: OnRing) -> Values:
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    return [on_ring(model())(x) + 0]


@use("q of float64, k and v of float32")
def mixed_dtypes(on_ring: OnRing) -> Values:
    q = torch.randn(2, 4, LENGTH, 8).double()
    return [on_ring(lambda q: F.scaled_dot_product_attention(q, q.float(), q.float()))(q) + 0]


@use("integer q, k and v")
def integer_attention(on_ring: OnRing) -> Values:
    q = torch.ones(2, 4, LENGTH, 8, dtype=torch.int64)
    return [on_ring(lambda q: F.scaled_dot_product_attention(q, q, q))(q) + 0]


@use("token ids of int16 and uint8")
def small_ids(on_ring: OnRing) -> Values:
    net, table = model(), torch.randn(61, WIDTH).double()
    run = on_ring(lambda ids: net(table[ids.long()]))
    return [run(torch.randint(61, (ROWS, LENGTH), dtype=dtype)) + 0 for dtype in (torch.int16, torch.uint8)]


@use("token ids beyond the table")
def ids_out_of_range(on_ring: OnRing) -> Values:
    net, table = model(), nn.Embedding(61, WIDTH).double()
    return [on_ring(lambda ids: net(table(ids)))(torch.full((ROWS, LENGTH), 99)) + 0]


@use("a float8 input, cast inside")
def float8(on_ring: OnRing) -> Values:
    net, x = model(), tokens(dtype=torch.float32).to(torch.float8_e4m3fn)
    return [on_ring(lambda x: net(x.double()))(x) + 0]


# --- strides and kinds of tensors


@use("a transposed input")
def transposed(on_ring: OnRing) -> Values:
    return once(on_ring, tokens().transpose(0, 1).contiguous().transpose(0, 1))


@use("every second token of a tensor")
def strided(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(length=2 * LENGTH)[:, ::2])


@use("an expanded input, of stride 0")
def expanded(on_ring: OnRing) -> Values:
    return once(on_ring, tokens(rows=1).expand(3, -1, -1))


@use("tokens that overlap in memory")
def overlapping(on_ring: OnRing) -> Values:
    x = torch.randn(LENGTH * WIDTH + WIDTH).double().as_strided((2, LENGTH, WIDTH), (WIDTH, WIDTH // 2, 1))
    return once(on_ring, x)


@use("an input with a storage offset")
def with_offset(on_ring: OnRing) -> Values:
    return once(on_ring, torch.randn(1 + ROWS * LENGTH * WIDTH).double()[1:].view(ROWS, LENGTH, WIDTH))


@use("one tensor as two inputs")
def same_twice(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    return [on_ring(lambda a, b: net(a + b))(x, x) + 0]


@use("overlapping views of one tensor as two inputs")
def views_twice(on_ring: OnRing) -> Values:
    net, x = model(), tokens(length=LENGTH + 1)
    return [on_ring(lambda a, b: net(a + b))(x[:, 1:], x[:, :-1]) + 0]


@use("a sparse input")
def sparse(on_ring: OnRing) -> Values:
    net, x = model(), tokens().to_sparse()
    return [on_ring(lambda x: net(x.to_dense()))(x) + 0]


@use("a nested tensor as an input")
def nested_tensor(on_ring: OnRing) -> Values:
    x = torch.nested.nested_tensor([tokens(rows=1)[0], tokens(length=7, rows=1)[0]], layout=torch.jagged)
    y = on_ring(model())(x)
    return [y.to_padded_tensor(0.0)]


class Named(Tensor):
    """A class that only adds to Tensor."""


@use("a subclass of `Tensor` without `__torch_dispatch__` as an input: the output is of this class", fast=True)
def subclass(on_ring: OnRing) -> Values:
    net = model()
    y = on_ring(net)(tokens().as_subclass(Named))
    assert type(y) is Named
    loss_of(y).backward()
    return [y.as_subclass(Tensor) + 0, *gradients(net)]


@use(
    "a wrapper of tensors (a subclass with `__torch_dispatch__`) as an input",
    "InputError",
    "which wraps other tensors: expected a plain tensor",
    fast=True,
)
def wrapper(on_ring: OnRing) -> Values:
    from torch.testing._internal.two_tensor import TwoTensor

    x = tokens()
    return [on_ring(model())(TwoTensor(x, x.clone())).a + 0]


@use("an `nn.Parameter` as an input")
def parameter_input(on_ring: OnRing) -> Values:
    x = nn.Parameter(tokens())
    on_ring(model())(x).pow(2).mean().backward()
    assert x.grad is not None
    return [x.grad]


@use("a numpy array as an input")
def numpy_input(on_ring: OnRing) -> Values:
    net = model()
    return [on_ring(lambda a: net(torch.from_numpy(a)))(tokens().numpy()) + 0]


@use("lists, dicts, None, texts and numbers as inputs")
def containers(on_ring: OnRing) -> Values:
    net = model()

    def call(xs: Any, named: Any, nothing: Any, word: str, n: int, scale: float) -> Any:
        return {"y": [net(xs[0] + named["b"]) * scale + n, word], "none": nothing}

    found = on_ring(call)([tokens()], {"b": tokens()}, None, "word", 3, 0.5)
    assert found["none"] is None and found["y"][1] == "word"
    return [found["y"][0] + 0]


@use("a missing argument")
def missing(on_ring: OnRing) -> Values:
    return [on_ring(model())()]


@use("a superfluous argument")
def superfluous(on_ring: OnRing) -> Values:
    return [on_ring(model())(tokens(), tokens(), tokens())]


@use("None as the input")
def none(on_ring: OnRing) -> Values:
    return [on_ring(model())(None)]


@use("an input of another width")
def other_width(on_ring: OnRing) -> Values:
    return [on_ring(model())(torch.randn(ROWS, LENGTH, WIDTH + 1).double())]


@use("an input of another dtype than the weights")
def other_dtype(on_ring: OnRing) -> Values:
    return [on_ring(model())(tokens(dtype=torch.float32))]
