"""The page of a dump directory, made of the files that are there (`ringpass.passes.dump` lists them).

>>> import tempfile
>>> write_page(Path(tempfile.mkdtemp())).name
Traceback (most recent call last):
ringpass.errors.OptionError: ... holds no graph0: ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ringpass.errors import OptionError
from ringpass.files import read_text, write_text
from ringpass.page.exchange_graph import as_dot, exchange_graph
from ringpass.page.render import render
from ringpass.page.timeline import Event, planned_of
from ringpass.page.trace import as_trace

PAGE, REPORT, SCHEDULE = "index.html", "report.json", "schedule.json"
STAGES = ("captured.py", "partitioned.py", "forward.py", "backward.py", "output_code_forward.py",
          "output_code_backward.py", "plan.txt", "sites.txt", "gathers.txt", "recurrences.txt", "schedule.txt",
          "stages.txt")  # fmt: skip
"""The texts that the page shows, in their order."""


def write_page(directory: Path, trace: Mapping[str, Any] | None = None) -> Path:
    """Writes `index.html` into a dump directory, and returns its path; `trace`: as in `render`.

    Raises OptionError if the directory holds no dump.
    """
    folders = graph_folders(directory)
    if not folders:
        raise OptionError(
            f"{directory} holds no graph0: expected a directory that RINGPASS_DUMP or the option 'dump' named in a run "
            "whose graph has an attention"
        )
    report: dict[str, Any] = {"version": 1, "model": directory.resolve().name, "graphs": []}
    texts: dict[str, str] = {}
    for i, folder in enumerate(folders):
        of_graph, graph = _report(folder)
        report = {**report, **of_graph, "graphs": [*report["graphs"], {"index": i, **graph}]}
        ranks = sorted(folder.glob("rank*"), key=lambda path: _number(path, "rank"))
        for place in (folder, *ranks[:1]):
            texts |= {f"graph{i}/{name}": read_text(place / name) for name in STAGES if (place / name).is_file()}
        report.setdefault("rank", _number(ranks[0], "rank") if ranks else 0)
    write_text(directory, PAGE, render(report, texts, trace))
    return directory / PAGE


def graph_folders(directory: Path) -> list[Path]:
    """The folders of the graphs of a dump directory, in order."""
    found = [path for path in directory.glob("graph*") if path.is_dir() and path.name.removeprefix("graph").isdigit()]
    return sorted(found, key=lambda path: _number(path, "graph"))


def schedule_files(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(file name, text) of what is made of a plan's data: itself, its timeline for Perfetto, its exchanges as DOT."""
    yield SCHEDULE, json.dumps(data, separators=(",", ":"))
    schedules = data["schedules"] or []
    if schedules:
        timelines: dict[str, tuple[list[Event], str]] = {}
        for i, schedule in enumerate(schedules):
            timelines[f"schedule {i}"] = planned_of(schedule, data)
        yield "trace.json", json.dumps(as_trace(timelines, data["world"]), separators=(",", ":"))
        yield (
            "exchange.dot",
            "\n".join(as_dot(exchange_graph(x["ranks"]), f"schedule{i}") for i, x in enumerate(schedules)),
        )


def _report(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of a graph: of the whole run, and of the graph itself."""
    if (path := folder / REPORT).is_file():
        report = json.loads(read_text(path))
        return {name: value for name, value in report.items() if name != "graphs"}, report["graphs"][0]
    if (path := folder / SCHEDULE).is_file():
        graph = json.loads(read_text(path))
        return {name: graph[name] for name in ("world", "made_by") if name in graph}, graph
    return {}, {}


def _number(path: Path, word: str) -> int:
    digits = path.name.removeprefix(word)
    return int(digits) if digits.isdigit() else 0
