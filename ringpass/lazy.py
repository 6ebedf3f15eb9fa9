"""Outputs that hold this rank's tokens and show themselves as tensors of global shape.

A LazyOutput gathers on first use, once, above autograd: its gradient goes back to the local tokens.  Reading its shape,
dtype or device is no use.  Gathering is a collective: all ranks must use an output, or none; a rank that waits in vain
gets a PeerError that names the output and the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ringpass import ops
from ringpass.agreement import Ring
from ringpass.collectives import Shard
from ringpass.errors import PeerError


@dataclass(frozen=True)
class Origin:
    """Which output of which call this is, and how to gather it; `part`: of what is gathered, these tokens."""

    name: str
    call: int
    position: int
    shard: Shard
    ring: Ring
    part: tuple[int, int] | None = None

    def shape(self, local: Tensor) -> list[Any]:
        """Of what the model returned."""
        shape = self.shard.resized(local.shape, self.shard.length, self.shard.tokens)
        if self.part is not None:
            shape[self.shard.dim] = self.part[1] - self.part[0]
        return shape

    def gather(self, local: Tensor) -> Tensor:
        """What the model returned, on all ranks."""
        whole: Tensor = ops.gather(local, *_shard_args(self))
        whole = self._ordered(whole, inverse=True)
        return whole if self.part is None else whole.narrow(self.shard.dim, self.part[0], self.part[1] - self.part[0])

    def scatter(self, grad: Tensor) -> Tensor:
        """The local tokens' share of its cotangent."""
        if self.part is not None:
            dim, (start, stop) = self.shard.dim, self.part
            whole = grad.new_zeros((*grad.shape[:dim], self.shard.tokens, *grad.shape[dim + 1 :]))
            grad = whole.slice_scatter(grad, dim, start, stop)
        shared: Tensor = ops._gather_backward_shard(self._ordered(grad, inverse=False), *_shard_args(self))
        return shared

    def _ordered(self, whole: Tensor, inverse: bool) -> Tensor:
        """All tokens in the order of the layout's curve, or, inverse, back in their own."""
        s, order = self.shard, self.shard.placement.order
        return ops.permute(whole, s.dim, s.outer, s.tokens, str(order), inverse) if order else whole


class LazyOutput(Tensor):
    """A tensor of global shape, of which this rank holds `local`."""

    local: Tensor
    origin: Origin
    gathered: Tensor | None

    @staticmethod
    def __new__(cls, local: Tensor, origin: Origin) -> LazyOutput:
        return torch.Tensor._make_wrapper_subclass(cls, origin.shape(local), dtype=local.dtype, device=local.device)

    def __init__(self, local: Tensor, origin: Origin) -> None:
        self.local, self.origin, self.gathered = local, origin, None

    def full(self) -> Tensor:
        """The whole tensor, as on one device; gathers at the first call, on all ranks together."""
        if self.gathered is None:
            o = self.origin
            missing = o.ring.await_everyone(f"output/{o.call}/{o.position}")
            if missing:
                raise PeerError(
                    f"output {o.name!r} of call {o.call} was used on rank {o.ring.rank}, but not within "
                    f"{o.ring.timeout:g} s (option 'timeout') on rank {', '.join(map(str, missing))}. Gathering it "
                    "needs all ranks: use it on every rank of the ring (print on one rank what all ranks computed), or "
                    "on none."
                )
            with torch.inference_mode(False), torch.enable_grad():  # a first use under no_grad is not the last
                self.gathered = _Gather.apply(self)  # type: ignore[no-untyped-call]
            self.local = self.gathered.new_empty(0)
        return self.gathered

    OWN = frozenset(
        {
            getattr(Tensor, n).__get__
            for n in (
                "shape",
                "dtype",
                "device",
                "requires_grad",
                "ndim",
                "layout",
                "is_cuda",
                "is_leaf",
                "grad_fn",
                "grad",
                "retains_grad",
            )
        }
        | {
            Tensor.size,
            Tensor.dim,
            Tensor.numel,
            Tensor.ndimension,
            Tensor.is_floating_point,
            Tensor.is_complex,
            Tensor.element_size,
        }
        | {Tensor.retain_grad, Tensor.register_hook}
        | {Tensor.__len__}
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in cls.OWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(LazyOutput, LazyOutput.full, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod  # torch's stub has the plain function that switches dispatch off in this place
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(LazyOutput, LazyOutput.full, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Show(torch.autograd.Function):
    """Makes the lazy output a node of the autograd graph, on which hooks see its whole cotangent.

    That is of global shape, equal on every rank, and gives the local output its own tokens.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, origin: Origin) -> LazyOutput:
        ctx.origin = origin
        return LazyOutput(local, origin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.origin.scatter(grad), None


class _Gather(torch.autograd.Function):
    """What a lazy output stands for; the cotangent is the lazy output's."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyOutput) -> Tensor:
        return lazy.origin.gather(lazy.local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def show(local: Tensor, origin: Origin) -> LazyOutput:
    """`local` as a tensor of global shape."""
    lazy: LazyOutput = _Show.apply(local, origin)  # type: ignore[no-untyped-call]
    lazy.local = local
    return lazy


def _shard_args(origin: Origin) -> tuple[Any, ...]:
    s = origin.shard
    return s.dim, s.outer, s.tokens, s.layout, s.world, s.rank, origin.ring.name
