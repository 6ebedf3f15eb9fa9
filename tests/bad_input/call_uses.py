"""What is compiled, from where it is called, and what is done with its outputs."""

from __future__ import annotations

import threading
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from ringpass.kernels import table as kernels
from tests.bad_input.block import gradients, loss_of, model, tokens
from tests.bad_input.rank_cases import Cases, OnRing, Values
from tests.support.models import WIDTH, Block

CALLED = Cases()
use = CALLED.add

ROWS, LENGTH = 2, 13


@use("`torch.compile` of a function", fast=True)
def function(on_ring: OnRing) -> Values:
    net = model()
    y = on_ring(lambda x: net(x) * 2)(tokens())
    loss_of(y).backward()
    return [y, *gradients(net)]


@use("`torch.compile` of attention itself")
def attention_alone(on_ring: OnRing) -> Values:
    q = torch.randn(ROWS, 4, LENGTH, 8, dtype=torch.float64, requires_grad=True)
    y = on_ring(F.scaled_dot_product_attention)(q, q, q, is_causal=True)
    loss_of(y).backward()
    assert q.grad is not None
    return [y, q.grad]


@use("`torch.compile` of a bound method")
def method(on_ring: OnRing) -> Values:
    net = model()
    return [on_ring(net.forward)(tokens()) + 0]


@use("`torch.compile` of a module that is compiled already")
def nested_same(on_ring: OnRing) -> Values:
    net = model()
    y = on_ring(on_ring(net))(tokens())
    loss_of(y).backward()
    return [y, *gradients(net)]


@use("a compiled model inside another compiled model")
def nested(on_ring: OnRing) -> Values:
    parts = nn.ModuleList([model(), model()])
    inner = on_ring(parts[0])
    y = on_ring(lambda x: parts[1](inner(x)))(tokens())
    loss_of(y).backward()
    return [y, *gradients(parts)]


@use("a model compiled by Inductor's `eager` backend inside one on the ring")
def nested_other(on_ring: OnRing) -> Values:
    parts = nn.ModuleList([model(), model()])
    inner = torch.compile(parts[0], backend="eager")
    y = on_ring(lambda x: parts[1](inner(x)))(tokens())
    loss_of(y).backward()
    return [y, *gradients(parts)]


@use("a model on the ring called in one compiled by another backend")
def nested_in_other(on_ring: OnRing) -> Values:
    parts = nn.ModuleList([model(), model()])
    inner = on_ring(parts[0])
    y = torch.compile(lambda x: parts[1](inner(x)), backend="aot_eager")(tokens())
    loss_of(y).backward()
    return [y, *gradients(parts)]


@use("two compiled models, the output of one into the other")
def two_models(on_ring: OnRing) -> Values:
    parts = nn.ModuleList([model(), model()])
    first, second = (on_ring(part) for part in parts)
    y = second(first(tokens()))
    loss_of(y).backward()
    return [y, *gradients(parts)]


