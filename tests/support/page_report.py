"""A report for the page, filled from a real plan and its graphs on one rank of a ring without peers.

>>> found = page_report(model, batch, world=4, rank=1, layout="zigzag")
>>> html = render(found.report, found.texts)

What the page reads is the dict that `ringpass.explain` makes; this one has all its parts, in the simplest way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.fx import GraphModule, Node

from ringpass.nodes import bytes_of, op_name, source_line
from ringpass.passes.dump import readable
from ringpass.passes.dump import texts as texts_of_stage
from ringpass.passes.partition.partitioned import Partitioned, gathers_data
from ringpass.passes.pipeline import Pipeline
from ringpass.passes.plan.plan import RingPlan
from ringpass.passes.plan.plan_data import plan_data, where
from tests.support.pipeline_stages import fake_ring

BOUNDARIES = {
    "reduce": "reduce",
    "start_sum": "parameter sum",
    "redistribute": "redistribute",
    "all_to_all": "all-to-all",
}
REMEDY = "leave the op out, or apply it to single tokens"


@dataclass
class PageReport:
    """A report and the texts of its stages."""

    report: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict)


def page_report(
    step: Callable[[Any], Any], model: torch.nn.Module, world: int, rank: int = 0, **options: Any
) -> PageReport:
    """What is compiled for `rank` when `step(compiled model)` runs, backward included."""
    results: dict[str, Any] = {}
    graphs: dict[str, GraphModule] = {}
    run, lowered = Pipeline.run, Pipeline.lowered

    def record(self: Pipeline, stage: Callable[..., Any], *args: Any) -> Any:
        results[stage.__name__] = result = run(self, stage, *args)
        return result

    def record_lowered(self: Pipeline, name: str, gm: GraphModule) -> None:
        lowered(self, name, gm)
        graphs[name] = gm

    chosen = {"compiler": "aot_eager", **options}
    with (
        fake_ring(rank, world),
        patch.object(Pipeline, "run", record),
        patch.object(Pipeline, "lowered", record_lowered),
    ):
        compiled: Any = torch.compile(model, backend="ring_dilated", options=chosen)
        step(compiled)
    texts = dict(text for stage, result in results.items() for text in texts_of_stage(stage, result, rank))
    texts |= {f"{name}.py": readable(gm) for name, gm in graphs.items()}
    planned, program = results["plan"], results["partition"]
    memory = _memory(graphs)
    report = {
        "version": 1,
        "made_by": {"ringpass": "0.1.0", "torch": str(torch.__version__)},
        "model": type(model).__name__,
        "world": world,
        "rank": rank,
        "options": {name: str(value) for name, value in chosen.items()},
        "command": f"ringpass explain model.py:make --world-size {world} --rank {rank}",
        "fingerprint": "0" * 16,
        "verdict": {
            "lines": [
                f"{len(planned.sites)} attentions over {world} ranks, {len(program.gathers)} values gathered.",
                f"A rank needs {memory['peak']} bytes at most.",
            ],
            "peak_bytes": memory["peak"],
            "device": {"name": "a device", "bytes": 2 * memory["peak"]},
            "fits": True,
            "efficiency": 0.83,
            "change": "Nothing: no value is gathered." if not program.gathers else "Rewrite the op that gathers.",
        },
        "longest": {"tokens": 2 * planned.axes[0].hint if planned.axes else 0, "device": "a device"},
        "breaks": [],
        "recompiles": [],
        "graphs": [_graph(planned, program, graphs, memory, results)],
    }
    return PageReport(report, texts)


def _graph(
    planned: RingPlan, program: Partitioned, graphs: dict[str, GraphModule], memory: Any, results: dict[str, Any]
) -> dict[str, Any]:
    data = plan_data(planned)
    proofs = results["prove_all"]
    return {
        "index": 0,
        **data,
        "layouts": [
            {"name": name, "chosen": i == 0, "seconds": seconds, "why": line}
            for i, (line, name, seconds) in enumerate(_layouts(planned))
        ],
        "gathers": [{**gather, "remedy": REMEDY} for gather in gathers_data(program)],
        "boundaries": [x for phase, gm in graphs.items() for x in _boundaries(phase, gm)],
        "memory": memory,
        "proof": {"text": "The schedules of all ranks are proved correct.", "tiles": 0, "problems": len(proofs),
                  "orders": ["gloo", "NCCL"]},
    }  # fmt: skip


def _layouts(planned: RingPlan) -> list[tuple[str, str, float]]:
    lines = [line for line in planned.weighed.lines if line.startswith("layout ")]
    return [(line, line.split()[1].rstrip(":"), 1e-3 * (1 + i)) for i, line in enumerate(lines)]


def _boundaries(phase: str, gm: GraphModule) -> list[dict[str, Any]]:
    found = []
    for node in gm.graph.nodes:
        kind = BOUNDARIES.get(op_name(node).removeprefix("ringpass.").partition(".")[0]) if _calls(node) else None
        if kind:
            source, line = where(source_line(node))
            about = {"source": source, "line": line, "direction": phase}
            found.append({"kind": kind, "name": node.name, "bytes": bytes_of(node), **about})
    return found


def _memory(graphs: dict[str, GraphModule]) -> dict[str, Any]:
    """Bytes alive after each node, if every node had a buffer of its own until its last use."""
    program, kinds = [], {"parameters": 0, "saved": 0, "temporary": 0}
    for phase, gm in graphs.items():
        nodes = list(gm.graph.nodes)
        last = {user: i for i, n in enumerate(nodes) for user in n.all_input_nodes}
        ends: dict[int, int] = {}
        live = sum(bytes_of(n) for n in nodes if n.op == "placeholder")
        kinds["saved" if phase == "backward" else "parameters"] = live
        for i, node in enumerate(nodes):
            if _calls(node) and not op_name(node).startswith(("view", "t.", "permute", "getitem", "slice", "select")):
                live += bytes_of(node)
                ends[last.get(node, i)] = ends.get(last.get(node, i), 0) + bytes_of(node)
                program.append({"phase": phase, "node": node.name, "live": live})
            live -= ends.pop(i, 0)
    peak = max((x["live"] for x in program), default=0)
    kinds["temporary"] = max(0, peak - kinds["parameters"])
    return {"kinds": kinds, "peak": peak, "program": program}


def _calls(node: Node) -> bool:
    return node.op == "call_function"
