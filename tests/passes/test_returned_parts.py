"""Outputs that are a slice of the sequence, such as a sliding layer's cache, are gathered when they are used."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ringpass.lazy import LazyOutput
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.models import AttentionWithCache
from tests.support.process_ranks import Workers

PARTS = (slice(-5, None), slice(2, 9), slice(0, -1), slice(20, 40))


def job(group: dist.ProcessGroup, part: slice, outputs: str) -> tuple[bool, list[float]]:
    """Whether the part was returned unused, and errors of both outputs and of the gradient through them."""
    model, x = AttentionWithCache(part).double(), torch.randn(2, 23, 8, dtype=torch.float64)
    found = []
    run = compiled(model, group, outputs=outputs)(x), model(x)
    lazy = isinstance(run[0][1], LazyOutput) and run[0][1].gathered is None
    for out, keys in run:
        assert keys.shape == run[1][1].shape
        loss = out.square().sum() + keys.pow(3).sum()
        found.append((out, keys, *torch.autograd.grad(loss, model.project.weight)))
    return lazy, [relative(got, want) for got, want in zip(*found, strict=True)]


@pytest.mark.parametrize("part", [PARTS[0], PARTS[1], *map(slow, PARTS[2:])], ids=str)
def test_a_part_of_the_sequence(workers: Workers, part: slice) -> None:
    for ranks, outputs in ((3, "lazy"), (2, "gathered")):
        for lazy, errors in workers.run(job, ranks, part, outputs):
            assert lazy == (outputs == "lazy") and max(errors) < 1e-12


def unused(group: dist.ProcessGroup) -> str:
    """What is gathered for an output that nobody uses."""
    from tests.support.pipeline_stages import stages

    with stages() as seen:
        compiled(AttentionWithCache(slice(-5, None)).double(), group)(torch.randn(2, 23, 8, dtype=torch.float64))
    return str(seen["partitioned"][0].graph)


def test_an_unused_part_costs_nothing(workers: Workers) -> None:
    for graph in workers.run(unused, 2):
        assert "ringpass.gather" not in graph and "ringpass.ring_attention" in graph
