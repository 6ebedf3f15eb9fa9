"""Operators that find the local rows of tokens, and that choose the blocks of keys of approximate attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ringpass.comm import all_reduce
from ringpass.comm.collectives import Shard
from ringpass.layouts.layout import Layout
from ringpass.ops.library import SHARD, define, implement
from ringpass.precision import accumulator
from ringpass.schedule import block_selection as selection
from ringpass.schedule.block_selection import TopBlocks

define("locate(Tensor positions, SymInt tokens, str layout, int world, int rank) -> Tensor")
define(f"block_means(Tensor x, int block, {SHARD}, str group) -> Tensor")
define(
    "choose_blocks(Tensor q, Tensor k, float scale, str mask, SymInt queries, SymInt keys, int block, float? density, "
    "float? mass) -> Tensor"
)

locate = torch.ops.ringpass.locate.default
block_means = torch.ops.ringpass.block_means.default
choose_blocks = torch.ops.ringpass.choose_blocks.default


def _locate(positions: Tensor, tokens: int, layout: str, world: int, rank: int) -> Tensor:
    where, wanted = Layout(layout, world), positions % tokens
    if where.order:
        wanted = where.order.inverse.tensor(wanted)[wanted]
    held = torch.cat([torch.arange(a, b, device=positions.device) for a, b in where.ranges(rank, tokens)])
    rows = torch.full((tokens,), -1, dtype=torch.int64, device=positions.device)
    rows[held] = torch.arange(len(held), device=positions.device)
    return rows[wanted]


implement("locate", _locate, lambda positions, *args: positions.new_empty(positions.shape, dtype=torch.int64))


def _block_means(x: Tensor, block: int, *args: Any) -> Tensor:
    where, group = Shard(*args[:-1]), args[-1]
    layout = where.layout
    sums = selection.block_sums(x, block, layout.ranges(where.rank, where.tokens), where.tokens, layout.order)
    complete = where.layout.replicated or where.world == 1
    return selection.means(sums if complete else all_reduce.reduce([sums], group)[0], block, where.tokens)


def _fake_block_means(x: Tensor, block: int, *args: Any) -> Tensor:
    blocks = (Shard(*args[:-1]).tokens + block - 1) // block
    return x.new_empty((*x.shape[:2], blocks, x.shape[3]), dtype=accumulator(x.dtype))


def _choose_blocks(
    q: Tensor, k: Tensor, scale: float, mask: str, queries: int, keys: int, block: int, *target: Any
) -> Tensor:
    return selection.choose(q, k, scale, mask, (queries, keys), TopBlocks(block, *target))


def _fake_choose_blocks(q: Tensor, k: Tensor, *args: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], k.shape[2]), dtype=torch.bool)


implement("block_means", _block_means, _fake_block_means)
implement("choose_blocks", _choose_blocks, _fake_choose_blocks)
