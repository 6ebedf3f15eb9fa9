"""Machines that are really broken, as far as a test can break one: `doctor` names what is wrong, and the remedy.

No compiler, no process group, gloo alone, another torch, a missing rank, a port that does not answer, no space left.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from ringpass.__main__ import main
from ringpass.doctor import command, compiler, installation, ranks
from ringpass.doctor.finding import Finding, Status, bounded
from ringpass.doctor.network import Job, job_of, names, way_to_rank_0
from ringpass.errors import OptionError
from ringpass.torch_features import TESTED_TORCH
from tests.support.ports import free_port
from tests.support.repository import ROOT
from tests.support.small_disk import small_disk

LIMIT = 2.0  # seconds


def named(findings: list[Finding], name: str) -> Finding:
    """The finding of that name."""
    (found,) = [x for x in findings if x.name == name]
    return found


def job(rank: int, world: int, port: int) -> Job:
    return Job(rank, world, rank, world, "127.0.0.1", port, has_store=False)


def doctor(*arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    run = [sys.executable, "-m", "ringpass", "doctor", "--json", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(run, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, list[Finding]]:
    """Its exit code, and what it found; nothing if it did not print."""
    printed, complaints = process.communicate(timeout=240)
    assert process.returncode in (0, 1), complaints
    found = json.loads(printed)["findings"] if printed else []
    return process.returncode, [Finding(**{**x, "status": Status(x["status"])}) for x in found]


# --- this machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checks", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_without_a_process_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checks: str
) -> None:
    """On this machine nothing is broken; it says how to start ranks.  "some": without a compilation."""
    if checks == "some":
        some = [("attention", installation.attention), ("backend", installation.registration)]
        monkeypatch.setattr(command, "_local_checks", lambda *args: some)
    assert main(["doctor", "--json", "--world-size", "2", "--timeout", "200"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["version"] == 1 and report["status"] == "warning"
    found = {x["name"]: x for x in report["findings"]}
    assert found["process group"]["status"] == "warning"
    assert "torchrun --nproc-per-node" in found["process group"]["remedy"]
    assert "1 MiB to the next rank and back" in found["2 local ranks"]["found"]
    assert found["backend"]["status"] == found["attention"]["status"] == "ok"
    assert checks == "some" or found["compiler"]["status"] == "ok"


@pytest.mark.slow
def test_under_torchrun() -> None:
    """Rank 0 alone prints, for all ranks."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*run, "-m", "ringpass", "doctor", "--json", "--timeout", "150"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = {x["name"]: x for x in json.loads(done.stdout)["findings"]}
    assert found["ranks"]["found"] == "all 2 ranks came"
    assert found["round trip"]["status"] == "ok" and found["rendezvous"]["status"] == "ok"


# --- no compiler ------------------------------------------------------------------------------------------------------


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    (found,) = compiler.compiles(120)
    assert found.status is Status.PROBLEM and "there is no C++ compiler '/nowhere/g++'" in found.found
    assert "InvalidCxxCompiler" in found.found and "CXX" in found.remedy


def test_a_compilation_that_takes_too_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is stopped, whatever it is doing then; the compiler would take a minute."""
    script = tmp_path / "g++"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    (found,) = compiler.compiles(LIMIT)
    assert found.status is Status.PROBLEM and "more than 2 s" in found.found


# --- gloo alone, another torch ----------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
def test_gloo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host without GPUs it is enough; beside GPUs it is a problem.  Either way the remedy is there."""
    found = named([*installation.backends()], "nccl")
    assert found.status is Status.OK and "gloo alone" in found.found and "CUDA build of torch" in found.remedy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert named([*installation.backends()], "nccl").status is Status.PROBLEM


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.10.1", Status.PROBLEM), ("2.11.0+cpu", Status.OK), ("2.99.0.dev20300101", Status.WARNING)],
)
def test_another_torch(monkeypatch: pytest.MonkeyPatch, version: str, status: Status) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    found = named([*installation.versions()], "torch")
    assert found.status is status and version in found.found
    assert status is Status.OK or "pip install 'torch>=2.11.0" in found.remedy


def test_the_releases_are_those_of_the_documentation() -> None:
    table = (ROOT / "docs" / "torch_versions.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| 2.")]
    assert tuple(rows) == TESTED_TORCH


def test_the_backend_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "entry_points", lambda group: [])
    (found,) = installation.registration()
    assert found.status is Status.PROBLEM and "pip install" in found.remedy


# --- ranks that do not come -------------------------------------------------------------------------------------------


