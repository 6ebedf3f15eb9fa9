"""making: the report of a call, or of the graphs of a real run."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import ringpass
from ringpass.config import RingConfig
from ringpass.explain.data import Event, GraphReport
from ringpass.explain.dumping import write_dump
from ringpass.explain.facts import graph_report
from ringpass.explain.fake import run_fake, tensor_bytes
from ringpass.explain.longest import longest
from ringpass.explain.memory import FIXED, TRAINED
from ringpass.explain.report import Report
from ringpass.explain.request import UNNAMED, Request
from ringpass.explain.sources import shown
from ringpass.explain.stages import ExplainingBackend, GraphRun
from ringpass.explain.verdict import Device, device_of_name, verdict_of
from ringpass.passes.dump import readable
from ringpass.passes.op_rules.spec import Rank
from ringpass.schedule.machine import PRESETS

NO_CUDA = (
    "there is no CUDA device here: tensors on 'meta' are seen on the CPU, with its tiles and kernels; layouts and ways "
    "are weighed for the machine that is described"
)
GROUP = "explained"
"""The name of a process group that does not exist."""


def make(request: Request) -> Report:
    """The report of a call."""
    device = device_of_name(request.device)
    report, runs = _report(request, device)
    unseen = {name: value for name, value in request.options.items() if name != "dump"}
    found = longest(
        replace(request, options=unseen), report, lambda other: _report(other, device)[0].verdict.peak_bytes
    )
    made = replace(report, longest=found, texts=texts_of(runs))
    write_dump(made, runs)
    return made


def _report(request: Request, device: Device | None) -> tuple[Report, list[GraphRun]]:
    """The report without the largest length and without texts, and what it is made of."""
    runs, compilations = graphs_of(request, device)
    graphs = [graph_report_of(i, run) for i, run in enumerate(runs)]
    return report_of(graphs, runs, request, device, compilations, tensor_bytes(request.model)), runs


def graphs_of(request: Request, device: Device | None) -> tuple[list[GraphRun], list[Any]]:
    """What was made of each graph of the call, and what Dynamo notes of each compilation."""
    options = dict(request.options)
    if request.machine is not None:
        options["machine"] = request.machine
    elif device is not None and device.name in PRESETS:
        options.setdefault("machine", device.name)
    backend = ExplainingBackend(RingConfig.from_options(options), Rank(request.rank, request.world, GROUP))
    seen = (device.type if device else None) or torch.get_default_device().type
    there = seen != "cuda" or torch.cuda.is_available()  # without one, torch traces no autograd of CUDA tensors
    call = request.model, request.args, request.kwargs, backend, seen if there else "cpu", request.train
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = list(torch._dynamo.utils.get_compilation_metrics())  # of the last few: their number says nothing
        run_fake(*call)
        compilations = [x for x in torch._dynamo.utils.get_compilation_metrics() if all(x is not y for y in before)]
    if backend.graphs:
        told = {str(w.message) for w in heard if "ringpass" in w.filename or "passes" in w.filename}
        backend.graphs[0].told += sorted(told)
        if not there:
            backend.graphs[0].told.append(NO_CUDA)
    return backend.graphs, compilations


def graph_report_of(index: int, run: GraphRun) -> GraphReport:
    """The report of graph number `index`."""
    return graph_report(index, run, _inputs(run))


def texts_of(runs: Sequence[GraphRun]) -> dict[str, str]:
    """The stages of the explained rank, by graph and file name."""
    found: dict[str, str] = {}
    for i, run in enumerate(runs):
        stages = {"captured": run.read.captured.gm} | ({"partitioned": run.made.program.gm} if run.made else {})
        found |= {f"graph{i}/{name}.py": readable(gm) for name, gm in (stages | run.lowered).items()}
    return found


def report_of(
    graphs: Sequence[GraphReport],
    runs: Sequence[GraphRun],
    request: Request,
    device: Device | None,
    compilations: Sequence[Any] = (),
    held: int | None = None,
) -> Report:
    """The report of graphs.

    `compilations`: Dynamo's notes of them; `held`: bytes of the model's parameters and buffers, None: those that the
    graphs read.
    """
    breaks = _breaks(runs)
    breaks += _uncompiled(compilations, {event.source for event in breaks})
    peak = peak_bytes(graphs, held)
    return Report(
        made_by={"ringpass": ringpass.__version__, "torch": torch.__version__, "python": platform.python_version()},
        model=_name(request.model),
        world=request.world,
        rank=request.rank,
        options={name: str(value) for name, value in request.options.items()},
        command=_command(request),
        fingerprint=fingerprint(runs),
        verdict=verdict_of(graphs, breaks, request.world, peak, device),
        longest=None,
        breaks=breaks,
        recompiles=_recompiles(compilations),
        graphs=list(graphs),
    )


def peak_bytes(graphs: Sequence[GraphReport], held: int | None) -> int:
    """The peak of a rank over all graphs: while one runs, what earlier ones saved is still there.

    `held`: bytes of all parameters and buffers; gradients of those that the graphs train are added.
    """
    gradients = sum(graph.memory.kinds["gradients"] for graph in graphs)
    parameters = held if held is not None else sum(graph.memory.kinds["parameters"] for graph in graphs)
    inputs = max((graph.memory.kinds["inputs"] for graph in graphs), default=0)
    before, most = 0, 0
    for graph in graphs:
        most = max(most, before + graph.memory.activations)
        before += graph.memory.held
    return parameters + gradients + inputs + most


def fingerprint(runs: Sequence[GraphRun]) -> str:
    """A digest of graphs, options and plans."""
    found = hashlib.sha256()
    for run in runs:
        nodes = run.read.captured.gm.graph.nodes
        text = "\n".join(f"{n.name} = {getattr(n.target, '__name__', n.target)}({n.args}, {n.kwargs})" for n in nodes)
        found.update(f"{text}\n{run.config.fingerprint()}\n{run.made.plan if run.made else run.whole}\n".encode())
    return found.hexdigest()


def _inputs(run: GraphRun) -> list[str]:
    """What each input of a graph is: Dynamo names parameters and buffers after the modules that hold them."""
    captured = run.read.captured
    out = []
    for node, value in zip(captured.gm.graph.find_nodes(op="placeholder"), captured.inputs, strict=True):
        held = "_parameters_" in node.name or "_buffers_" in node.name or node.name.startswith("l_self_")
        trained = isinstance(value, torch.Tensor) and value.requires_grad
        out.append("" if not held else TRAINED if trained else FIXED)
    return out


def _name(model: Any) -> str:
    model = getattr(model, "_orig_mod", model)
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", str(model))


def _command(request: Request) -> str:
    words = ["--world-size", request.world, "--rank", request.rank]
    words += ["--options", json.dumps(dict(request.options), default=str)] if request.options else []
    words += ["--machine", request.machine] if request.machine is not None else []
    words += ["--device", request.device] if request.device is not None else []
    return f"ringpass explain {UNNAMED} {shlex.join(map(str, words))}"


# --- breaks, recompilations -------------------------------------------------------------------------------------------


def _breaks(runs: Sequence[GraphRun]) -> list[Event]:
    found: Counter[tuple[str, str | None]] = Counter()
    for run in runs:
        if run.broken is not None:
            stack = list(run.broken.user_stack or ())
            source = f"{shown(stack[-1].filename)}:{stack[-1].lineno}" if stack else None
            found[str(run.broken.reason).splitlines()[0], source] += 1
    return [Event(reason, source, count) for (reason, source), count in found.items()]


def _uncompiled(compilations: Sequence[Any], known: Collection[str | None]) -> list[Event]:
    """Functions that Dynamo does not compile at all, as those that break in a loop; `known`: lines of other breaks."""
    found: Counter[tuple[str, str | None]] = Counter()
    for metrics in compilations:
        file, line = metrics.fail_user_frame_filename, metrics.fail_user_frame_lineno
        source = f"{shown(file)}:{line}" if file else None
        if metrics.fail_type == "Unsupported" and source not in known:
            reason = str(metrics.fail_reason).splitlines()[0]
            found[f"{reason}, so that Dynamo compiles nothing of {metrics.co_name!r} itself", source] += 1
    return [Event(reason, source, count) for (reason, source), count in found.items()]


def _recompiles(compilations: Sequence[Any]) -> list[Event]:
    """What Dynamo compiled more than once, and why."""
    found: Counter[tuple[str, str | None]] = Counter()
    for metrics in compilations:
        if metrics.recompile_reason:
            file, line = metrics.co_filename, metrics.co_firstlineno
            found[str(metrics.recompile_reason).splitlines()[0], f"{shown(file)}:{line}" if file else None] += 1
    return [Event(reason, source, count) for (reason, source), count in found.items()]
