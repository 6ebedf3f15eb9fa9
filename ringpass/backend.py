"""The backend `ring_dilated`: from Dynamo's graph to one rank's compiled program, stage by stage.

    model = torch.compile(model, backend="ring_dilated")

Under torchrun every rank passes the same full batch and gets the same full result.  Importing this module tells Dynamo
to skip logging calls in models, which would otherwise break the graph
(`torch._dynamo.config.ignore_logging_functions`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule

from ringpass.comm.agreement import Agreement, Ring, ring_of
from ringpass.comm.wrapper_checks import concerns
from ringpass.compiled import compiled_call, replicated_call
from ringpass.config import RingConfig
from ringpass.errors import OptionError, UnsupportedError
from ringpass.lazy import LazyOutput
from ringpass.nodes import source_line
from ringpass.passes.capture.capture import Captured, capture
from ringpass.passes.capture.decompose import decompose
from ringpass.passes.detect.detect import detect
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.divide import divide
from ringpass.passes.failures import CannotWriteError, Failures
from ringpass.passes.lower.codegen import compile_partitioned, compile_unpartitioned
from ringpass.passes.op_rules.attention import attentions
from ringpass.passes.op_rules.spec import Rank
from ringpass.passes.op_rules.table import draws_counter_based, draws_shared, has_rule
from ringpass.passes.partition.partitioned import Partitioned
from ringpass.passes.partition.placement import place
from ringpass.passes.partition.prove_moves import prove_moves
from ringpass.passes.partition.writer import partition
from ringpass.passes.pipeline import Pipeline
from ringpass.passes.plan.plan import RingPlan
from ringpass.passes.plan.prove import prove_all
from ringpass.patterns import everything
from ringpass.schedule.dilation import Dilation
from ringpass.schedule.tiles import tiling
from ringpass.torch_features import flash_implementation

log = logging.getLogger("ringpass")

AUTOTUNING = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise")
"""Options of Inductor under which it chooses kernels by their times."""
NAMED_ATTENTIONS = 4  # attentions that a message names
WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "leave the mode out", "max-autotune": "use mode='max-autotune-no-cudagraphs'"}
"""Inductor's modes that turn on CUDA graphs, and what to do instead."""


