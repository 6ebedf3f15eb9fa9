"""tables: a report for people: plain text, tables of rich for a terminal, HTML for a notebook.

The three show the same `Section`s, in the order in which a reader needs them: verdict, axes, attentions, gathers,
boundaries, memory, breaks, proof.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ringpass.amounts import size
from ringpass.errors import RingpassError
from ringpass.explain.data import GraphReport, ReportData, SiteReport

WIDTH = 118
SHOWN = 12  # rows of a table of gathers or boundaries


class MissingRichError(RingpassError, ImportError):
    """Tables need rich, which is not installed."""


@dataclass(frozen=True)
class Section:
    """A title, lines of text, and a table: names of columns, and rows."""

    title: str
    lines: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def sections(report: ReportData) -> Iterator[Section]:
    """What is shown of a report."""
    yield _verdict(report)
    for graph in report.graphs:
        name = f"graph {graph.index}: " if len(report.graphs) > 1 else ""
        if graph.whole:
            yield Section(f"{name}not partitioned", (graph.whole,))
        else:
            yield _axes(graph, name)
            yield _sites(graph, name)
            yield from _gathers(graph, name)
            yield from _boundaries(graph, name)
        yield _memory(graph, name)
    yield from _events(report)
    proofs = [graph.proof.text for graph in report.graphs if graph.proof]
    if proofs:
        yield Section("proved", tuple(proofs))
    made = ", ".join(f"{name} {version}" for name, version in report.made_by.items())
    yield Section("made by", (made, f"fingerprint {report.fingerprint[:16]}", report.command))


def _verdict(report: ReportData) -> Section:
    verdict = report.verdict
    lines = list(verdict.lines)
    lines += [f"change: {verdict.change}"] if verdict.change else []
    if report.longest is not None:
        tokens = report.longest["tokens"]
        checked = "" if report.longest["verified"] else ", not explained itself"
        found = f"{tokens:,} tokens{checked}" if tokens is not None else "not known"
        lines.append(f"longest sequence for {report.longest['device']}: {found}; {report.longest['why']}")
    return Section(f"{report.model} on {report.world} ranks, seen from rank {report.rank}", tuple(lines))


def _axes(graph: GraphReport, name: str) -> Section:
    rows = [(str(a.index), f"{a.tokens:,}", a.layout, a.why) for a in graph.axes]
    lines = [layout.why for layout in graph.layouts]
    lines = [f"{'chosen' if i == 0 else 'rejected'}: {line}" for i, line in enumerate(lines)]
    lines += [f"machine {graph.machine}"] if graph.machine else []
    return Section(f"{name}axes", (*lines, *graph.remarks), ("axis", "tokens", "layout", "why"), tuple(rows))


def _sites(graph: GraphReport, name: str) -> Section:
    columns = "attention", "mask", "pairs", "tiles", "way", "receives", "balance", "where"
    return Section(f"{name}attentions", tuple(_about_ways(graph)), columns, tuple(_site(s) for s in graph.sites))


def _site(site: SiteReport) -> tuple[str, ...]:
    folded = f" x {len(site.indices)}" if len(site.indices) > 1 else ""
    heads = (
        f"{site.heads[0]} heads"
        if site.heads[0] == site.heads[1]
        else f"{site.heads[0]} heads, {site.heads[1]} of K, V"
    )
    tiles = ", ".join(f"{n} {kind}" for kind, n in site.tiles.items() if n)
    way = "as the model wrote it" if not site.partitioned else site.comm
    way = f"ulysses {site.degree}, {way}" if site.degree > 1 else way
    received = sum(site.rank_received_bytes.values())
    density = "" if site.density is None else f"{site.density:.3g}"
    balance = "" if site.balance is None else f"{site.balance:.2f}"
    where = site.path or site.name
    where = f"{where} ({site.source})" if site.source else where
    lengths = f"{site.queries:,} x {site.keys:,}"
    return (
        f"{site.indices[0]}{folded}: {heads}, {lengths}",
        site.mask,
        density,
        tiles,
        way,
        size(received),
        balance,
        where,
    )


def _about_ways(graph: GraphReport) -> Iterator[str]:
    for site in graph.sites:
        yield f"attention {site.indices[0]}: {site.why}"
        for way in site.ways[:4]:
            verdict = "chosen" if way.chosen else "rejected"
            parts = ", ".join(f"{part} {1e3 * s:.3g}" for part, s in way.parts.items() if s)
            yield f"  {verdict}: {way.name}, {1e3 * way.seconds:.3g} ms ({parts})"


def _gathers(graph: GraphReport, name: str) -> Iterator[Section]:
    rows = [
        (x.op, size(x.bytes), f"{x.flops:.3g}", x.why, x.remedy, x.source or "")
        for x in sorted(graph.gathers, key=lambda x: -x.bytes)
    ]
    lines = ("nothing is gathered",) if not rows else tuple(_more(rows))
    yield Section(f"{name}gathers", lines, ("op", "bytes", "FLOPs", "why", "instead", "where"), tuple(rows[:SHOWN]))


def _boundaries(graph: GraphReport, name: str) -> Iterator[Section]:
    totals: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    for x in graph.boundaries:
        key = x.kind + (", if it is used" if x.on_use else ""), x.direction
        totals[key] += x.bytes
        counts[key] += 1
    rows = [(kind, phase, str(counts[kind, phase]), size(n)) for (kind, phase), n in totals.most_common()]
    if rows:
        yield Section(f"{name}boundaries", (), ("kind", "phase", "count", "bytes"), tuple(rows))


def _memory(graph: GraphReport, name: str) -> Section:
    memory = graph.memory
    rows = [(kind, size(n), f"{n / max(1, memory.peak):.0%}") for kind, n in memory.kinds.items()]
    top = max(memory.program, key=lambda moment: moment["live"], default=None)
    lines = [f"at the peak, {size(memory.peak)}" + (f", in the {top['phase']} after {top['node']}" if top else "")]
    return Section(f"{name}memory of a rank", tuple(lines), ("kind", "bytes", "of the peak"), tuple(rows))


def _events(report: ReportData) -> Iterator[Section]:
    for title, events in (("graph breaks", report.breaks), ("compiled again", report.recompiles)):
        if events:
            rows = [(event.reason, event.source or "", str(event.count)) for event in events]
            yield Section(title, (), ("reason", "where", "count"), tuple(rows))


def _more(rows: Sequence[Any]) -> list[str]:
    return [f"and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []


# --- renderers --------------------------------------------------------------------------------------------------------


def text(report: ReportData) -> str:
    """A report as text; in tables where rich is installed, else line by line."""
    try:
        from rich.console import Console
    except ImportError:
        return plain(report)
    out = io.StringIO()
    Console(file=out, width=WIDTH, highlight=False, color_system=None).print(renderable(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def plain(report: ReportData) -> str:
    """A report line by line, without rich."""
    lines: list[str] = []
    for section in sections(report):
        lines += [section.title, *(f"  {line}" for line in section.lines)]
        lines += [
            "  " + "; ".join(f"{c} {v}" for c, v in zip(section.columns, row, strict=True) if v) for row in section.rows
        ]
    return "\n".join(lines)


def renderable(report: ReportData) -> Any:
    """A report as what rich prints.  Raises MissingRichError without rich."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise MissingRichError(
            "tables of a report need rich: pip install 'ringpass[tools]'; str(report) does not"
        ) from error
    parts: list[Any] = []
    for section in sections(report):
        parts.append(Text(section.title, style="bold"))
        parts += [Text(f"  {line}") for line in section.lines]
        if section.rows:
            table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
            for column in section.columns:
                table.add_column(column, overflow="fold")
            for row in section.rows:
                table.add_row(*(Text(cell) for cell in row))
            parts.append(table)
    return Group(*parts)


def html(report: ReportData) -> str:
    """A report for a notebook.  Without rich, as preformatted text."""
    try:
        from rich.console import Console
    except ImportError:
        from html import escape

        return f"<pre>{escape(plain(report))}</pre>"
    console = Console(file=io.StringIO(), width=WIDTH, record=True, highlight=False)
    console.print(renderable(report))
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
