"""What the stage `partition` hands on: one rank's program, and what the caller must know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

OutputSize = int | tuple[str, int]


@dataclass(frozen=True)
class ShardedOutput:
    """An output that holds this rank's L tokens of all `tokens`; `dim` has size outer * L * inner.

    `outer` and `tokens` are ints, or `("extra", i)`: the value of extra output i, where they are symbolic.  `part`: the
    model returns these tokens alone (start, stop), such as the last ones for a cache.
    """

    name: str
    dim: int
    outer: OutputSize
    tokens: OutputSize
    layout: str
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class ShardedInput:
    """Input number `position` is this rank's tokens in dim `dim`."""

    position: int
    dim: int
    layout: str


@dataclass(frozen=True)
class Gather:
    """A value that had to be gathered: which, why, its bytes at full length; the line, and the op, that read it."""

    value: str
    reason: str
    bytes: int
    where: str
    op: str = ""

    def __str__(self) -> str:
        return f"gather {self.value} ({self.bytes} bytes): {self.reason}{f', {self.where}' if self.where else ''}"


@dataclass(frozen=True)
class WholeWork:
    """What every rank computes of an op on all tokens, since an operand had to be gathered: calls, and their FLOPs."""

    op: str
    calls: int
    flops: int

    def __str__(self) -> str:
        return f"on every rank {self.op}: {self.calls} call{'s' * (self.calls > 1)} on all tokens, {self.flops} FLOPs"


@dataclass(frozen=True)
class Partitioned:
    """One rank's program.  `inputs`: fakes for its placeholders: the captured graph's, then the seed if `seeded`."""

    gm: GraphModule
    inputs: tuple[Any, ...]
    outputs: tuple[ShardedOutput | None, ...]
    extras: int  # symbolic sizes returned after the outputs
    gathers: tuple[Gather, ...]
    whole_work: tuple[WholeWork, ...]
    seeded: bool
    sharded_inputs: tuple[ShardedInput, ...]
    draws: bool  # random ops that draw from the default generator, which the ranks must then share
    reads: bool  # the host reads data of the call to prune schedules
