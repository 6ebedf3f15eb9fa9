"""CUDA devices without one: fake tensors on a described device, through the bodies of the package's operators.

    with bodies_on_fake_cuda() as checked:
        q = torch.empty(2, 4, 64, 8, device="cuda")        # no memory: shapes, strides, dtypes and devices alone
        torch.ops.ringpass.take_rows(q, [0, 1], [0, 8, 1])
    checked                                                # {"take_rows": 1}

Torch's own operators check devices, dtypes and shapes as on a device.  Every operator of ringpass runs its body, and
what that returns must be as its fake says: device, dtype, shape and strides.  Replaced by checks of what they are given
are messages, collectives, the compiled FlexAttention, and autograd inside a body, which needs a device: its function
runs forward, and each gradient is like its input.

A build of torch without CUDA refuses even to index such tensors, as it has nothing that could set the current device.
`load_device_guard` gives it torch's own stand-in, which does nothing.  That cannot be undone, and autograd counts
devices when it starts, so callers run in a process of their own: `fake_cuda_process` makes one.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ringpass.comm import all_reduce, collectives, p2p, pooling
from ringpass.kernels import cuda as kernels_cuda
from ringpass.kernels import flex, merge
from ringpass.ops.library import BODIES, LIBRARY

HOPPER = (9, 0)
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""


def fake_cuda_process() -> ProcessPoolExecutor:
    """A process in which `bodies_on_fake_cuda` works: `run_there` runs functions in it."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), load_device_guard)


