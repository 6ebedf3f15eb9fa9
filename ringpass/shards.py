"""Sharded tensors, of which each rank holds its local tokens: outputs of a model, and inputs to it.

    options = {"outputs": "local"}                                # of torch.compile(model, backend="ring_dilated")
    logits = model(ids)                                           # this rank's tokens only
    labels = ringpass.local(labels, like=logits)                  # the same tokens of a replicated tensor
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count     # count: of all ranks

    embeds = ringpass.sharded(mine)                               # of global shape; each rank passes its tokens
    logits = model(inputs_embeds=embeds)

The gradient of a shard is that of its local tokens.  If each rank calls backward on the loss summed over its tokens and
divided by the count over all ranks, all ranks get the full gradients of the compiled model's parameters.

`sharded`, `local` and `tokens_of` are for users; the other functions return outputs of compiled models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DTensorShard
from torch.utils.weak import WeakTensorKeyDictionary

from ringpass import ops
from ringpass.comm import collectives
from ringpass.comm.agreement import Agreement
from ringpass.comm.collectives import Shard
from ringpass.comm.ring import group_of, ring_of
from ringpass.errors import InputError, MismatchError
from ringpass.layouts.layout import CHUNKED, CONTIGUOUS, INPUTS, Layout
from ringpass.layouts.ranges import spread
from ringpass.layouts.redistribution import Redistribution, redistribution
from ringpass.lazy import LazyOutput, Origin, held, show

Output = TypeVar("Output")
Carry = Callable[[Tensor, Redistribution, str], Tensor]
_HELD: Any = WeakTensorKeyDictionary()  # the origin of each returned tensor; None: replicated

# --- outputs of a model -----------------------------------------------------------------------------------------------


def as_lazy(local: Tensor, origin: Origin, group: object) -> Tensor:
    """An output of global shape that gathers on first use."""
    return show(local, origin)


def as_local(local: Tensor, origin: Origin, group: object) -> Tensor:
    """An output as a plain tensor of this rank's tokens (.., L, ..), for the option outputs="local"."""
    rows = origin.local_rows(local)
    _HELD[rows] = origin
    return rows


def on_all_ranks(output: Output) -> Output:
    """A replicated output, returned as it is: `tokens_of` and `local` then know that it holds all tokens."""
    if isinstance(output, Tensor):
        _HELD[output] = None
    return output


def as_dtensor(local: Tensor, origin: Origin, group: object) -> DTensor:
    """An output as a DTensor on the mesh of the ring, sharded along its sequence dim as torch.chunk splits.

    `group`: the option of that name.
    """
    mesh = _mesh(group, origin, local.device.type)
    shape, dim = torch.Size(origin.shape(local)), origin.shard.dim
    rows = origin.local_rows(local)
    plan = _to_chunks(origin.shard, origin.part, origin.inner, shape[dim])
    mine = _Redistribute.apply(rows, dim, plan, origin.ring.name)  # type: ignore[no-untyped-call]
    stride = torch.empty(shape, device="meta").stride()
    out = DTensor.from_local(mine, mesh, [DTensorShard(dim)], run_check=False, shape=shape, stride=stride)
    shard = Shard(dim, 1, shape[dim], CHUNKED, origin.ring.world, origin.ring.rank)
    _HELD[out] = Origin(origin.name, origin.call, origin.position, shard, origin.ring)
    return out


OutputKind = Callable[[Tensor, Origin, object], Tensor]
"""(local output, its origin, the option `group`) -> what the model returns."""
OUTPUTS: Mapping[str, OutputKind | None] = {
    "lazy": as_lazy,
    "gathered": None,
    "local": as_local,
    "dtensor": as_dtensor,
}
"""The values of the option `outputs`; None: outputs are gathered in the compiled graph."""


def _mesh(group: object, origin: Origin, device: str) -> DeviceMesh:
    """The option `group` if it is a mesh, else a mesh of its ranks."""
    if isinstance(group, DeviceMesh) and group.ndim == 1:
        return group
    assert origin.ring.pg is not None
    return DeviceMesh.from_group(origin.ring.pg, device)


