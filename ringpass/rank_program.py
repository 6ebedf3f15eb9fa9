"""The stages from Dynamo's graph to the program of one rank: those of a real run, and of `ringpass.explain`.

    read = read_graph(gm, inputs, config, stages, tell)
    if reason := left_whole(read, rank, config, tell):       # nothing to partition, and why
        ...
    made = make_program(read, gm, inputs, config, rank, stages, tell)    # the plan, proved; the program of `rank`

Contract: nothing here talks to other ranks or needs any; the result depends on the graph, the options, the name of the
CUDA device, P and the rank.  What a user must hear goes to `tell`, once for all ranks: a real run logs it on rank 0, a
report lists it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.fx import GraphModule

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
from ringpass.schedule.proof import Proof
from ringpass.schedule.tiles import tiling

LOG, LOG_OF_GATHERS = "ringpass", "ringpass.passes.partition"
"""Channels of `logging`."""
NAMED_ATTENTIONS = 4  # attentions that a message names
ALONE, NO_ATTENTION = "one rank and no options", "no attention"
"""Why nothing of a graph is partitioned."""


class Tell(Protocol):
    """Hears what a user must hear, and the channel for it."""

    def __call__(self, text: str, channel: str = LOG) -> None:
        """`channel`: the name of a logger."""


@dataclass(frozen=True)
class ReadGraph:
    """What was read from a graph of Dynamo's: the captured graph, its attentions, the ops whose analysis failed."""

    captured: Captured
    sites: tuple[AttentionSite, ...]
    failures: Failures

    @property
    def draws(self) -> bool:
        """Whether the graph draws random numbers, which must not depend on the number of ranks."""
        nodes = self.captured.gm.graph.nodes
        drawn = any(draws_counter_based(n) or draws_shared(n) for n in nodes)
        return drawn or any(site.dropout for site in self.sites)


@dataclass(frozen=True)
class RankProgram:
    """The plan of a graph, what was proved of it, and the program of one rank.

    `sharded`: the positions of inputs that come sharded; `left`: how many attentions stay as the model wrote them.
    """

    read: ReadGraph
    plan: RingPlan
    proofs: tuple[Proof, ...]
    program: Partitioned
    sharded: Collection[int]
    left: int


def read_graph(
    gm: GraphModule, inputs: Sequence[Any], config: RingConfig, stages: Pipeline, tell: Tell | None = None
) -> ReadGraph:
    """Captures `gm`, a graph of Dynamo's, and finds its attentions.

    `tell`: is told of analyses that fail; None: they are logged, on every rank.
    """
    failures = Failures(config.strict, tell=tell)
    captured = stages.run(capture, gm, inputs)
    captured = stages.run(decompose, captured, has_rule, failures)
    sites = stages.run(detect, captured.gm, everything() if config.along_curve else config.mask, failures)
    return ReadGraph(captured, sites, failures)


def left_whole(read: ReadGraph, rank: Rank, config: RingConfig, tell: Tell) -> str:
    """Why there is nothing to partition, `ALONE` or `NO_ATTENTION`.  Empty: there is something.

    A graph that draws random numbers is partitioned all the same, since they must not depend on the number of ranks.
    """
    draws = read.draws
    if rank.world == 1 and not config.asked and not draws:
        return ALONE
    if not read.sites:
        for name, value in config.altering.items():
            tell(f"no attention in this graph for the option {name!r} ({value}) to act on")
        tell(f"no attention in this graph: compiled as plain {config.compiler}, every rank computes all of it")
        if not draws:
            return NO_ATTENTION
    return ""


def make_program(
    read: ReadGraph,
    gm: GraphModule,
    inputs: Sequence[Any],
    config: RingConfig,
    rank: Rank,
    stages: Pipeline,
    tell: Tell,
) -> RankProgram:
    """Plans the graph, proves the schedules of all ranks, and writes the program of `rank`.

    Raises OptionError for options that an attention contradicts, UnsupportedError for what cannot be partitioned
    exactly (or, under `strict`, without a gather).
    """
    captured, failures = read.captured, read.failures
    stages.open()
    sharded = {i: x.origin.shard.dim for i, x in enumerate(inputs) if isinstance(x, LazyOutput)}
    division = divide(stages.run, captured, read.sites, rank.world, config, sharded, failures)
    sweep, planned, placement = division.sweep, division.plan, division.placement
    stages.write("plan", planned)  # of several, the one that was chosen
    _refuse_ignored_options(planned, config)
    _tell_unread(planned, config, tell)
    proofs = stages.run(prove_all, planned, rank.rank)
    gather_outputs = _gathers_outputs(gm, config, tell)
    program = None
    while program is None:  # an op that cannot be written on local tokens is placed anew, replicated
        try:
            program = stages.run(partition, captured, placement, planned, rank, config.strict, gather_outputs)
        except CannotWriteError as refused:
            failures.note("partition", refused.node, refused.__cause__)
            placement = stages.run(place, captured, planned, sweep, sharded, failures)
    stages.run(prove_moves, placement, program)
    _tell_about(planned, program, tell)
    left = len(attentions(captured.gm.graph)) - planned.partitioned
    return RankProgram(read, planned, proofs, program, sharded, left)


def break_of(gm: GraphModule) -> Any:
    """Why, and where, Dynamo ended `gm` before the end of the model's function: its `reason`; None: it did not."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return reason if reason is not None and reason.graph_break else None


def _gathers_outputs(gm: GraphModule, config: RingConfig, tell: Tell) -> bool:
    """Whether outputs are gathered in the graph: by the option `outputs`, or since a graph break passes them on."""
    broken = break_of(gm)
    if broken is not None:
        why = str(broken.reason).splitlines()[0]
        tell(f"graph break ({why}): the outputs of this graph are gathered for the next one")
    return broken is not None or config.gathered


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


def _tell_unread(planned: RingPlan, config: RingConfig, tell: Tell) -> None:
    """Tells of, or under `strict` refuses, attentions that run as the model wrote them since they were not read."""
    for site in planned.sites if planned.world > 1 else ():
        if site.unread:
            where = source_line(site.site.node)
            text = f"{site.site.node.name}{f' at {where}' if where else ''} runs as the model wrote it: {site.unread}"
            if config.strict:
                raise UnsupportedError(f"strict=True: the attention {text}")
            tell(f"the attention {text}; its ranks gather what it reads")


def _tell_about(planned: RingPlan, program: Partitioned, tell: Tell) -> None:
    """Tells what was dilated, what is gathered, and what every rank computes of it."""
    for text in _dilated(planned):
        tell(text)
    for gather in program.gathers if planned.world > 1 else ():
        if gather.reason != "output":
            tell(str(gather), LOG_OF_GATHERS)
    for work in program.whole_work if planned.world > 1 else ():
        tell(str(work), LOG_OF_GATHERS)


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
    more = [f"and {len(names) - NAMED_ATTENTIONS} more"] if len(names) > NAMED_ATTENTIONS else []
    return ", ".join([*names[:NAMED_ATTENTIONS], *more])
