"""Dropout whose keep mask depends on an element's global index alone, however the tensor is sharded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ringpass.comm.collectives import Shard
from ringpass.ops import counter_random
from ringpass.ops.library import LIBRARY, SHARD, define, implement

define(f"keep(Tensor seed, SymInt[] shape, float p, int stream, {SHARD}) -> Tensor")
define(f"dropout(Tensor x, Tensor seed, float p, int stream, {SHARD}) -> Tensor")

keep = torch.ops.ringpass.keep.default
dropout = torch.ops.ringpass.dropout.default


def _dropout(x: Tensor, seed: Tensor, p: float, stream: int, *args: Any) -> Tensor:
    """Composite: autograd and code generation see the keep mask as one op, and the scaling as arithmetic to fuse."""
    kept = keep(seed, list(x.shape), p, stream, *args)
    return torch.where(kept, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)


def _keep(seed: Tensor, shape: Sequence[int], p: float, stream: int, *args: Any) -> Tensor:
    """The keep mask of the local elements of a tensor whose local shape is `shape`."""
    where = Shard(*args)
    indices = [torch.arange(n, device=seed.device) for n in shape]
    if not where.layout.replicated:
        indices[where.dim] = _global_index(where, shape[where.dim], seed.device)
    return counter_random.keep(seed, stream, p, indices)


def _global_index(where: Shard, size: int, device: torch.device) -> Tensor:
    """(size,): the index of each local element along the full dim, of size outer * S * inner."""
    inner = size // (where.outer * where.length)
    spans = where.layout.ranges(where.rank, where.tokens)
    tokens = torch.cat([torch.arange(a, b, device=device) for a, b in spans])
    if where.layout.order:
        tokens = where.layout.order.permutation.tensor(tokens)[tokens]
    outer, last = torch.arange(where.outer, device=device), torch.arange(inner, device=device)
    index: Tensor = (outer.view(-1, 1, 1) * where.tokens + tokens.view(1, -1, 1)) * inner + last
    return index.reshape(-1)


implement("keep", _keep, lambda seed, shape, *args: seed.new_empty(shape, dtype=torch.bool))
LIBRARY.impl("dropout", _dropout, "CompositeImplicitAutograd")
