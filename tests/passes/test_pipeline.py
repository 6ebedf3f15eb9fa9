"""The runner of the stages, and the contracts that it checks: each kind of broken result is refused by name."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule

from ringpass import RingConfig, backend, ops
from ringpass.layouts.layout import Layout
from ringpass.masks.expr import parse
from ringpass.ops import primitives
from ringpass.passes.detect.detect import detect
from ringpass.passes.op_rules.spec import Rank
from ringpass.passes.op_rules.table import rule_for
from ringpass.passes.partition.placement import place
from ringpass.passes.partition.writer import partition
from ringpass.passes.pipeline import Pipeline
from ringpass.passes.plan.plan import plan
from ringpass.passes.propagate.factors import propagate
from ringpass.passes.verify import CHECKS, VerificationError, verify
from tests.support.pipeline_stages import captured_graph

RANKS = 2


def attend(x: Tensor, w: Tensor) -> Tensor:
    """One layer of causal attention, and a softmax over the sequence, which needs it replicated."""
    y = F.linear(x, w)
    out = F.scaled_dot_product_attention(y, y, y, is_causal=True)
    return out + out.softmax(2)


def results() -> dict[str, Any]:
    """What each stage hands on for `attend`."""
    found: dict[str, Any] = {}

    def backend(gm: GraphModule, inputs: list[Tensor]) -> Any:
        captured = captured_graph(gm, inputs)
        sites = detect(captured.gm)
        sweep = propagate(captured.gm, rule_for)
        planned = plan(sites, sweep, RANKS, RingConfig())
        placement = place(captured, planned, sweep, {})
        program = partition(captured, placement, planned, Rank(0, RANKS, "ring"), False, False)
        stages = dict(decompose=captured, detect=sites, propagate=sweep, plan=planned, place=placement)
        found.update(stages, partition=program)
        return gm

    torch._dynamo.reset()
    torch.compile(attend, backend=backend)(torch.randn(1, 2, 16, 8), torch.randn(8, 8, requires_grad=True))
    return found


def leave_a_mutation(stages: dict[str, Any]) -> None:
    graph = stages["decompose"].gm.graph
    node = next(n for n in graph.nodes if n.target is torch.ops.aten.add.Tensor)
    node.target = torch.ops.aten.add_.Tensor


def drop_a_value(stages: dict[str, Any]) -> None:
    node = next(n for n in stages["decompose"].gm.graph.nodes if n.op == "call_function")
    del node.meta["val"]


def read_a_leaf_that_is_not_there(stages: dict[str, Any]) -> None:
    stages["detect"] = tuple(replace(site, mask=parse("k <= q & x3[b, k]")) for site in stages["detect"])


def lose_a_factor(stages: dict[str, Any]) -> None:
    sweep = stages["propagate"]
    node = next(n for n in sweep.values if n.op == "placeholder")
    sweep.values[node] = ((), *sweep.values[node][:2], ())


def plan_for_other_ranks(stages: dict[str, Any]) -> None:
    axes = stages["plan"].axes
    stages["plan"] = replace(stages["plan"], axes=tuple(replace(a, layout=Layout("zigzag", 5)) for a in axes))


def schedule_in_another_layout(stages: dict[str, Any]) -> None:
    sites = stages["plan"].sites
    striped = Layout("striped", RANKS)
    wrong = tuple(replace(s, problem=replace(s.problem, key_layout=striped)) for s in sites)
    stages["plan"] = replace(stages["plan"], sites=wrong)


def run_a_softmax_over_tokens_on_them(stages: dict[str, Any]) -> None:
    placement = stages["place"]
    node = next(n for n in placement.live if n.target is torch.ops.aten.softmax.int)
    placement.modes[node] = next(iter(placement.axis_of.values()))


def describe_an_output_too_many(stages: dict[str, Any]) -> None:
    program = stages["partition"]
    stages["partition"] = replace(program, outputs=(*program.outputs, None))


BROKEN: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("decompose", leave_a_mutation, "changes a tensor in place"),
    ("decompose", drop_a_value, "has no value"),
    ("detect", read_a_leaf_that_is_not_there, "reads leaf 3 of 0"),
    ("propagate", lose_a_factor, "factors"),
    ("plan", plan_for_other_ranks, "is not of 2 ranks"),
    ("plan", schedule_in_another_layout, "key_layout is not that of axis"),
    ("place", run_a_softmax_over_tokens_on_them, "which it needs replicated"),
    ("partition", describe_an_output_too_many, "outputs and 0 sizes described"),
]


def test_every_stage_of_the_backend_has_a_contract() -> None:
    """The schedules' proof, which returns nothing that a later stage reads, is the exception."""
    source = inspect.getsource(backend.ring_dilated)
    assert {*re.findall(r"stages\.run\((\w+),", source)} == {*CHECKS} - {"lower"} | {"prove_all"}


def test_results_keep_their_contracts() -> None:
    stages = results()
    assert {*stages, "capture", "lower"} == set(CHECKS)
    for stage, result in stages.items():
        verify(stage, result)


@pytest.mark.parametrize(("stage", "damage", "complaint"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_broken_results_are_refused(stage: str, damage: Callable[..., None], complaint: str) -> None:
    stages = results()
    damage(stages)
    with pytest.raises(VerificationError, match=f"stage {stage}: .*{complaint}"):
        verify(stage, stages[stage])


def lowered(waits: int, replicate: bool) -> GraphModule:
    """A graph with one exchange, waited for so often."""
    graph = Graph()
    x = graph.placeholder("x")
    started = graph.call_function(primitives.exchange, ([x], 4, 1, 1, 0, "ring"))
    received = graph.call_function(operator.getitem, (started, 0))
    ends = [graph.call_function(primitives.wait, (received,)) for _ in range(waits)]
    rest = [graph.call_function(ops.replicate, ([x], "ring"))] if replicate else []
    graph.output((*ends, *rest))
    return GraphModule({}, graph)


def test_lowered_graphs_are_refused() -> None:
    verify("lower", lowered(1, False))
    for waits, replicate, complaint in ((0, False, "waited for 0 times"), (2, False, "2 times"), (1, True, "is left")):
        with pytest.raises(VerificationError, match=complaint):
            verify("lower", lowered(waits, replicate))


def test_the_runner_times_and_compares(tmp_path: Path) -> None:
    def grow(gm: GraphModule) -> GraphModule:
        output = gm.graph.find_nodes(op="output")[0]
        with gm.graph.inserting_before(output):
            gm.graph.call_function(torch.ops.aten.neg.default, (gm.graph.find_nodes(op="placeholder")[0],))
        return gm

    stages = Pipeline(str(tmp_path), rank=3)
    gm = stages.run(lambda: lowered(1, False))
    stages.run(grow, gm)
    assert not list(tmp_path.iterdir())  # nothing is written before the graph is known to be partitioned
    stages.open()
    (text,) = (path.read_text() for path in tmp_path.glob("rank3/*/stages.txt"))
    first, second = text.splitlines()
    assert first.startswith("<lambda>: 0.") and first.endswith("s, 5 nodes")
    assert second.startswith("grow: 0.") and second.endswith("6 nodes; +1 neg.default")
