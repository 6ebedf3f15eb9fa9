"""The command `doctor`: runs the checks one by one, each under a time limit, and prints what they find."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from functools import partial

import torch

from ringpass.doctor import compiler, installation, network, ranks
from ringpass.doctor.finding import Finding, Status, bounded, worst
from ringpass.doctor.network import Job, job_of
from ringpass.doctor.report import as_json, show
from ringpass.errors import OptionError
from ringpass.progress import progress

Check = tuple[str, Callable[[], Iterable[Finding]]]
SPARE = 15.0  # seconds beyond a check's own limit, for what it does beside waiting
TIMEOUT = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "--world-size", type=int, default=None, metavar="N",
        help="processes to start for the round trip; default: one per GPU, at least 2; under torchrun, its ranks",
    )  # fmt: skip
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help="seconds that a check may wait; default: 60",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Runs all checks and prints the findings; 1 if there is a problem."""
    if args.timeout <= 0:
        raise OptionError(f"--timeout must be more than 0 seconds, got {args.timeout:g}")
    job = job_of(os.environ)
    if args.world_size is not None and (args.world_size < 2 or (job and args.world_size != job.world)):
        expected = f"left out: torchrun started {job.world} ranks" if job else "2 or more"
        raise OptionError(f"--world-size must be {expected}, got {args.world_size}")
    findings, speaks = _of_job(job, args.timeout) if job else (_of_host(args.world_size, args.timeout), True)
    if speaks:
        print(as_json(findings)) if args.json else show(findings)
    return int(worst(findings) is Status.PROBLEM)


def _of_host(world: int | None, seconds: float) -> list[Finding]:
    """What all checks find where no job is running."""
    gpus = torch.cuda.device_count()
    world = max(2, gpus) if world is None else world
    checks: list[Check] = [
        *_local_checks(None, seconds),
        (f"{world} ranks, gloo", partial(ranks.local, world, "cpu", seconds)),
    ]
    if 2 <= world <= gpus:
        checks.append((f"{world} ranks, nccl", partial(ranks.local, world, "cuda", seconds)))
    return [*_run(checks, seconds), ranks.not_started_by_torchrun(world)]


def _local_checks(job: Job | None, seconds: float) -> list[Check]:
    """The checks of one host."""
    return [
        ("versions", installation.versions),
        ("devices", installation.devices),
        ("backends", installation.backends),
        ("the name of the backend", installation.registration),
        ("attention", installation.attention),
        ("caches", compiler.caches),
        ("torch.compile", partial(compiler.compiles, seconds)),
        ("network", partial(network.names, job)),
    ]


def _run(checks: list[Check], seconds: float, hidden: bool = False) -> list[Finding]:
    findings = []
    with progress(len(checks), hidden) as advance:
        for name, check in checks:
            advance(name)
            findings += bounded(name, check, seconds + SPARE)
    return findings


def _of_job(job: Job, seconds: float) -> tuple[list[Finding], bool]:
    """(what this rank of a job finds, whether it prints): one rank of each host checks the host.

    The first rank that came prints, with what the others found; also a rank that reaches none of them.
    """
    meeting: list[ranks.Meeting] = []

    def meet() -> list[Finding]:
        met, found = ranks.meet(job, seconds)
        meeting.extend([met] if met else [])
        return found

    hidden = job.rank != 0
    patience = 3 * seconds  # to reach the store, to open it, to wait for the last rank
    findings = _run([("ranks", meet)], patience, hidden)
    met = meeting[0] if meeting else None
    device = "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= job.local_world else "cpu"
    if met and met.everyone:  # before what takes long on some ranks, while all are here
        trip = partial(ranks.round_trips, met, device, seconds)
        findings += _run([("round trip", trip)], patience, hidden)
    if job.local_rank == 0:
        findings = [*_run(_local_checks(job, seconds), seconds, hidden), *findings]
    if met is None:
        return findings, True
    return [*findings, *ranks.share(met, findings, 2 * seconds)], job.rank == met.present[0]
