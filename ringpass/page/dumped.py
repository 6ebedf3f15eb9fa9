"""The page of a dump directory, made of the files that are there (`ringpass.passes.dump` lists them).

>>> import tempfile
>>> write_page(Path(tempfile.mkdtemp())).name
Traceback (most recent call last):
ringpass.errors.OptionError: ... holds no graph0: ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ringpass.errors import OptionError
from ringpass.files import read_text, write_text
from ringpass.page.exchange_graph import as_dot, exchange_graph
from ringpass.page.render import render
from ringpass.page.trace import graph_trace

PAGE, REPORT = "index.html", "report.json"
STAGES = ("captured.py", "partitioned.py", "forward.py", "backward.py", "output_code_forward.py",
          "output_code_backward.py", "plan.txt", "sites.txt", "gathers.txt", "recurrences.txt", "schedule.txt",
          "stages.txt")  # fmt: skip
"""The texts that the page shows, in their order."""


def write_page(directory: Path, profiles: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Writes `index.html` into a dump directory, and returns its path; `profiles`: as in `render`.

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
        report = {**report, **of_graph, "graphs": [*report["graphs"], {**graph, "index": i}]}
        ranks = sorted(folder.glob("rank*"), key=lambda path: _number(path, "rank"))
        for place in (folder, *ranks[:1]):
            texts |= {f"graph{i}/{name}": read_text(place / name) for name in STAGES if (place / name).is_file()}
        report.setdefault("rank", _number(ranks[0], "rank") if ranks else 0)
    write_text(directory, PAGE, render(report, texts, profiles))
    return directory / PAGE


def graph_folders(directory: Path) -> list[Path]:
    """The folders of the graphs of a dump directory, in order."""
    found = [path for path in directory.glob("graph*") if path.is_dir() and path.name.removeprefix("graph").isdigit()]
    return sorted(found, key=lambda path: _number(path, "graph"))


def report_files(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(file name, text) of a report of one graph: itself, its timeline for Perfetto, its exchanges as DOT."""
    (graph,) = report["graphs"]
    yield REPORT, json.dumps(report, separators=(",", ":"))
    if graph["schedules"]:
        graphs = [as_dot(exchange_graph(x["ranks"]), f"schedule{i}") for i, x in enumerate(graph["schedules"])]
        yield "trace.json", json.dumps(graph_trace(graph, report["world"]), separators=(",", ":"))
        yield "exchange.dot", "\n".join(graphs)


def _report(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of a graph: of the whole run, and of the graph itself; without a report, nothing."""
    if not (path := folder / REPORT).is_file():
        return {}, {}
    try:
        report = json.loads(read_text(path))
        return {name: value for name, value in report.items() if name != "graphs"}, report["graphs"][0]
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise OptionError(f"{path}: expected the report of a graph as ringpass writes it, but: {error}") from error


def _number(path: Path, word: str) -> int:
    digits = path.name.removeprefix(word)
    return int(digits) if digits.isdigit() else 0
