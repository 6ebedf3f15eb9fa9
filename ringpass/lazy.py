"""Outputs and inputs that hold this rank's tokens and behave as tensors of global shape.

A LazyOutput is gathered at its first use, once; its gradient flows back to the local tokens.  Reading its shape, dtype
or device is not a use.  Gathering is a collective: all ranks must use an output, or none of them; a rank that waits in
vain gets a PeerError that names the output and the ranks.  A compiled model of the same ring that reads it token by
token takes the local tokens instead, without a gather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._guards import TracingContext

from ringpass import ops
from ringpass.comm.collectives import Shard
from ringpass.comm.recovery import give_up, settle
from ringpass.comm.ring import Ring
from ringpass.errors import PeerError
from ringpass.layouts.redistribution import held_by
from ringpass.masks.constants import Array, DeviceCopies
from ringpass.ops import boundary
from ringpass.profiling import profiled


@dataclass(frozen=True)
class Origin:
    """Which output of which call a tensor is, and how to gather it.

    `part`: the output is only this range of the gathered tokens; None: all.
    """

    name: str
    call: int
    position: int
    shard: Shard
    ring: Ring
    part: tuple[int, int] | None = None
    inner: int = 1  # the sequence dim has size outer * S * inner

    def shape(self, local: Tensor) -> list[Any]:
        """The shape of the model's output, given the local tensor."""
        shape = self.shard.resized(local.shape, self.shard.length, self.shard.tokens)
        if self.part is not None:
            shape[self.shard.dim] = self.part[1] - self.part[0]
        return shape

    @property
    def size(self) -> int:
        """The size of the sequence dim of the model's output."""
        size: int = self.part[1] - self.part[0] if self.part else self.shard.outer * self.shard.tokens * self.inner
        return size

    @property
    def kind(self) -> str:
        """A description that must be equal on all ranks if they pass the output to a model."""
        s = self.shard
        part = f", of which {self.part}" if self.part else ""
        return f"local tokens of {s.tokens} in dim {s.dim} ({s.outer} x S x {self.inner}), {s.layout_name}{part}"

    def held(self, rank: int) -> DeviceCopies:
        """The positions along the sequence dim of the model's output that `rank` holds, in the order of rows."""
        return _held(self.shard, self.part, self.inner, rank)

    def held_tokens(self, rank: int) -> DeviceCopies:
        """The tokens of one sequence that `rank` holds, in the order of rows."""
        return _held(replace(self.shard, outer=1), None, 1, rank)

    def local_rows(self, local: Tensor) -> Tensor:
        """The rows of `local` that are in the model's output: all of them unless it is a `part`."""
        if self.part is None:
            return local
        return local.index_select(self.shard.dim, _part_rows(self.shard, self.part).tensor(local))

    def gather(self, local: Tensor) -> Tensor:
        """The model's output, replicated, from the local tensors of all ranks: a collective."""
        full: Tensor = ops.gather(local, *_shard_args(self))
        full = self._ordered(full, inverse=True)
        return full if self.part is None else full.narrow(self.shard.dim, self.part[0], self.part[1] - self.part[0])

    def scatter(self, grad: Tensor) -> Tensor:
        """The gradient of the local tensor, from the replicated one of the model's output."""
        if self.part is not None:
            dim, (start, stop) = self.shard.dim, self.part
            full = grad.new_zeros((*grad.shape[:dim], self.shard.tokens, *grad.shape[dim + 1 :]))
            grad = full.slice_scatter(grad, dim, start, stop)
        mine: Tensor = boundary.shard_back(self._ordered(grad, inverse=False), *_shard_args(self))
        return mine

    def local_shard(self, full: Tensor) -> Tensor:
        """This rank's tokens of a replicated tensor."""
        shard: Tensor = ops.shard(self._ordered(full, inverse=False), *_shard_args(self))
        return shard

    def _ordered(self, full: Tensor, inverse: bool) -> Tensor:
        """All tokens in the order of the layout's curve, or, if `inverse`, back in the original order."""
        s, order = self.shard, self.shard.layout.order
        return ops.permute(full, s.dim, s.outer, s.tokens, str(order), inverse) if order else full


def held(shard: Shard, part: tuple[int, int] | None, inner: int, rank: int) -> Array:
    """The positions that `rank` holds along a dim of size outer * S * inner, or along the range `part` of its tokens.

    1-D, in the order of the rank's rows.
    """
    tokens = held_by(shard.layout, rank, shard.tokens)
    if part is not None:
        return tokens[_inside(tokens, part)] - part[0]
    outer = np.arange(shard.outer)[:, None, None]
    positions: Array = ((outer * shard.tokens + tokens[:, None]) * inner + np.arange(inner)).reshape(-1)
    return positions


@lru_cache(maxsize=64)
def _held(shard: Shard, part: tuple[int, int] | None, inner: int, rank: int) -> DeviceCopies:
    return DeviceCopies(held(shard, part, inner, rank))


@lru_cache(maxsize=64)
def _part_rows(shard: Shard, part: tuple[int, int]) -> DeviceCopies:
    """The rows of the tokens `part` among those that this rank holds."""
    return DeviceCopies(np.flatnonzero(_inside(held_by(shard.layout, shard.rank, shard.tokens), part)))


def _inside(tokens: Array, part: tuple[int, int]) -> Array:
    inside: Array = (part[0] <= tokens) & (tokens < part[1])
    return inside


