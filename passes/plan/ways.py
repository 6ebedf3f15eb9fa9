"""ways: the layout of the model, and the Ulysses degree and the transport of each attention.  An analysis.

    a machine is described    by the option `machine`, or since the graph's CUDA device has a preset: layouts, degrees,
                              ring and all-gather are weighed together by estimated time (`schedule.cost`), as far as
                              the options leave them open
    none is                   layouts are weighed alone; "auto" is degree 1 and a ring, and the plan says so

All-gather holds the keys and values of all ranks, so it is weighed only among ranks that the inner dimension of the
machine joins, and up to GATHERED_BYTES.

Contract: depends on the graph, the options, the name of the CUDA device and P alone.  The ranks compare the text of the
plan, which names the machine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ringpass.amounts import size
from ringpass.config import RingConfig
from ringpass.nodes import hint_of
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.plan.degrees import degrees
from ringpass.passes.propagate.axis import Axis
from ringpass.schedule.attention_time import ALLGATHER, Group, Load, Way
from ringpass.schedule.cost import Estimate, SiteChoice, choose
from ringpass.schedule.dilation import AUTO, Dilation, group_problems
from ringpass.schedule.machine import UNDESCRIBED, Machine, preset_of_device
from ringpass.schedule.tiles import Problem

GATHERED_BYTES = 500 * 10**6  # K and V that all-gather may hold in one attention


@dataclass(frozen=True)
class Sharded:
    """An attention that runs over the ranks, its problem in any layout, and the axes of its queries and keys.

    `moves`: all ranks get the queries of the axis, so that each attends to its own keys alone.
    """

    site: AttentionSite
    problem: Problem
    dilation: Dilation | None
    axes: tuple[Axis | None, Axis | None]
    moves: bool = False

    @property
    def fixed(self) -> bool:
        """Whether all calls have these lengths."""
        return all(isinstance(axis.tokens, int) for axis in self.axes if axis)


@dataclass(frozen=True)
class Weighed:
    """What layouts and machine were weighed: the chosen layout first.

    `machine`: UNDESCRIBED if nobody described one; `note`: what "auto" then means.
    """

    layouts: tuple[Estimate, ...] = ()
    machine: Machine = UNDESCRIBED
    note: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """For the plan's text."""
        about = [f"machine {self.machine}"] if self.machine is not UNDESCRIBED else [self.note] * bool(self.note)
        return (*about, *(f"layout {estimate}" for estimate in self.layouts))


@dataclass(frozen=True)
class Chosen:
    """The layout's name, how each attention runs by its index, why it could not be gathered, and what was weighed."""

    layout: str
    choices: dict[int, SiteChoice] = field(default_factory=dict)
    refused: dict[int, tuple[str, ...]] = field(default_factory=dict)
    weighed: Weighed = Weighed()


def choose_ways(
    sharded: Sequence[Sharded], axes: Sequence[Axis], world: int, config: RingConfig, tracked: Collection[Node]
) -> Chosen:
    """What takes the least estimated time.  Raises OptionError for a degree or a machine that does not fit."""
    fallback = "contiguous" if config.layout == AUTO else config.layout
    if world == 1:
        return Chosen(fallback)
    machine = described([x.site for x in sharded], config)
    if machine is not UNDESCRIBED:
        machine.require_ranks(world)
    along = [x.site for x in sharded if x.axes[0]]
    open_degrees = degrees(along, world, config, machine is not UNDESCRIBED)
    allowed = dict(zip((site.index for site in along), open_degrees, strict=True))
    loads = [load_of(x.site, x.problem, x.dilation, tracked) for x in sharded]
    ways, why = [], []
    for x, load in zip(sharded, loads, strict=True):
        split = x.moves or x.site.index not in allowed
        refused = [] if split or machine is UNDESCRIBED else list(_against_gathering(x, load, world, machine))
        gathers = machine is not UNDESCRIBED and not refused
        ways.append((Way(),) if split else _ways(allowed[x.site.index], world, config, gathers))
        why.append([f"not weighed: all-gather, as {text}" for text in refused] if config.comm == AUTO else [])
    note = _about_auto(config) if machine is UNDESCRIBED else ""
    if config.layout != AUTO and machine is UNDESCRIBED:
        first = [SiteChoice(of[0]) for of in ways]
        return _chosen(fallback, sharded, first, why, Weighed((), machine, note))
    fixed, layouts = all(x.fixed for x in sharded), () if config.layout == AUTO else (config.layout,)
    tried = choose(loads, world, fixed, machine, ways, layouts)
    tried = [t for t in tried if all(axis.reaches_all(t.layout) for axis in axes)] or tried
    return _chosen(tried[0].layout, sharded, tried[0].choices, why, Weighed(tuple(tried), machine, note))


