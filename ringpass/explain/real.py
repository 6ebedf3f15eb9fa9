"""real: the report of a real run, for the option `explain`: the same data, of the plan and the program that run.

    run = real_run(config, rank, options)            # of this process, by the path that the option names
    show = run.add(graph, then)                      # a `Show` for the lowered graphs of one graph

The file is written anew whenever torch has lowered a graph: a backward at its first call.  A report is at hand before
the run ends, and holds the graphs so far.  Nothing is known of the memory of a graph that is not partitioned.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from ringpass.config import RingConfig
from ringpass.explain.making import report_of
from ringpass.explain.request import Request
from ringpass.explain.stages import GraphRun
from ringpass.passes.op_rules.spec import Rank

Show = Callable[[str, GraphModule], None]


class RealRun:
    """The graphs that a process has compiled so far, and the file that tells of them."""

    def __init__(self, path: str, rank: Rank, options: Mapping[str, Any]) -> None:
        self.path, self.graphs = path, list[GraphRun]()
        self.request = Request(None, (), {}, rank.world, rank.rank, options, None, None, None)

    def add(self, run: GraphRun, then: Show) -> Show:
        """Adds a graph; returns what is shown its lowered graphs, which it hands on to `then`."""
        self.graphs.append(run)
        self.write()

        def show(stage: str, gm: GraphModule) -> None:
            then(stage, gm)
            run.lowered[stage] = GraphModule(gm, copy.deepcopy(gm.graph))
            self.write()

        return show

    def write(self) -> None:
        """Writes the report of the graphs so far."""
        with unset_fake_temporarily():  # torch compiles under a fake mode, and masks are evaluated with data
            report = report_of(self.graphs, self.request, None)
        command = shlex.join(sys.argv)
        replace(report, model=_model(self.graphs[0]), command=command).save(self.path)


_RUNS: dict[str, RealRun] = {}
"""Of this process, by path."""


def real_run(config: RingConfig, rank: Rank, options: Mapping[str, Any]) -> RealRun | None:
    """The run whose report this process writes; None: the option is not given, or another rank writes it."""
    if config.explain is None or rank.rank:
        return None
    return _RUNS.setdefault(config.explain, RealRun(config.explain, rank, options))


def _model(run: GraphRun) -> str:
    """The class of the outermost module that the nodes of a graph name."""
    for node in run.read.captured.gm.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack:
            return str(getattr(stack[0][1], "__name__", stack[0][1])).rpartition(".")[2]
    return "a function"
