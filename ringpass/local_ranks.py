"""Processes of this host that form one process group for a while: what `measure`, `doctor` and `demo` run.

    def job(say, x):                                   # at the top of a module, so that processes can import it
        say("adding")                                  # rank 0's texts reach `advance`
        total = torch.tensor(x)
        torch.distributed.all_reduce(total)
        return total.item()

    run_on_local_ranks(job, 2, "cpu", (3,), exchange=60)     # [6, 6]: what each rank returns

They meet through a file, so that nothing of the network is needed but what gloo or NCCL itself uses.  Where a limit is
given, none outlives it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from ringpass.errors import PeerError

Say = Callable[[str], None]
LEAVE = 5.0  # seconds that a process has to end by itself once all have answered


def nothing_said(text: str) -> None:
    """A `Say` that nobody hears."""


@contextmanager
def process_group(device: str, local_rank: int, exchange: float, **how: Any) -> Iterator[None]:
    """The default process group, NCCL's for "cuda", else gloo's, for as long as the block runs.

    `exchange`: the limit of one exchange, in seconds; `how`: further arguments of `init_process_group`.
    """
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=exchange), **how)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_on_local_ranks(
    job: Callable[..., Any],
    ranks: int,
    device: str,
    args: tuple[Any, ...] = (),
    *,
    exchange: float,
    limit: float | None = None,
    advance: Say = nothing_said,
) -> list[Any]:
    """What `job(say, *args)` returns on each of `ranks` new processes of this host, by rank.

    `exchange`, `limit`: seconds for one exchange and for everything; None: no limit.  `advance`: is told what rank 0
    says.  On the CPU each process has one thread.  Raises PeerError, which names the rank, if one raises, dies, or has
    not answered within the limit.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ringpass_ranks_") as folder:
        ours, theirs = zip(*(context.Pipe(duplex=False) for _ in range(ranks)), strict=True)
        how = [_Rank(rank, ranks, device, str(Path(folder) / "store"), exchange) for rank in range(ranks)]
        processes = [context.Process(target=_serve, args=(of, theirs[of.rank], job, args), daemon=True) for of in how]
        for process in processes:
            process.start()
        for pipe in theirs:
            pipe.close()
        try:
            found = _answers(dict(enumerate(ours)), limit, advance)
            for process in processes:
                process.join(LEAVE)
            return found
        finally:
            for process in processes:
                process.kill()
                process.join()


@dataclass(frozen=True)
class _Rank:
    """One of the processes."""

    rank: int
    ranks: int
    device: str
    store: str
    exchange: float


def _answers(pipes: dict[int, Any], limit: float | None, advance: Say) -> list[Any]:
    """What each rank answers; texts on the way are what rank 0 says."""
    ends = None if limit is None else time.monotonic() + limit
    found: dict[int, Any] = {}
    while missing := {pipe: rank for rank, pipe in pipes.items() if rank not in found}:
        ready = wait(list(missing), None if ends is None else max(0.0, ends - time.monotonic()))
        if not ready:
            ranks = ", ".join(map(str, sorted(missing.values())))
            raise PeerError(f"rank {ranks} of {len(pipes)} did not answer within {limit:g} s")
        for pipe in ready:
            _read(pipe, missing[pipe], found, advance)
    return [found[rank] for rank in sorted(found)]


def _read(pipe: Any, rank: int, found: dict[int, Any], advance: Say) -> None:
    try:
        kind, said = pipe.recv()
    except EOFError:
        raise PeerError(f"rank {rank} ended without an answer: look at its output above") from None
    if kind == "failed":
        raise PeerError(f"rank {rank} failed: {said}")
    if kind == "says":
        advance(said)
    else:
        found[rank] = said


def _serve(own: _Rank, pipe: Connection, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if own.device == "cpu":
        torch.set_num_threads(1)
    say = (lambda text: pipe.send(("says", text))) if own.rank == 0 else nothing_said
    how = {"init_method": f"file://{own.store}", "rank": own.rank, "world_size": own.ranks}
    try:
        with process_group(own.device, own.rank, own.exchange, **how):
            pipe.send(("answers", job(say, *args)))
    except Exception as error:  # told to the parent, which raises it
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