def ring_dilated(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compiles `gm`, a graph of Dynamo's, for this rank.

        model = torch.compile(model, backend="ring_dilated", options={"layout": "zigzag"})

    `options`: those of `RingConfig`; `mode`: one of Inductor's modes without CUDA graphs.  Raises OptionError for bad
    options, UnsupportedError for what cannot be partitioned exactly (or, under `strict`, without a gather).  The
    compiled function raises MismatchError if the ranks differ, and PeerError if one does not arrive in time.
    """
    config = RingConfig.from_options(options)
    inductor = _inductor_options(config, mode)
    ring = ring_of(config.ring, config.timeout)
    _warn_of_autotuning(ring, inductor)
    _check_data_parallel_wrappers(ring, config)
    stages, failures = Pipeline(config.dump, ring.rank), Failures(config.strict)
    captured = stages.run(capture, gm, example_inputs)
    captured = stages.run(decompose, captured, has_rule, failures)
    sites = stages.run(detect, captured.gm, everything() if config.along_curve else config.mask, failures)
    if (call := _unpartitioned(gm, example_inputs, captured, sites, ring, config, inductor)) is not None:
        return call
    _refuse_cuda_graphs(inductor, mode)
    stages.open()
    sharded = {i: x.origin.shard.dim for i, x in enumerate(example_inputs) if isinstance(x, LazyOutput)}
    division = divide(stages.run, captured, sites, ring.world, config, sharded, failures)
    sweep, planned, placement = division.sweep, division.plan, division.placement
    stages.write("plan", planned)  # of several, the one that was chosen
    _refuse_ignored_options(planned, config)
    _warn_of_unread(planned, ring, config)
    stages.run(prove_all, planned, ring.rank)
    rank = Rank(ring.rank, ring.world, ring.name)
    gather_outputs = _gathers_outputs(gm, config, ring)
    program = None
    while program is None:  # an op that cannot be written on local tokens is placed anew, replicated
        try:
            program = stages.run(partition, captured, placement, planned, rank, config.strict, gather_outputs)
        except CannotWriteError as refused:
            failures.note("partition", refused.node, refused.__cause__)
            placement = stages.run(place, captured, planned, sweep, sharded, failures)
    stages.run(prove_moves, placement, program)
    _report(planned, program, ring)
    left = len(attentions(captured.gm.graph)) - planned.partitioned  # attentions that stay as the model wrote them
    run = compile_partitioned(program, config, inductor, rank, left, stages.lowered, stages.dumps, stages.coded)
    facts = _facts(captured, planned, config, sharded, failures)
    return compiled_call(run, program, Agreement(ring, facts, _names(captured), config.compare_weights), ring, config)


def _unpartitioned(
    gm: GraphModule,
    inputs: Sequence[Any],
    captured: Captured,
    sites: tuple[AttentionSite, ...],
    ring: Ring,
    config: RingConfig,
    inductor: dict[str, Any],
) -> Callable[..., Any] | None:
    """The function that Dynamo calls if there is nothing to partition: one rank and no options, or no attention.

    Else None; also for a graph that draws random numbers, since they must not depend on the number of ranks.
    """
    nodes = captured.gm.graph.nodes
    draws = any(draws_counter_based(n) or draws_shared(n) for n in nodes) or any(site.dropout for site in sites)
    if ring.world == 1 and not config.asked and not draws:
        return compile_unpartitioned(gm, inputs, inductor, config.compiler)
    if not sites:
        for name, value in config.altering.items():
            _warn_rank0(ring, f"no attention in this graph for the option {name!r} ({value}) to act on")
        _warn_rank0(
            ring, f"no attention in this graph: compiled as plain {config.compiler}, every rank computes all of it"
        )
        if not draws:
            return replicated_call(compile_unpartitioned(gm, inputs, inductor, config.compiler))
    return None


class LoggingCalls(set[Any]):
    """Functions that Dynamo skips: those already named, warnings.warn, and the methods of loggers that emit a message.

    Methods that libraries add to logging.Logger later (transformers' `warning_once`) count too.
    """

    METHODS = ("debug", "info", "warning", "warn", "error", "exception", "critical", "log", "warning_once", "info_once")

    def __contains__(self, function: object) -> bool:
        name = getattr(function, "__name__", "")
        emits = name in self.METHODS and getattr(logging.Logger, name, None) is function
        return emits or function is warnings.warn or super().__contains__(function)


def skip_logging_calls() -> None:
    """Tells Dynamo to skip logging calls, once per process."""
    config = torch._dynamo.config
    if not isinstance(config.ignore_logging_functions, LoggingCalls):
        config.ignore_logging_functions = LoggingCalls({*config.ignore_logging_functions, warnings.warn})


skip_logging_calls()


def _inductor_options(config: RingConfig, mode: str | None) -> dict[str, Any]:
    if mode and config.compiler != "inductor":
        raise OptionError(
            f"mode={mode!r} is Inductor's, and compiler={config.compiler!r} does not use Inductor: drop one"
        )
    return {**(torch._inductor.list_mode_options(mode) if mode else {}), **config.inductor}


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


def _gathers_outputs(gm: GraphModule, config: RingConfig, ring: Ring) -> bool:
    """Whether outputs are gathered in the graph: by the option `outputs`, or since a graph break passes them on."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    broken = bool(reason is not None and reason.graph_break)
    if broken:
        why = str(reason.reason).splitlines()[0]
        _warn_rank0(ring, f"graph break ({why}): the outputs of this graph are gathered for the next one")
    return broken or config.gathered


def _refuse_ignored_options(planned: RingPlan, config: RingConfig) -> None:
    """Refuses options that some attention would ignore or contradict."""
    _refuse_unmasked(planned, config)
    _refuse_contradiction(planned, config)


def _refuse_unmasked(planned: RingPlan, config: RingConfig) -> None:
    """Refuses options for an attention that runs as the model wrote it and would therefore ignore them."""
    for_all = config.altering.keys() - {"dilation"}
    left = [s.site.node.name for s in planned.sites if s.problem is None and (for_all or s.dilation)]
    if left:
        option, why = next(iter(config.altering)), "; ".join(planned.remarks) or "its queries stay replicated"
        raise UnsupportedError(
            f"the option {option!r} cannot be applied to {', '.join(left)}, which runs as the model wrote it: {why}. "
            "Write that attention with K and V of the batch and heads of Q, or leave the option out."
        )


def _refuse_contradiction(planned: RingPlan, config: RingConfig) -> None:
    """Refuses a pattern that leaves an attention nothing to attend to: it is a mistake."""
    for s in planned.sites if "mask" in config.altering else ():
        if s.problem and not len(tiling(s.problem)):
            raise OptionError(
                f"the option 'mask' ({config.mask}) and the mask of {s.site.node.name} contradict each other: no query "
                f"sees any key under {s.problem.mask}"
            )


def _warn_of_unread(planned: RingPlan, ring: Ring, config: RingConfig) -> None:
    """Warns of, or under `strict` refuses, attentions that run as the model wrote them since they were not read."""
    for site in planned.sites if ring.world > 1 else ():
        if site.unread:
            where = source_line(site.site.node)
            text = f"{site.site.node.name}{f' at {where}' if where else ''} runs as the model wrote it: {site.unread}"
            if config.strict:
                raise UnsupportedError(f"strict=True: the attention {text}")
            _warn_rank0(ring, f"the attention {text}; its ranks gather what it reads")


def _report(planned: RingPlan, program: Partitioned, ring: Ring) -> None:
    log.info("%s", planned)
    for text in _dilated(planned):
        _warn_rank0(ring, text)
    for gather in program.gathers if ring.world > 1 else ():
        if gather.reason != "output":
            _warn_rank0(ring, str(gather))
    for work in program.whole_work if ring.world > 1 else ():
        _warn_rank0(ring, str(work))


def _dilated(planned: RingPlan) -> list[str]:
    """A line of text for each dilation: the attentions that it dilates, and what they attend to."""
    alike: dict[tuple[Dilation, int], list[str]] = {}
    for s in planned.sites:
        if s.dilation and s.problem:
            name = f"{s.site.index} ({s.site.path or s.site.node.name})"
            alike.setdefault((s.dilation, s.problem.queries), []).append(name)
    return [
        f"attention {_first_few(names)} dilated by {dilation}: {dilation.describe()}; "
        f"about {dilation.share(tokens):.4g} of all pairs of {tokens} tokens"
        for (dilation, tokens), names in alike.items()
    ]


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(
        [
            *names[:NAMED_ATTENTIONS],
            *([f"and {len(names) - NAMED_ATTENTIONS} more"] if len(names) > NAMED_ATTENTIONS else []),
        ]
    )


def _warn_rank0(ring: Ring, text: str) -> None:
    """Warns once per ring: on rank 0."""
    if ring.rank == 0:
        log.warning("%s", text)


def _names(captured: Captured) -> tuple[str, ...]:
    return tuple(n.name for n in captured.gm.graph.nodes if n.op == "placeholder")


def _facts(
    captured: Captured, planned: RingPlan, config: RingConfig, sharded: Collection[int], failures: Failures
) -> tuple[tuple[str, str], ...]:
    """(name, text) pairs that must be equal on all ranks; the first one that differs is reported."""
    import ringpass

    nodes = captured.gm.graph.nodes
    inputs = [
        (n.name, str(n.meta["val"].dtype), str(list(n.meta["val"].shape)), *(["sharded"] if i in sharded else []))
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
        ("plan", str(planned)),
        ("ops that run on all tokens since their analysis failed", str([n.name for n in failures.nodes])),
    )


def _target_name(target: object) -> str:
    """The target of a node as text, without memory addresses, which differ between ranks."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
