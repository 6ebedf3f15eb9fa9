"""real: the report of a real run, for the options `explain` and `dump`: of the plan and the program that run.

    run = real_run(config, rank, options, stages)    # of this process; None: nothing asks for a report of this rank
    shown = run.add(graph, stages)                   # `shown.lowered` and `shown.coded` for the compiler of one graph

Files are written anew whenever torch has lowered a graph, a backward at its first call, and the page when Inductor's
code is there.  A report is at hand before the run ends, and holds the graphs so far.  Nothing is known of the memory of
a graph that is not partitioned.

    <explain>                       the report of all graphs
    <dump>/index.html               the page of all graphs that are partitioned, with the texts beside it
    <dump>/graph0/report.json       the report, of this graph alone; its verdict is on all graphs
    <dump>/graph0/trace.json, exchange.dot

Contract: a path that cannot be written is an OptionError when the first graph is compiled.  A fault in making a report
is a warning that names what is missing, and the run goes on; what the system refuses later, as a full disk does, is
raised.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from ringpass.config import RingConfig
from ringpass.errors import InputError, OptionError
from ringpass.explain.data import Data, GraphReport
from ringpass.explain.dumping import write_dump
from ringpass.explain.making import graph_report_of, report_of, texts_of
from ringpass.explain.report import media_of
from ringpass.explain.request import Request
from ringpass.explain.stages import GraphRun
from ringpass.explain.verdict import DEVICES, Device
from ringpass.files import check_writable
from ringpass.page.dumped import write_page
from ringpass.passes.op_rules.spec import Rank
from ringpass.passes.pipeline import Pipeline
from ringpass.schedule.machine import Machine
from ringpass.side_products import side_product
from ringpass.torch_features import compiled_callable

HOW_LONG = "a run shows the lengths that it runs: ringpass.explain(.., device=..) looks for the longest that fits"


class RealRun:
    """The graphs that a process has compiled so far, and the files that tell of them."""

    def __init__(self, path: str | None, rank: Rank, options: Mapping[str, Any]) -> None:
        self.path = path
        self.graphs: list[RealGraph] = []
        self.models: dict[str, None] = {}
        self.request = Request(None, (), {}, rank.world, rank.rank, options, None, None, None)

    def add(self, run: GraphRun, stages: Pipeline) -> RealGraph:
        """Adds a graph, whose stages `stages` ran; returns what is to be shown its lowered graphs and its code."""
        graph = RealGraph(len(self.graphs), run, stages, self)
        self.graphs.append(graph)
        with side_product("the model's name in the report"):
            self.models[model_name(compiled_callable(), run)] = None
        graph.report_anew("as it is captured")
        return graph

    def write(self) -> None:
        """Writes the report of the graphs so far, and the dump of those that have a folder."""
        runs = [graph.run for graph in self.graphs if graph.report is not None]
        device = next(filter(None, map(device_of_run, runs)), None)
        report = report_of([graph.report for graph in self.graphs if graph.report], runs, self.request, device)
        longest: Data = {"tokens": None, "device": device.name, "verified": False, "why": HOW_LONG} if device else {}
        model = ", ".join(self.models) or "not known"
        report = replace(report, model=model, command=shlex.join(sys.argv), longest=longest or None)
        if self.path is not None:
            with side_product(f"the report {self.path}"):
                shown = replace(report, texts=texts_of(runs)) if media_of(self.path) == ".html" else report
                shown.save(self.path)
        with side_product("the report or the page of the dump"):
            write_dump(report, runs)


class RealGraph:
    """One graph: hears of its lowered graphs and of Inductor's code, after the stages that it hands them to."""

    def __init__(self, index: int, run: GraphRun, stages: Pipeline, of: RealRun) -> None:
        self.index, self.run, self.stages, self.of = index, run, stages, of
        self.report: GraphReport | None = None

    def report_anew(self, when: str) -> None:
        """Makes the report of this graph, and writes all."""
        with side_product(f"the report of graph {self.index}, {when},"), unset_fake_temporarily():
            self.report = graph_report_of(self.index, self.run)  # in AOTAutograd's mode masks could not be evaluated
            self.of.write()

    def lowered(self, stage: str, gm: GraphModule) -> None:
        """Hears of the lowered `forward` or `backward`."""
        self.stages.lowered(stage, gm)
        with side_product(f"the {stage} of graph {self.index} in its report"):
            self.run.lowered[stage] = GraphModule(gm, copy.deepcopy(gm.graph))
        self.report_anew(f"with its {stage}")

    def coded(self, stage: str, code: str) -> None:
        """Hears of the code that Inductor generated."""
        self.stages.coded(stage, code)
        with side_product(f"the page of the dump with the code of the {stage}"):
            if self.run.folder is not None:
                write_page(self.run.folder.parent)


_RUNS: dict[tuple[str | None, str | None], RealRun] = {}
"""Of this process, by the path that the option `explain` names and the directory of the dump."""


def real_run(config: RingConfig, rank: Rank, options: Mapping[str, Any], stages: Pipeline) -> RealRun | None:
    """The run whose report this process writes; None: nothing asks for one, or another rank writes it.

    Raises OptionError if the file that the option `explain` names cannot be written.
    """
    key = config.explain, stages.dump.folder
    if rank.rank or key == (None, None):
        return None
    if key not in _RUNS:
        if config.explain is not None:
            _check(config.explain)
        _RUNS[key] = RealRun(config.explain, rank, options)
    return _RUNS[key]


def _check(path: str) -> None:
    try:
        check_writable(path)
    except (OSError, InputError) as error:
        raise OptionError(
            f"option 'explain': expected the path of a file that can be written, got {path!r}: {error}. Name another "
            "one, or leave it out"
        ) from error


def device_of_run(run: GraphRun) -> Device | None:
    """The CUDA device of a graph's inputs, or else that of the machine that is described; None: not known."""
    inputs = [x for x in run.read.captured.inputs if isinstance(x, Tensor)]
    if any(x.device.type == "cuda" for x in inputs) and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Device(found.name, found.total_memory, "cuda")
    machine = run.config.machine
    memory = DEVICES.get(machine.name) if isinstance(machine, Machine) else None
    return Device(machine.name, memory, "cuda") if isinstance(machine, Machine) and memory else None


def unwrapped(compiled: Any) -> Any:
    """The module of a bound method, or the function that another one wraps."""
    while not isinstance(compiled, torch.nn.Module):
        holder = getattr(compiled, "__self__", None)
        inner = holder if isinstance(holder, torch.nn.Module) else getattr(compiled, "__wrapped__", None)
        if inner is None:
            break
        compiled = inner
    return compiled


def model_name(compiled: Any, run: GraphRun) -> str:
    """The class of the module that is compiled, or its function's name; else the outermost that a graph names."""
    compiled = unwrapped(compiled)
    if isinstance(compiled, torch.nn.Module):
        return type(compiled).__name__
    if compiled is not None:
        return str(getattr(compiled, "__name__", type(compiled).__name__))
    for node in run.read.captured.gm.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack:
            return str(getattr(stack[0][1], "__name__", stack[0][1])).rpartition(".")[2]
    return "a function"
