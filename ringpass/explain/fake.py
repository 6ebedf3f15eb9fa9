"""fake: a model and its inputs as fake tensors, which have shapes and no data, run through Dynamo.

    with fake_call(model, args, kwargs, device="cpu", train=None) as call:
        call(backend)                           # Dynamo hands `backend` each graph of the model

The copy of the model shares everything with the original but its modules and tensors; a parameter that two modules
share is one fake, too.  Tensors on the device "meta" are seen on `device`.

Integers and booleans stay real, up to KNOWN of them in a tensor, and so does what is made of them alone: a model that
reads the sizes of pictures or the lengths of texts takes the branches that it takes in a run.

Contract: the model and its inputs are not changed, and no memory is taken for either, but for copies of those integers.
Dynamo's cache is emptied before and after, so that no run sees the lengths of another: what the process has compiled is
compiled again at its next call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

from ringpass.errors import InputError, RingpassError, UnsupportedError
from ringpass.logging_calls import skip_logging_calls

Backend = Callable[..., Any]
KNOWN = 2**20
"""Elements of a tensor that stays real."""
SHAPED_BY_DATA = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output
FACTORIES = ("_like", "aten::new_")
"""What the names of ops have in them that take a shape from a tensor, and no value."""


class KnownMode(FakeTensorMode):
    """Fake tensors, beside real ones: integers that are made of real tensors, or of numbers, are real."""

    inside = False  # of an op that a fake is decomposed into: nothing is real there

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What `func` makes of its arguments: real where all that it is made of is, and small; else fake.

        Raises UnsupportedError where it would write a fake value to a real tensor.
        """
        kwargs = kwargs or {}
        if self.inside:
            return super().dispatch(func, types, args, kwargs)
        self.inside = True
        try:
            if not self._stays_real(func, types, args, kwargs):
                _refuse_unknown(func, args, kwargs)
                return super().dispatch(func, types, args, kwargs)
        finally:
            self.inside = False
        with no_dispatch():
            return func(*args, **kwargs)

    def _stays_real(self, func: Any, types: Any, args: Any, kwargs: Any) -> bool:
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor | torch.SymInt)]
        drawn = torch.Tag.nondeterministic_seeded in getattr(func, "tags", [torch.Tag.nondeterministic_seeded])
        if drawn or not all(isinstance(x, Tensor) and is_known(x) for x in given):
            return False
        if given and any(tag in func.tags for tag in SHAPED_BY_DATA):
            return True
        integers = not given or any(name in func.name() for name in FACTORIES)
        made = super().dispatch(func, types, args, kwargs)
        found = [x for x in pytree.tree_leaves(made) if isinstance(x, Tensor)]
        return all(x.numel() <= KNOWN and not (integers and has_fractions(x)) for x in found)


def is_known(tensor: Tensor) -> bool:
    """Whether a tensor is real, and small enough to stay so."""
    return type(tensor) is Tensor and tensor.device.type != "meta" and tensor.numel() <= KNOWN


def has_fractions(tensor: Tensor) -> bool:
    """Whether the elements of a tensor are neither integers nor booleans."""
    return tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized


def _refuse_unknown(func: Any, args: Any, kwargs: Any) -> None:
    """Raises UnsupportedError where an op would write what is not known to a real tensor, whose data may be read."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    named = {**dict(zip((x.name for x in schema.arguments), args, strict=False)), **kwargs}
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for x in pytree.tree_leaves(named.get(argument.name)):
                if isinstance(x, Tensor) and is_known(x):
                    raise UnsupportedError(
                        f"explain runs without data, but for integers, and {func.name()} writes other values to a "
                        "tensor of integers between or in the graphs of the model: make that tensor of what is written"
                    )


class Fakes:
    """The fakes of one call: one for each tensor, however often it is met."""

    def __init__(self, device: str) -> None:
        self.mode = KnownMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.device = torch.device(device)
        self.known: dict[int, Tensor] = {}
        self.originals: list[Tensor] = []  # alive as long as their ids are keys

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor, a parameter if it is one."""
        if id(tensor) not in self.known:
            self.known[id(tensor)] = self._made(tensor)
            self.originals.append(tensor)
        return self.known[id(tensor)]

    def _made(self, tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            raise InputError("a lazy module has no shapes before its first call: call the model once, then explain it")
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        if is_known(tensor) and tensor.layout == torch.strided and not has_fractions(tensor):
            return tensor.clone()
        if device.type != "meta" and not isinstance(tensor, FakeTensor):
            return self.mode.from_tensor(tensor, static_shapes=True)
        device = self.device if device.type == "meta" else device
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        made = FakeTensor(self.mode, empty, device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)

    def copy(self, model: Any) -> Any:
        """A copy of the model whose tensors are fakes."""
        if not isinstance(model, nn.Module):
            return model
        held = [x for module in model.modules() for x in _tensors(module)]
        return copy.deepcopy(model, {id(x): self.of(x) for x in held})

    def tree(self, values: Any) -> Any:
        """Nested arguments with fakes for their tensors."""
        return pytree.tree_map_only(Tensor, self.of, values)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module, and tensors that are plain attributes."""
    for values in (module._parameters, module._buffers, vars(module)):
        yield from (x for x in values.values() if isinstance(x, Tensor))


def run_fake(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    backend: Backend,
    device: str = "cpu",
    train: bool | None = None,
) -> Any:
    """Calls a fake copy of `model` through Dynamo with `backend`; returns what it returns.

    `train`: True: in training mode; False: in evaluation mode without gradients; None: as the model and the caller's
    grad mode are.  Raises UnsupportedError where the model reads data of its inputs outside of compiled graphs, and
    whatever `backend` raises of ringpass.
    """
    skip_logging_calls()
    fakes = Fakes(device)
    run = fakes.copy(getattr(model, "_orig_mod", model))
    if isinstance(run, nn.Module) and train is not None:
        run.train(train)
    called = fakes.tree((tuple(args), dict(kwargs)))
    with _fresh_dynamo(), nullcontext() if train is None else torch.set_grad_enabled(train):
        compiled: Any = torch.compile(run, backend=_under(fakes.mode, backend))
        try:
            with fakes.mode:
                return compiled(*called[0], **called[1])
        except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
            what = str(error).splitlines()[0]
            raise UnsupportedError(
                f"explain runs without data, but for integers that it is given, and outside of the compiled graphs the "
                f"model reads the data of a tensor ({what}): its next steps cannot be known. Pass integers and "
                "booleans with their values, not on 'meta'; take out what branches on other numbers"
            ) from error
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, RingpassError):
                raise error.inner_exception from error
            raise


def _under(mode: FakeTensorMode, backend: Backend) -> Backend:
    """`backend`, whose graphs run as Dynamo traced them, on fakes: what follows a graph break sees full outputs."""

    def explaining(gm: Any, inputs: Sequence[Any]) -> Any:
        backend(gm, inputs)

        def run(*given: Any) -> Any:
            with mode:
                return gm.forward(*given)

        return run

    return explaining


@contextmanager
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def tensor_bytes(values: Any) -> int:
    """Bytes of the distinct tensors in nested values, or of a module's parameters and buffers."""
    found = [*values.parameters(), *values.buffers()] if isinstance(values, nn.Module) else pytree.tree_leaves(values)
    tensors = {id(x): x for x in found if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())
