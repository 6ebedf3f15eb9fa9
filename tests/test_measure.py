"""The command line: a machine is measured and printed as the option `machine` reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from ringpass import RingConfig
from ringpass.__main__ import main
from ringpass.schedule.machine import Machine
from tests.support.repository import ROOT


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, *arguments]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def check(machine: Machine, ranks: list[int | None]) -> None:
    """What holds on any machine."""
    assert [dimension.ranks for dimension in machine.dimensions] == ranks
    assert all(1e6 < rate < 1e16 for _, rate in machine.flops) and 1e6 < machine.memory_bandwidth < 1e14
    assert 0 < machine.call_seconds < 1
    for dimension in machine.dimensions:
        assert 1e4 < dimension.bandwidth < 1e13
        assert 0 < dimension.p2p_seconds < 10 and 0 < dimension.collective_seconds < 10


def test_ranks_of_this_host(tmp_path: Any) -> None:
    done = command("-m", "ringpass", "measure", "--device", "cpu", "--name", "here")
    assert done.returncode == 0, done.stderr
    machine = Machine.from_json(done.stdout)
    check(machine, [2])
    assert machine.name == "here" and "done" in done.stderr  # the bar
    path = tmp_path / "machine.json"
    path.write_text(done.stdout)
    assert RingConfig.from_options({"machine": str(path)}).machine == machine


@pytest.mark.slow
def test_ranks_of_torchrun() -> None:
    """Rank 0 alone prints."""
    run = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ringpass", "measure"
    done = command(*run, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    check(Machine.from_json(done.stdout), [2])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", "0"), "--ranks must be from 1 on, got 0"),
        pytest.param(
            ("--device", "cuda"),
            "torch finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    device = () if "cuda" in arguments else ("--device", "cpu")
    assert main(["measure", *device, *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--help"], "measure this machine"), (["measure", "--help"], "--ranks N")):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0 and said in capsys.readouterr().out


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "COMMAND" in capsys.readouterr().err
