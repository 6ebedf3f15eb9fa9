"""The record of what the compiler knows of one op, and the two interfaces in which records are written.

    RULES = {"softmax.int": OpRule(dims=along_dims)}        # in the file of the op's family, for `table` to collect

A record answers every question that the other passes have about an op, so that they name none.  Its fields stand in
the order of the passes that ask: propagate (`dims` ..), place (`reads` ..), partition (`write` ..).

Contract of `dims`: it ties the factors of operands that are the same index, and notes those that the op needs
replicated, those over which it sums, and those of its operands that are shifted against each other.  For every other
factor, the op on shards gives shards of the op: `write`, by default the same call on local operands, relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import sympy
from torch.fx import Node

from ringpass.nodes import op_name
from ringpass.passes.propagate.axis import Axis
from ringpass.passes.propagate.factors import Factor, Note, Results, Sweep

GraphSize = int | Node
"""A size in the program that is written: a number, or the node that computes it."""


@dataclass(frozen=True)
class Rank:
    """Who this rank is.  `group` is the process group's name."""

    rank: int
    world: int
    group: str


class ShardArgs(NamedTuple):
    """Where a tensor's tokens are, as the boundary operators take it: `dim` has size outer * tokens * inner."""

    dim: int
    outer: GraphSize
    tokens: GraphSize
    layout: str
    world: int
    rank: int


class Placed(Protocol):
    """Where each node runs, as far as records ask: `passes.partition.placement.PlacementPlan`."""

    @property
    def sweep(self) -> Sweep:
        """Which dims are the same index."""

    @property
    def modes(self) -> Mapping[Node, Axis | None]:
        """The axis on whose local tokens a node runs; None: replicated."""

    @property
    def slices(self) -> set[Node]:
        """Nodes that slice or join sequences on local tokens."""

    def axis_along(self, node: Node, dim: int) -> Axis | None:
        """The axis of one dim of `node`."""

    def sequence_along(self, node: Node, dim: int) -> Factor | None:
        """The sequence of which one dim of `node`, on an axis, is a slice that agrees with the others of it."""

    def holder(self, axis: Axis, offset: sympy.Expr, part: Node, dim: int) -> int | None:
        """The rank that holds all tokens of `part`, which begin at `offset` of `axis`; None: several ranks."""

    def reads_neighbours(self, node: Node, axis: Axis) -> bool:
        """Whether `node`, on an axis, reads the tokens around each token of it."""

    def in_order(self, node: Node, axis: Axis) -> bool:
        """Whether neighbours on the axis are neighbours in the sequence."""

    def is_axis(self, factor: Factor) -> bool:
        """Whether a factor is partitioned."""