_PROPERTIES = (
    "shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf", "grad_fn", "grad", "retains_grad",
    "itemsize", "nbytes", "output_nr", "_base", "_version", "_backward_hooks",
    *(n for n in dir(Tensor) if n.startswith("is_") and not callable(getattr(Tensor, n))),
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "nelement", "ndimension", "element_size", "stride", "storage_offset", "_is_view",
    "is_contiguous", "is_floating_point", "is_complex", "is_conj", "is_neg", "is_inference", "is_signed", "retain_grad",
    "register_hook", "__len__",
)  # fmt: skip
"""What can be read of a tensor without reading its elements."""


class LazyOutput(Tensor):
    """A tensor of global shape, of which this rank holds `local`.

    `gathered`: the full tensor, after the first use.  `nothing`: an empty tensor, all that Dynamo sees of the elements.
    """

    local: Tensor
    origin: Origin
    gathered: Tensor | None
    nothing: Tensor

    @staticmethod
    def __new__(cls, local: Tensor, origin: Origin) -> LazyOutput:
        return torch.Tensor._make_wrapper_subclass(cls, origin.shape(local), dtype=local.dtype, device=local.device)

    def __init__(self, local: Tensor, origin: Origin) -> None:
        self.local, self.origin, self.gathered = local, origin, None
        self.nothing = local.new_empty(0)

    @property
    def kind(self) -> str:
        """A description that must be equal on all ranks if they pass it to a model."""
        used = ", gathered" if self.gathered is not None else ", with hooks" if self._watched else ""
        return f"{self.origin.kind}{used}"

    @property
    def _watched(self) -> bool:
        """Whether hooks or `retain_grad` observe its gradient, which must then be the full one."""
        return bool(self._backward_hooks) or self.retains_grad

    def tokens_in(self, layout: str, dim: int, ring: Ring) -> Tensor:
        """This rank's tokens along `dim` in the layout `layout`, redistributed, or gathered first, if necessary."""
        o, s = self.origin, self.origin.shard
        simple = (s.dim, s.outer, o.inner, o.part, o.ring) == (dim, 1, 1, None, ring)
        if simple and self.gathered is None and not self._watched:
            if s.layout_name == layout:
                return self.local
            moved: Tensor = ops.redistribute(
                self.local, dim, 1, s.tokens, s.layout_name, layout, s.world, s.rank, ring.name
            )
            return moved
        shard = Shard(dim, 1, self.shape[dim], layout, ring.world, ring.rank)
        return Origin("", 0, 0, shard, ring).local_shard(self.full())

    def full(self) -> Tensor:
        """The full tensor, replicated.  Gathers at the first call, which all ranks must make.

        Raises PeerError if a rank does not make it within the option `timeout`.
        """
        if self.gathered is None:
            o = self.origin
            settle(o.ring)
            with profiled(f"gather an output: {o.name} of call {o.call}"):
                missing = o.ring.await_everyone(f"output/{o.call}/{o.position}")
            if missing:
                raise PeerError(
                    f"output {o.name!r} of call {o.call} was used on rank {o.ring.rank}, but not within "
                    f"{o.ring.timeout:g} s (option 'timeout') on rank {', '.join(map(str, missing))}. Gathering it "
                    "needs all ranks: use it on every rank of the ring (print on one rank what all ranks computed), or "
                    "on none."
                )
            try:
                with torch.inference_mode(False), torch.enable_grad():  # a first use under no_grad is not the last
                    self.gathered = _Gather.apply(self)  # type: ignore[no-untyped-call]
            except BaseException as error:  # such as out of memory: the others are in the gather, or come to it
                give_up(o.ring, error)
                raise
            self.local = self.gathered.new_empty(0)
        return self.gathered

    UNGATHERED = frozenset(
        {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}
    )

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Shows Dynamo a plain tensor of global shape, equal on every rank, and hides the local tokens."""
        return ["nothing"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> Tensor:
        return inner["nothing"].new_empty_strided(size, stride)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        described = func is Tensor.untyped_storage and TracingContext.try_get() is not None  # by Dynamo, in a graph
        if func in cls.UNGATHERED or described:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(LazyOutput, LazyOutput.full, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod  # torch's stub has the plain function that switches dispatch off in this place
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(LazyOutput, LazyOutput.full, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Show(torch.autograd.Function):
    """Makes the lazy output a node of the autograd graph, so that hooks on it see its full gradient.

    The gradient has global shape and is equal on every rank; the local output gets that of its tokens.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, origin: Origin) -> LazyOutput:
        ctx.origin = origin
        return LazyOutput(local, origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.origin.scatter(grad), None


class _Gather(torch.autograd.Function):
    """The gathered value of a lazy output; both have the same gradient."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyOutput) -> Tensor:
        return lazy.origin.gather(lazy.local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def show(local: Tensor, origin: Origin) -> LazyOutput:
    """`local` as a tensor of global shape that is gathered at its first use."""
    lazy: LazyOutput = _Show.apply(local, origin)  # type: ignore[no-untyped-call]
    lazy.local = local
    return lazy


def _shard_args(origin: Origin) -> tuple[Any, ...]:
    s = origin.shard
    return s.dim, s.outer, s.tokens, s.layout_name, s.world, s.rank, origin.ring.name
