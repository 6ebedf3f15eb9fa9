"""Operators of sums over ranks that other work hides: `lower` writes them for each `reduce_list` of the backward.

start_sum           packs several gradients into one new flat buffer, in the dtype in which they are added, and starts
                    its sum over ranks, in place; the sum is under way when this returns
wait_sum            that buffer, complete
unpack_gradients    its parts, flat, each in the dtype of its gradient
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringpass.comm import all_reduce
from ringpass.comm.p2p import IN_FLIGHT
from ringpass.ops.library import define, implement, storage_key
from ringpass.profiling import profiled

define("start_sum(Tensor[] gradients, int[] silent, ScalarType dtype, str group) -> Tensor")
define("wait_sum(Tensor(a) flat, str group) -> Tensor(a)")  # Inductor learns from its lowering that this writes
define("unpack_gradients(Tensor flat, int[] sizes, str[] dtypes) -> Tensor[]")  # torch 2.11 has no lists of dtypes

_ops = torch.ops.ringpass
start_sum, wait_sum = _ops.start_sum.default, _ops.wait_sum.default
unpack_gradients = _ops.unpack_gradients.default


def _start_sum(gradients: list[Tensor], silent: list[int], dtype: torch.dtype, group: str) -> Tensor:
    flat = all_reduce.pack(gradients, silent, dtype)
    IN_FLIGHT[storage_key(flat)] = all_reduce.start(flat, group)
    return flat


def _wait_sum(flat: Tensor, group: str) -> Tensor:
    with profiled("wait for a sum of gradients"):
        IN_FLIGHT.pop(storage_key(flat)).wait()
    return flat


def _fake_start_sum(gradients: list[Tensor], silent: list[int], dtype: torch.dtype, group: str) -> Tensor:
    return gradients[0].new_empty(sum(x.numel() * (1 + x.is_complex()) for x in gradients), dtype=dtype)


def _unpack(flat: Tensor, sizes: list[int], dtypes: list[str]) -> list[Tensor]:
    return all_reduce.unpack(flat, sizes, [getattr(torch, name) for name in dtypes])


def _fake_unpack(flat: Tensor, sizes: list[int], dtypes: list[str]) -> list[Tensor]:
    return [flat.new_empty(n, dtype=getattr(torch, name)) for n, name in zip(sizes, dtypes, strict=True)]


implement("start_sum", _start_sum, _fake_start_sum)
implement("wait_sum", _wait_sum, lambda flat, group: flat)
implement("unpack_gradients", _unpack, _fake_unpack)