def run_there(process: ProcessPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a process of `fake_cuda_process`.  Raises AssertionError with the text of any error there."""
    return process.submit(_with_errors_as_text, function, *args).result()


def _with_errors_as_text(function: Callable[..., Any], *args: Any) -> Any:
    """Torch's errors hold what cannot be sent to another process."""
    try:
        return function(*args)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    raise AssertionError(text)


def load_device_guard() -> None:
    """Registers the stand-in for a device guard, in a build of torch that has none.  Needs a C++ compiler."""
    torch.set_num_threads(1)
    if torch.version.cuda is not None:
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        subprocess.run([get_cpp_compiler(), str(source), *flags, "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


@contextmanager
def bodies_on_fake_cuda(capability: tuple[int, int] = HOPPER) -> Iterator[Counter[str]]:
    """New tensors are fake; operators run their bodies.  Yields how often each was checked against its fake.

    capability: the compute capability of the described device.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(kernels_cuda, "capability", lambda device: capability))
        stack.enter_context(patch.object(collectives, "run_collective", _checked_collective))
        stack.enter_context(patch.object(collectives, "start_gather", _checked_gather))
        stack.enter_context(patch.object(pooling, "start", _checked_all_to_all))
        stack.enter_context(patch.object(p2p, "start", _checked_start))
        stack.enter_context(patch.object(all_reduce, "start", _checked_sum))
        stack.enter_context(patch.object(flex, "capability", lambda device: capability))
        stack.enter_context(patch.object(flex, "flex_step", _flex_step))
        stack.enter_context(patch.object(flex, "flex_step_backward", _flex_step_backward))
        stack.enter_context(patch.object(merge, "fused_merge", lambda: merge.written_merge))
        stack.enter_context(patch.object(torch.func, "vjp", _vjp))
        stack.enter_context(patch.object(torch.autograd, "grad", _grad))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        bodies = stack.enter_context(_Bodies())
        yield bodies.checked


class _Bodies(TorchFunctionMode):
    """Runs the body of each of the package's operators, and compares what it returns with the operator's fake."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = getattr(func, "default", func) if isinstance(func, torch._ops.OpOverloadPacket) else func
        schema = getattr(op, "_schema", None)
        namespace, _, name = schema.name.partition("::") if schema else ("", "", "")
        if namespace != LIBRARY.ns or name not in BODIES:
            return func(*args, **(kwargs or {}))
        named = kwargs or {}
        with self:
            got = BODIES[name](*args, **named)
        check_like(name, tree_leaves(got), tree_leaves(op(*args, **named)))
        self.checked[name] += 1
        return got


def check_like(name: str, got: Sequence[Tensor], fake: Sequence[Tensor]) -> None:
    """Raises AssertionError unless what the body of operator `name` returned is as its fake says."""
    found, promised = ([_described(x) for x in some] for some in (got, fake))
    assert found == promised, f"the body of {name} returned {found}, its fake says {promised}"


def _described(x: Tensor) -> tuple[Any, ...]:
    return str(x.device), x.dtype, tuple(x.shape), _strides(x)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Strides that matter: those of dims with more than one element, of a tensor that has any."""
    return tuple(s for n, s in zip(x.shape, x.stride(), strict=True) if n > 1) if x.numel() else ()


def _checked_start(
    sent: Tensor, dst: int | None, received: Tensor, src: int | None, tag: int, group: str, label: str = ""
) -> p2p.PendingExchange:
    """In place of `p2p.start`: nothing is sent."""
    for x in (sent, received):
        assert x.device.type == "cuda" and x.dim() == 1 and x.is_contiguous(), _described(x)
    return p2p.PendingExchange(received, sent, [], (dst, src))


def _checked_collective(collective: object, *args: Any, group: str, what: str = "") -> None:
    """In place of `collectives.run_collective`: nothing is sent."""
    buffers = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    assert buffers and all(x.device.type == "cuda" and x.is_contiguous() for x in buffers), buffers
    assert len({x.dtype for x in buffers}) == 1, buffers


def _checked_gather(sent: Tensor, received: Tensor, group: str) -> p2p.PendingExchange:
    """In place of `collectives.start_gather`: nothing is sent."""
    _checked_collective(None, sent, received, group=group)
    return p2p.PendingExchange(received, sent, [], ())


def _checked_all_to_all(
    message: Tensor, received: Sequence[int], sent: Sequence[int], group: str
) -> p2p.PendingExchange:
    """In place of `pooling.start`: nothing is sent."""
    assert message.device.type == "cuda" and message.is_contiguous() and message.numel() == sum(sent), message
    return p2p.PendingExchange(message.new_empty(sum(received)), message, [], ())


def _checked_sum(flat: Tensor, group: str) -> p2p.PendingExchange:
    """In place of `all_reduce.start`: nothing is sent."""
    assert flat.device.type == "cuda" and flat.dim() == 1 and flat.is_contiguous(), _described(flat)
    return p2p.PendingExchange(flat, flat, [Mock()], ())


def _flex_step(q: Tensor, k: Tensor, v: Tensor, mask: flex.StepMask, scale: float) -> tuple[Tensor, Tensor]:
    """In place of FlexAttention's compiled operator."""
    index = torch.zeros(1, dtype=torch.int64, device="cuda")  # a scalar would be read on the host
    seen = mask.mask_mod(*(index,) * 4, *mask.buffers)
    assert {x.device for x in (q, k, v, seen, *mask.lists, *mask.buffers)} == {index.device}
    assert q.dtype == k.dtype == v.dtype and seen.dtype == torch.bool
    return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _flex_step_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: flex.StepMask, scale: float
) -> list[Tensor]:
    """In place of the compiled operator of its gradient."""
    found, found_lse = _flex_step(q, k, v, mask, scale)
    for given, like in ((grad, found), (out, found), (lse, found_lse)):
        assert (given.device, given.dtype, given.shape) == (like.device, like.dtype, like.shape), (given, like)
    return [torch.empty_like(x) for x in (q, k, v)]


def _vjp(function: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """In place of `torch.func.vjp`."""
    out = function(*primals)
    return out, lambda grad: list(_grad([out], primals, [grad]))


def _grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """In place of `torch.autograd.grad`."""
    for out, grad in zip(outputs, grads, strict=True):
        assert (out.device, out.dtype, out.shape) == (grad.device, grad.dtype, grad.shape), (out, grad)
    return tuple(torch.empty_like(x) for x in inputs)
