"""The benchmarks run: the cheap ones at sizes that measure nothing, the others as far as their --help."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks import (
    agreement,
    bytes_received,
    checks,
    density,
    dilation_length,
    memory,
    overlap,
    peaks,
    planning,
    soak,
    step_time,
    ways,
)
from benchmarks.paired import Case, RankFailed, against, on_ranks
from benchmarks.timeline import Event, as_trace, covered, picture
from ringpass import patterns
from ringpass.masks.expr import parse
from ringpass.reference import multiplicity
from ringpass.schedule.dilation import Dilation
from tests.support.pattern_models import dense_mask

NAMES = (
    "agreement", "alternatives", "bytes_received", "checks", "compile_time", "density", "dilation_length", "memory",
    "overlap", "peaks", "planning", "soak", "step_time", "ways",
)  # fmt: skip
PAGE = (Path(__file__).parent.parent / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_help_and_page_name_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out
    assert f"python -m benchmarks.{name}" in PAGE


def test_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agreement.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert re.match(r"the ranks compare a call in P=2: \S+ ms, \S+ of one by one", _last(capsys))
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    ours, others = (case["seconds"][name]["samples"] for name in ("agreement", "one by one"))
    assert case["ratios"]["of one by one"]["samples"] == [a / b for a, b in zip(ours, others, strict=True)]


@pytest.mark.slow
def test_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert _last(capsys).startswith("a step with all checks, over one without, at S=64: ")


@pytest.mark.slow
def test_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert _last(capsys).startswith("what auto takes, over the fastest way's median:")
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert case["taken"] in case["seconds"] and set(case["seconds"]) == {"ring", "all-gather", "degree 2"}
    assert min(case["ratios"]["taken over the fastest"]["samples"]) >= 1


def test_step_time_of_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_time.main(["--quick", "--what", "attention", "--out", str(tmp_path / "found.json")])
    assert re.search(r"efficiency at S=128, of what independent processes reach: attention \S+;", _last(capsys))
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    alone, independent, ring = (case["seconds"][name]["samples"] for name in ("alone", "independent", "ring"))
    assert case["ratios"]["scaling"]["samples"] == [a / b for a, b in zip(alone, independent, strict=True)]
    assert case["ratios"]["of independent"]["samples"] == pytest.approx(
        [b / (2 * c) for b, c in zip(independent, ring, strict=True)]
    )


def test_overlap_and_its_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlap.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert _last(capsys).startswith("ring over the larger of compute and transfer: forward, 2 heads x 256 tokens")
    cases = json.loads((tmp_path / "found.json").read_text())["cases"]
    counts = [
        sum(event[0] == 0 and event[1] == lane for event in case["events"])
        for case in cases
        for lane in ("tile", "transfer", "wait")
    ]
    # backward: the keys and values come, then the gradients of the local ones; the local tile is split in two
    assert counts == [2, 1, 1, 3, 2, 2]
    trace = json.loads((tmp_path / "found.trace.json").read_text())["traceEvents"]
    assert sum(entry["ph"] == "X" for entry in trace) == sum(len(case["events"]) for case in cases)


def test_ranks_receive_what_they_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bound holds for every mask, for all ranks together and for the busiest one."""
    bytes_received.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert _last(capsys).endswith("(bound <= 1.05: met)")
    cases = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert len(cases) == 5 and all(sum(case["received"]) <= 1.05 * sum(case["needed"]) for case in cases)


def test_planning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planning.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert re.search(r"classify \S+ \(bound <= 10: met\) s; plan \S+ \(bound <= 30: met\) s", _last(capsys))


