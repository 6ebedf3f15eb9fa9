"""Whether ranks start, meet and reach each other: a message around the ring and back.

Without torchrun, processes of this host are started for it (`ringpass.local_ranks`).  In a job, ranks first meet in the
store at MASTER_ADDR:MASTER_PORT, so that one that never started is named; rank 0 then collects what all found.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ringpass.comm import p2p
from ringpass.doctor.finding import Finding, Status, within
from ringpass.doctor.network import Job, way_to_rank_0
from ringpass.errors import PeerError
from ringpass.local_ranks import Say, process_group, run_on_local_ranks

c10d: Any = dist  # stores, which torch does not list among its public names
Store = dist.distributed_c10d.Store
MESSAGE = 2**18  # float32 elements: 1 MiB
CONNECT = 3.0  # seconds beyond the limit of a store, which does not keep to it before the other end has answered
POLL = 0.1  # seconds between looks into the store
HOW_TO_START = "torchrun --nproc-per-node {} -m ringpass doctor checks the ranks of a job; train with torchrun too"


def around(device: str) -> float:
    """The seconds for a message from each rank of the default group to the next one, and back.

    Raises PeerError if it does not arrive, or arrives changed.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    at = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    world_group = dist.group.WORLD
    assert world_group is not None, "the caller has made the default group"
    after, before = (rank + 1) % world, (rank - 1) % world
    own = torch.arange(MESSAGE, dtype=torch.float32, device=at) + rank
    received, returned = torch.empty_like(own), torch.empty_like(own)
    started = time.perf_counter()
    if world > 1:
        p2p.start(own, after, received, before, 0, world_group.group_name).wait()
        p2p.start(received, before, returned, after, 1, world_group.group_name).wait()
        if not torch.equal(returned, own):
            raise PeerError(f"what rank {rank} sent to rank {after} came back changed")
    return time.perf_counter() - started


def _job(say: Say, device: str) -> float:
    """One of the processes of this host; the first message, which connects them, is not timed."""
    around(device)
    return around(device)


def local(world: int, device: str, seconds: float) -> Iterator[Finding]:
    """A round trip between `world` processes of this host."""
    name, backend = f"{world} local ranks", "nccl" if device == "cuda" else "gloo"
    try:
        took = max(run_on_local_ranks(_job, world, device, (device,), exchange=seconds, limit=seconds))
    except PeerError as error:
        remedy = "look at the lines 'host name' and 'interfaces' above; try GLOO_SOCKET_IFNAME=lo"
        remedy = "run with NCCL_DEBUG=INFO" if device == "cuda" else remedy
        yield Finding(name, Status.PROBLEM, f"{backend}: {error}", remedy)
        return
    yield Finding(name, Status.OK, f"{backend}: 1 MiB to the next rank and back in {1e3 * took:.1f} ms")


def not_started_by_torchrun(world: int) -> Finding:
    """What to do where there is no process group."""
    text = "not started by torchrun: no process group here, so a compiled model runs on one rank"
    return Finding("process group", Status.WARNING, text, HOW_TO_START.format(world))


# --- the ranks of a job -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meeting:
    """The store in which the ranks of a job met, and the ranks that came."""

    job: Job
    store: Store
    present: tuple[int, ...]

    @property
    def everyone(self) -> bool:
        """Whether all ranks came."""
        return len(self.present) == self.job.world


def meet(job: Job, seconds: float) -> tuple[Meeting | None, list[Finding]]:
    """Waits until all ranks have come, at most `seconds`; None: this rank does not reach the store."""
    way = way_to_rank_0(job, seconds)
    if way.status is Status.PROBLEM:
        return None, [way]
    where = f"{job.address}:{job.port}"
    try:
        limit = timedelta(seconds=seconds)
        how = job.address, job.port, None, job.opens_store, limit
        tcp = within(seconds + CONNECT, lambda: c10d.TCPStore(*how, wait_for_workers=False))
        store = c10d.PrefixStore("ringpass_doctor", tcp)
        store.set(f"here/{job.rank}", "yes")
        present = _those_with(store, "here", range(job.world), seconds)
    except (RuntimeError, TimeoutError) as error:
        first = str(error).splitlines()[0]
        if job.opens_store:
            text, remedy = f"cannot listen at {where}: {first}", "set MASTER_PORT to a free port"
        else:
            text = f"{where} accepts connections, but no store of torch answers there: {first}"
            remedy = "set MASTER_PORT to that of rank 0 or of torchrun; something else listens on this one"
        return None, [Finding("rendezvous", Status.PROBLEM, text, remedy)]
    return Meeting(job, store, present), [way, _presence(job, present, seconds)]


def _presence(job: Job, present: Sequence[int], seconds: float) -> Finding:
    missing = [str(rank) for rank in range(job.world) if rank not in present]
    if not missing:
        return Finding("ranks", Status.OK, f"all {job.world} ranks came")
    text = f"rank {', '.join(missing)} of {job.world} did not come within {seconds:g} s"
    remedy = f"look at the output of rank {', '.join(missing)}; WORLD_SIZE={job.world} must be the number of processes"
    return Finding("ranks", Status.PROBLEM, text, remedy)


def _those_with(store: Store, key: str, ranks: Sequence[int], seconds: float) -> tuple[int, ...]:
    """The ranks that have set `key`: all of them, or those that had after `seconds`."""
    ends = time.monotonic() + seconds
    while True:
        found = tuple(rank for rank in ranks if store.check([f"{key}/{rank}"]))
        if len(found) == len(ranks) or time.monotonic() > ends:
            return found
        time.sleep(POLL)


def round_trips(meeting: Meeting, device: str, seconds: float) -> Iterator[Finding]:
    """A message around the ranks of a job, which all came."""
    job, backend = meeting.job, "nccl" if device == "cuda" else "gloo"
    how = {"store": c10d.PrefixStore(backend, meeting.store), "rank": job.rank, "world_size": job.world}
    try:
        with process_group(device, job.local_rank, seconds, **how):
            around(device)
            took = around(device)
    except (RuntimeError, PeerError) as error:
        first = str(error).splitlines()[0]
        remedy = "open all ports between the hosts: ranks connect to each other directly; set GLOO_SOCKET_IFNAME or "
        remedy += "NCCL_SOCKET_IFNAME to the interface that reaches them"
        yield Finding("round trip", Status.PROBLEM, f"{backend}, {job.world} ranks: {first}", remedy)
        return
    text = f"{backend}, {job.world} ranks: 1 MiB to the next rank and back in {1e3 * took:.1f} ms"
    yield Finding("round trip", Status.OK, text)


def share(meeting: Meeting, findings: Sequence[Finding], seconds: float) -> list[Finding]:
    """On the first rank present, the problems and warnings that the others found; nothing on the others."""
    job, store = meeting.job, meeting.store
    mine = [asdict(x) for x in findings if x.status is not Status.OK]
    store.set(f"found/{job.rank}", json.dumps(mine))
    if job.rank != meeting.present[0]:
        return []
    others = [rank for rank in meeting.present if rank != job.rank]
    told = _those_with(store, "found", others, seconds)
    out = [
        Finding(f"rank {rank}: {x['name']}", Status(x["status"]), x["found"], x["remedy"])
        for rank in told
        for x in json.loads(store.get(f"found/{rank}"))
        if Finding(x["name"], Status(x["status"]), x["found"], x["remedy"]) not in findings
    ]
    silent = [str(rank) for rank in others if rank not in told]
    if silent:
        text = f"rank {', '.join(silent)} came and then fell silent for {seconds:g} s"
        out.append(Finding("ranks", Status.PROBLEM, text, "look at its output"))
    return out