@use("`torch._dynamo.reset()` between two steps")
def after_reset(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(net)
    loss_of(run(x)).backward()
    torch._dynamo.reset()
    loss_of(run(x)).backward()
    return gradients(net)


@use('`set_stance("force_eager")` on all ranks')
def force_eager(on_ring: OnRing) -> Values:
    run, x = on_ring(model()), tokens()
    with torch.compiler.set_stance("force_eager"):
        return [run(x) + 0]


@use("`torch.compiler.disable` on the model")
def disabled(on_ring: OnRing) -> Values:
    net = model()
    return [on_ring(torch.compiler.disable(net))(tokens()) + 0]


@use("calls from a second thread, one after the other")
def second_thread(on_ring: OnRing) -> Values:
    net, x, found = model(), tokens(), []
    run = on_ring(net)
    loss_of(run(x)).backward()

    def work() -> None:
        y = run(x)
        loss_of(y).backward()
        found.append(y + 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return [*found, *gradients(net)]


@use("calls from two threads at once", "UnsupportedError", "two threads", as_one_device=(1,), fast=True)
def two_threads(on_ring: OnRing) -> Values:
    run, x = on_ring(model()), tokens()
    raised, threads = list[Exception](), list[threading.Thread]()
    run(x)
    forward = kernels.forward

    def work() -> None:
        try:
            run(x)
        except Exception as error:
            raised.append(error)

    def meanwhile(*args: Any) -> Any:
        if not threads:
            threads.append(threading.Thread(target=work))
            threads[0].start()
            threads[0].join()
        return forward(*args)

    with patch.object(kernels, "forward", meanwhile):
        y = run(x) + 0
    if raised:
        raise raised[0]
    return [y]


@use("the first call in a second thread")
def first_in_thread(on_ring: OnRing) -> Values:
    net, x, found = model(), tokens(), []
    run = on_ring(net)
    thread = threading.Thread(target=lambda: found.append(run(x) + 0))
    thread.start()
    thread.join()
    return [*found]


@use("train, then eval, then train")
def modes(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(net)
    run.train()
    loss_of(run(x)).backward()
    run.eval()
    with torch.no_grad():
        y = run(x) + 0
    run.train()
    loss_of(run(x)).backward()
    return [y, *gradients(net)]


@use("`torch.set_default_dtype` and `torch.set_default_device`")
def defaults(on_ring: OnRing) -> Values:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("cpu"):
            return [on_ring(Block(causal=True))(torch.randn(ROWS, LENGTH, WIDTH)) + 0]
    finally:
        torch.set_default_dtype(torch.float32)


@use("a `TorchFunctionMode` around the call")
def function_mode(on_ring: OnRing) -> Values:
    from torch.overrides import TorchFunctionMode

    class Count(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    run = on_ring(model())
    with Count():
        y = run(tokens())
    return [y + 0]


@use("a `TorchDispatchMode` around the call")
def dispatch_mode(on_ring: OnRing) -> Values:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    run = on_ring(model())
    with Count():  # type: ignore[no-untyped-call]
        y = run(tokens()) + 0
    return [y]


@use("`FlopCounterMode` around the call")
def flop_counter(on_ring: OnRing) -> Values:
    from torch.utils.flop_counter import FlopCounterMode

    run = on_ring(model())
    with FlopCounterMode(display=False):
        y = run(tokens()) + 0
    return [y]


@use("an output changed in place")
def output_in_place(on_ring: OnRing) -> Values:
    net = model()
    y = on_ring(net)(tokens())
    y.mul_(2)
    loss_of(y).backward()
    return gradients(net)


@use("a slice of an output changed in place under `no_grad`")
def output_slice_in_place(on_ring: OnRing) -> Values:
    with torch.no_grad():
        y = on_ring(model())(tokens())
        y[:, 3:5] = 0
    return [y + 0]


@use("`numpy()`, `tolist()` and `item()` of outputs")
def to_python(on_ring: OnRing) -> Values:
    with torch.no_grad():
        y = on_ring(model())(tokens())
    return [torch.from_numpy(y.numpy()), torch.tensor(y.tolist(), dtype=torch.float64), torch.tensor(y.sum().item())]


@use("`data_ptr()` of an output")
def data_pointer(on_ring: OnRing) -> Values:
    with torch.no_grad():
        y = on_ring(model())(tokens())
    return [torch.tensor(y.data_ptr() != 0)]


@use("`y.data` of an output")
def output_data(on_ring: OnRing) -> Values:
    y = on_ring(model())(tokens())
    return [y.data + 0, y.detach() + 0]


@use("`out=` into an output")
def out_argument(on_ring: OnRing) -> Values:
    with torch.no_grad():
        y = on_ring(model())(tokens())
        torch.add(torch.ones_like(y), 1, out=y)
    return [y + 0]
