"""A training whose ranks are killed goes on with the losses of one that nobody disturbed, on any number of ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from examples.resume import Run, train_step
from tests.support.process_ranks import Workers
from tests.support.repository import ROOT

CLOSE = 1e-9  # of losses in float64


@dataclass(frozen=True)
class Launch:
    """One torchrun of the example.  `kills`: how many times its ranks are killed; it is ended after the last one."""

    ranks: int
    layout: str = "auto"
    kills: int = 0


def lines(folder: Path) -> list[dict[str, Any]]:
    """The losses so far; those of steps that were taken again are there again."""
    path = folder / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextmanager
def launched(launch: Launch, folder: Path, steps: int, every: int) -> Iterator[psutil.Process]:
    """torchrun and its ranks, in a session of their own, which does not outlive the block."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch.ranks}"]
    job = ["--max-restarts=100", "--monitor-interval=0.1", "-m", "examples.resume", f"--folder={folder}"]
    job += [f"--steps={steps}", f"--every={every}", f"--layout={launch.layout}", "--compiler=aot_eager"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(
            command + job, cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
    started = psutil.Process(process.pid)
    try:
        yield started
    finally:
        family = [started, *started.children(recursive=True)] if started.is_running() else []
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(60)


def ranks_of(torchrun: psutil.Process, count: int, limit: float) -> list[psutil.Process]:
    """The processes of all ranks, once they are there."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        with suppress(psutil.Error):  # one that ends while we look
            found = [p for p in torchrun.children() if "examples.resume" in " ".join(p.cmdline())]
            if len(found) == count:
                return found
        time.sleep(0.1)
    raise TimeoutError(f"torchrun has not started {count} ranks within {limit:g} s")


def disturbed(launches: list[Launch], folder: Path, steps: int, every: int, chance: random.Random) -> list[str]:
    """Runs the example to its end; says when which rank was killed."""
    killed = []
    for launch in launches:
        with launched(launch, folder, steps, every) as torchrun:
            for _ in range(launch.kills):
                victims = ranks_of(torchrun, launch.ranks, 120)
                before, begun = len(lines(folder)), time.monotonic()
                some = chance.randint(0, 4)  # 0: while it starts, loads or compiles
                while len(lines(folder)) < before + some and time.monotonic() < begun + 180:
                    time.sleep(0.02)
                time.sleep(chance.uniform(0, 5 if some == 0 else 0.1))
                victim = chance.choice(victims)
                assert victim.is_running(), (folder / "log").read_text()[-3000:]
                killed.append(f"P = {launch.ranks}, {launch.layout}: one rank after {len(lines(folder))} losses")
                victim.send_signal(signal.SIGKILL)
                psutil.wait_procs(victims, 120)
            if launch is launches[-1]:
                assert torchrun.wait(300) == 0, (folder / "log").read_text()[-3000:]
    return killed


def undisturbed(group: dist.ProcessGroup, steps: int) -> list[float]:
    """The losses of a training on one rank, step by step."""
    run = Run()
    options: Any = {"group": group, "compiler": "aot_eager"}
    model: Any = torch.compile(run.model, backend="ring_dilated", dynamic=True, options=options)
    return [train_step(run, model) for _ in range(steps)]


def check(folder: Path, wanted: list[float]) -> float:
    """Every loss that was written, also of steps taken twice, is that of the undisturbed training."""
    found = lines(folder)
    assert {line["step"] for line in found} == set(range(1, len(wanted) + 1))
    largest: float = max(abs(line["loss"] - wanted[line["step"] - 1]) for line in found)
    assert largest <= CLOSE
    assert [path.name for path in folder.glob("*.partial")] == [] and len(list(folder.glob("step_*"))) <= 2
    return largest


def test_a_kill_changes_no_loss(workers: Workers, tmp_path: Path) -> None:
    """On two ranks, one is killed after four steps or more; the next attempt goes on from a checkpoint."""
    (wanted,) = workers.run(undisturbed, 1, 16)
    chance = random.Random(6)
    disturbed([Launch(2, "zigzag", kills=1)], tmp_path / "killed", 16, 2, chance)
    check(tmp_path / "killed", wanted)
    assert min(line["step"] for line in lines(tmp_path / "killed") if line["attempt"] == 1) > 2


@pytest.mark.slow
def test_twenty_kills_and_other_numbers_of_ranks(
    workers: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P = 2, then 3, then 2 again, each in another layout."""
    steps, every = 200, 1
    (wanted,) = workers.run(undisturbed, 1, steps)
    launches = [Launch(2, "zigzag", 7), Launch(3, "contiguous", 7), Launch(2, "striped", 6)]
    killed = disturbed(launches, tmp_path / "killed", steps, every, random.Random(0))
    largest = check(tmp_path / "killed", wanted)
    written = lines(tmp_path / "killed")
    with capsys.disabled():
        print("", *killed, sep="\n")
        print(f"{len(killed)} kills, {len(written)} losses for {steps} steps, largest difference {largest:.1e}")
    assert len(killed) == 20 and len(written) > steps and {line["ranks"] for line in written} == {2, 3}


def optimizer_state(group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The optimizer's state after three steps: on a ring, or on one device without the backend."""
    run = Run()
    options: Any = {"group": group, "compiler": "aot_eager"}
    model: Any = run.model if group is None else torch.compile(run.model, backend="ring_dilated", options=options)
    run.model.dropout.p = 0.0  # the ring's dropout draws other numbers than one device's
    for _ in range(3):
        train_step(run, model)
    return run.optimizer.state_dict()


def test_the_ring_leaves_the_optimizer_as_on_one_device(workers: Workers) -> None:
    """The same entries, of full size, with the same values."""
    wanted = optimizer_state(None)
    for found in workers.run(optimizer_state, 2):
        assert found["param_groups"] == wanted["param_groups"]
        torch.testing.assert_close(found["state"], wanted["state"], rtol=1e-10, atol=1e-12)