def test_a_rank_is_missing() -> None:
    """Ranks 0 and 1 of 3 meet in a real store; both name rank 2, within the limit."""
    port, found = free_port(), dict[int, list[Finding]]()
    kept = []  # rank 0's store lives as long as the others look into it

    def come(rank: int) -> None:
        meeting, found[rank] = ranks.meet(job(rank, 3, port), LIMIT)
        kept.append(meeting)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10 * LIMIT)
    for rank in range(2):
        missing = named(found[rank], "ranks")
        assert missing.status is Status.PROBLEM and missing.found == "rank 2 of 3 did not come within 2 s"
        assert "WORLD_SIZE=3" in missing.remedy


@pytest.mark.slow
def test_a_rank_is_missing_from_a_job() -> None:
    """The same with whole processes: rank 0 prints and both end with 1."""
    where = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        doctor("--timeout", "60", environment={**where, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    (code, found), (other, nothing) = map(finished, started)
    assert (code, other, nothing) == (1, 1, [])
    assert named(found, "ranks").found == "rank 2 of 3 did not come within 60 s"


def test_a_part_of_the_environment() -> None:
    with pytest.raises(OptionError, match="not MASTER_ADDR, MASTER_PORT: start with torchrun"):
        job_of({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(OptionError, match="RANK must be from 0 to WORLD_SIZE - 1"):
        job_of({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"})


# --- a port that does not answer --------------------------------------------------------------------------------------


@contextmanager
def full_queue() -> Iterator[int]:
    """A port where asking for a connection gets no answer: the kernel drops the packets while a queue is full."""
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        try:
            yield server.getsockname()[1]
        finally:
            for one in waiting:
                one.close()


def test_a_firewall_drops_packets() -> None:
    with full_queue() as port:
        found = way_to_rank_0(job(1, 2, port), LIMIT)
    assert found.status is Status.PROBLEM and "its packets are dropped" in found.found
    assert str(port) in found.found and "firewall" in found.remedy


def test_nothing_listens() -> None:
    found = way_to_rank_0(job(1, 2, free_port()), 0.5)
    assert found.status is Status.PROBLEM and "Connection refused" in found.found
    assert "start rank 0" in found.remedy


def test_something_else_listens() -> None:
    """It accepts, and never says anything: a proxy, or another program."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        check = lambda: ranks.meet(job(1, 2, server.getsockname()[1]), LIMIT)[1]  # noqa: E731
        found = named(bounded("ranks", check, 60), "rendezvous")
    assert found.status is Status.PROBLEM and "no store of torch answers" in found.found
    assert "MASTER_PORT" in found.remedy


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    found = named([*names(None)], "interfaces")
    assert found.status is Status.PROBLEM and "ib7" in found.found and "lo" in found.found


# --- no space ---------------------------------------------------------------------------------------------------------


def test_no_space_for_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with small_disk(tmp_path) as small:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(small / "cache"))
        found = named([*compiler.caches()], "inductor cache")
    assert found.status is Status.PROBLEM and "No space left on device" in found.found
    assert "set TORCHINDUCTOR_CACHE_DIR" in found.remedy


def test_caches_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/ringpass")
    found = named([*compiler.caches()], "inductor cache")
    assert found.status is Status.PROBLEM and "cannot write" in found.found


@pytest.mark.slow
def test_doctor_on_a_full_disk(tmp_path: Path) -> None:
    """The whole command goes on to its end."""
    with small_disk(tmp_path) as small:
        code, found = finished(
            doctor("--timeout", "120", environment={"TORCHINDUCTOR_CACHE_DIR": str(small / "cache")})
        )
    assert code == 1 and named(found, "inductor cache").status is Status.PROBLEM
    assert named(found, "2 local ranks").status is Status.OK


# --- the checks themselves --------------------------------------------------------------------------------------------


def test_no_check_can_hang_or_stop_the_others() -> None:
    stop = threading.Event()

    def hangs() -> list[Finding]:
        stop.wait(30)
        return []

    (late,), (broken,) = bounded("slow", hangs, 0.1), bounded("broken", lambda: [Finding(**{})], 5)
    stop.set()
    assert late.status is broken.status is Status.PROBLEM
    assert "no answer within 0.1 s" in late.found and "TypeError" in broken.found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--world-size", "1"), "--world-size must be 2 or more, got 1"),
        (("--timeout", "0"), "--timeout must be more than 0 seconds, got 0"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    assert main(["doctor", *arguments]) == 2
    assert said in capsys.readouterr().err
