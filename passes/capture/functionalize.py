"""functional form: each in-place op of a captured graph becomes its functional twin.

Contract: afterwards no ATen op changes a tensor, save `aten.copy_(placeholder, value)`, which stands where the mutation
of an input stood and is what later uses read.  A write through a view goes into its base, and other views of it are
replayed.  What has no such form raises MutationError.

Terms: a *view* shares its storage with its *base*; the *twin* of `add_` is `add`.
"""

from __future__ import annotations

import operator
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from ringpass.errors import UnsupportedError
from ringpass.nodes import mutates

aten = torch.ops.aten


class MutationError(UnsupportedError):
    """A tensor is changed in place in a way that has no functional equivalent here."""


_TWIN_NAMES = {f"__i{name}__": f"bitwise_{name}" for name in ("and", "or", "xor")} | {"normal_": "normal_functional"}
_TWIN_OVERLOADS = {
    "aten::bernoulli_.float": "p",
    "aten::pow_.Tensor": "Tensor_Tensor",
    "aten::float_power_.Tensor": "Tensor_Tensor",
    "aten::floor_divide_.Tensor": "default",
}

# How a new value of a view goes into its base: by an op with the view's own arguments, by the inverse permutation,
# by a reshape, or as it is (then view and base have the same elements in the same places).
_SCATTERS = {"slice": aten.slice_scatter, "select": aten.select_scatter, "diagonal": aten.diagonal_scatter}
_TRANSPOSES = {"transpose", "t", "swapaxes", "swapdims"}
_RESHAPES = {"view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "view_as", "reshape_as"}
_IDENTITIES = {"alias", "detach", "contiguous", "to", "type_as", "dropout", "expand", "expand_as", "lift_fresh"}


def _op_name(target: object) -> str:
    """`add_` for aten.add_.Tensor; other targets as they print."""
    return str(target).split(".")[1] if isinstance(target, OpOverload) else str(target)


def functional_twin(op: OpOverload) -> OpOverload:
    """The op that returns what `op` writes into its first argument.  Raises MutationError where there is none."""
    writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in op._schema.arguments]
    namespace, in_place, own_overload = str(op).split(".")
    name = _TWIN_NAMES.get(in_place, in_place.removesuffix("_"))
    packet = getattr(getattr(torch.ops, namespace), name, None)
    overload = _TWIN_OVERLOADS.get(op.name(), own_overload)
    found = packet is not None and overload in packet.overloads() and name != in_place
    if not found or writes != [True] + [False] * (len(writes) - 1) or torch.Tag.inplace_view in op.tags:
        raise MutationError(f"{op} changes a tensor in place and has no functional form; use an op that has a result")
    twin: OpOverload = getattr(packet, overload)
    return twin


def _storages(value: object) -> set[int]:
    tensors = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor) and x.layout is torch.strided]
    return {x.untyped_storage()._cdata for x in tensors}


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    a, b = one.meta["val"].shape, other.meta["val"].shape
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


