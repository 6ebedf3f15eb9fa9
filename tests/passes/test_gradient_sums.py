"""Sums of gradients in lowered graphs and generated code: started early, waited for at the end, alike on all ranks."""

from __future__ import annotations

import operator
import re
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.fx import Node

from ringpass import ops
from ringpass.ops import gradient_sums, primitives
from ringpass.passes.partition import writer
from ringpass.patterns import causal, sink, window
from tests.support.described_gpu import code_of
from tests.support.models import MODELS, batch_for
from tests.support.pattern_models import SelfAttention
from tests.support.pipeline_stages import compile_step, fake_ring, stages

SMALL = 20_000  # bytes of a bucket, of which the models below fill several


def backward_nodes(rank: int, world: int, name: str = "mistral", **options: Any) -> list[Node]:
    with fake_ring(rank, world), patch.object(writer, "BUCKET_BYTES", SMALL):
        seen = compile_step(name, 23, False, **options)
    return list(seen["backward"][0].graph.nodes)


def windowed_nodes(rank: int, world: int, unroll_limit: int) -> list[Node]:
    options: Any = {"compiler": "aot_eager", "layout": "zigzag", "unroll_limit": unroll_limit, "outputs": "local"}
    options |= {"mask": causal() & (window(7) | sink(4)), "tile": 4}
    model = nn.Sequential(SelfAttention(causal=True), nn.Linear(8, 8), SelfAttention(causal=True))
    with fake_ring(rank, world), patch.object(writer, "BUCKET_BYTES", 100), stages() as seen:
        torch.compile(model, backend="ring_dilated", options=options)(torch.randn(1, 64, 8)).sum().backward()
    return list(seen["backward"][0].graph.nodes)


def named(nodes: list[Node], name: str) -> list[int]:
    return [i for i, n in enumerate(nodes) if n.name.startswith(name)]


@pytest.mark.parametrize("unroll_limit", (0, 128))
def test_buckets_start_early_and_are_waited_for_at_the_end(unroll_limit: int) -> None:
    nodes = backward_nodes(1, 3, unroll_limit=unroll_limit)
    starts, waits = named(nodes, "start_gradients_bucket"), named(nodes, "wait_gradients_bucket")
    assert len(starts) == len(waits) > 2
    assert ops.reduce_list not in {n.target for n in nodes}
    assert starts[0] < len(nodes) * 3 / 4
    assert max(starts) < min(waits)
    after = {n.target for n in nodes[min(waits) :] if n.op == "call_function"}
    assert after == {
        gradient_sums.wait_sum,
        gradient_sums.unpack_gradients,
        operator.getitem,
        torch.ops.aten.reshape.default,
    }


def test_a_bucket_starts_right_after_its_last_gradient() -> None:
    nodes = backward_nodes(1, 3)
    at = {n: i for i, n in enumerate(nodes)}
    for i in named(nodes, "start_gradients_bucket"):
        last = max(at[x] for x in nodes[i].all_input_nodes)
        assert {n.target for n in nodes[last + 1 : i]} <= {gradient_sums.start_sum}


def test_ranks_that_skip_steps_start_sums_between_the_same_attentions() -> None:
    """Under a window with a sink, ranks have different exchanges, and sums at the same places."""
    found, exchanges = [], set()
    for rank in range(4):
        nodes, rolled = (windowed_nodes(rank, 4, limit) for limit in (10_000, 0))
        exchanges.add(tuple(n.args[5] for n in nodes if n.target is primitives.exchange))
        kinds = (gradient_sums.start_sum, gradient_sums.wait_sum, ops.ring_attention_backward)
        order = [n.name for n in rolled if n.target in kinds]
        sums = [n.name for n in nodes if n.target in kinds]
        assert sums == [n for n in order if "gradients" in n]
        found.append(order)
    assert all(order == found[0] for order in found)
    assert len(exchanges) > 1


def test_generated_code_keeps_the_order() -> None:
    with fake_ring(1, 3), patch.object(writer, "BUCKET_BYTES", SMALL):
        model = MODELS["nanogpt"].make()
        run: Any = torch.compile(model, backend="ring_dilated", options={"layout": "zigzag"})
        _, code = code_of(lambda: run(**batch_for("nanogpt", 23)))
    lines = code[code.index("def call(") :].splitlines()
    work = re.compile(r"extern_kernels|cpp_fused|torch\.ops\.")
    calls = [line for line in lines if work.search(line) and "assert_" not in line]
    starts, waits = (
        [i for i, c in enumerate(calls) if f"ringpass.{x}.default(" in c] for x in ("start_sum", "wait_sum")
    )
    assert len(starts) == len(waits) > 2
    assert starts[0] < len(calls) * 3 / 4 and max(starts) < min(waits)
    assert not any("attention" in c or "exchange" in c or "mm(" in c for c in calls[min(waits) :])
