"""Four plausible mistakes in the boundary operators, each of which the parity tests must catch.

Each mutation replaces one rule of the invariant (a replicated value has the full, equal cotangent on every rank; a
sharded value has that of its local tokens) by what one might write instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch import Tensor

from ringpass import ops
from ringpass.comm import all_reduce
from ringpass.comm.collectives import Shard
from ringpass.nodes import op_name
from ringpass.ops import boundary
from ringpass.passes.partition import writer as partition
from ringpass.passes.partition.placement_plan import PlacementPlan
from tests.support.model_parity import parity, worst
from tests.support.process_ranks import Workers


@contextmanager
def gather_with_torchs_backward() -> Iterator[None]:
    """The backward of an all-gather as torch's differentiable collectives have it: the sum of the ranks' cotangents."""
    real = ops.shard

    class Summing:
        """`shard` as seen by gather's backward only: the partitioner's graphs keep the real operator."""

        def __call__(self, grad: Tensor, *args: Any) -> Tensor:
            mine: Tensor = real(all_reduce.reduce([grad], args[-1])[0], *args)
            return mine

    with patch.object(boundary, "shard_back", Summing()):
        yield


@contextmanager
def shard_as_a_plain_slice() -> Iterator[None]:
    """The backward of `shard` without communication: zeros for the other ranks' tokens."""

    def padded(grad: Tensor, *args: Any) -> Tensor:
        where = Shard(*args[:-1])
        full = grad.new_zeros(where.resized(grad.shape, where.length, where.tokens))
        offset = 0
        for start, stop in where.layout.ranges(where.rank, where.tokens):
            full.narrow(where.dim, start, stop - start).copy_(grad.narrow(where.dim, offset, stop - start))
            offset += stop - start
        return full

    with patch.object(boundary, "gather_back", padded):
        yield


@contextmanager
def replicate_for_linear_layers_only() -> Iterator[None]:
    """Parameters of other ops (norms, embeddings) are read as they are."""
    real = PlacementPlan.replicated_operands

    def operands(self: PlacementPlan, node: Any) -> Any:
        return real(self, node) if node.op == "call_function" and op_name(node) == "linear.default" else []

    def broadcast(self: Any, node: Any, reason: str) -> Any:
        return self.broadcasts.get(node, self.replicated(node, reason))

    with (
        patch.object(PlacementPlan, "replicated_operands", operands),
        patch.object(partition.Writer, "broadcast", broadcast),
    ):
        yield


@contextmanager
def replicate_every_parameter() -> Iterator[None]:
    """All parameters pass through `replicate`, also where replicated layers read them."""
    real = partition.Writer._replicate

    def replicate(self: Any, uses: Any) -> None:
        real(self, uses)
        for node, _ in uses:
            if node.op == "placeholder":
                self.replicas[node] = self.broadcasts[node]

    def all_parameters(self: Any) -> None:
        replicate(self, [(n, True) for n in self.replicas if n in self.placement.tracked])

    with patch.object(partition.Writer, "_replicate_parameters", all_parameters):
        yield


MUTATIONS: dict[str, tuple[Callable[[], Any], str, bool]] = {
    "gather with torch's backward": (gather_with_torchs_backward, "nanogpt", False),
    "shard as a plain slice": (shard_as_a_plain_slice, "position_table", True),
    "replicate for linear layers only": (replicate_for_linear_layers_only, "gpt2", True),
    "replicate every parameter": (replicate_every_parameter, "conditioned", True),
}


def mutated(group: dist.ProcessGroup, name: str) -> dict[str, float]:
    mutation, model, labels = MUTATIONS[name]
    with mutation():
        return parity(group, model, 23, labels, False)


@pytest.mark.parametrize("name", MUTATIONS)
def test_parity_catches(workers: Workers, name: str) -> None:
    error, where = worst(workers.run(mutated, 2, name))
    assert error > 1e-3, f"{name} went unnoticed"
    assert where.startswith("grad")
