"""difference: what changed from one report to another, as text and as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ringpass.amounts import size
from ringpass.errors import InputError
from ringpass.explain.memory import KINDS

BYTES = "bytes"
Data = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One thing that differs: where, what it was and is; `unit` is "bytes" for sizes."""

    what: str
    before: Any
    after: Any
    unit: str = ""

    def __str__(self) -> str:
        before, after = (size(x) if self.unit and isinstance(x, int) else str(x) for x in (self.before, self.after))
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (self.before, self.after))
        ratio = f" ({self.after / self.before:.3g} times)" if numbers and self.before else ""
        return f"{self.what}: {before} -> {after}{ratio}"


@dataclass(frozen=True)
class Difference:
    """The changes from one report to another; false if there are none."""

    changes: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        return "\n".join(map(str, self.changes)) or "no difference"

    def to_dict(self) -> list[dict[str, Any]]:
        """The changes as data that `json` takes."""
        return [asdict(change) for change in self.changes]


def difference(before: Data, after: Data) -> Difference:
    """What changed between the dicts of two reports.  Raises InputError for another version."""
    versions = {report.get("version") for report in (before, after)}
    if len(versions) > 1:
        raise InputError(f"reports of one version can be compared, got versions {', '.join(map(str, versions))}")
    told = [*_facts(before, after), *_verdicts(before, after), *_graphs(before, after)]
    return Difference(tuple(change for change in told if change.before != change.after))


def _facts(before: Data, after: Data) -> Iterator[Change]:
    for key in ("model", "world", "rank"):
        yield Change(key, before[key], after[key])
    for name in {**before["options"], **after["options"]}:
        yield Change(f"option {name}", before["options"].get(name), after["options"].get(name))
    for name in {**before["made_by"], **after["made_by"]}:
        yield Change(name, before["made_by"].get(name), after["made_by"].get(name))


def _verdicts(before: Data, after: Data) -> Iterator[Change]:
    first, second = before["verdict"], after["verdict"]
    yield Change("peak of a rank", first["peak_bytes"], second["peak_bytes"], BYTES)
    for key in ("fits", "efficiency"):
        yield Change(key, first[key], second[key])
    yield _change("longest sequence that fits", before, after, lambda report: (report["longest"] or {}).get("tokens"))
    yield _change("graph breaks", before, after, lambda report: sum(e["count"] for e in report["breaks"]))
    yield _change("recompilations", before, after, lambda report: sum(e["count"] for e in report["recompiles"]))
    yield _change("graphs", before, after, lambda report: len(report["graphs"]))


def _change(what: str, before: Data, after: Data, of: Callable[[Data], Any], unit: str = "") -> Change:
    return Change(what, of(before), of(after), unit)


def _graphs(before: Data, after: Data) -> Iterator[Change]:
    for i, (first, second) in enumerate(zip(before["graphs"], after["graphs"], strict=False)):
        name = f"graph {i}, " if len(after["graphs"]) > 1 else ""
        for what, (of, unit) in OF_GRAPH.items():
            yield _change(f"{name}{what}", first, second, of, unit)


def _layouts(graph: Data) -> str:
    return ", ".join(axis["layout"] for axis in graph["axes"])


def _ways(graph: Data) -> str:
    return ", ".join(dict.fromkeys(f"degree {s['degree']} {s['comm']}" for s in graph["sites"]))


def _partitioned(graph: Data) -> int:
    return sum(len(site["indices"]) for site in graph["sites"] if site["partitioned"])


def _boundaries(graph: Data, phase: str) -> int:
    return sum(boundary["bytes"] for boundary in graph["boundaries"] if boundary["direction"] == phase)


def _memory(graph: Data, kind: str) -> int:
    found: int = graph["memory"]["kinds"][kind]
    return found


def _attention(graph: Data, phase: str) -> int:
    return sum(len(site["indices"]) * site["rank_received_bytes"].get(phase, 0) for site in graph["sites"])


OF_GRAPH: Mapping[str, tuple[Callable[[Data], Any], str]] = {
    "layouts": (_layouts, ""),
    "ways": (_ways, ""),
    "attentions on the ranks": (_partitioned, ""),
    "keys and values received, forward": (lambda graph: _attention(graph, "forward"), BYTES),
    "keys and values received, backward": (lambda graph: _attention(graph, "backward"), BYTES),
    "received at boundaries, forward": (lambda graph: _boundaries(graph, "forward"), BYTES),
    "received at boundaries, backward": (lambda graph: _boundaries(graph, "backward"), BYTES),
    "gathered": (lambda graph: sum(x["bytes"] for x in graph["gathers"]), BYTES),
    "ops that gather": (lambda graph: ", ".join(sorted({x["op"] for x in graph["gathers"]})) or "none", ""),
    **{f"memory at the peak, {kind}": (partial(_memory, kind=kind), BYTES) for kind in KINDS},
}
"""What is compared of each graph: how it is found, and its unit."""
