"""The command `explain`, and the option of the same name."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from ringpass.__main__ import main
from ringpass.errors import InputError
from tests.support.model_parity import compiled
from tests.support.process_ranks import Workers

MODEL = """
import torch

def make():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return layer, (torch.empty(1, 64, 16),)

def wrong():
    return make()[0]

def fails():
    raise KeyError("no such weights")

class Named(torch.nn.Module):
    def forward(self, x, rank=0, device=None):
        return x * rank

def named():
    return Named(), (torch.empty(4),), {"rank": 3, "device": "cpu"}

def misfits():
    return make()[0], (torch.empty(1, 64, 15),)
"""
ASKED = ["--world-size", "4", "--options", '{"compiler": "aot_eager"}']


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "model_to_explain.py"
    path.write_text(MODEL)
    path.with_name(f"{path.name}.json").write_text('{"verdict": {}, "version": 1}')
    return str(path)


def test_the_command(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    page = tmp_path / "report.html"
    assert main(["explain", f"{file}:make", *ASKED, "--json", str(path), "--html", str(page), "--strict"]) == 0
    assert page.read_text().startswith("<!doctype html>")
    assert "on 4 ranks" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["world"] == 4
    command = shlex.split(report["command"])  # which makes the report again
    assert main([*command[1:], "--json", str(path)]) == 0 and json.loads(path.read_text()) == report
    capsys.readouterr()
    asked = [*ASKED, "--device", "1000", "--diff", str(path)]
    assert main(["explain", f"{file}:make", *asked]) == 1  # does not fit
    assert "fits: None -> False" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["make"], "expected FILE:FACTORY"),
        (["nowhere.py:make"], "there is no file"),
        (["{file}:nothing"], "has no function"),
        (["{file}:wrong"], "must return (model, args)"),
        (["{file}:make", "--options", "{"], "must be JSON"),
        (["{file}:make", "--json", "report.pdf"], "ends in .html, .json, .txt"),
        (["{file}:make", "--html", "report.txt"], "ends in .html"),
        (["{file}:make", "--diff", "{file}"], "--diff must name a report"),
        (["{file}:make", "--diff", "{file}.json"], "lacks something: KeyError: "),
        (["{file}:fails"], "fails cannot be made: KeyError: 'no such weights'"),
        (["{file}:misfits"], "the model does not run: "),
        (["{file}:make", "--json", "{file}/report.json"], "the report cannot be written"),
    ],
)
def test_bad_input(arguments: list[str], said: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [text.replace("{file}", file) for text in arguments]
    assert main(["explain", *given, "--world-size", "4"]) == 2
    assert said in capsys.readouterr().err


def test_arguments_of_the_model_have_any_names(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of `explain` too."""
    assert main(["explain", f"{file}:named", "--world-size", "4"]) == 0
    assert "Named on 4 ranks" in capsys.readouterr().out


def step(group: Any, path: str) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    run = compiled(layer, group, explain=path, timeout=300.0)
    run(torch.ones(1, 64, 16)).sum().backward()


def test_the_option_writes_what_runs(workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    workers.run(step, 2, str(path))
    found = json.loads(path.read_text())
    (graph,) = found["graphs"]
    assert found["world"] == 2 and found["model"] == "TransformerEncoderLayer"
    assert graph["sites"][0]["rank_received_bytes"].keys() == {"forward", "backward"}
    assert {boundary["direction"] for boundary in graph["boundaries"]} >= {"backward"}
    assert graph["memory"]["activations"] > 0


def test_the_option_refuses_other_endings() -> None:
    run: Any = torch.compile(torch.sin, backend="ring_dilated", options={"explain": "report.pdf"})
    with pytest.raises(Exception, match="ends in .html, .json, .txt") as raised:
        run(torch.ones(3))
    assert isinstance(raised.value, InputError) or "InputError" in str(raised.value) or raised.value.__cause__
