"""What happens when a call fails on a rank: an exception of a kernel, out of memory, a peer that is lost.

What the call had started stays under way, and would meet what later calls start.  So the ranks that gave up a call meet
through the store before they start anything else, and go on with a process group of their own.

    give_up(ring, error)      # where the exception passes; it is raised on
    with giving_up(ring): ..  # the same, of any exception that leaves the block
    with compiling(ring): ..  # the same, of a call whose graph is compiled inside
    settle(ring)              # before the next call, backward or gather: returns once all ranks have given up a call

A rank that gave up alone cannot go on: `settle` raises PeerError there, and the waits of the others name it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.exc import RestartAnalysis

from ringpass.comm.lost import LOOK, break_off
from ringpass.comm.notices import described, give_notice, notices, withdraw_notice
from ringpass.comm.p2p import take_in_flight
from ringpass.comm.ring import Ring, Running
from ringpass.errors import PeerError

log = logging.getLogger(__name__)


def give_up(ring: Ring, error: BaseException | None, running: Running | None = None) -> None:
    """Notes, and tells the others, that this rank gave up what it was `running`, by `error` if that is known.

    A call that is given up before it began counts as begun: the others have begun it, or will.
    """
    if ring.pg is None or ring.world == 1:
        return
    ring.calls = max(ring.calls, running.call if running else 0)
    why = f" by {described(error)}" if error is not None else ", in which an exception was raised"
    ring.gave_up = f"gave up {running or ring.running}{why}"
    ring.left += take_in_flight(ring.name)
    give_notice(ring, ring.gave_up)


@contextmanager
def giving_up(
    ring: Ring, running: Running | None = None, unless: type[BaseException] | tuple[()] = ()
) -> Iterator[None]:
    """Gives up what this rank is `running` if an exception leaves the block, `unless` it is one that ends no call."""
    try:
        yield
    except unless:
        raise
    except BaseException as error:
        give_up(ring, error, running)
        raise


@contextmanager
def compiling(ring: Ring) -> Iterator[None]:
    """Gives up the next call if an exception leaves the block, in which a graph of that call is compiled.

    Raises PeerError if the ranks cannot go on after a failed call.
    """
    settle(ring)
    # a restart is no failure: Dynamo traces and compiles again
    with giving_up(ring, Running(ring.calls + 1, "compilation"), unless=RestartAnalysis):
        yield


def begin_backward(ring: Ring, running: Running) -> None:
    """Notes that a backward begins."""
    ring.running = ring.backward = running
    ring.backward_task = _graph_task()
    ring.backwards.append(running.call)


def give_up_backward(ring: Ring, error: BaseException | None) -> None:
    """Notes that the backward under way has failed, by `error` if that is known."""
    failed, ring.backward = ring.backward, None
    give_up(ring, error, failed)


def _graph_task() -> int:
    """The number of the graph task of autograd that this thread runs; a checkpoint makes calls within one; -1: none."""
    return torch._C._current_graph_task_id()


def end_backward(ring: Ring) -> None:
    """Notes that the backward has ended, without an exception."""
    ring.running, ring.backward = Running(ring.running.call, line=ring.running.line), None


def settle(ring: Ring) -> None:
    """Lets the ranks go on after a call that failed on all of them; at once where none has failed.

    Raises PeerError within the limit if another rank has not given up a call too.
    """
    if ring.backward is not None and ring.backward_task != _graph_task():
        give_up_backward(ring, None)
    if not ring.gave_up:
        return
    own = f"gave_up/{ring.epoch}/{ring.rank}"
    withdraw_notice(ring)
    ring.store.set(own, f"{ring.calls},{ring.headers},{ring.notices} {ring.gave_up}")
    ring.store.add("notices", 1)
    ring.calls, ring.headers, ring.notices = _meet(ring)
    if ring.epoch:
        ring.store.delete([f"gave_up/{ring.epoch - 1}/{ring.rank}"])  # which all ranks have read
    _replace(ring)
    ring.backwards.clear()
    ring.gave_up = ""


def _meet(ring: Ring) -> Iterator[int]:
    """Waits until all ranks have given up a call; returns the most calls, headers and notices that a rank had."""
    keys = [f"gave_up/{ring.epoch}/{rank}" for rank in range(ring.world)]
    end = time.monotonic() + ring.timeout
    while not ring.store.wait(keys, min(LOOK, ring.timeout)):
        begun = ring.begun()  # before who gave up
        missing = [rank for rank, text in enumerate(ring.store.get_all(keys)) if not text]
        on = [rank for rank in missing if begun[rank] > ring.calls]
        if missing and (on or time.monotonic() > end):
            raise PeerError(_alone(ring, on, missing))
    counts = [map(int, text.split()[0].split(",")) for text in ring.store.get_all(keys)]
    return map(max, zip(*counts, strict=True))


def _alone(ring: Ring, on: list[int], missing: list[int]) -> str:
    """What is wrong where ranks `missing` did not give up a call; ranks `on` began the next one."""
    names = ", ".join(map(str, on or missing))
    did = f"completed it and began call {ring.calls + 1}" if on else f"did not within {ring.timeout:g} s"
    told = "; ".join(notices(ring))
    return (
        f"rank {ring.rank} {ring.gave_up}; rank {names} {did}. A batch can be skipped only if every rank skips it: "
        "agree on that, by an all_reduce of a flag over another process group, or start again from a checkpoint."
        f"{f' {told}' if told else ''}"
    )


def _replace(ring: Ring) -> None:
    """Makes a process group of the same ranks, on which nothing is under way; ends the one that was made before."""
    assert ring.pg is not None
    before, ring.epoch = ring.own, ring.epoch + 1
    c10d: Any = dist.distributed_c10d
    ranks, backend = dist.get_process_group_ranks(ring.pg), dist.get_backend(ring.pg)
    if backend == dist.Backend.UNDEFINED:
        backend = dist.Backend(dist.get_backend_config(ring.pg))  # several, by device
    device = ring.pg.bound_device_id
    try:
        with _without_split():
            made, _ = c10d._new_process_group_helper(
                len(ranks),
                ring.rank,
                ranks,
                backend,
                c10d._get_default_store(),
                # used once, as its keys stay in the store
                group_name=f"ringpass_{ring.name}_{ring.store.generation}_{ring.epoch}",
                timeout=ring.limit,
                device_id=device,
            )
    except RuntimeError as error:
        raise PeerError(
            f"rank {ring.rank} {ring.gave_up}, and then could not connect to the other ranks again: {error}. "
            f"{' '.join(notices(ring))}"
        ) from error
    c10d._world.pg_group_ranks[made] = {rank: i for i, rank in enumerate(ranks)}
    ring.own = made
    ring.warm.clear()
    if before is None:  # the given group may serve others: what is under way there stays alive
        ring.kept += ring.left
    else:
        break_off(before)
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group(before)
    ring.left = []
    log.warning("rank %d %s; all ranks did so, and go on with the next call", ring.rank, ring.gave_up)


@contextmanager
def _without_split() -> Iterator[None]:
    """Makes process groups with connections of their own inside.

    NCCL would otherwise split those of the default group, in which all its ranks must take part, and in which what
    failed may be under way.
    """
    default = dist.group.WORLD
    assert default is not None, "the ring's process group is one of its subgroups"
    bound, default.bound_device_id = default.bound_device_id, None
    try:
        yield
    finally:
        default.bound_device_id = bound
