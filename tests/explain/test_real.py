"""The report of a real run: a side product, which never stops the run; the model's name, and the device."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringpass.side_products import _warn_once
from tests.support.page_models import Layers, step
from tests.support.pipeline_stages import fake_ring
from tests.support.process_ranks import spawn


def run_step(model: Any, compiled: Any = None, **options: Any) -> None:
    """A step of a model on rank 0 of two, without peers."""
    settings: Any = {"compiler": "aot_eager", **options}
    with fake_ring(0, 2):
        run: Any = compiled(settings) if compiled else torch.compile(model, backend="ring_dilated", options=settings)
        step(run, 16)


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize(
    ("broken", "missing"),
    [
        ("ringpass.explain.real.graph_report_of", "the report of graph 0, "),
        ("ringpass.explain.real.report_of", "the report of graph 0, "),
        ("ringpass.explain.real.texts_of", "the report "),
        ("ringpass.explain.real.write_dump", "the report or the page of the dump"),
        ("ringpass.passes.pipeline.texts", "shows of the "),
        ("ringpass.passes.dump.readable", "shows of the "),
    ],
)
def test_a_run_survives_what_it_shows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str, missing: str, call: int
) -> None:
    """A fault in the first, second or third call of what makes texts; the run ends, and says what is missing."""
    _warn_once.cache_clear()
    module, name = broken.rpartition(".")[::2]
    real, calls = getattr(__import__(module, fromlist=[name]), name), []

    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call + 1:
            raise ZeroDivisionError("seeded")
        return real(*args, **kwargs)

    with patch(broken, faulty), caplog.at_level(logging.WARNING, "ringpass"):
        run_step(Layers(1), explain=str(tmp_path / "report.html"), dump=str(tmp_path / "dump"))
    assert len(calls) > call
    (told,) = [r.getMessage() for r in caplog.records if "seeded" in r.getMessage()]
    assert missing in told and "ZeroDivisionError: seeded at " in told and "The run goes on" in told
    assert (tmp_path / "dump" / "graph0" / "rank0" / "schedule.txt").exists() or "texts" in broken


def unwritable(group: dist.ProcessGroup, path: str) -> str:
    """What a rank raises whose rank 0 cannot write the report."""
    options: Any = {"compiler": "aot_eager", "explain": path, "timeout": 20.0}
    run: Any = torch.compile(Layers(1), backend="ring_dilated", options=options)
    try:
        step(run, 16)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_path_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = (x.result for x in spawn(unwritable, 2, str(tmp_path / "file" / "report.json"), timeout=300.0))
    assert "option 'explain': expected the path of a file that can be written" in first
    assert second.startswith("PeerError") and "rank 0" in second and "OptionError" in second


@pytest.mark.parametrize("path", ["folder.json", "x" * 300 + ".json"])
def test_other_paths_that_cannot_be_written(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="option 'explain': expected the path"):
        run_step(Layers(1), explain=str(tmp_path / path))


# --- the model, the device --------------------------------------------------------------------------------------------


class Outer(nn.Module):
    """Its first graph is that of a submodule, which breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Inner(Layers):
    """Breaks at its begin."""

    def forward(self, x: Tensor) -> Any:
        torch._dynamo.graph_break()
        return super().forward(x)


@pytest.mark.parametrize("how", ["compile", "method", "forward", "function"])
def test_the_model_is_the_outermost(tmp_path: Path, how: str) -> None:
    model = Outer()

    def call(x: Tensor) -> Any:
        return model(x)

    def compiled(options: Any) -> Any:
        if how == "method":
            model.compile(backend="ring_dilated", options=options)
            return model
        given: Any = {"compile": model, "forward": model.forward, "function": call}[how]
        return torch.compile(given, backend="ring_dilated", options=options)

    run_step(model, compiled, explain=str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text())["model"] == ("call" if how == "function" else "Outer")


def test_the_device_of_a_described_machine(tmp_path: Path) -> None:
    """Whether the peak fits it is known; without one the report says nothing of a device, and the page how to ask."""
    for name, options in (("known", {"machine": "H100"}), ("unknown", {})):
        run_step(Layers(1), explain=str(tmp_path / f"{name}.json"), **options)
    known, unknown = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("known", "unknown"))
    assert known["verdict"]["device"] == {"name": "H100", "bytes": 80 * 10**9} and known["verdict"]["fits"] is True
    assert known["longest"]["tokens"] is None and "ringpass.explain(.., device=..)" in known["longest"]["why"]
    assert unknown["verdict"]["device"] is None and unknown["verdict"]["fits"] is None and unknown["longest"] is None
