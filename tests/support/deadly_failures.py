"""Ways for a run to fall apart in which a rank, the victim, dies or stops: each case is a job of its own."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ringpass.comm import all_reduce, p2p, pooling
from tests.support.failure_cases import RANKS, TEXTS, TO_BEGIN, Case, Run, Told, killed, stopped, told
from tests.support.living_failures import other_batch
from tests.support.models import loss_of


def in_an_exchange(run: Run) -> Any:
    with run.breaking(p2p, "start", 1, killed):
        run.step()


def in_the_backward_ring(run: Run) -> Any:
    loss = loss_of(run.run(**TEXTS))
    with run.breaking(p2p, "start", 1, killed):
        loss.backward()


def in_an_all_to_all(run: Run) -> Any:
    with run.breaking(pooling, "start", 1, killed):
        run.step()


def in_a_sum(run: Run) -> Any:
    with run.breaking(all_reduce, "start", 1, killed):
        run.step()


def between_steps(run: Run) -> Any:
    if run.rank == 1:
        killed()
    run.step()


def before_the_first_call(run: Run) -> Any:
    between_steps(run)


def in_a_compilation(run: Run) -> Any:
    from ringpass import rank_program

    run.run = run.compiled()
    with run.breaking(rank_program, "divide", 1, killed):
        run.step()


def stopped_in_an_exchange(run: Run) -> Any:
    with run.breaking(p2p, "start", 1, stopped):
        run.step()


def host_killed(run: Run) -> Any:
    with run.breaking(p2p, "start", 1, killed, rank=0):
        run.step()


def host_stopped(run: Run) -> Any:
    with run.breaking(p2p, "start", 1, stopped, rank=0):
        run.step()


def host_killed_between_steps(run: Run) -> Any:
    if run.rank == 0:
        killed()
    run.step()


def host_leaves_a_mismatch(run: Run) -> Any:
    """Rank 0 ends as soon as it has its error."""
    try:
        other_batch(run)
    finally:
        if run.rank == 0:
            os._exit(3)


def killed_in_a_mismatch(run: Run) -> Any:
    """While the ranks tell each other what differs."""
    from ringpass.comm.ring import Ring

    with run.breaking(Ring, "exchange_texts", 1, killed):
        other_batch(run)


def exception_of_the_user(run: Run) -> Any:
    """Rank 1 ends by an exception of its own, as a script does."""
    if run.rank == 1:
        import sys

        try:
            raise ValueError("a bad file")
        except ValueError as error:
            sys.excepthook(type(error), error, error.__traceback__)
        os._exit(1)
    run.step()


BROKE = "broke in the forward of call 2"
DEADLY = (
    Case(
        "killed in the forward ring", in_an_exchange, ("PeerError", "exchange of step", BROKE, "a rank died"), victim=1
    ),
    Case(
        "killed in the backward ring",
        in_the_backward_ring,
        ("PeerError", "exchange", "of attention", "broke in the backward of call 2"),
        victim=1,
        slow=True,
    ),
    Case(
        "killed in an all-to-all",
        in_an_all_to_all,
        ("PeerError", "all-to-all", BROKE),
        victim=1,
        slow=True,
        options=(("ulysses_degree", 3),),
    ),
    Case(
        "killed in a sum of gradients",
        in_a_sum,
        ("PeerError", "sum of gradients", "the backward of call 2"),
        victim=1,
        slow=True,
    ),
    Case("killed between steps", between_steps, ("PeerError", "came to call 2"), victim=1, slow=True),
    Case(
        "killed before the first call",
        before_the_first_call,
        ("PeerError", "came to call 1"),
        victim=1,
        slow=True,
        begins=False,
        limit=TO_BEGIN,
    ),
    Case("killed in a compilation", in_a_compilation, ("PeerError", "came to call 2"), victim=1, slow=True),
    Case(
        "stopped in the forward ring",
        stopped_in_an_exchange,
        ("PeerError", "exchange of step", BROKE, "within 4 s (option 'timeout')"),
        victim=1,
        slow=True,
    ),
    Case(
        "the host of the store is killed in the ring",
        host_killed,
        ("PeerError", "exchange of step", BROKE, "lost the process group's store"),
        victim=0,
        own_store=True,
    ),
    Case(
        "the host of the store is stopped in the ring",
        host_stopped,
        ("PeerError", "exchange of step", BROKE, "lost the process group's store"),
        victim=0,
        own_store=True,
        slow=True,
    ),
    Case(
        "the host of the store is killed between steps",
        host_killed_between_steps,
        ("PeerError", "lost the process group's store"),
        victim=0,
        own_store=True,
        slow=True,
    ),
    Case(
        "the host of the store leaves after a mismatch",
        host_leaves_a_mismatch,
        ("MismatchError", "differ in values of input"),
        victim=0,
        own_store=True,
    ),
    Case(
        "killed while a mismatch is described",
        killed_in_a_mismatch,
        ("PeerError", "differ in call 2", "rank 1 did not say"),
        victim=1,
        slow=True,
    ),
    Case(
        "an exception of the script on one rank",
        exception_of_the_user,
        ("PeerError", "rank 1 ended after call 1 by ValueError: a bad file"),
        victim=1,
        slow=True,
    ),
)


def deadly(group: dist.ProcessGroup, number: int, port: int) -> Told:
    """What this rank says of a case in which another one dies, in a job of its own."""
    case, rank = DEADLY[number], group.rank()
    if case.own_store:
        dist.destroy_process_group()
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
        )
        group = dist.distributed_c10d._get_default_group()
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(RANKS)]
    dist.all_gather(pids, torch.tensor([os.getpid()]), group=group)
    victim = int(pids[case.victim or 0])
    run = Run(group, case)
    found = told(lambda: case.job(run))
    if rank == RANKS - 1:  # what is stopped would keep the test waiting
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    return found
