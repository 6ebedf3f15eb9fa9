"""fake: a model and its inputs as fake tensors, which have shapes and no data, run through Dynamo.

    with fake_call(model, args, kwargs, device="cpu", train=None) as call:
        call(backend)                           # Dynamo hands `backend` each graph of the model

The copy of the model shares everything with the original but its modules and tensors; a parameter that two modules
share is one fake, too.  Tensors on the device "meta" are seen on `device`.

Contract: the model and its inputs are not changed, and no memory is taken for either.  Dynamo's cache is emptied before
and after, so that no run sees the lengths of another: what the process has compiled is compiled again at its next call.
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

from ringpass.errors import InputError, RingpassError, UnsupportedError
from ringpass.logging_calls import skip_logging_calls

Backend = Callable[..., Any]


class Fakes:
    """The fakes of one call: one for each tensor, however often it is met."""

    def __init__(self, device: str) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
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
        if device.type != "meta" and not isinstance(tensor, FakeTensor):
            return self.mode.from_tensor(tensor, static_shapes=True)
        device = self.device if device.type == "meta" else device
        with self.mode:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
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
                f"explain runs without data, and outside of the compiled graphs the model reads the data of a tensor "
                f"({what}): its next steps cannot be known. Fix what the model branches on before the call, such as an "
                "attention mask that is checked for being all ones, or take the branch out"
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
