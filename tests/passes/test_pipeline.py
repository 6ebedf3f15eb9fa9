"""The runner of the stages, and the contracts that it checks: each kind of broken result is refused by name."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from ringpass import RingConfig, ops, rank_program
from ringpass.layouts.layout import Layout
from ringpass.masks.expr import parse
from ringpass.ops import primitives
from ringpass.passes import divide
from ringpass.passes.detect.detect import detect
from ringpass.passes.op_rules.spec import Rank
from ringpass.passes.op_rules.table import RULES, rule_for
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
    """Proofs, which return nothing that a later stage reads, are the exception."""
    source = inspect.getsource(rank_program) + inspect.getsource(divide.divide)
    assert {*re.findall(r"\brun\((\w+),", source)} == {*CHECKS} - {"lower"} | {"prove_all", "prove_moves"}


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
    rest = [graph.call_function(ops.replicate, ([x], 0, 0, "ring"))] if replicate else []
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
    (text,) = (path.read_text() for path in tmp_path.glob("graph0/rank3/stages.txt"))
    first, second = text.splitlines()
    assert first.startswith("<lambda>: 0.") and first.endswith("s, 5 nodes")
    assert second.startswith("grow: 0.") and second.endswith("6 nodes; +1 neg.default")


# --- graphs that are right --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Self-attention over (B, S, 8), and what a test does after it."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.project, self.after = nn.Linear(8, 24), after

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.after(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def assert_finite(x: Tensor) -> Tensor:
    torch._assert_async(x.isfinite().all())  # a call without a result
    return x * 2


def latents(x: Tensor) -> Tensor:
    """Queries of one batch entry over the keys of all."""
    return F.scaled_dot_product_attention(x[:1, None, :5] * 2, x[:, None], x[:, None])


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "a call without a result": assert_finite,
    "a gated linear unit": lambda x: F.glu(x),
    "queries that keys broadcast": latents,
    "a rounded size": lambda x: x * round(x.shape[1] * 0.5),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_right_graphs_pass(name: str, dynamic: bool) -> None:
    """Ordinary models, on one rank that partitions because of an option."""
    model, x = Layer(RIGHT[name]).double(), torch.randn(2, 23, 8, dtype=torch.float64)
    options: dict[str, Any] = {"compiler": "aot_eager", "layout": "zigzag", "tile": 16}
    torch._dynamo.reset()
    run = torch.compile(model, backend="ring_dilated", options=options, dynamic=dynamic)
    if (name, dynamic) == ("a rounded size", True):
        with pytest.raises(Exception, match="cannot compute the size"):
            run(x)
        return
    torch.testing.assert_close(run(x), model(x), rtol=0, atol=1e-12)


def test_a_rule_that_does_not_fit_gathers(caplog: pytest.LogCaptureFixture) -> None:
    """A fault in an op's record costs memory and a warning, not the numbers."""
    wrong = replace(RULES["relu.default"], dims=lambda sweep, node, note: sweep.fresh((3, 5)))
    with patch.dict(RULES, {"relu.default": wrong}), caplog.at_level("WARNING", "ringpass"):
        model, x = Layer(lambda x: x.relu() * 2).double(), torch.randn(2, 23, 8, dtype=torch.float64)
        options: dict[str, Any] = {"compiler": "aot_eager", "tile": 16}
        torch._dynamo.reset()
        got = torch.compile(model, backend="ring_dilated", options=options)(x)
    torch.testing.assert_close(got, model(x), rtol=0, atol=1e-12)
    assert "failed to analyse relu.default" in caplog.text
    assert "please report it" in caplog.text
