"""data: the parts of a report, as frozen dataclasses; their fields are the keys of `Report.to_dict`.

Sizes are bytes, times seconds, positions tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

VERSION = 1
LISTED_RANKS = 64  # up to this many ranks, ranges and schedules are listed
Data = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A line of the model: `source` is "file:line", `line` its text; None where the graph does not say."""

    source: str | None = None
    line: str | None = None


@dataclass(frozen=True)
class Event:
    """A graph break or a recompilation, and how often."""

    reason: str
    source: str | None
    count: int


@dataclass(frozen=True)
class AxisReport:
    """A sharded sequence: its layout and why; per rank, the runs of tokens that it holds; the curve along which."""

    index: int
    tokens: int
    layout: str
    why: str
    ranks: list[list[list[int]]] | None
    curve: Data | None


@dataclass(frozen=True)
class LayoutReport:
    """A layout that was weighed: its estimated time, None without a described machine."""

    name: str
    chosen: bool
    seconds: float | None
    why: str


@dataclass(frozen=True)
class WayReport:
    """A way in which an attention might run, with the estimated seconds of its slowest rank."""

    name: str
    degree: int
    comm: str
    chosen: bool
    seconds: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class SiteReport:
    """Attentions that are alike.  Lists are by rank, None above 1,024 ranks."""

    indices: list[int]
    name: str
    path: str
    source: str | None
    line: str | None
    heads: list[int]
    head_width: list[int]
    queries: int
    keys: int
    mask: str
    density: float | None
    degree: int
    comm: str
    split: bool
    partitioned: bool
    why: str
    tiles: Mapping[str, int]
    pairs: list[int] | None
    received_bytes: list[int] | None
    needed_bytes: list[int] | None
    pooled_bytes: list[int] | None
    balance: float | None
    ways: list[WayReport]
    rank_received_bytes: Mapping[str, int]  # of one of them, on the rank that is shown, by phase


@dataclass(frozen=True)
class GatherReport:
    """A value that every rank gathers: the op that needs it, why, and the rewrite that avoids it."""

    op: str
    bytes: int
    flops: int
    source: str | None
    line: str | None
    why: str
    remedy: str


@dataclass(frozen=True)
class BoundaryReport:
    """What the rank receives at one place of the program; of a sum, the message that is summed.

    `site`: whether it belongs to an attention; `on_use`: whether it happens only if an output is used.
    """

    kind: str
    name: str
    bytes: int
    source: str | None
    direction: str
    on_use: bool = False


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by kind at the peak of one rank, their sum, and the program's course."""

    kinds: Mapping[str, int]
    peak: int
    activations: int
    held: int
    program: list[Data]


@dataclass(frozen=True)
class ProofReport:
    """What was proved, in a line; how many tiles of how many different problems; the orders of exchanges."""

    text: str
    tiles: int
    problems: int
    orders: list[str]


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo captured.  `whole`: why nothing of it is partitioned; empty: it is."""

    index: int
    whole: str
    axes: list[AxisReport]
    layouts: list[LayoutReport]
    sites: list[SiteReport]
    gathers: list[GatherReport]
    boundaries: list[BoundaryReport]
    memory: MemoryReport
    proof: ProofReport | None
    schedules: list[Data] | None
    warnings: list[str]  # what a run would log
    remarks: list[str]  # of the plan
    machine: str | None


@dataclass(frozen=True)
class Verdict:
    """What a user must read first: at most three `lines`.

    `efficiency`: estimated, of attention, of what P ranks could do; None without a described machine.
    """

    lines: list[str]
    peak_bytes: int
    device: Data | None
    fits: bool | None
    efficiency: float | None
    change: str | None
    why: str
    problems: list[str]


@dataclass(frozen=True)
class ReportData:
    """What the backend makes of a model on `world` ranks; `rank` is the one whose program is shown."""

    made_by: Mapping[str, str]
    model: str
    world: int
    rank: int
    options: Mapping[str, str]
    command: str
    fingerprint: str
    verdict: Verdict
    longest: Data | None
    breaks: list[Event]
    recompiles: list[Event]
    graphs: list[GraphReport]
    version: int = field(default=VERSION)


def by_rank(values: Sequence[Any], world: int, most: int) -> list[Any] | None:
    """The values of each rank; None where there are more than `most` ranks."""
    return list(values) if world <= most else None
