"""report: what `ringpass.explain` returns.

    report = ringpass.explain(model, ids, world_size=8)
    print(report)                       # text; rich tables with `report.__rich__()`, HTML in a notebook
    report.to_dict()                    # JSON-able; docs/explain.md documents every key

The keys are those of `ringpass.explain.data.VERSION`: a later version may add some.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringpass.errors import InputError
from ringpass.explain import tables
from ringpass.explain.data import Data, ReportData
from ringpass.explain.difference import Difference, difference


@dataclass(frozen=True)
class Report(ReportData):
    """What the backend makes of a model on `world` ranks; `rank` is the one whose program is shown."""

    def to_dict(self) -> Data:
        """The report as data that `json` takes: dicts, lists, texts and numbers."""
        return {"version": self.version, **asdict(self)}

    def to_json(self, indent: int | None = None) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def diff(self, other: Report | Mapping[str, Any]) -> Difference:
        """What changes from this report to `other`, which may be the dict of one.

        Raises InputError for data of another version.
        """
        return difference(self.to_dict(), other.to_dict() if isinstance(other, Report) else other)

    def save(self, path: str | Path) -> None:
        """Writes the report to a file, in the form that its ending names: `.json` or `.txt`.

        Raises InputError for another ending.
        """
        ending = media_of(path)
        Path(path).write_text(WRITERS[ending](self) + "\n")

    def __str__(self) -> str:
        return tables.text(self)

    def __rich__(self) -> Any:
        return tables.renderable(self)

    def _repr_html_(self) -> str:
        return tables.html(self)


WRITERS: Mapping[str, Callable[[Report], str]] = {".json": lambda report: report.to_json(indent=1), ".txt": str}
"""How a report is written to a file, by its ending."""


def media_of(path: str | Path) -> str:
    """The ending of a file that a report can be written to.  Raises InputError for another one."""
    ending = Path(path).suffix.lower()
    if ending not in WRITERS:
        raise InputError(f"a report is written to a file that ends in {' or '.join(WRITERS)}, got {str(path)!r}")
    return ending
