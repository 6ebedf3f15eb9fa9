"""Dump directories: one folder for all ranks, equal files once, layers folded, files written whole, the page."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringpass.__main__ import main
from ringpass.errors import OptionError
from ringpass.page.command import has_display
from ringpass.page.dumped import write_page
from ringpass.page.timeline import Event
from tests.support.model_parity import compiled
from tests.support.page_models import Layers, step
from tests.support.pipeline_stages import fake_ring
from tests.support.process_ranks import Workers
from tests.support.profiles import profile_of
from tests.support.traffic import received_bytes


def dumped(group: dist.ProcessGroup, directory: str) -> tuple[int, int]:
    """A step of three layers; the bytes of keys and values that this rank receives, and of gradients."""
    torch.manual_seed(0)
    run = compiled(Layers(3), group, dump=directory, layout="zigzag")
    with received_bytes() as totals:
        step(run, 37)
    return totals[0], totals[1]


@pytest.fixture(scope="module")
def dump(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, int]]]:
    """The dump of three ranks, and what they received."""
    folder = tmp_path_factory.mktemp("dump")
    return folder, workers.run(dumped, 3, str(folder))


def test_all_ranks_are_in_one_directory(dump: tuple[Path, Any]) -> None:
    folder, _ = dump
    assert {x.name for x in folder.iterdir()} == {"graph0", "index.html"}
    shared = {"captured.py", "sites.txt", "plan.txt", "gathers.txt", "report.json", "trace.json", "exchange.dot"}
    assert {x.name for x in (folder / "graph0").iterdir()} == {*shared, "rank0", "rank1", "rank2"}
    stages = {"partitioned.py", "forward.py", "backward.py", "partitioned.diff", "forward.diff"}
    for rank in range(3):
        own = {x.name for x in (folder / "graph0" / f"rank{rank}").iterdir()}
        assert own == {*stages, "schedule.txt", "stages.txt"}


def test_equal_layers_are_folded(dump: tuple[Path, Any]) -> None:
    graph = dump[0] / "graph0"
    (site,) = (graph / "sites.txt").read_text().splitlines()
    assert re.match(r"sites 0 to 2 \(scaled_dot_product_attention to scaled_dot_product_attention_2\), x 3: q", site)
    text = (graph / "rank1" / "schedule.txt").read_text()
    assert text.startswith("sites 0 to 2, x 3, on rank 1 of 3: ") and text.count("local tokens") == 1


def test_the_schedule_as_data(dump: tuple[Path, Any]) -> None:
    """Its bytes are those that ranks received; its tiles and ranges are those of the text."""
    folder, totals = dump
    report = json.loads((folder / "graph0" / "report.json").read_text())
    (data,) = report["graphs"]
    assert report["world"] == 3 and report["verdict"]["peak_bytes"] >= data["memory"]["peak"] > 0
    assert {boundary["direction"] for boundary in data["boundaries"]} == {"forward", "backward"}
    (site,), (schedule,) = data["sites"], data["schedules"]
    assert site["indices"] == [0, 1, 2] and site["mask"] == "k <= q"
    assert re.fullmatch(r"tests/support/page_models\.py:\d+", site["source"]) and "scaled_dot_product" in site["line"]
    for rank, (keys, _) in enumerate(totals):
        received = sum(s["receive"]["bytes"] for s in schedule["ranks"][rank]["steps"] if s["receive"])
        assert site["received_bytes"][rank] == received
        assert keys == 2 * 3 * received  # forward and backward, three layers
        text = (folder / "graph0" / f"rank{rank}" / "schedule.txt").read_text()
        assert f"{site['pairs'][rank] // 2} pairs" in text  # of each of two heads
        for q0, q1, k0, k1, kind in (t for s in schedule["ranks"][rank]["steps"] for t in s["tiles"]):
            assert f"{kind} q{q0}:{q1} k{k0}:{k1}" in text
    held = sorted(token for runs in data["axes"][0]["ranks"] for a, b in runs for token in range(a, b))
    assert held == list(range(37))


def test_differences_between_stages(dump: tuple[Path, Any]) -> None:
    text = (dump[0] / "graph0" / "rank0" / "partitioned.diff").read_text()
    assert text.startswith("--- captured.py\n+++ partitioned.py\n@@ ")
    assert re.search(r"^-.*scaled_dot_product_attention", text, re.MULTILINE)
    assert re.search(r"^\+.*ringpass\.ring_attention", text, re.MULTILINE)
    assert not re.search(r"^[-+].* = torch.ops.aten.linear", text, re.MULTILINE)  # it differs in its shape alone


def test_the_page_shows_the_last_stage(dump: tuple[Path, Any]) -> None:
    """It was made again when the backward was there, and can be made from the files alone."""
    page = (dump[0] / "index.html").read_text()
    assert write_page(dump[0]).read_text() == page
    assert page.startswith("<!doctype html>") and len(page) < 1e6


def test_inductor_s_code_is_beside_the_stages(tmp_path: Path) -> None:
    with fake_ring(0, 2):
        run: Any = torch.compile(Layers(1), backend="ring_dilated", options={"dump": str(tmp_path)})
        step(run, 16)
    for stage in ("forward", "backward"):
        code = (tmp_path / "graph0" / "rank0" / f"output_code_{stage}.py").read_text()
        assert "def call(" in code and "ringpass" in code


def test_graphs_of_a_directory_are_numbered_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with fake_ring(1, 3):
            options: Any = {"compiler": "aot_eager", "dump": str(tmp_path / name)}
            run: Any = torch.compile(Layers(1), backend="ring_dilated", options=options)
            step(run, 16)
        assert [x.name for x in (tmp_path / name).iterdir()] == ["graph0"]


def test_each_share_of_the_heads_has_its_schedule(tmp_path: Path) -> None:
    """With a Ulysses degree of 2, two rings of two ranks; and the page shows both."""
    with fake_ring(0, 4):
        options: Any = {"compiler": "aot_eager", "ulysses_degree": 2, "dump": str(tmp_path)}
        run: Any = torch.compile(Layers(1), backend="ring_dilated", options=options)
        step(run, 64)
    (data,) = json.loads((tmp_path / "graph0" / "report.json").read_text())["graphs"]
    assert [[of["rank"] for of in x["ranks"]] for x in data["schedules"]] == [[0, 2], [1, 3]]
    for schedule in data["schedules"]:
        for of in schedule["ranks"]:
            received = sum(s["receive"]["bytes"] for s in of["steps"] if s["receive"])
            assert received == data["sites"][0]["received_bytes"][of["rank"]]
    assert min(data["sites"][0]["pooled_bytes"]) > 0 and (tmp_path / "index.html").is_file()


# --- ringpass dump open -----------------------------------------------------------------------------------------------


def test_dump_open(dump: tuple[Path, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints the path of the page, makes it where it is missing, and opens it where there is a display."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    page = dump[0] / "index.html"
    page.unlink()
    assert main(["dump", "open", str(dump[0])]) == 0
    assert capsys.readouterr().out.strip() == str(page) and page.is_file() and not opened
    monkeypatch.setenv("DISPLAY", ":0")
    assert has_display() and main(["dump", "open", str(dump[0])]) == 0
    assert opened == [page.as_uri()]


def test_dump_open_takes_a_profile_of_each_rank(
    dump: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"rank{rank}.json" for rank in (1, 0)]
    for rank, file in zip((1, 0), files, strict=True):
        file.write_text(json.dumps(profile_of([Event(rank, "tile", 0, 0.0, 1.0 + rank, "")], rank)))
    zipped = tmp_path / "rank0.json.gz"
    zipped.write_bytes(gzip.compress(files[1].read_bytes()))
    start = ["dump", "open", str(dump[0]), "--no-browser", "--trace"]
    assert main([*start, str(files[0]), str(zipped)]) == 0
    packed = re.search(r'id="more"[^>]*>([^<]+)<', (dump[0] / "index.html").read_text())
    assert packed is not None
    shown = json.loads(zlib.decompress(base64.b64decode(packed[1])))["measured"]
    assert sorted(shown["rank"]) == [0, 1] and shown["span"] == 2.0 and shown["found"] == 2
    capsys.readouterr()
    for wrong, said in (
        ([str(files[1]), str(zipped)], "rank0.json.gz is of rank 0, as "),
        ([str(dump[0] / "graph0" / "trace.json")], "holds no range of ringpass"),
        ([str(tmp_path)], "Chrome's trace format"),
    ):
        assert main([*start, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_dump_open_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", "open", str(tmp_path)]) == 2
    assert "holds no graph0" in capsys.readouterr().err
    with pytest.raises(OptionError, match="a run whose graph has an attention"):
        write_page(tmp_path)
    os.mkdir(tmp_path / "graph0")
    assert main(["dump", "open", str(tmp_path), "--trace", str(tmp_path / "none.json"), "--no-browser"]) == 2
    assert "Chrome's trace format" in capsys.readouterr().err
    for text in ('{"graphs"', "[1]", '{"graphs": []}'):
        (tmp_path / "graph0" / "report.json").write_text(text)
        assert main(["dump", "open", str(tmp_path), "--again", "--no-browser"]) == 2
        assert "expected the report of a graph" in capsys.readouterr().err
