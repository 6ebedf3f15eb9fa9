"""Makes the page from its parts: a template, styles, scripts, and the data that they show."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from ringpass.page import code
from ringpass.page.glossary import TERMS
from ringpass.page.panels import PANELS
from ringpass.page.profile import measured
from ringpass.page.timeline import Event, planned_of, slowest

SCRIPTS = (
    "elements", "tables", "drawing", "verdict", "tokens", "sites", "tiles", "exchanges", "timeline", "code", "moves",
    "memory", "alternatives", "about", "start",
)  # fmt: skip
"""The scripts of the page, in the order in which they run."""
SHOWN = 50_000  # measured events at most, the first ones: a page stays below 5 MB


def render(report: Mapping[str, Any], texts: Mapping[str, str], profiles: Sequence[Mapping[str, Any]] = ()) -> str:
    """One self-contained HTML file, which shows the report, without a network and from disk.

    >>> report = {"version": 1, "model": "GPT", "world": 2, "graphs": [{"axes": [], "sites": []}]}
    >>> "GPT on 2 ranks" in render(report, {"captured.py": "a = 1"})
    True

    `report`: the dict of `ringpass.explain(..).to_dict()`; of what is missing its panel says so.  `texts`: a stage's
    file name -> its text; in a report of several graphs, `graph1/captured.py` is one of graph 1.  `profiles`: those of
    the ranks of a run in Chrome's trace format, for the measured timeline.
    """
    graphs = report.get("graphs", [])
    plans = [[planned_of(schedule) for schedule in graph.get("schedules") or ()] for graph in graphs]
    ran = measured(profiles)
    more = {
        "code": [code.as_data(code.stages(_of_graph(texts, i))) for i in range(max(1, len(graphs)))],
        "timelines": [[_columns(events, unit) for events, unit in of] for of in plans],
        "measured": {**_columns(ran[:SHOWN], "s"), "found": len(ran)} if profiles else None,
    }
    template = Environment(
        loader=FunctionLoader(_part), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("page.html")
    return template.render(
        report=report,
        title=f"{report.get('model', 'A model')} on {report.get('world', '?')} ranks",
        panels=PANELS,
        style=_part("style.css"),
        script="\n".join(_part(f"{name}.js") for name in SCRIPTS),
        data=_in_script({**report, "slowest": [[slowest(events) for events, _ in of] for of in plans]}),
        terms=_in_script(TERMS),
        more=base64.b64encode(zlib.compress(json.dumps(more, separators=(",", ":")).encode(), 9)).decode(),
    )


def _of_graph(texts: Mapping[str, str], graph: int) -> dict[str, str]:
    """The texts of one graph, by file name."""
    named = {name: name.rpartition("/") for name in texts}
    return {file: texts[name] for name, (folder, _, file) in named.items() if folder in ("", f"graph{graph}")}


def _columns(events: Sequence[Event], unit: str) -> dict[str, Any]:
    """Events column by column; times in millionths of the whole, which compress well."""
    first = min((x.start for x in events), default=0.0)
    span = max((x.stop for x in events), default=1.0) - first or 1.0
    scale = 1e6 / span
    return {
        "unit": unit,
        "span": span,
        "rank": [x.rank for x in events],
        "lane": [x.lane for x in events],
        "step": [x.step for x in events],
        "start": [round((x.start - first) * scale) for x in events],
        "stop": [round((x.stop - first) * scale) for x in events],
        "detail": [x.detail for x in events],
    }


def _in_script(data: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


@cache
def _part(name: str) -> str:
    return (files("ringpass.page") / "parts" / name).read_text("utf-8")