class Writer(Protocol):
    """The program that is being written, as far as records add to it: `passes.partition.writer.Writer`."""

    rank: Rank
    seed: Node | None

    @property
    def placement(self) -> Placed:
        """Where each node runs."""

    def sharded(self, node: Node, axis: Axis) -> Node:
        """This rank's tokens of `node` on `axis`."""

    def replicated(self, node: Node, reason: str) -> Node:
        """`node` at full length: gathered, and reported with `reason`, if it is sharded."""

    def either(self, node: Node, reason: str) -> GraphSize:
        """`node` in whichever form there is, for an op that reads its dtype and device alone."""

    def is_sharded(self, node: Node) -> bool:
        """Whether `node` has been written sharded, and not replicated."""

    def operand(self, node: Node, axis: Axis | None, reason: str) -> GraphSize:
        """`node` as an operand of what runs on `axis` (None: replicated): a size, its local tokens, or all tokens."""

    def operands(self, node: Node, axis: Axis | None, reason: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of `node` with each node in them as `operand` gives it."""

    def operands_by_name(self, node: Node, axis: Axis, reason: str) -> dict[str, Any]:
        """The arguments of an ATen op by name, with each node as `operand` gives it."""

    def report(self, node: Node, reason: str) -> None:
        """Notes that `node` is gathered on every rank.  Raises UnsupportedError under `strict`."""

    def next_stream(self) -> int:
        """A number of its own for each random op, the same on every rank."""

    def shard_args(self, node: Node, axis: Axis) -> ShardArgs:
        """Where the tokens of `node` on `axis` are."""

    def replicated_args(self) -> ShardArgs:
        """The same of a value that is replicated."""

    def local_shape(self, node: Node, axis: Axis) -> list[GraphSize]:
        """The shape of this rank's shard of `node`."""

    def length(self, axis: Axis) -> GraphSize:
        """L, the number of local tokens."""

    def tokens(self, axis: Axis) -> GraphSize:
        """S, the number of all tokens."""

    def size(self, expr: sympy.Expr) -> GraphSize:
        """A size expression as an int, or as a node computed from the graph's symbolic inputs.

        Raises UnsupportedError for arithmetic that has no node.
        """

    def compute(self, fn: Callable[..., Any], *args: GraphSize) -> GraphSize:
        """`fn` of ints and size nodes; its arithmetic is written into the graph."""

    def emit(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Node:
        """Appends a call."""

    def emit_by_name(self, target: Any, arguments: dict[str, Any], name: str | None = None) -> Node:
        """Appends a call of an ATen op with its arguments by name."""

    def copy(self, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Node:
        """Appends the call of `node` with other arguments."""


@dataclass(frozen=True)
class Put:
    """What an op puts along `dim`: parts, each (its value, start, stop), into `base`, or one after another."""

    dim: int
    base: Node | None
    parts: tuple[tuple[Node, int, int], ...]


class Reads(Enum):
    """Which operands an op reads element by element."""

    ALL = "all"
    FIRST = "first"  # the others lend a dtype or a device
    NONE = "none"  # it makes its result from sizes


def not_understood(sweep: Sweep, node: Node, note: Note) -> None:
    """Of an op without a rule every operand is needed replicated; it is reported by name."""


def same_call(writer: Writer, node: Node, axis: Axis) -> Node:
    """The op on local operands."""
    args, kwargs = writer.operands(node, axis, f"operand of {op_name(node)}")
    return writer.copy(node, args, kwargs)


def same_replicated_call(writer: Writer, node: Node, reason: str) -> Node:
    """The op on replicated operands."""
    args, kwargs = writer.operands(node, None, reason)
    return writer.copy(node, args, kwargs)


@dataclass(frozen=True)
class OpRule:
    """What is known of one op; see the module."""

    # propagate
    dims: Callable[[Sweep, Node, Note], Results | None]
    """(sweep, node, note) -> the dims of the result, a tuple of them for several results; None: not understood."""
    computes: bool = False
    """A product or norm: what follows works on values that ranks compute, not on tables or inputs."""

    # place
    reads: Reads = Reads.ALL
    follows: bool = False
    """It runs where its first operand does."""
    attention: bool = False
    """An attention call."""
    expands: bool = False
    """Its result may have a sequence dim that no operand has."""
    detaches: bool = False
    """Its result needs no gradient."""
    draws: Callable[[Node], bool] | None = None
    """Whether a call draws random numbers by counters, the same for any number of ranks; None: the op never does."""
    takes_none: bool = True
    """It works on a tensor without elements: a rank may have no index of a batch axis."""
    may_shard: Callable[[Placed, Node], bool] = lambda placement, node: True
    """Whether this call may run on local tokens, where its dims alone do not say."""
    slice_axis: Callable[[Placed, Node, Axis, int], Axis | None] | None = None
    """(placement, node, axis, dim) -> `axis` if the node slices or joins sequences along `dim` on local tokens."""
    takes_part: Callable[[Node], tuple[int, int, int] | None] = lambda node: None
    """(dim, start, stop) of the neighbouring elements that the op takes along one dim, and does nothing else."""
    puts: Callable[[Node], Put | None] = lambda node: None
    """What it puts into a dim, where that is known, and does nothing else."""
    view: bool = False
    """Its result has the elements of its operand in their order."""
    weights: Callable[[Node], list[Node]] = lambda node: []
    """The operands that a node which slices so reads replicated."""

    # partition
    write: Callable[[Writer, Node, Axis], Node] = same_call
    """Writes the op on local tokens."""
    write_replicated: Callable[[Writer, Node, str], Node] = same_replicated_call
    """(writer, node, reason): writes the op on replicated operands."""
    reduce: Callable[[Writer, Node, Axis], Node | tuple[Node, ...]] | None = None
    """Writes the op on local tokens, and combines the results of all ranks; a tuple for several results.

    None: it must not be split along what it sums over."""
    select: Callable[[Writer, Node, Node, int, Axis], Node | None] | None = None
    """(writer, node, x, dim, axis): writes the few tokens, replicated, that the op takes along `dim` of the shard x."""
    constant: bool = False
    """Every element of the result is the same: it is written again, replicated, rather than gathered."""
    output_part: Callable[[Node], tuple[Any, ...] | None] = lambda node: None
    """(dim, start, stop, step) of a slice, which may wait until an output is used."""