class Functionaliser:
    """Walks the graph once, keeping for each tensor the node that holds its present value.

    A write to a tensor gives it a new value, gives its base one (the base with the view's part replaced), and makes
    the other views of that base stale; a stale view that is used again is taken anew from its base's present value.
    """

    def __init__(self, gm: fx.GraphModule, fake_mode: FakeTensorMode) -> None:
        self.gm, self.graph, self.fake_mode = gm, gm.graph, fake_mode
        self.present: dict[fx.Node, fx.Node] = {}
        self.same: dict[fx.Node, fx.Node] = {}  # an in-place op's node -> the tensor it changed and returned
        self.base: dict[fx.Node, fx.Node] = {}
        self.views: dict[fx.Node, list[fx.Node]] = {}
        self.recipe: dict[fx.Node, tuple[Any, Any]] = {}  # a view's arguments, as first written
        self.stale: set[fx.Node] = set()
        self.needs_grad: set[fx.Node] = set()
        self.grad_enabled = True
        self.autocasts: list[Any] = []  # the arguments of the regions that are open here

    def run(self) -> None:
        """Rewrites the graph, if any of its ops changes a tensor.  Raises MutationError."""
        if not any(map(mutates, self.graph.nodes)):
            return
        self.grad_enabled = torch.is_grad_enabled()
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                self.step(node)
        for node in reversed([*self.base, *self.same]):
            if not node.users:
                self.graph.erase_node(node)

    def step(self, node: fx.Node) -> None:
        """Rewrites one node: its operands become present values, itself, if it changes a tensor, its twin."""
        if node.target is torch._C._set_grad_enabled:
            self.grad_enabled = bool(node.args[0])
        elif node.target is torch.amp.autocast_mode._enter_autocast:
            self.autocasts.append(node.args)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            self.autocasts.pop()
        original = node.args, node.kwargs
        if mutates(node):
            self.rewrite(node)
            return
        node.args, node.kwargs = fx.map_arg(original, self.read)
        self.note_gradient(node)
        source = self.viewed(node, original)
        if source is not None:
            self.base[node], self.recipe[node] = source, original
            self.views.setdefault(source, []).append(node)

    def viewed(self, node: fx.Node, original: Any) -> fx.Node | None:
        """The tensor that `node` is a view of, among its recorded arguments `original`; None: it has its own memory."""
        if node.op != "call_function":
            return None
        if node.target is operator.getitem and node.args[0] not in self.base:
            return None  # one result of several, each with its own memory
        mine, found = _storages(node.meta.get("val")), []
        fx.map_arg(original, lambda i: found.append(i) if mine & _storages(i.meta.get("val")) else None)
        return self.same.get(found[0], found[0]) if found else None

    def note_gradient(self, node: fx.Node) -> None:
        """Notes whether `node` needs a gradient, as autograd will see it."""
        value = node.meta.get("val")
        if node.op in ("placeholder", "get_attr"):
            needs = isinstance(value, torch.Tensor) and value.requires_grad
        else:
            needs = self.grad_enabled and not self.needs_grad.isdisjoint(node.all_input_nodes)
            needs = needs and _op_name(node.target) != "detach"
            if isinstance(value, torch.Tensor):
                needs = needs and (value.is_floating_point() or value.is_complex())
        if needs:
            self.needs_grad.add(node)

    def read(self, node: fx.Node) -> fx.Node:
        """The node with the present value of the tensor that `node` stood for when it was recorded."""
        node = self.same.get(node, node)
        if node in self.stale:
            if not (isinstance(node.target, OpOverload) or node.target is operator.getitem):
                raise MutationError(f"{node.target} returned a view of a tensor that is changed in place; clone it")
            self.stale.discard(node)
            args, kwargs = fx.map_arg(self.recipe[node], self.read)
            self.present[node] = self.emit(node, node.target, args, kwargs)
        return self.present.get(node, node)

    def rewrite(self, node: fx.Node) -> None:
        """Replace an in-place op by its twin, and let later readers of what it changed see the result."""
        assert isinstance(node.target, OpOverload)
        changed = node.args[0]
        if not isinstance(changed, fx.Node):
            raise MutationError(f"{node.target} changes a list of tensors in place; change them one by one")
        key = self.same[node] = self.same.get(changed, changed)
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.read)
        if node.target is aten.detach_.default:
            self.detach(node, key)
            return
        hidden = self.check_gradient(node, key)
        if node.target is aten.copy_.default and key.op == "placeholder":
            self.write(node, key, args[1], hidden)
            return
        if node.target in (aten.copy_.default, aten.fill_.Tensor):
            value = self.copied(node, args[0], args[1])
        else:
            if node.target is aten.bernoulli_.float:  # the twin has no default for p
                args = (*args, 0.5)[:2]
            value = self.emit(node, functional_twin(node.target), args, kwargs)
        if value.meta["val"].dtype != changed.meta["val"].dtype:
            value = self.emit(node, aten.to.dtype, (value, changed.meta["val"].dtype), {})
        self.write(node, key, value, hidden)

    def copied(self, node: fx.Node, into: fx.Node, source: fx.Node) -> fx.Node:
        """What `into.copy_(source)` or `into.fill_(source)` leaves in `into`; `aten.copy` has no derivative."""
        want, have = into.meta["val"], source.meta["val"]
        if not _same_shape(into, source):
            source = self.emit(node, aten.expand.default, (source, self.sizes(node, into)), {})
        if (want.dtype, want.device) != (have.dtype, have.device):
            return self.emit(node, aten.to.device, (source, want.device, want.dtype), {})
        return self.emit(node, aten.clone.default, (source,), {"memory_format": torch.contiguous_format})

    def detach(self, node: fx.Node, key: fx.Node) -> None:
        """`detach_` changes no number, only what autograd knows of the tensor."""
        value = self.read(key)
        if value in self.needs_grad:
            if key.op == "placeholder":
                raise MutationError(f"detach_() of the graph input {key.name} is not supported; use detach()")
            self.present[key] = self.emit(node, aten.detach.default, (value,), {})

    def check_gradient(self, node: fx.Node, key: fx.Node) -> bool:
        """Whether the in-place op `node` hides from autograd that it changes `key`, an input that nobody has read.

        Raises MutationError where it hides that of anything else.
        """
        root, hidden = key, False
        while root in self.base:
            base = self.base[root]
            if _op_name(root.target) == "detach" and self.read(base) in self.needs_grad:
                hidden = base.op == "placeholder" and not self.is_read(base)
                if not hidden:
                    raise MutationError(f"{node.target} changes, through detach(), a tensor that needs a gradient")
            root = base
        outside = root.op in ("placeholder", "get_attr")  # copy_ under no_grad does there what the in-place op did
        if not self.grad_enabled and not outside and self.read(key) in self.needs_grad:
            raise MutationError(f"{node.target} under no_grad changes a tensor that needs a gradient; use torch.where")
        return hidden

    def is_read(self, key: fx.Node) -> bool:
        """Whether something that needs a gradient has been computed from the present value of `key`."""
        users = [user for value in (key, self.read(key)) for user in value.users]
        return any(user in self.needs_grad and user.target is not aten.copy_.default for user in users)

    def written_outside(self, node: fx.Node, key: fx.Node, value: fx.Node, hidden: bool) -> fx.Node:
        """`copy_` into an input or constant; `hidden` from autograd, as under no_grad."""
        hidden = hidden and self.grad_enabled
        if hidden:
            self.graph.call_function(torch._C._set_grad_enabled, (False,))
        copied = self.emit(node, aten.copy_.default, (key, value), {})
        if hidden:
            self.graph.call_function(torch._C._set_grad_enabled, (True,))
        return copied

    def write(self, node: fx.Node, key: fx.Node, value: fx.Node, hidden: bool, through: fx.Node | None = None) -> None:
        """Give `key` a new value; `node` is the op that does it, `through` the view of `key` that it came by."""
        outside = key.op in ("placeholder", "get_attr")
        if outside:
            before = self.read(key)
            value = self.written_outside(node, key, value, hidden)
            if before in self.needs_grad:
                self.needs_grad.add(value)
        self.present[key] = value
        self.stale.discard(key)
        for view in self.views.get(key, ()):
            if view is not through or outside:
                self.make_stale(view)
        if key in self.base:
            base = self.base[key]
            self.write(node, base, self.scattered(node, key, self.read(base), value), hidden, through=key)

    def make_stale(self, view: fx.Node) -> None:
        """From now on, `view` and its views are taken anew from their base when they are used."""
        self.stale.add(view)
        for inner in self.views.get(view, ()):
            self.make_stale(inner)

    def scattered(self, node: fx.Node, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
        """The tensor `base` with the part that `view` shows replaced by `value`."""
        if not isinstance(base.meta["val"], torch.Tensor):
            raise MutationError(f"{node.target} changes one of several views of a tensor; change the tensor itself")
        name, shape = _op_name(view.target), base.meta["val"].shape
        (_, *rest), kwargs = fx.map_arg(self.recipe[view], self.read)
        if name in _SCATTERS:
            return self.emit(node, _SCATTERS[name].default, (base, value, *rest), kwargs)
        if name in _TRANSPOSES:
            value = self.emit(node, view.target, (value, *rest), kwargs)
            return self.emit(node, aten.contiguous.default, (value,), {})
        if name == "permute":
            order = [dim % len(shape) for dim in rest[0]]
            value = self.emit(node, view.target, (value, [order.index(dim) for dim in range(len(shape))]), kwargs)
            return self.emit(node, aten.contiguous.default, (value,), {})
        if name in _RESHAPES:
            return self.emit(node, aten.reshape.default, (value, self.sizes(node, base)), {})
        if name in _IDENTITIES and _same_shape(view, base):
            return value
        raise MutationError(f"{node.target} changes a tensor through {name}; change the tensor itself, or clone first")

    def sizes(self, node: fx.Node, tensor: fx.Node) -> list[int | fx.Node]:
        """The shape of `tensor`, with a node for each symbolic size."""
        shape = tensor.meta["val"].shape
        return [
            size if isinstance(size, int) else self.emit(node, aten.sym_size.int, (tensor, dim), {})
            for dim, size in enumerate(shape)
        ]

    def emit(self, like: fx.Node, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """Adds a call here, with its fake value and with the source lines of `like`."""
        node = self.graph.create_node("call_function", target, tuple(args), dict(kwargs), name=_op_name(target))
        node.meta = dict(like.meta)
        fake_args, fake_kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.fake_mode, torch.no_grad(), ExitStack() as regions:
            for region in self.autocasts:
                regions.enter_context(torch.autocast(*region))
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        self.note_gradient(node)
        return node
