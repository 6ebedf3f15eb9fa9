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
    """Which output of which call this is, and how to gather it."""

    name: str
    call: int
    position: int
    shard: Shard
    ring: Ring


class LazyOutput(Tensor):
    """A tensor of global shape, of which this rank holds `local`."""

    local: Tensor
    origin: Origin
    gathered: Tensor | None

    @staticmethod
    def __new__(cls, local: Tensor, origin: Origin) -> LazyOutput:
        shape = origin.shard.resized(local.shape, origin.shard.length, origin.shard.tokens)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=local.requires_grad
        )

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
            s = o.shard
            args = (s.dim, s.outer, s.tokens, s.layout, s.world, s.rank, o.ring.name)
            self.gathered = ops.gather(self.local, *args)
            self.local = self.gathered.new_empty(0)
        return self.gathered

    METADATA = frozenset(
        {
            getattr(Tensor, n).__get__
            for n in ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_cuda", "is_leaf")
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
        | {Tensor.__len__}
    )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in cls.METADATA:
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
