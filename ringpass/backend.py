"""The backend `ring_dilated`: from Dynamo's graph to one rank's compiled program, in one straight line.

    model = torch.compile(model, backend="ring_dilated")

Under torchrun every rank passes the same full batch and gets the same full result.  Importing this module tells Dynamo
to skip logging calls in models, which would else break the graph in two
(`torch._dynamo.config.ignore_logging_functions`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.fx import GraphModule

from ringpass.comm.agreement import Agreement, Ring, ring_of
from ringpass.comm.collectives import Shard
from ringpass.comm.data_parallel import concerns
from ringpass.config import RingConfig
from ringpass.errors import OptionError, UnsupportedError
from ringpass.lazy import LazyOutput, Origin, show
from ringpass.passes.capture.capture import Captured, capture
from ringpass.passes.detect.detect import detect
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.dump import Dump
from ringpass.passes.lower import codegen
from ringpass.passes.lower.lower import attentions
from ringpass.passes.op_rules.table import rule_for
from ringpass.passes.partition.emitter import Rank
from ringpass.passes.partition.placement import draws_elsewhere, is_dropout
from ringpass.passes.partition.writer import LocalInput, LocalOutput, Partitioned, partition
from ringpass.passes.plan.plan import RingPlan, plan
from ringpass.passes.plan.verify import prove_all
from ringpass.passes.propagate.factors import Sweep
from ringpass.patterns import everything
from ringpass.schedule.dilation import Dilation
from ringpass.schedule.tiles import tiling
from ringpass.shards import as_dtensor, as_local, on_all_ranks

log = logging.getLogger("ringpass")

SHOWN = 4  # attentions that a message names


def ring_dilated(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compiles `gm` for this rank.  `options`: those of `RingConfig`; `mode`: Inductor's modes.

    Raises OptionError for bad options, UnsupportedError for what cannot be partitioned exactly (or, under `strict`,
    without a gather), and at the first call MismatchError where ranks differ.
    """
    config = RingConfig.from_options(options)
    inductor = _inductor_options(config, mode)
    ring = ring_of(config.ring, config.timeout)
    _check_data_parallel(ring, config)
    captured = capture(gm, example_inputs)
    sites = detect(captured.gm, everything() if config.along_curve else config.mask)
    draws = _draws(captured, sites)
    if ring.world == 1 and not config.asked and not draws:
        return codegen.plain(gm, example_inputs, inductor, config.compiler)
    if not sites:
        for name, value in config.altering.items():
            _warn_rank0(ring, f"no attention in this graph for the option {name!r} ({value}) to act on")
        _warn_rank0(
            ring, f"no attention in this graph: compiled as plain {config.compiler}, every rank computes all of it"
        )
        if not draws:
            return _calling_whole(codegen.plain(gm, example_inputs, inductor, config.compiler))
    dump = Dump(config.dump, ring.rank)
    dump.graph("captured", captured.gm)
    shares = {i: x.origin.shard.dim for i, x in enumerate(example_inputs) if isinstance(x, LazyOutput)}
    given = captured.gm.graph.find_nodes(op="placeholder")
    sweep = Sweep(worked={given[i] for i in shares}).run(captured.gm, rule_for)
    planned = plan(sites, sweep, ring.world, config)
    _refuse_unmasked(planned, config)
    _refuse_contradiction(planned, config)
    prove_all(planned, ring.rank)
    dump.plan(planned, ring.rank)
    who = Rank(ring.rank, ring.world, ring.name)
    gather_outputs = _gathers_outputs(gm, config, ring)
    local = partition(captured, planned, sweep, who, config.strict, gather_outputs, shares)
    dump.graph("partitioned", local.gm)
    dump.text("gathers.txt", "\n".join(map(str, local.gathers)) or "nothing is gathered")
    _report(planned, local, ring)
    key = (ring.rank, ring.world, ring.name)
    whole = len(attentions(captured.gm.graph)) - sum(
        s.problem is not None and not s.site.written for s in planned.sites
    )
    run = codegen.compile_local(local.gm, local.inputs, config, inductor, key, whole, dump.graph, dump.path is not None)
    facts = _facts(captured, planned, config, shares)
    return _calling(run, local, Agreement(ring, facts, _names(captured)), ring, config)


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


