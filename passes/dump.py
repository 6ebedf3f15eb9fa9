"""dump: what the stages handed on, as text, in one directory for all ranks.

    <dir>/graph0         what is the same on all ranks: captured.py, sites.txt, plan.txt, gathers.txt, and of a graph
                         with recurrences recurrences.txt
    <dir>/graph0/rank3   what is this rank's: schedule.txt, partitioned.py, forward.py, backward.py, stages.txt,
                         the differences to the stage before (partitioned.diff, forward.diff), and Inductor's code
                         (output_code_forward.py, output_code_backward.py)

Beside them rank 0 writes the report of all ranks and the page (`ringpass.explain.real`).

Contract: a rank needs no other one.  Each file is written whole or not at all, so ranks may share a file system or not.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from ringpass.config import DUMP_VARIABLE
from ringpass.errors import InputError, OptionError
from ringpass.files import write_text
from ringpass.page.code import difference
from ringpass.passes.detect.site import AttentionSite
from ringpass.passes.plan.plan import RingPlan, SitePlan
from ringpass.schedule.program import Rectangle

LISTED_RECTANGLES = 64  # empty rectangles of a schedule that are listed one by one
SHARED = {"captured.py", "sites.txt", "plan.txt", "gathers.txt", "recurrences.txt"}
"""Files that are the same on all ranks."""
BEFORE = {"partitioned.py": "captured.py", "forward.py": "partitioned.py"}
"""The stage with which a stage is compared."""
_numbers: defaultdict[str, Iterator[int]] = defaultdict(count)  # of the graphs of a directory


class Dump:
    """The texts of one rank and graph: kept until `open`, then files under `directory`."""

    def __init__(self, directory: str | None, rank: int) -> None:
        self.folder = directory or None
        self.rank = rank
        self.path: Path | None = None
        self.kept: dict[str, str] = {}

    def open(self) -> None:
        """Makes the folder of this graph, which gets the next number of its directory, and writes what is kept.

        Raises OptionError if it cannot be made or written.
        """
        if self.folder is None:
            return
        self.path = Path(self.folder) / f"graph{next(_numbers[os.path.abspath(self.folder)])}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, text in self.kept.items():
                self._put(name, text)
        except (OSError, InputError) as error:  # the path is that of a file, too long, a link, or not to be written
            raise OptionError(
                f"option 'dump' or {DUMP_VARIABLE}: expected a directory that can be made and written, got "
                f"{self.folder!r}: {error}. Name another one, or leave it out"
            ) from error

    def write(self, name: str, text: str) -> None:
        """Writes the file `name`, or keeps its text until `open`; and how a stage differs from the one before."""
        self.kept[name] = text
        if self.path is not None:
            self._put(name, text)
        if (before := BEFORE.get(name)) in self.kept:
            self.write(name.replace(".py", ".diff"), difference(str(before), self.kept[str(before)], name, text))

    def graph(self, name: str, gm: GraphModule) -> None:
        """Writes a graph as the file `name`.py."""
        self.write(f"{name}.py", readable(gm))

    def _put(self, name: str, text: str) -> None:
        assert self.path is not None
        folder = self.path.name if name in SHARED else f"{self.path.name}/rank{self.rank}"
        write_text(self.path.parent, f"{folder}/{name}", text + "\n")


def texts(stage: str, result: Any, rank: int) -> Iterator[tuple[str, str]]:
    """(file name, text) of each file that shows the `result` of a stage."""
    if stage == "decompose":
        yield "captured.py", readable(result.gm)
    elif stage == "detect":
        yield "sites.txt", sites(result)
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


def sites(found: Sequence[AttentionSite]) -> str:
    """A line for each site; for a run of equal ones, such as the layers of a model, one line."""
    lines = []
    for _, run in groupby(found, lambda site: str(site).partition("): ")[2]):
        first, *others = run
        if others:
            last, text = others[-1], str(first).partition("): ")[2]
            names = f"sites {first.index} to {last.index} ({first.node.name} to {last.node.name})"
            lines.append(f"{names}, x {1 + len(others)}: {text}")
        else:
            lines.append(str(first))
    return "\n".join(lines)


def schedule(plan: RingPlan, rank: int) -> str:
    """The schedule of `rank`, step by step, for each site of a plan; of a run of equal sites, once."""
    lines = []
    bodies = [(i, list(_site_schedule(site, plan.world, rank))) for i, site in enumerate(plan.sites)]
    for _, run in groupby(bodies, lambda x: x[1]):
        (first, body), *others = run
        name = f"sites {first} to {others[-1][0]}, x {1 + len(others)}," if others else f"site {first}"
        lines += [line.replace("SITE", name, 1) if line.startswith("SITE") else line for line in body]
    return "\n".join(lines)


def _site_schedule(site: SitePlan, world: int, rank: int) -> Iterator[str]:
    """The lines of one site; SITE stands for what it is called."""
    programs, share = site.programs(rank), site.share(rank)
    for group, program in zip(site.group_problems(share) or [None], programs, strict=False):
        heads = f", {share}" if site.degree > 1 else ""
        name = f"SITE on rank {rank} of {world}{heads}{f', {group.head_group}' if group else ''}"
        yield f"{name}: {program.area} pairs, {program.received} key tokens received"
        yield from (f"  {step}" for step in program.steps)
        if program.empty:
            yield f"  empty: {_rectangles(program.empty)}"
    if not programs:
        yield from (f"SITE on rank {rank} of {world}", "  runs replicated")
    if site.dilation:
        yield f"  in all {site.received(rank)} (token, head) pairs received"


def _rectangles(found: list[Rectangle]) -> str:
    shown = [f"queries {a}:{b} x keys {c}:{d}" for (a, b), (c, d) in found[:LISTED_RECTANGLES]]
    return ", ".join(
        [*shown, *([f"and {len(found) - LISTED_RECTANGLES} more"] if len(found) > LISTED_RECTANGLES else [])]
    )
