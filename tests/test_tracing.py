"""Where compiler people look: logs by TORCH_LOGS, artifacts that tlparse lists, ranges in a profile.

All of it from one run of the script of docs/debugging.md, on two ranks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT

PAGE = (ROOT / "docs" / "debugging.md").read_text()
ARTIFACTS = "captured", "sites", "plan", "schedule", "partitioned", "gathers", "forward", "backward"
LOGGERS = "ringpass.passes.plan", "ringpass.passes.pipeline", "ringpass.comm.agreement"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(its folder, what it printed, what it logged)"""
    folder = tmp_path_factory.mktemp("debugging")
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    (folder / "profile_ranks.py").write_text(script)
    variables = {
        "TORCH_LOGS": "+ringpass",
        "TORCH_TRACE": str(folder / "trace"),
        "TORCH_LOGS_FORMAT": "%(name)s %(message)s",
    }
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "profile_ranks.py",
    ]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout, done.stderr


def test_the_script_prints_ranges(run: tuple[Path, str, str]) -> None:
    folder, printed, _ = run
    for name in ("attention_step0_q0to32_k0to32", "receive_step1_from_rank1", "attention_backward_step1_q"):
        assert f"site0 {name}" in printed
    assert "wait for site0 receive_step1_from_rank1" in printed
    events = json.loads((folder / "rank1.json").read_text())["traceEvents"]
    assert any(event["name"] == "site0 receive_step1_from_rank0" for event in events if "name" in event)


def test_logs(run: tuple[Path, str, str]) -> None:
    """TORCH_LOGS="+ringpass" shows all loggers of the table, on both ranks."""
    logged = run[2]
    assert all(re.search(rf"{re.escape(name)} ", logged) for name in LOGGERS)
    assert "axis 0: 64 tokens, zigzag" in logged and re.search(r"pipeline capture: \d+\.\d+ s", logged)
    assert {f"rank {rank} comes to call {call}" for rank in (0, 1) for call in (1, 2)} <= set(
        re.findall(r"rank \d comes to call \d", logged)
    )
    assert "rank 1: all 2 ranks came to call 2" in logged
    assert all(f"`{name}`" in PAGE for name in LOGGERS)


def test_tlparse_lists_the_artifacts(run: tuple[Path, str, str]) -> None:
    folder = run[0]
    tlparse = shutil.which("tlparse") or shutil.which("tlparse", path=str(Path(sys.executable).parent))
    if tlparse is None:
        pytest.skip("tlparse is not installed: pip install tlparse")
    for rank in (0, 1):
        (log,) = (folder / "trace").glob(f"*rank_{rank}_*.log")
        page = folder / f"page{rank}"
        done = subprocess.run([tlparse, str(log), "-o", str(page), "--no-browser"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        index = (page / "index.html").read_text()
        for name in ARTIFACTS:
            found = re.findall(rf'href="([^"]*/ringpass_{name}_\d+\.txt)"', index)
            assert found, f"{name} is not in tlparse's index"
            assert (page / found[-1]).read_text().strip()
            assert f"`ringpass_{name}`" in PAGE
        (schedule, *_) = page.glob("*/ringpass_schedule_*.txt")
        assert schedule.read_text().startswith(f"site 0 on rank {rank} of 2")
