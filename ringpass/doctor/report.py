"""The findings of `doctor` as a table for people or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from ringpass.doctor.finding import Finding, Status, worst

COLOURS = {Status.OK: "green", Status.WARNING: "yellow", Status.PROBLEM: "bold red"}


def as_json(findings: Sequence[Finding]) -> str:
    """{"version": 1, "status": the worst, "findings": [{"name", "status", "found", "remedy"}, ..]}"""
    return json.dumps({"version": 1, "status": worst(findings), "findings": [asdict(x) for x in findings]}, indent=2)


def show(findings: Sequence[Finding]) -> None:
    """Prints a table, where rich is installed, else lines; then what the findings come to."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(as_text(findings))
        return
    table = Table(show_edge=False, pad_edge=False)
    for name in ("", "checked", "found, and what to do"):
        table.add_column(name, overflow="fold")
    for x in findings:
        about = Text(x.found)
        if x.remedy:
            about.append(f"\n→ {x.remedy}", style="italic")
        table.add_row(Text(x.status, style=COLOURS[x.status]), Text(x.name), about)
    console = Console()
    console.print(table)
    console.print(Text(summary(findings), style=COLOURS[worst(findings)]))


def as_text(findings: Sequence[Finding]) -> str:
    """The findings line by line.

    >>> print(as_text([Finding("gloo", Status.OK, "built in"), Finding("lo", Status.PROBLEM, "none", "add it")]))
    ok       gloo: built in
    problem  lo: none
             -> add it
    1 problem, 0 warnings
    """
    lines = []
    for x in findings:
        lines += [f"{x.status:<8} {x.name}: {x.found}", *([f"{'':<8} -> {x.remedy}"] if x.remedy else [])]
    return "\n".join([*lines, summary(findings)])


def summary(findings: Sequence[Finding]) -> str:
    """How many problems and warnings there are."""
    counts = [sum(x.status is status for x in findings) for status in (Status.PROBLEM, Status.WARNING)]
    return ", ".join(
        f"{n} {word}{'' if n == 1 else 's'}" for n, word in zip(counts, ("problem", "warning"), strict=True)
    )