def _check_data_parallel(ring: Ring, config: RingConfig) -> None:
    """At DDP and FSDP2 around the model."""
    for text in concerns(ring.pg) if ring.pg and ring.world > 1 else ():
        if config.strict:
            raise UnsupportedError(text)
        _warn_rank0(ring, text)


def _draws(captured: Captured, sites: tuple[AttentionSite, ...]) -> bool:
    """Whether the graph draws random numbers: with one rank too, its dropout is that of every number of ranks."""
    nodes = captured.gm.graph.nodes
    return any(is_dropout(n) or draws_elsewhere(n) for n in nodes) or any(site.dropout for site in sites)


def _gathers_outputs(gm: GraphModule, config: RingConfig, ring: Ring) -> bool:
    """Outputs are gathered in the graph when asked, and when a graph break feeds them to the next graph."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = bool(reason is not None and reason.graph_break)
    if broken:
        why = str(reason.reason).splitlines()[0]  # type: ignore[union-attr]
        _warn_rank0(ring, f"graph break ({why}): the outputs of this piece are gathered for the next one")
    return broken or config.outputs == "gathered"


def _refuse_unmasked(planned: RingPlan, config: RingConfig) -> None:
    """The options act on attentions that ringpass computes: one that runs as the model wrote it would ignore them."""
    for_all = config.altering.keys() - {"dilation"}
    left = [s.site.node.name for s in planned.sites if s.problem is None and (for_all or s.dilation)]
    if left:
        option, why = next(iter(config.altering)), "; ".join(planned.remarks) or "its queries stay replicated"
        raise UnsupportedError(
            f"the option {option!r} cannot be applied to {', '.join(left)}, which runs as the model wrote it: {why}. "
            "Write that attention with K and V of the batch and heads of Q, or leave the option out."
        )


def _refuse_contradiction(planned: RingPlan, config: RingConfig) -> None:
    """A pattern that leaves an attention nothing to attend to is a mistake."""
    for s in planned.sites if "mask" in config.altering else ():
        if s.problem and not len(tiling(s.problem)):
            raise OptionError(
                f"the option 'mask' ({config.mask}) and the mask of {s.site.node.name} contradict each other: no query "
                f"sees any key under {s.problem.mask}"
            )


def _report(planned: RingPlan, local: Partitioned, ring: Ring) -> None:
    log.info("%s", planned)
    for text in _dilated(planned):
        _warn_rank0(ring, text)
    for gather in local.gathers if ring.world > 1 else ():
        if gather.reason != "output":
            _warn_rank0(ring, str(gather))


def _dilated(planned: RingPlan) -> list[str]:
    """A line for each dilation: in which attentions, and what they attend to."""
    alike: dict[tuple[Dilation, int], list[str]] = {}
    for s in planned.sites:
        if s.dilation and s.problem:
            name = f"{s.site.index} ({s.site.path or s.site.node.name})"
            alike.setdefault((s.dilation, s.problem.queries), []).append(name)
    return [
        f"attention {_listed(names)} dilated by {dilation}: {dilation.describe()}; "
        f"about {dilation.share(tokens):.4g} of all pairs of {tokens} tokens"
        for (dilation, tokens), names in alike.items()
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:SHOWN], *([f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else [])])


def _warn_rank0(ring: Ring, text: str) -> None:
    """Warns once per ring: on rank 0."""
    if ring.rank == 0:
        log.warning("%s", text)


def _names(captured: Captured) -> tuple[str, ...]:
    return tuple(n.name for n in captured.gm.graph.nodes if n.op == "placeholder")


def _facts(
    captured: Captured, planned: RingPlan, config: RingConfig, shares: Collection[int]
) -> tuple[tuple[str, str], ...]:
    """What must be equal on all ranks, in the order in which a difference is reported."""
    import ringpass

    nodes = captured.gm.graph.nodes
    inputs = [
        (n.name, str(n.meta["val"].dtype), str(list(n.meta["val"].shape)), *(["in shares"] if i in shares else []))
        for i, n in enumerate(n for n in nodes if n.op == "placeholder")
        if isinstance(n.meta.get("val"), torch.Tensor)
    ]
    text = "\n".join(f"{n.name} = {_spelled(n.target)}({n.args}, {n.kwargs})" for n in nodes)
    return (
        ("call", "a compiled model"),
        ("versions", f"torch {torch.__version__}, ringpass {ringpass.__version__}"),
        ("options", config.fingerprint()),
        ("inputs", "; ".join(" ".join(i) for i in inputs)),
        ("graph", text),
        ("plan", str(planned)),
    )


def _spelled(target: Any) -> str:
    """A call's target without memory addresses, which differ between ranks."""
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _calling(
    run: Callable[..., Any], local: Partitioned, agreement: Agreement, ring: Ring, config: RingConfig
) -> Callable[..., Any]:
    """What Dynamo calls: agree, draw the seed, run, hand out local outputs as the options say."""
    shares = {share.position: share for share in local.shares}

    def call(*given: Any) -> Any:
        draws = local.seeded or local.draws
        drawn = int(torch.randint(2**62, (), dtype=torch.int64)) if draws else 0
        seed = agreement.seed([x.kind if isinstance(x, LazyOutput) else x for x in given], drawn)
        args = [_taken(x, shares.get(i), ring) for i, x in enumerate(given)]
        with _generator(seed) if local.draws else nullcontext():
            results = run(*args, torch.tensor(seed, dtype=torch.int64)) if local.seeded else run(*args)
        outputs, extras = results[: len(local.outputs)], results[len(local.outputs) :]
        return [
            _handed_out(o, i, spec, extras, ring, config) if spec else on_all_ranks(o)
            for i, (o, spec) in enumerate(zip(outputs, local.outputs, strict=True))
        ]

    return call


