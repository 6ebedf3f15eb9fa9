"""Capture: Dynamo's graph re-traced to functional, pre-dispatch ATen, one node per attention, linear, norm or loss.

Contract.  In: the GraphModule and the example inputs that Dynamo hands a backend; they are not changed.  Out:
`Captured`, whose graph has the same placeholders (order and names) and the same outputs, and in which
  - every node is a placeholder, a get_attr, an `OpOverload`, a higher-order operator, `operator.*`/`torch.sym_*` on
    sizes, or one of the state switches `_set_grad_enabled`, `_enter_autocast`, `_exit_autocast`, which hold for the
    nodes that follow, so that the order of nodes has a meaning;
  - no ATen op changes a tensor, save `aten.copy_(placeholder, value)`, after which all uses read the `copy_` node;
  - `meta["val"]` is a fake tensor (of `Captured.fake_mode`), a symbolic number or a tree of these; `stack_trace` and
    `nn_module_stack` point to the user's source;
  - nodes of an activation checkpoint stand in line and carry `recompute` and `ac_graph_id`, which AOTAutograd's
    partitioner reads; all other higher-order operators are kept whole, with Dynamo's own graphs as bodies.

Steps:
    inputs = fakes of the example inputs, with the symbols that Dynamo gave their sizes
    flat = flatten_checkpoints(gm)                    # a copy: bodies inlined and tagged
    outline_transforms(flat)                          # vmap and its like become submodules
    traced = make_fx(interpret flat, pre_dispatch)    # autocast really entered, higher-order operators kept
    inherit(traced, gm)                               # names, sources and module metadata of Dynamo's graph
    Functionaliser(traced).run()                      # an in-place op becomes its functional twin

Terms: a *region* is the stretch of nodes between a functorch transform's increment and decrement of its nesting level.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch._functorch.predispatch import lazy_load_decompositions
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx, track_tensor_tree
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from ringpass.errors import UnsupportedError
from ringpass.passes.capture.dynamo import fakify, inherit, restart_with_constant_floats
from ringpass.passes.capture.functionalize import Functionaliser

aten = torch.ops.aten
FLEX = torch.ops.higher_order.flex_attention


class CaptureError(UnsupportedError):
    """Dynamo's graph holds something that cannot be written as functional pre-dispatch ATen with the same meaning."""


class SelectiveCheckpointError(CaptureError):
    """An activation checkpoint chooses with a `context_fn` what it saves."""


@dataclass(frozen=True)
class Captured:
    """A captured graph, one fake tensor or symbolic number per placeholder, and the mode that these belong to."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    fake_mode: FakeTensorMode


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """The graph that Dynamo hands a backend, traced again as the module says; `gm` and its inputs are not changed.

    Raises CaptureError and MutationError for what has no functional form with the same meaning.
    """
    restart_with_constant_floats(gm)
    fake_mode, inputs = fakify(example_inputs)
    flat = flatten_checkpoints(gm)
    outline_transforms(flat)
    traced = _trace(flat, inputs, fake_mode)
    inherit(traced, gm, inputs)
    Functionaliser(traced, fake_mode).run()
    traced.graph.lint()
    traced.recompile()
    return Captured(traced, inputs, fake_mode)


# -- structure: checkpoints and functorch transforms -------------------------------------------------------------------


def _is_checkpoint(node: fx.Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and node.target.name() == "tag_activation_checkpoint"


def flatten_checkpoints(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of `gm` in which each checkpointed body stands in line, its nodes tagged to be recomputed in backward."""
    root, graph, ids = torch.nn.Module(), fx.Graph(), itertools.count(1)
    result = _inline(gm, root, graph, [], {}, ids)
    graph.output(result)
    return fx.GraphModule(root, graph)


def _inline(
    gm: fx.GraphModule,
    root: torch.nn.Module,
    graph: fx.Graph,
    args: Sequence[Any],
    tags: dict[str, Any],
    ids: Iterator[int],
) -> Any:
    """Copy `gm`'s nodes to the end of `graph`, with `args` for its placeholders if there are any; return its output."""
    values: dict[fx.Node, Any] = {}
    given = iter(args)
    for node in gm.graph.nodes:
        if node.op == "output":
            return fx.map_arg(node.args[0], values.__getitem__)
        if node.op == "placeholder" and args:
            values[node] = next(given)
        elif _is_checkpoint(node):
            body_args = fx.map_arg(node.args[1:], values.__getitem__)
            body, inner_tags = _checkpoint_body(gm, node, next(ids))
            values[node] = _inline(body, root, graph, body_args, inner_tags, ids)
        elif node.target is operator.getitem and isinstance(values[node.args[0]], (tuple, list)):
            values[node] = values[node.args[0]][node.args[1]]
        elif not (node.op == "get_attr" and all(map(_is_checkpoint, node.users))):
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta.update(tags)
            if node.op in ("get_attr", "call_module"):
                values[node].target = _adopt(root, gm, node)
    raise AssertionError("a graph without an output")


