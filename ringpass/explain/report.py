"""report: what `ringpass.explain` returns.

    report = ringpass.explain(model, ids, world_size=8)
    print(report)                       # text; rich tables with `report.__rich__()`, HTML in a notebook
    report.save("report.html")          # the page: docs/page.md walks through it
    report.to_dict()                    # JSON-able; docs/explain.md documents every key

The keys are those of `ringpass.explain.data.VERSION`: a later version may add some.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ringpass.errors import InputError
from ringpass.explain import tables
from ringpass.explain.data import Data, ReportData
from ringpass.explain.difference import Difference, difference
from ringpass.files import write_text
from ringpass.page.render import render
from ringpass.page.trace import graph_trace


@dataclass(frozen=True)
class Report(ReportData):
    """What the backend makes of a model on `world` ranks; `rank` is the one whose program is shown.

    `texts`: the stages of that rank, for the page alone: "graph0/captured.py", "graph0/partitioned.py",
    "graph0/forward.py", "graph0/backward.py".
    """

    texts: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> Data:
        """The report as data that `json` takes: dicts, lists, texts and numbers."""
        found = asdict(self)
        del found["texts"]
        return {"version": self.version, **found}

    def to_json(self, indent: int | None = None) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_html(self) -> str:
        """The page: one self-contained file, the stages of the explained rank included."""
        return render(self.to_dict(), self.texts)

    def trace(self, graph: int = 0) -> Data:
        """The planned timeline of one graph's attentions in Chrome's trace format, which Perfetto opens.

        Its times are counted in FLOPs (`ringpass.page.timeline`); empty above 64 ranks.
        """
        return graph_trace(asdict(self.graphs[graph]), self.world)

    def diff(self, other: Report | Mapping[str, Any]) -> Difference:
        """What changes from this report to `other`, which may be the dict of one.

        Raises InputError for data of another version.
        """
        return difference(self.to_dict(), other.to_dict() if isinstance(other, Report) else other)

    def save(self, path: str | Path) -> None:
        """Writes the report to a file, in the form that its ending names: `.html`, `.json` or `.txt`.

        Raises InputError for another ending.
        """
        ending = media_of(path)
        write_text(Path(path).parent, Path(path).name, WRITERS[ending](self) + "\n")

    def __str__(self) -> str:
        return tables.text(self)

    def __rich__(self) -> Any:
        return tables.renderable(self)

    def _repr_html_(self) -> str:
        return tables.html(self)


WRITERS: Mapping[str, Callable[[Report], str]] = {
    ".html": lambda report: report.to_html(),
    ".json": lambda report: report.to_json(indent=1),
    ".txt": str,
}
"""How a report is written to a file, by its ending."""


def media_of(path: str | Path) -> str:
    """The ending of a file that a report can be written to.  Raises InputError for another one."""
    ending = Path(path).suffix.lower()
    if ending not in WRITERS:
        raise InputError(f"a report is written to a file that ends in {', '.join(WRITERS)}, got {str(path)!r}")
    return ending
