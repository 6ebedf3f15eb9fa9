"""stages: the explaining backend, which takes each graph of Dynamo's as far as the lowered graphs of one rank.

    backend = ExplainingBackend(config, Rank(0, 8, "explained"))
    run_fake(model, args, kwargs, backend)
    backend.graphs                              # one `GraphRun` for each graph, in order

Contract: the stages are those of `ringpass.rank_program`; nothing is compiled to code, run, sent or logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ringpass.config import RingConfig
from ringpass.passes.lower.codegen import show_lowered
from ringpass.passes.op_rules.spec import Rank
from ringpass.passes.pipeline import Pipeline
from ringpass.rank_program import LOG, RankProgram, ReadGraph, break_of, left_whole, make_program, read_graph

WHOLE = 2**31  # attentions that may stay as the model wrote them, where nothing is partitioned


@dataclass
class GraphRun:
    """What was made of one graph.

    `whole`: why nothing was partitioned, empty otherwise; `made`: the plan and the program if something was;
    `lowered`: the graphs by phase; `told`: what a run would have logged; `folder`: that of its dump, if there is one.
    """

    read: ReadGraph
    whole: str
    made: RankProgram | None
    rank: Rank
    config: RingConfig
    lowered: dict[str, GraphModule] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    broken: Any = None  # Dynamo's reason for the end of the graph
    folder: Path | None = None


@dataclass
class ExplainingBackend:
    """A backend that makes a `GraphRun` of each graph for one `rank`."""

    config: RingConfig
    rank: Rank
    graphs: list[GraphRun] = field(default_factory=list)

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        """The stages on one graph."""
        told: list[str] = []

        def tell(text: str, channel: str = LOG) -> None:
            told.append(text)

        stages = Pipeline(self.config.dump, self.rank.rank)
        read = read_graph(gm, inputs, self.config, stages, tell)
        whole = left_whole(read, self.rank, self.config, tell)
        made = None
        program, given, left = gm, tuple(inputs), WHOLE
        if not whole:
            made = make_program(read, gm, inputs, self.config, self.rank, stages, tell)
            program, given, left = made.program.gm, made.program.inputs, made.left
        run = GraphRun(read, whole, made, self.rank, self.config, {}, told, break_of(gm), stages.dump.path)
        inductor: dict[str, Any] = dict(self.config.inductor)
        if not torch.cuda.is_available():
            inductor.setdefault("shape_padding", False)  # which would time products on the device

        def show(stage: str, lowered: GraphModule) -> None:
            if made is not None:
                stages.lowered(stage, lowered)
            run.lowered[stage] = lowered

        show_lowered(program, given, self.config, inductor, left, show)
        self.graphs.append(run)
