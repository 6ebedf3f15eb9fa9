"""The operator that merges the results of all ranks for the same queries: `merge_ranks`.

    out, lse = merge_ranks(out, lse, world, rank, group)    (B, H, n, D), (B, H, n) of the rank's keys -> of all keys

The merge is by log-sum-exp, in the order of ranks on every rank, so that all get the same bits.  A rank receives P - 1
times the bytes of its own result.  It has no gradient of its own: that of a split attention goes through its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringpass.comm import collectives
from ringpass.comm.collectives import Shard
from ringpass.kernels.blocks import empty_rows_first, rows_first
from ringpass.kernels.tile import merge_by_lse
from ringpass.layouts.layout import CONTIGUOUS
from ringpass.ops.library import define, implement

define("merge_ranks(Tensor out, Tensor lse, int world, int rank, str group) -> Tensor[]")
merge_ranks = torch.ops.ringpass.merge_ranks.default


def _body(out: Tensor, lse: Tensor, world: int, rank: int, group: str) -> list[Tensor]:
    both = torch.cat([out, lse.unsqueeze(-1)], -1).unsqueeze(0)
    of_ranks = collectives.gather(both, Shard(0, 1, world, CONTIGUOUS, world, rank), group)
    merged, total = of_ranks[0, ..., :-1], of_ranks[0, ..., -1]
    for more in of_ranks[1:]:
        merged, total = merge_by_lse(merged, total, more[..., :-1], more[..., -1])
    return [rows_first(merged), total.contiguous()]


def _fake(out: Tensor, lse: Tensor, world: int, rank: int, group: str) -> list[Tensor]:
    return [empty_rows_first(out, out.shape[3]), lse.new_empty(lse.shape)]


implement("merge_ranks", _body, _fake)
