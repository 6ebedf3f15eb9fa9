"""dumping: what the dump of a graph tells of all ranks, report, timeline and exchanges; and the page of all graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ringpass.explain.report import Report
from ringpass.explain.stages import GraphRun
from ringpass.files import write_text
from ringpass.page.dumped import report_files, write_page


def write_dump(report: Report, runs: Sequence[GraphRun]) -> None:
    """Writes the files of a report's graphs beside their texts, and the page; a graph without a folder has none.

    The report of a graph has no other graph, but the verdict is on all of them.
    """
    folders = [run.folder for run in runs]
    for graph, folder in zip(report.graphs, folders, strict=True):
        if folder is not None:
            for name, text in report_files(replace(report, graphs=[graph]).to_dict()):
                write_text(folder.parent, f"{folder.name}/{name}", text)
    for directory in {folder.parent for folder in folders if folder is not None}:
        write_page(directory)