def _checkpoint_body(gm: fx.GraphModule, node: fx.Node, number: int) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The body of a checkpoint and the tags that AOTAutograd's partitioner expects on its nodes."""
    holder = node.args[0]
    assert isinstance(holder, fx.Node)
    body = gm.get_submodule(str(holder.target))
    assert isinstance(body, fx.GraphModule)
    if body.meta.get("_checkpoint_context_fn") is not None or node.kwargs.get("context_fn") is not None:
        raise SelectiveCheckpointError(
            "torch.utils.checkpoint with a context_fn (selective checkpointing) is not supported: its policy names ops "
            "that do not exist at this level.  Call checkpoint without context_fn"
        )
    return body, {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": number}


def _adopt(root: torch.nn.Module, gm: fx.GraphModule, node: fx.Node) -> str:
    """Register what a get_attr node names on `root` too; return its name there."""
    if node.op == "call_module":
        raise CaptureError(
            f"expected parameters as graph inputs, got the module call {node.target}; "
            "set torch._dynamo.config.inline_inbuilt_nn_modules = True"
        )
    value = operator.attrgetter(str(node.target))(gm)
    stem = str(node.target).replace(".", "_")
    for name in itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(1))):
        if not hasattr(root, name):
            setattr(root, name, value)
        if getattr(root, name) is value:
            return name
    raise AssertionError("unreachable")


def _function_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def outline_transforms(gm: fx.GraphModule) -> None:
    """Replace each outermost region of a functorch transform (vmap, grad, jvp) by a call of a submodule."""
    for region in _regions(gm.graph):
        _outline(gm, region)
    gm.recompile()


def _outline(gm: fx.GraphModule, region: list[fx.Node]) -> None:
    inside = set(region)
    ins = list(dict.fromkeys(i for node in region for i in node.all_input_nodes if i not in inside))
    outs = [node for node in region if any(user not in inside for user in node.users)]
    name = f"region_{region[0].name}"
    gm.add_submodule(name, _region_body(gm, region, ins, outs))
    with gm.graph.inserting_after(region[-1]):
        call = last = gm.graph.call_module(name, tuple(ins))
    for i, out in enumerate(outs):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(operator.getitem, (call, i))
        last.meta = dict(out.meta)
        out.replace_all_uses_with(last, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        gm.graph.erase_node(node)


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        opens = _function_name(node).endswith("_increment_nesting")
        if opens and depth == 0:
            regions.append([])
        depth += opens
        if depth:
            regions[-1].append(node)
        depth -= _function_name(node).endswith("_decrement_nesting")
    return regions


def _region_body(gm: fx.GraphModule, region: list[fx.Node], ins: list[fx.Node], outs: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in ins}
    for node in region:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outs))
    return fx.GraphModule(gm, graph)


