"""What `recurrences` finds of one recurrence, for `placement` to hand on and for the writer to write."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from ringpass.layouts.redistribution import between
from ringpass.nodes import bytes_of
from ringpass.passes.op_rules.spec import Put
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor


@dataclass(frozen=True)
class HandOver:
    """A value that the rank `src` sends to `dst`, before `reader`, the first node that reads it there."""

    value: Node
    src: int
    dst: int
    reader: Node


@dataclass(eq=False)
class Recurrence:
    """A recurrence over chunks of `unit` tokens, of which rank owners[i] has chunk i.

    `axis`: that of the chunks; of single tokens, the axis of the sequence itself.  `factors`: what numbers the chunks;
    `sources`: the axes of their tokens.
    """

    axis: Axis
    factors: tuple[Factor, ...]
    sources: tuple[Axis, ...]
    owners: tuple[int, ...]
    unit: int
    modes: dict[Node, Axis | None] = field(default_factory=dict)  # of each node of the region
    slices: set[Node] = field(default_factory=set)
    owned: dict[Node, int] = field(default_factory=dict)  # the chunk on whose owner a node runs
    picks: dict[Node, tuple[int, int]] = field(default_factory=dict)  # (chunk, elements of a chunk in the dim picked)
    writes: dict[Node, tuple[Put, int]] = field(default_factory=dict)  # (what is put, elements of a chunk in the dim)
    views: set[Node] = field(default_factory=set)  # tokens as chunks of tokens, or back
    entering: dict[Node, Axis | None] = field(default_factory=dict)  # values on tokens that are read in chunks
    leaving: dict[Node, Axis] = field(default_factory=dict)  # values on tokens that are made of chunks
    handed: list[HandOver] = field(default_factory=list)
    begins: tuple[Node, ...] = ()  # values that enter and may need a gradient
    ends: tuple[Node, ...] = ()  # the writes whose result is read

    def __contains__(self, node: Node) -> bool:
        """Whether the recurrence says how a node is written."""
        return node in self.owned or node in self.writes or node in self.views

    @property
    def layout(self) -> str:
        """The layout of the tokens, chunk by chunk."""
        return self.axis.layout.in_units(self.unit).name if self.unit > 1 else self.axis.layout.name

    def index(self, chunk: int) -> int:
        """The number of a chunk among those of its owner."""
        return self.owners[:chunk].count(self.owners[chunk])

    @property
    def state_bytes(self) -> int:
        """What all ranks together send of states in a forward."""
        return sum(bytes_of(one.value) for one in self.handed)

    @property
    def token_bytes(self) -> int:
        """What all ranks together send of tokens in a forward: those of chunks that several ranks hold."""
        pairs = [(n, a, False) for n, a in self.entering.items()] + [(n, a, True) for n, a in self.leaving.items()]
        return sum(self._moved(node, axis, back) for node, axis, back in pairs if axis is not None)

    def _moved(self, node: Node, axis: Axis, back: bool) -> int:
        layouts = (self.layout, axis.layout.name) if back else (axis.layout.name, self.layout)
        world = axis.layout.world
        rows = sum(sum(between(*layouts, world, axis.hint, rank).received) for rank in range(world))
        return rows * bytes_of(node) // axis.hint

    @property
    def bytes(self) -> int:
        """What all ranks together send in a forward."""
        return self.state_bytes + self.token_bytes
