"""dump: what the stages handed on, as text, in one directory per rank and graph.

<dir>/rank0/graph0/captured.py, sites.txt, plan.txt, schedule.txt, recurrences.txt (of a graph that has any),
partitioned.py, gathers.txt, forward.py, backward.py, stages.txt
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ringpass.config import DUMP_VARIABLE
from ringpass.passes.plan.plan import RingPlan
from ringpass.schedule.program import Rectangle

LISTED_RECTANGLES = 64  # empty rectangles of a schedule that are listed one by one
_numbers = count()


class Dump:
    """The texts of one rank and graph: kept until `open`, then files under `directory`, or where RINGPASS_DUMP says."""

    def __init__(self, directory: str | None, rank: int) -> None:
        self.folder = directory or os.environ.get(DUMP_VARIABLE) or None
        self.rank = rank
        self.path: Path | None = None
        self.kept: dict[str, str] = {}

    def open(self) -> None:
        """Makes the folder of this graph, which gets the next number, and writes what is kept."""
        if self.folder is None:
            return
        self.path = Path(self.folder) / f"rank{self.rank}" / f"graph{next(_numbers)}"
        self.path.mkdir(parents=True, exist_ok=True)
        for name, text in self.kept.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        """Writes the file `name` of this rank and graph, or keeps its text until `open`."""
        if self.path is None:
            self.kept[name] = text
        else:
            (self.path / name).write_text(text + "\n")

    def graph(self, name: str, gm: GraphModule) -> None:
        """Writes a graph as the file `name`.py."""
        self.write(f"{name}.py", readable(gm))


def texts(stage: str, result: Any, rank: int) -> Iterator[tuple[str, str]]:
    """(file name, text) of each file that shows the `result` of a stage."""
    if stage == "decompose":
        yield "captured.py", readable(result.gm)
    elif stage == "detect":
        yield "sites.txt", "\n".join(map(str, result))
    elif stage == "plan":
        yield "plan.txt", str(result)
        yield "schedule.txt", schedule(result, rank)
    elif stage == "place" and result.choices:
        yield "recurrences.txt", "\n".join(result.choices)
    elif stage == "partition":
        yield "partitioned.py", readable(result.gm)
        yield "gathers.txt", "\n".join(map(str, (*result.gathers, *result.whole_work))) or "nothing is gathered"


def readable(gm: GraphModule) -> str:
    """A graph with the shape and dtype of every value."""
    text = gm.print_readable(print_output=False, include_stride=False)
    text = re.sub(r";(  |)(\w+ = )+None$", "", text, flags=re.MULTILINE)  # where values die
    return text.replace(f"File: {os.getcwd()}{os.sep}", "File: ")


def schedule(plan: RingPlan, rank: int) -> str:
    """The schedule of `rank`, step by step, for each site of a plan."""
    lines = []
    for i, site in enumerate(plan.sites):
        programs, share = site.programs(rank), site.share(rank)
        for group, program in zip(site.group_problems(share) or [None], programs, strict=False):
            total = f": {program.area} pairs, {program.received} key tokens received"
            heads = f", {share}" if site.degree > 1 else ""
            name = f"site {i} on rank {rank} of {plan.world}{heads}{f', {group.head_group}' if group else ''}"
            lines += [f"{name}{total}", *(f"  {step}" for step in program.steps)]
            lines += [f"  empty: {_rectangles(program.empty)}"] if program.empty else []
        lines += [] if programs else [f"site {i} on rank {rank} of {plan.world}", "  runs replicated"]
        lines += [f"  in all {site.received(rank)} (token, head) pairs received"] if site.dilation else []
    return "\n".join(lines)


def _rectangles(found: list[Rectangle]) -> str:
    shown = [f"queries {a}:{b} x keys {c}:{d}" for (a, b), (c, d) in found[:LISTED_RECTANGLES]]
    return ", ".join(
        [*shown, *([f"and {len(found) - LISTED_RECTANGLES} more"] if len(found) > LISTED_RECTANGLES else [])]
    )
