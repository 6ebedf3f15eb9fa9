"""The backend `ring_dilated`: from Dynamo's graph to one rank's compiled program, stage by stage.

    model = torch.compile(model, backend="ring_dilated")

Under torchrun every rank passes the same full batch and gets the same full result.  Importing this module tells Dynamo
to skip logging calls in models, which would otherwise break the graph (`ringpass.logging_calls`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch._guards import CompileContext
from torch.fx import GraphModule

from ringpass import metrics
from ringpass.comm.agreement import Agreement
from ringpass.comm.notices import notice_when_python_ends, telling
from ringpass.comm.recovery import compiling
from ringpass.comm.ring import Ring, ring_of
from ringpass.comm.wrapper_checks import concerns
from ringpass.compiled import compiled_call, lone_call, replicated_call
from ringpass.config import RingConfig
from ringpass.errors import OptionError, UnsupportedError
from ringpass.explain.real import RealGraph, real_run
from ringpass.explain.report import media_of
from ringpass.explain.sources import source_of
from ringpass.explain.stages import GraphRun
from ringpass.input_kinds import refuse_wrappers
from ringpass.logging_calls import skip_logging_calls
from ringpass.option_checks import one_of
from ringpass.passes.capture.capture import Captured
from ringpass.passes.lower.codegen import compile_partitioned, compile_unpartitioned
from ringpass.passes.op_rules.attention import attentions
from ringpass.passes.op_rules.spec import Rank
from ringpass.passes.pipeline import Pipeline
from ringpass.profiling import in_range
from ringpass.rank_program import (
    LOG,
    NO_ATTENTION,
    RankProgram,
    ReadGraph,
    break_of,
    left_whole,
    make_program,
    read_graph,
)
from ringpass.torch_features import compiling_autograd, compiling_to_save, flash_implementation

log, log_of_plan = logging.getLogger(LOG), logging.getLogger("ringpass.passes.plan")

AUTOTUNING = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise")
"""Options of Inductor under which it chooses kernels by their times."""
WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "leave the mode out", "max-autotune": "use mode='max-autotune-no-cudagraphs'"}
"""Inductor's modes that turn on CUDA graphs, and what to do instead."""