class _Redistribute(torch.autograd.Function):
    """Sends rows along a dim to the ranks that want them; the backward sends their gradients back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, plan: Redistribution, group: str) -> Tensor:
        ctx.how = dim, plan, group
        return _along(x, dim, collectives.carry, plan, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dim, plan, group = ctx.how
        return _along(grad, dim, collectives.carry_back, plan, group), None, None, None


def _along(x: Tensor, dim: int, carry: Carry, plan: Redistribution, group: str) -> Tensor:
    before, n, after = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
    rows = carry(x.reshape(before.numel(), n, after.numel()), plan, group)
    return rows.reshape(*before, rows.shape[1], *after)


@lru_cache(maxsize=64)
def _to_chunks(shard: Shard, part: tuple[int, int] | None, inner: int, size: int) -> Redistribution:
    """The redistribution from the shards of a dim of global size `size` to DTensor's chunks of it."""
    ranks = range(shard.world)
    chunks = [spread(Layout(CHUNKED, shard.world).ranges(rank, size)) for rank in ranks]
    return redistribution([held(shard, part, inner, rank) for rank in ranks], chunks, shard.rank)


# --- their tokens -----------------------------------------------------------------------------------------------------


def tokens_of(output: Tensor, dim: int = 1) -> Tensor:
    """The positions of this rank's rows of `output` along the sequence dim of the full tensor: (rows,), int64.

    >>> output = on_all_ranks(torch.zeros(2, 3, 8))                # as on a single rank, which holds all tokens
    >>> tokens_of(output)
    tensor([0, 1, 2])

    `output`: an output of a model that was compiled with the option outputs="local" or "dtensor", or a result of
    `sharded`.  `dim`: its sequence dim, used only if the output is replicated.
    Raises InputError for any other tensor, also for one computed from an output.
    """
    origin = _origin(output)
    if origin is None:
        return torch.arange(output.shape[dim], device=output.device)
    return origin.held(origin.shard.rank).tensor(output).clone()


def local(x: Tensor, like: Tensor, dim: int = 1) -> Tensor:
    """The tokens of the replicated `x`, along `dim`, that this rank holds of `like`: (.., S, ..) to (.., rows, ..).

    >>> output = on_all_ranks(torch.zeros(2, 3, 8))                # as on a single rank, which holds all tokens
    >>> local(torch.tensor([[0, 1, 2]]), like=output)
    tensor([[0, 1, 2]])

    `like`: an output of a model that was compiled with the option outputs="local" or "dtensor", or a result of
    `sharded`.  The gradient of `x` is replicated: if `x` needs one, all ranks must call backward together.
    Raises InputError for another `like`, or if `x` does not have as many tokens as the full `like`.
    """
    origin = _origin(like)
    if origin is None:
        return x
    shard, size = origin.shard, x.shape[dim]
    if size == origin.size:
        positions = origin.held(shard.rank)
    elif size == shard.tokens and origin.part is None:  # positions in one sequence, while `like` merges several
        positions = origin.held_tokens(shard.rank)
    else:
        sizes = {origin.size, shard.tokens} if origin.part is None else {origin.size}
        raise InputError(
            f"expected a tensor of {' or '.join(map(str, sorted(sizes)))} tokens in dim {dim}, as those of `like`, got "
            f"{list(x.shape)}: pass the replicated tensor, and the dim of its sequence"
        )
    full = ops.replicate([x], origin.ring.name)[0] if x.requires_grad else x
    return full.index_select(dim, positions.tensor(x))


def _origin(output: Tensor) -> Origin | None:
    if isinstance(output, LazyOutput):
        return output.origin
    if output in _HELD:
        found: Origin | None = _HELD[output]
        return found
    raise InputError(
        f"a tensor of shape {list(output.shape)} is no output of a model compiled with outputs='local', and a tensor "
        "computed from one does not know its tokens: pass the output itself"
    )


