"""Problems of self-attention, and programs with a part changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ringpass.layouts.layout import Layout
from ringpass.schedule.program import Program, Step
from ringpass.schedule.tiles import Problem

CAUSAL = "k <= q"
WINDOW = "k <= q & q - k < 5"


def problem(
    mask: str, world: int, queries: int, layout: str = "zigzag", keys: int = -1, tile: int = 1024, cut_all: bool = False
) -> Problem:
    sides = Layout(layout, world), Layout(layout, world)
    return Problem(mask, queries, queries if keys < 0 else keys, *sides, tile, cut_all)


Programs = list[Program]


def changed(programs: Programs, rank: int, index: int, **changes: object) -> Programs:
    """`programs` with some fields of one step changed."""
    steps = list(programs[rank].steps)
    steps[index] = replace(steps[index], **changes)  # type: ignore[arg-type]
    return with_steps(programs, rank, steps)


def with_steps(programs: Programs, rank: int, steps: Sequence[Step]) -> Programs:
    return [replace(p, steps=tuple(steps)) if p.rank == rank else p for p in programs]