def _chosen(
    layout: str,
    sharded: Sequence[Sharded],
    choices: Sequence[SiteChoice],
    why: Sequence[Sequence[str]],
    weighed: Weighed,
) -> Chosen:
    indices = [x.site.index for x in sharded]
    refused = {index: tuple(lines) for index, lines in zip(indices, why, strict=True)}
    return Chosen(layout, dict(zip(indices, choices, strict=True)), refused, weighed)


def described(sites: Sequence[AttentionSite], config: RingConfig) -> Machine:
    """The machine that the option or the device describes, with the nodes of the ring; UNDESCRIBED if none does."""
    if isinstance(config.machine, Machine):
        return config.machine
    device = next((site.q.meta["val"].device for site in sites), torch.device("cpu"))
    if device.type != "cuda" or not torch.cuda.is_available():
        return UNDESCRIBED
    found = preset_of_device(torch.cuda.get_device_name(device))
    return UNDESCRIBED if found is None else config.on_nodes(found)


def _about_auto(config: RingConfig) -> str:
    """What "auto" means without a machine; nothing if no option is "auto"."""
    open_ = [
        name for name, value in (("ulysses_degree", config.ulysses_degree), ("comm", config.comm)) if value == AUTO
    ]
    if not open_:
        return ""
    means = {"ulysses_degree": "ulysses degree 1", "comm": "a ring"}
    return f"no machine is described (option 'machine'), so 'auto' is {' and '.join(means[x] for x in open_)}"


def _ways(degrees: Sequence[int], world: int, config: RingConfig, gathers: bool) -> tuple[Way, ...]:
    """Those that are weighed, the plainest first; with a degree of P no keys are on other ranks."""
    rings = [Way(degree) for degree in degrees if config.comm != ALLGATHER or degree == world]
    gathered = (
        [Way(1, ALLGATHER)] if 1 in degrees and (config.comm == ALLGATHER or (config.comm == AUTO and gathers)) else []
    )
    return (*rings, *gathered)


def _against_gathering(x: Sharded, load: Load, world: int, machine: Machine) -> Iterator[str]:
    """Why all-gather is no candidate."""
    if world > machine.spans[0]:
        yield f"the ranks are more than the {machine.spans[0]:.0f} of the inner dimension"
    if load.key_bytes > GATHERED_BYTES:
        yield f"K and V are {size(load.key_bytes)}, above {size(GATHERED_BYTES)}"
    if x.dilation is not None:
        yield "the attention is dilated"
    if not x.fixed:
        yield "its lengths change"
    if x.problem.key_layout.replicated:
        yield "every rank has the keys"


def load_of(
    site: AttentionSite, problem: Problem, dilation: Dilation | None, tracked: Collection[Node] = frozenset()
) -> Load:
    """What the cost of an attention depends on; `tracked`: the nodes that may need a gradient."""
    k, v = (x.meta["val"] for x in (site.k, site.v))
    heads, key_heads = site.heads
    q = site.q.meta["val"]
    batch = hint_of(q.shape[0]) if q.ndim > 2 else 1
    groups = []
    for group in group_problems(problem, dilation, heads) if dilation else ():
        members = group.head_group.members
        groups.append(Group(group.problem, len(members), len({head // (heads // key_heads) for head in members})))
    backward = any(x in tracked for x in (site.q, site.k, site.v))
    widths = hint_of(k.shape[-1]), hint_of(v.shape[-1])
    return Load(problem, heads, key_heads, widths, k.element_size(), batch, backward, tuple(groups))