@pytest.mark.slow
def test_density(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    density.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert _last(capsys).startswith("time over density x dense: window 0.50")
    cases = json.loads((tmp_path / "found.json").read_text())["cases"]
    *masks, dilated = cases
    joined = multiplicity(Dilation.parse(dilated["dilation"]), heads=8, tokens=256)
    assert joined.double().mean().item() == dilated["case"]["density"]
    drawn = [case for case in masks if "count" in case]
    for case, share in zip(drawn, (0.5, 0.25), strict=True):  # 2 of 4 blocks, and no less than one
        pattern = patterns.random_blocks(256, case["block"], case["count"])
        assert case["case"]["density"] == share == dense_mask(pattern, 256).double().mean().item()
    for case, share in zip((case for case in masks if "reach" in case), (0.5, 0.5, 0.1, 0.1), strict=True):
        assert case["case"]["density"] == pytest.approx(share, abs=0.02)
        pattern = patterns.Pattern(parse(density.expression(case["reach"], case["global tokens"])))
        assert dense_mask(pattern, 256).double().mean().item() == case["case"]["density"]


@pytest.mark.slow
def test_dilation_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dilation_length.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert _last(capsys).startswith("a token's time over that at 128 tokens, at most")
    first, second = json.loads((tmp_path / "found.json").read_text())["cases"]
    (a,), (b,) = (case["seconds"]["this"]["samples"] for case in (first, second))
    assert first["ratios"]["of a token"]["samples"] == [1]
    assert second["ratios"]["of a token"]["samples"] == pytest.approx([b / 2 / a])


@pytest.mark.slow
def test_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20 steps on 2 ranks, with one restart of the process group: losses as on one device, nothing left behind."""
    assert soak.main(["--quick", "--out", str(tmp_path / "found.json")]) == 0, capsys.readouterr().out
    assert _last(capsys).startswith("20 steps on 2 ranks, under 200 measured: memory is not judged, loss within ")
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert 0 < case["loss"] <= 1e-9
    for of in case["of ranks"]:
        assert of["steps"] == 20 and len(of["compilations"]) == 2 and min(of["compilations"]) >= 1
        assert of["bytes received"]["exchange"] > 0


def soaked(**changes: object) -> Case:
    """A run that meets all bounds, but for `changes`."""
    memory = {"slope": changes.pop("slope", 0.5), "error": 0.01}
    left = {"descriptors": 0, "threads": 0, "keys": 0} | {k: v for k, v in changes.items() if k != "loss"}
    compilations = left.pop("compilations", 9)
    of = {"measured steps": 700, "compilations": [compilations], "MB per 1000 steps": memory, "left behind": left}
    return Case({"ranks": 3}, facts={"loss": changes.get("loss", 1e-12), "of ranks": [of]})


@pytest.mark.parametrize(
    "changes",
    [{"loss": 1e-8}, {"loss": float("nan")}, {"slope": 1.5}, {"compilations": 10}, {"descriptors": 3}, {"threads": 3}]
    + [{"keys": 4}],
    ids=str,
)
def test_soak_tells_each_broken_bound(changes: dict[str, float]) -> None:
    assert soak.broken(soaked()) == [] and len(soak.broken(soaked(**changes))) == 1


def test_soak_fits_a_line() -> None:
    slope, error = soak.fitted([(step, 400 + 0.002 * step + 0.1 * (-1) ** step) for step in range(300, 1000)])
    assert slope == pytest.approx(2.0, abs=0.05) and 0 < error < 0.1


@pytest.mark.slow
def test_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert re.search(r"at P=2, times P, over that of one process: \S+ \(bound <= 1.15", _last(capsys))


@pytest.mark.slow
def test_peaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peaks.main(["--quick", "--out", str(tmp_path / "found.json")])
    assert re.match(
        r"estimated over measured peak, from 1: \S+ \(bound <= 0.1: \S+\), gpt2 at P=2, S=64", _last(capsys)
    )
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert case["ratio"] == [a / b for a, b in zip(case["estimated"], case["measured"], strict=True)]
    assert len(case["ratio"]) == 2 and min(case["measured"]) > 64 * 32 * 4


def test_a_failing_rank_ends_the_run() -> None:
    with pytest.raises(RankFailed, match="ZeroDivisionError"):
        list(on_ranks(1, divmod, 1, 0))


def test_bounds_are_reported_whichever_way_they_fall() -> None:
    assert against(0.95, 0.92, at_least=True) == "0.95 (bound >= 0.92: met)"
    assert against(1.25, 1.1, at_least=False) == "1.25 (bound <= 1.1: MISSED)"


def test_ratios_are_taken_within_a_round() -> None:
    case = Case({}, {"a": [1.0, 8.0], "no overlap": [2.0, 4.0]})
    case.add_ratio("r", lambda a, no_overlap: a / no_overlap)
    assert case.ratios == {"r": [0.5, 2.0]}


def test_timeline() -> None:
    tile, transfer = Event(0, "tile", "tile", 0.0, 2.0), Event(0, "transfer", "transfer", 1.0, 4.0)
    assert covered([transfer], [tile]) == 1.0
    tiles, transfers, waits, _ = (line.partition("|")[2] for line in picture([tile, transfer]).splitlines())
    assert (tiles.count("#"), transfers.count("="), waits.count("w")) == (60, 90, 0)
    shown = [(e["ts"], e["dur"]) for e in as_trace({"x": [tile, transfer]})["traceEvents"] if e["ph"] == "X"]
    assert shown == [(0.0, 2e6), (1e6, 3e6)]


def _last(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip().splitlines()[-1]