@in_range("compile a graph")
def ring_dilated(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compiles `gm`, a graph of Dynamo's, for this rank.

        model = torch.compile(model, backend="ring_dilated", options={"layout": "zigzag"})

    `options`: those of `RingConfig`; `mode`: one of Inductor's modes without CUDA graphs.  Raises OptionError for bad
    options, UnsupportedError for what cannot be partitioned exactly (or, under `strict`, without a gather).  The
    compiled function raises MismatchError if the ranks differ, and PeerError if one does not arrive in time.
    """
    if compiling_autograd():  # its graph holds the programs of the backward, for this rank: run it in its order
        return compile_unpartitioned(gm, example_inputs, {}, "aot_eager")
    if metrics.recorder.active is not None:
        metrics.recorder.active.recompilations += _is_recompilation()
    config = RingConfig.from_options(options)
    inductor = _inductor_options(config, mode)
    ring = ring_of(config.ring, config.timeout)
    _refuse_saving()
    # a graph without attention is never compared, and a rank may compile it alone
    alone = telling(ring, f"failed to compile a graph after call {ring.calls}")
    with compiling(ring) if attentions(gm.graph) else alone:
        return _compiled(gm, example_inputs, config, ring, inductor, options or {}, mode)


def _compiled(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: RingConfig,
    ring: Ring,
    inductor: dict[str, Any],
    options: Mapping[str, Any],
    mode: str | None,
) -> Callable[..., Any]:
    """The function that runs `gm` on this rank, compiled."""
    notice_when_python_ends()
    _warn_of_autotuning(ring, inductor)
    _check_data_parallel_wrappers(ring, config)
    if config.explain is not None:
        media_of(config.explain)
    rank, stages = Rank(ring.rank, ring.world, ring.name), Pipeline(config.dump_directory, ring.rank)
    reported = real_run(config, rank, options, stages)
    told: list[str] = []

    def tell(text: str, channel: str = LOG) -> None:
        told.append(text)
        _warn_rank0(ring, text, channel)

    read = read_graph(gm, example_inputs, config, stages)
    if why := left_whole(read, rank, config, tell):
        if reported is not None:
            reported.add(GraphRun(read, why, None, rank, config, {}, told, break_of(gm)), stages)
        run = compile_unpartitioned(gm, example_inputs, inductor, config.compiler)
        if why == NO_ATTENTION:
            return replicated_call(run)
        return run if config.compiler == "inductor" else lone_call(run)
    _refuse_cuda_graphs(inductor, mode)
    refuse_wrappers(_names(read.captured), example_inputs)
    made = make_program(read, gm, example_inputs, config, rank, stages, tell)
    log_of_plan.info("%s", made.plan)
    shown: Pipeline | RealGraph = stages
    if reported is not None:
        graph = GraphRun(read, "", made, rank, config, {}, told, break_of(gm), stages.dump.path)
        shown = reported.add(graph, stages)
    seen = stages.dumps or reported is not None
    run = compile_partitioned(made.program, config, inductor, rank, made.left, shown.lowered, seen, shown.coded)
    agreement = Agreement(
        ring, _facts(made, config), _names(read.captured), config.compare_weights, sites=_sites(made), line=_line(read)
    )
    return compiled_call(run, made.program, agreement, ring, config)


skip_logging_calls()


def _is_recompilation() -> bool:
    """Whether Dynamo has compiled the same code before, for inputs that differ."""
    compile_id = CompileContext.current_compile_id()
    return compile_id is not None and bool(compile_id.frame_compile_id)


def _inductor_options(config: RingConfig, mode: str | None) -> dict[str, Any]:
    if mode and config.compiler != "inductor":
        raise OptionError(
            f"mode={mode!r} is Inductor's, and compiler={config.compiler!r} does not use Inductor: drop one"
        )
    modes = torch._inductor.list_mode_options()
    if mode:
        one_of("mode", mode, tuple(modes))
    return {**(modes[mode] if mode else {}), **config.inductor}


def _refuse_cuda_graphs(inductor: Mapping[str, Any], mode: str | None) -> None:
    """Refuses CUDA graphs for a partitioned program: a replay runs kernels alone, nothing that the host does."""
    if not inductor.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs):
        return
    instead = WITHOUT_CUDA_GRAPHS.get(mode or "")
    asked = f"mode={mode!r}" if instead else "Inductor's option 'triton.cudagraphs'"
    raise OptionError(
        f"{asked} turns on CUDA graphs, which replay kernels alone, and a program that is partitioned over ranks has "
        "the host start its exchanges, wait for them and compare the ranks in every call: "
        f"{instead or 'set it to False'}"
    )


def _refuse_saving() -> None:
    """Refuses `aot_compile`: the program exchanges with the process group of this run."""
    if compiling_to_save():
        raise UnsupportedError(
            "aot_compile saves a compiled function to a file, and this one exchanges with the process group of this "
            "run: call the compiled model instead, which finds its code in Inductor's cache from the second run on; "
            "or save the whole model, for one device, by torch.export"
        )


def _warn_of_autotuning(ring: Ring, inductor: Mapping[str, Any]) -> None:
    """Warns once that ranks may choose different kernels, if Inductor chooses kernels by measured times."""
    if ring.world > 1 and any(inductor.get(name) for name in AUTOTUNING):
        _warn_once_of_autotuning(ring.rank)


@cache
def _warn_once_of_autotuning(rank: int) -> None:
    if rank == 0:
        log.warning(
            "max_autotune chooses kernels by their times, so each rank may choose others, and values that every rank "
            "computes may differ in their last bits. Gradients of parameters stay equal on all ranks; for equal "
            "activations drop the mode."
        )


def _check_data_parallel_wrappers(ring: Ring, config: RingConfig) -> None:
    """Warns about, or under `strict` refuses, DDP/FSDP2 settings that conflict with the ring."""
    for text in concerns(ring.pg) if ring.pg and ring.world > 1 else ():
        if config.strict:
            raise UnsupportedError(text)
        _warn_rank0(ring, text)


def _warn_rank0(ring: Ring, text: str, channel: str = LOG) -> None:
    """Warns once per ring: on rank 0."""
    if ring.rank == 0:
        logging.getLogger(channel).warning("%s", text)


def _sites(made: RankProgram) -> tuple[str, ...]:
    """Where in the model each attention is, by its number."""
    found = {s.site.index: s.site.path or s.site.node.name for s in made.plan.sites}
    return tuple(found.get(i, "") for i in range(max(found, default=-1) + 1))


def _line(read: ReadGraph) -> str:
    """`model.py:31`: the line of the model at which a graph begins; empty where that is not known."""
    sources = (source_of(node).source for node in read.captured.gm.graph.nodes)
    return next(filter(None, sources), "").rpartition("/")[2]


def _names(captured: Captured) -> tuple[str, ...]:
    return tuple(n.name for n in captured.gm.graph.nodes if n.op == "placeholder")


def _facts(made: RankProgram, config: RingConfig) -> tuple[tuple[str, str], ...]:
    """(name, text) pairs that must be equal on all ranks; the first one that differs is reported."""
    import ringpass

    nodes, given = made.read.captured.gm.graph.nodes, made.read.captured.inputs
    inputs = [
        (
            n.name,
            str(n.meta["val"].dtype),
            str(list(n.meta["val"].shape)),
            *(["sharded"] if i in made.sharded else []),
            *(["needs a gradient"] if given[i].requires_grad and torch.is_grad_enabled() else []),
        )
        for i, n in enumerate(n for n in nodes if n.op == "placeholder")
        if isinstance(n.meta.get("val"), torch.Tensor)
    ]
    text = "\n".join(f"{n.name} = {_target_name(n.target)}({n.args}, {n.kwargs})" for n in nodes)
    return (
        ("call", "a compiled model"),
        ("versions", f"torch {torch.__version__}, ringpass {ringpass.__version__}"),
        ("flash attention", flash_implementation()),
        ("options", config.fingerprint()),
        ("inputs", "; ".join(" ".join(i) for i in inputs)),
        ("graph", text),
        ("plan", str(made.plan)),
        ("ops that run on all tokens since their analysis failed", str([n.name for n in made.read.failures.nodes])),
    )


def _target_name(target: object) -> str:
    """The target of a node as text, without memory addresses, which differ between ranks."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