# --- inputs to a model ------------------------------------------------------------------------------------------------


def sharded(
    x: Tensor, dim: int = 1, layout: str = CONTIGUOUS, group: dist.ProcessGroup | DeviceMesh | None = None
) -> Tensor:
    """A tensor of global shape of which `x` is this rank's shard, to be passed to a compiled model.

    >>> mine = torch.zeros(2, 3, 8)                                # (B, L, D) of (B, S, D); a single rank has L = S
    >>> sharded(mine, dim=1).shape
    torch.Size([2, 3, 8])

    All ranks of the ring `group` (a process group, a mesh of one dimension, or None: the default group) call this
    together, each with its tokens along `dim`, as `layout` assigns them:

        "contiguous"    rank after rank, the first S mod P ranks hold one token more
        "chunked"       rank after rank, as torch.chunk and DTensor split
        "zigzag"        of 2P chunks, rank r holds chunks r and 2P-1-r
        "striped"       of 8P chunks, rank r holds every P-th from r on

    A floating-point tensor that the model reads token by token is never gathered; its gradient is that of the local
    tokens.  If `x` is a DTensor that is sharded over a mesh of one dimension, the other arguments are taken from it.

    Raises InputError for a bad argument, and on all ranks MismatchError if dtypes, other dims or arguments differ, or
    if the lengths are not those of `layout`; PeerError if a rank does not arrive within its time limit (300 s unless a
    model of this ring has set the option `timeout`).
    """
    if isinstance(x, DTensor):
        x, dim, layout, group = _of_dtensor(x)
    ring = ring_of(group_of(group))
    _check(x, dim, layout)
    dim, mine = dim % x.ndim, x.shape[dim]
    rest = [*x.shape[:dim], "S", *x.shape[dim + 1 :]]
    kind = f"{x.dtype} [{', '.join(map(str, rest))}], {layout}{', needs a gradient' if x.requires_grad else ''}"
    lengths = Agreement(ring, (("call", "ringpass.sharded"), ("shard", kind)), ()).numbers((), mine, x.device)
    tokens, world = sum(lengths), ring.world
    if world == 1:
        return x
    fitting = {name: [Layout(name, world).length(rank, tokens) for rank in range(world)] for name in INPUTS}
    if lengths != fitting[layout]:
        raise MismatchError(_unfit(lengths, fitting, layout))
    shard = Shard(dim, 1, tokens, layout, world, ring.rank)
    return show(x, Origin("of ringpass.sharded", ring.calls, 0, shard, ring))


def _of_dtensor(x: DTensor) -> tuple[Tensor, int, str, DeviceMesh]:
    placements = x.placements
    if len(placements) != 1 or not isinstance(placements[0], DTensorShard):
        raise InputError(
            f"expected a DTensor that is sharded over a mesh of one dimension, got placements {list(placements)}: "
            "redistribute it to [Shard(dim)] over the ring's dimension of the mesh, or pass the model a replicated one"
        )
    return x.to_local(), placements[0].dim, CHUNKED, x.device_mesh


def _check(x: Tensor, dim: int, layout: str) -> None:
    if layout not in INPUTS:
        raise InputError(f"expected a layout, one of {', '.join(map(repr, INPUTS))}, got {layout!r}")
    if isinstance(x, LazyOutput) or not isinstance(x, Tensor):
        raise InputError(f"expected a tensor of this rank's tokens, got {type(x).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise InputError(f"expected the dim of the sequence, got dim={dim} of a tensor of shape {list(x.shape)}")


def _unfit(lengths: list[int], fitting: dict[str, list[int]], layout: str) -> str:
    others = [name for name, found in fitting.items() if found == lengths]
    what = f"these are the lengths of layout={others[0]!r}: pass that" if others else "split the full tensor like this"
    return (
        f"the ranks hold {', '.join(map(str, lengths))} tokens of {sum(lengths)}, and in layout {layout!r} they hold "
        f"{', '.join(map(str, fitting[layout]))}: {what}"
    )
