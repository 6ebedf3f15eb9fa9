"""dump: what every stage did, as text, in one directory per rank and graph.

<dir>/rank0/graph0/captured.py, sites.txt, plan.txt, schedule.txt, partitioned.py, gathers.txt, forward.py, backward.py
"""

from __future__ import annotations

import os
import re
from itertools import count
from pathlib import Path

from torch.fx import GraphModule

from ringpass.config import DUMP_VARIABLE
from ringpass.passes.plan.plan import RingPlan
from ringpass.schedule.program import Rectangle

SHOWN = 64  # empty rectangles of a schedule that are listed one by one
_numbers = count()


class Dump:
    """Writes stages under `directory` (or the one that RINGPASS_DUMP names); does nothing where neither is given."""

    def __init__(self, directory: str | None, rank: int) -> None:
        directory = directory or os.environ.get(DUMP_VARIABLE) or None
        self.path = Path(directory) / f"rank{rank}" / f"graph{next(_numbers)}" if directory else None

    def text(self, name: str, content: str) -> None:
        if self.path:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text(content + "\n")

    def graph(self, stage: str, gm: GraphModule) -> None:
        """A stage's graph, with the shape and dtype of every value."""
        if self.path:
            text = gm.print_readable(print_output=False, include_stride=False)
            text = re.sub(r";(  |)(\w+ = )+None$", "", text, flags=re.MULTILINE)  # where values die
            self.text(f"{stage}.py", text.replace(f"File: {os.getcwd()}{os.sep}", "File: "))

    def plan(self, plan: RingPlan, rank: int) -> None:
        """Sites, plan, and the schedule of `rank`, step by step."""
        if not self.path:
            return
        self.text("sites.txt", "\n".join(str(s.site) for s in plan.sites))
        self.text("plan.txt", str(plan))
        lines = []
        for i, site in enumerate(plan.sites):
            programs = site.programs(rank)
            for head_group, program in zip(site.head_groups or [None], programs, strict=False):
                total = f": {program.area} pairs, {program.received} key tokens received"
                name = f"site {i} on rank {rank} of {plan.world}{f', {head_group}' if head_group else ''}"
                lines += [f"{name}{total}", *(f"  {step}" for step in program.steps)]
                lines += [f"  empty: {_rectangles(program.empty)}"] if program.empty else []
            lines += [] if programs else [f"site {i} on rank {rank} of {plan.world}", "  runs replicated"]
            lines += [f"  in all {site.received(rank)} (token, head) pairs received"] if site.dilation else []
        self.text("schedule.txt", "\n".join(lines))


def _rectangles(found: list[Rectangle]) -> str:
    shown = [f"queries {a}:{b} x keys {c}:{d}" for (a, b), (c, d) in found[:SHOWN]]
    return ", ".join([*shown, *([f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])])
