"""Transforms, exports, traces and copies of a compiled model and of its outputs."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile

import torch

from tests.bad_input.block import gradients, loss_of, model, tokens
from tests.bad_input.rank_cases import Cases, OnRing, Values

TRANSFORMS = Cases()
use = TRANSFORMS.add


# --- torch.func and export


@use("`torch.func.grad` of the compiled model")
def func_grad(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(net)
    return [torch.func.grad(lambda z: loss_of(run(z)))(x)]


@use("`torch.func.vmap` of the compiled model")
def func_vmap(on_ring: OnRing) -> Values:
    run = on_ring(model())
    return [torch.func.vmap(run)(torch.stack([tokens(), tokens()]))]


@use("`torch.func.jvp` of the compiled model")
def func_jvp(on_ring: OnRing) -> Values:
    run, x = on_ring(model()), tokens()
    return list(torch.func.jvp(run, (x,), (torch.ones_like(x),)))


@use("`torch.func.functional_call` of the compiled model", fast=True)
def functional(on_ring: OnRing) -> Values:
    net = model()
    weights = {name: p.detach() * 2 for name, p in net.named_parameters()}
    run = on_ring(net)
    if run is not net:
        weights = {f"_orig_mod.{name}": p for name, p in weights.items()}
    return [torch.func.functional_call(run, weights, (tokens(),)) + 0]


@use("a compiled function that calls `functional_call`")
def functional_inside(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    weights = {name: (p.detach() * 2).requires_grad_() for name, p in net.named_parameters()}
    run = on_ring(lambda w, z: torch.func.functional_call(net, w, (z,)))
    loss_of(run(weights, x)).backward()
    return [w.grad for w in weights.values() if w.grad is not None]


@use(
    "`torch.func.grad` of attention inside the function",
    "RuntimeError",
    "is not implemented",
)
def grad_inside(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(lambda z: torch.func.grad(lambda y: loss_of(net(y)))(z))
    return [run(x) + 0]


@use("`torch.func.vmap` inside the compiled function")
def vmap_inside(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    with torch.no_grad():
        return [on_ring(lambda z: torch.func.vmap(lambda y: net(y[None])[0])(z))(x) + 0]


@use("`torch.export` of the compiled model")
def exported(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    return [torch.export.export(on_ring(net), (x,)).module()(x)]


@use("AOTInductor of the exported compiled model, loaded again")
def packaged(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    program = torch.export.export(on_ring(net), (x,))
    with tempfile.TemporaryDirectory() as folder:
        file = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
        return [torch._inductor.aoti_load_package(file)(x)]


@use("`aot_compile` of a compiled function", "UnsupportedError", "saves a compiled function to a file", fast=True)
def compiled_ahead(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(lambda m, z: m(z), fullgraph=True)
    return [run.aot_compile(((net, x), {}))(net, x)] if hasattr(run, "aot_compile") else [run(net, x)]


@use("`torch.jit.trace` of the compiled model", "RuntimeError", "not supported at the moment")
def jit_traced(on_ring: OnRing) -> Values:
    x = tokens()
    return [torch.jit.trace(on_ring(model()), (x,), check_trace=False)(x)]


@use("`make_fx` of the compiled model", "RuntimeError", "not supported at the moment")
def made_fx(on_ring: OnRing) -> Values:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = tokens()
    return [make_fx(on_ring(model()))(x)(x)]


@use("the compiled model on `meta` tensors", "InputError", "on the device 'meta'", as_one_device=(1,), fast=True)
def on_meta(on_ring: OnRing) -> Values:
    net = model().to("meta")
    return [torch.zeros(on_ring(net)(tokens().to("meta")).shape)]


@use("the compiled model on fake tensors", "InputError", "fake tensors", as_one_device=(1,), fast=True)
def on_fakes(on_ring: OnRing) -> Values:
    from torch._subclasses.fake_tensor import FakeTensorMode

    net, x = model(), tokens()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = on_ring(net)(mode.from_tensor(x))
    return [torch.zeros(y.shape)]


# --- copies


@use(
    "`copy.deepcopy` of a model with the option `group` (without: as one device)",
    "TypeError",
    "cannot pickle",
)
def deep_copied(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(net)
    run(x)
    other = copy.deepcopy(run)
    y = other(x)
    loss_of(y).backward()
    return [y, *gradients(other)]


@use("`pickle` of a model with the option `group` (without: as one device)", "TypeError", "cannot pickle")
def pickled(on_ring: OnRing) -> Values:
    net, x = model(), tokens()
    run = on_ring(net)
    run(x)
    return [pickle.loads(pickle.dumps(run))(x) + 0]


@use("`torch.save` of a model with the option `group` (without: as one device)", "TypeError", "cannot pickle")
def saved(on_ring: OnRing) -> Values:
    run, x, file = on_ring(model()), tokens(), io.BytesIO()
    run(x)
    torch.save(run, file)
    file.seek(0)
    return [torch.load(file, weights_only=False)(x) + 0]


@use("`state_dict` into a new compiled model")
def state_dict(on_ring: OnRing) -> Values:
    run, other = on_ring(model()), on_ring(model())
    other.load_state_dict(run.state_dict())
    return [other(tokens()) + 0]


@use("`copy.deepcopy` of an output")
def deep_copied_output(on_ring: OnRing) -> Values:
    with torch.no_grad():
        y = on_ring(model())(tokens())
    return [copy.deepcopy(y) + 0]


@use("`pickle` of an output")
def pickled_output(on_ring: OnRing) -> Values:
    with torch.no_grad():
        y = on_ring(model())(tokens())
    return [pickle.loads(pickle.dumps(y)) + 0]


@use("`torch.save` of an output")
def saved_output(on_ring: OnRing) -> Values:
    with torch.no_grad():
        y = on_ring(model())(tokens())
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    return [torch.load(file) + 0]