def _calling_whole(run: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo calls where every rank computes everything."""
    return lambda *args: [on_all_ranks(o) for o in run(*(_taken(arg, None, None) for arg in args))]


def _taken(arg: Any, share: LocalInput | None, ring: Ring | None) -> Any:
    """An argument as the program reads it: a lazy one gathered, or, where it is read token by token, its tokens."""
    if share is None or ring is None:
        return arg.full() if isinstance(arg, LazyOutput) else arg
    assert isinstance(arg, LazyOutput), "Dynamo guards on the kinds of its inputs"
    return arg.tokens_in(share.layout, share.dim, ring)


@contextmanager
def _generator(seed: int) -> Iterator[None]:
    """The default generators start from `seed` inside, and are as they were afterwards: all ranks draw alike."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _handed_out(
    output: torch.Tensor, position: int, spec: LocalOutput, extras: Sequence[Any], ring: Ring, config: RingConfig
) -> torch.Tensor:
    """A local output as the option `outputs` says."""
    outer, tokens = (extras[n[1]] if isinstance(n, tuple) else n for n in (spec.outer, spec.tokens))
    shard = Shard(spec.dim, outer, tokens, spec.layout, ring.world, ring.rank)
    inner = output.shape[spec.dim] // (outer * shard.length) if shard.length else 1
    origin = Origin(spec.name, ring.calls, position, shard, ring, spec.part, inner)
    if config.outputs == "lazy":
        return show(output, origin)
    return as_local(output, origin) if config.outputs == "local" else as_dtensor(output, origin, config.group)