# -- tracing -----------------------------------------------------------------------------------------------------------


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Run for real (on fakes) without a trace of it in the graph."""
    with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
        yield


class _Recorder(fx.Interpreter):
    """Runs a Dynamo graph under make_fx, with a rule for each node that make_fx would get wrong."""

    def __init__(self, gm: fx.GraphModule, autocasts: list[Any]) -> None:
        super().__init__(gm)
        self.autocasts = autocasts
        self.bodies: dict[int, fx.Node] = {}
        self.rules: dict[str, Callable[..., Any]] = {
            "_enter_autocast": self.enter_autocast,
            "_exit_autocast": self.exit_autocast,
            "_enter_inference_mode": self.enter_inference_mode,
            "_exit_inference_mode": torch._C._set_grad_enabled,
            "lazy_load_decompositions": self.load_decompositions,
            "_get_data_attr": torch.Tensor.detach,  # x.data, which leaves no node of its own
        }

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, HigherOrderOperator):
            return self.keep(target, _autocast(args) if target is FLEX else args, kwargs)
        rule = self.rules.get(getattr(target, "__name__", ""))
        return rule(*args) if rule else super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A functorch region: traced on its own to plain ATen, because a pre-dispatch trace loses batch dimensions."""
        region = self.module.get_submodule(target)
        assert isinstance(region, fx.GraphModule)
        _check_region(region, args)
        with _unrecorded():
            plain = make_fx(fx.Interpreter(region).run, tracing_mode="real")(*map(_own_copy, args))
        return _Recorder(plain, self.autocasts).run(*args)

    def keep(self, hop: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a higher-order operator as one node, whatever is in its bodies."""
        mode = get_proxy_mode()
        assert mode is not None
        tracer = mode.tracer
        proxy_args, proxy_kwargs = pytree.tree_map(lambda x: self.proxy(x, tracer), (args, kwargs))
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        with _unrecorded(), torch.no_grad():
            out = hop(*args, **kwargs)
            out = pytree.tree_map_only(
                torch.Tensor, lambda t: t.detach().requires_grad_(grad and t.is_floating_point()), out
            )
        proxy = tracer.create_proxy("call_function", hop, proxy_args, proxy_kwargs)
        return track_tensor_tree(out, proxy, constant=None, tracer=tracer)

    def proxy(self, x: Any, tracer: Any) -> Any:
        if not isinstance(x, torch.nn.Module):
            return tracer.unwrap_proxy(x)
        if id(x) not in self.bodies:
            name = tracer.get_fresh_qualname("body_")
            tracer.root.register_module(name, x)
            self.bodies[id(x)] = tracer.create_node("get_attr", name, (), {})
        return fx.Proxy(self.bodies[id(x)], tracer)

    def enter_autocast(self, *args: Any) -> Any:
        """Enters the region really, so that casts are recorded where torch makes them."""
        self.autocasts.append(torch.autocast(*args))
        return self.autocasts[-1].__enter__()  # sets the flags, and records the node

    def exit_autocast(self, _entered: Any) -> None:
        self.autocasts.pop().__exit__(None, None, None)

    def enter_inference_mode(self, enabled: bool) -> bool:
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(before and not enabled)  # what inference mode means to a graph
        return before

    def load_decompositions(self) -> None:
        with _unrecorded():
            lazy_load_decompositions()


def _autocast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of FlexAttention with q, k and v as its autocast rule casts them, the casts on record."""
    device = args[0].device.type
    if not torch.is_autocast_enabled(device) or args[0].dtype == torch.float64:
        return args
    return *(x.to(torch.get_autocast_dtype(device)) for x in args[:3]), *args[3:]


def _check_region(region: fx.GraphModule, args: Sequence[Any]) -> None:
    """A region is traced below autograd, where a node that steers autograd leaves no mark: refuse it."""
    if not (torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)):
        return
    for node in region.graph.nodes:
        no_grad = _function_name(node) == "_set_grad_enabled" and not node.args[0]
        if no_grad or getattr(node.target, "__name__", "") == "autograd_function_apply":
            raise CaptureError(
                f"{node.target} inside torch.func.vmap or grad, on values that need a gradient, is not supported; "
                "move it out of the transformed function"
            )


def _own_copy(x: Any) -> Any:
    """A fake that tracing may mutate: the one that AOTAutograd gets must keep its autograd state."""
    if not isinstance(x, torch.Tensor):
        return x
    mine = x.detach().requires_grad_(x.requires_grad)
    return mine if x.is_leaf or not x.requires_grad else mine.clone()


def _trace(flat: fx.GraphModule, inputs: Sequence[Any], fake_mode: FakeTensorMode) -> fx.GraphModule:
    autocasts: list[Any] = []
    allowed, fake_mode.allow_non_fake_inputs = fake_mode.allow_non_fake_inputs, True  # constants of the graph are real
    hooks = _disable_saved_tensors_hooks_during_tracing()  # a checkpoint around the call counts what its hooks see
    try:
        with hooks, fake_mode, torch.set_grad_enabled(torch.is_grad_enabled()), fx_traceback.preserve_node_meta():
            recorder = _Recorder(flat, autocasts)
            return make_fx(recorder.run, pre_dispatch=True, tracing_mode="real")(*map(_own_copy, inputs))
    finally:
        fake_mode.allow_non_fake_inputs = allowed
        while autocasts:
            autocasts.pop().__exit__(None, None, None)
