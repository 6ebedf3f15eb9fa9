"""What the graphs of one rank hold: nothing of full length, no gather, the same nodes on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from ringpass import ops
from ringpass.ops import gradient_sums
from tests.support.marks import slow
from tests.support.models import MODELS, batch_for, loss_of
from tests.support.pipeline_stages import compile_step, fake_ring, stages

LENGTH = 97  # prime, and no other size of the models


def full_length(gm: GraphModule, length: int) -> list[str]:
    """Values with a dim that holds all tokens, but for those exempt by name: small integers, explicit gathers."""
    found = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(tensor, Tensor) or not any(n >= length and n % length == 0 for n in tensor.shape):
                continue
            small = not tensor.is_floating_point() and sum(n % length == 0 for n in tensor.shape) == 1
            if not small and node.target is not ops.gather:
                found.append(f"{node.name}{list(tensor.shape)}")
    return found


@pytest.mark.parametrize(
    ("name", "padding"), [slow("gpt2", False), ("gpt2", True), ("llama", False), slow("llama", True)]
)
def test_nothing_of_full_length(name: str, padding: bool) -> None:
    with fake_ring(1, 4):
        seen = compile_step(name, LENGTH, padding)
    assert seen.keys() == {"captured", "partitioned", "forward", "backward"}
    for stage in ("partitioned", "forward", "backward"):
        (gm,) = seen[stage]
        assert full_length(gm, LENGTH) == [], stage
        targets = [n.target for n in gm.graph.nodes]
        assert ops.gather not in targets and torch.ops.aten.scaled_dot_product_attention.default not in targets
    assert full_length(seen["captured"][0], LENGTH)  # the walk does find such values


def structure(gm: GraphModule) -> list[tuple[str, str]]:
    return [(n.op, str(n.target)) for n in gm.graph.nodes]


def verdicts(gm: GraphModule, lengths: range) -> list[bool]:
    """Whether the compilation's guards on symbolic sizes accept each length."""
    fake = next(v for n in gm.graph.nodes if isinstance(v := n.meta.get("val"), Tensor))
    env = fake.fake_mode.shape_env  # type: ignore[attr-defined]
    symbols = {s for g in env.guards for s in g.expr.free_symbols}  # all stand for the one sequence length
    assert symbols
    return [
        all(bool(g.expr.subs(dict.fromkeys(symbols, n))) for g in env.guards)
        and all(n in env.var_to_range[s] for s in symbols)
        for n in lengths
    ]


@pytest.mark.parametrize("world", (3, slow(5)))
@pytest.mark.parametrize(
    ("name", "padding"), [slow("nanogpt", False), slow("gpt2", True), slow("llama", True), ("cross", False)]
)
def test_ranks_have_equal_graphs(name: str, padding: bool, world: int) -> None:
    graphs: list[dict[str, list[Any]]] = []
    for rank in range(world):
        with fake_ring(rank, world):
            seen = compile_step(name, 23, padding, unroll_limit=0)
            graphs.append({stage: [structure(g) for g in gms] for stage, gms in seen.items()})
    assert all(g == graphs[0] for g in graphs)
    calls = [t for _, t in graphs[0]["backward"][0] if t.startswith("ringpass")]
    assert "ringpass.ring_attention_backward.default" in calls and "ringpass.start_sum.default" in calls


def collectives(gm: GraphModule) -> list[tuple[str, Any]]:
    """What all ranks enter together, in order, with what they pass that must be equal."""
    kinds = (ops.gather, ops.reduce, gradient_sums.start_sum, gradient_sums.wait_sum)
    return [
        (str(n.target), [str(a) for a in n.args[1:-1] if isinstance(a, str)])
        for n in gm.graph.nodes
        if n.target in kinds
    ]


@pytest.mark.parametrize("world", (3, slow(5)))
def test_unrolled_ranks_enter_equal_collectives(world: int) -> None:
    """Unrolled, ranks differ in tiles and transfers; what they enter together keeps its order."""
    orders = []
    for rank in range(world):
        with fake_ring(rank, world):
            seen = compile_step("conditioned", 23, False)
            orders.append({stage: [collectives(g) for g in seen[stage]] for stage in ("forward", "backward")})
    assert all(o == orders[0] for o in orders) and orders[0]["backward"][0]


@pytest.mark.parametrize("world", (3, slow(5)))
def test_guards_agree_for_every_length(world: int) -> None:
    found = []
    for rank in range(world):
        with fake_ring(rank, world):
            torch.manual_seed(0)
            model = MODELS["nanogpt"].factory().double()
            run = torch.compile(model, backend="ring_dilated", options={"compiler": "aot_eager"})
            batch = batch_for("nanogpt", 23)
            for value in batch.values():
                torch._dynamo.mark_dynamic(value, 1)
            with stages() as seen:
                loss_of(run(**batch)).backward()
            found.append(verdicts(seen["captured"][0], range(2 * world + 1, 6 * world + 1)))
    assert all(f == found[0] for f in found)
    assert all(found[0])  # every length above 2P, to 6P, runs in one compilation


def test_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGPASS_DUMP", str(tmp_path))
    with fake_ring(1, 3):
        run = torch.compile(
            MODELS["gpt2"].make(), backend="ring_dilated", options={"compiler": "aot_eager", "layout": "zigzag"}
        )
        loss_of(run(**batch_for("gpt2", 23, True, True))).backward()
    graph, folder = tmp_path / "graph0", tmp_path / "graph0" / "rank1"
    shared = {"captured.py", "sites.txt", "plan.txt", "gathers.txt"}
    stages = {"partitioned.py", "forward.py", "backward.py", "partitioned.diff", "forward.diff"}
    assert {p.name for p in graph.iterdir()} == {*shared, "rank1"}  # rank 0 writes the page and what it reads
    assert {p.name for p in folder.iterdir()} == {*stages, "schedule.txt", "stages.txt"}
    assert "mask k <= q & bool(x0[b, k])" in (graph / "sites.txt").read_text()
    assert "axis 0: 23 tokens, zigzag" in (graph / "plan.txt").read_text()
    assert "receive" in (folder / "schedule.txt").read_text()
    assert "ringpass.ring_attention.default" in (folder / "partitioned.py").read_text()
    assert "receive_step1_from_rank0 = torch.ops.ringpass.exchange" in (folder / "forward.py").read_text()
    assert "attention_backward_step1" in (folder / "backward.py").read_text()


@pytest.mark.slow
def test_graphs_do_not_grow_with_ranks() -> None:
    """Above the unroll limit an attention is one node, whatever P; all 1,024 ranks are planned and proved."""
    sizes = set()
    for world in (200, 1024):
        with fake_ring(world // 3, world):
            seen = compile_step("llama", 2 * 1024 + 5, False)
        sizes.add(tuple(len(seen[stage][0].graph.nodes) for stage in ("partitioned", "forward", "backward")))
    assert len(sizes) == 1
