"""The network as gloo, NCCL and torchrun see it: names, interfaces, the environment, and the way to rank 0."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ringpass.doctor.finding import Finding, Status
from ringpass.errors import OptionError

SHOWN = ("MASTER_", "GLOO_", "NCCL_", "TORCH_NCCL_", "TORCH_GLOO_", "RINGPASS_", "CXX", "OMP_")
"""Variables whose names begin so change how ranks run."""
ATTEMPT = 3.0  # seconds, the longest single attempt to connect


@dataclass(frozen=True)
class Job:
    """One rank of a job as its environment describes it."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    has_store: bool  # torchrun's agent holds the store; else rank 0 opens it

    @property
    def opens_store(self) -> bool:
        """Whether this rank opens the store in which ranks meet."""
        return self.rank == 0 and not self.has_store


def job_of(environment: Mapping[str, str]) -> Job | None:
    """The job that an environment describes; None: the process was not started by torchrun or its like.

    Raises OptionError for one that says only a part.

    >>> job_of({}) is None
    True
    """
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    if not {"RANK", "WORLD_SIZE"} & environment.keys():
        return None
    if missing := [name for name in names if name not in environment]:
        raise OptionError(
            f"the environment has a part of what torchrun sets, and not {', '.join(missing)}: start with torchrun, "
            "set all four, or unset RANK and WORLD_SIZE"
        )
    try:
        rank, world, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local, of = int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", world))
    except ValueError as error:
        raise OptionError(f"RANK, WORLD_SIZE, MASTER_PORT must be numbers: {error}") from error
    if not 0 <= rank < world:
        raise OptionError(f"RANK must be from 0 to WORLD_SIZE - 1, got RANK={rank}, WORLD_SIZE={world}")
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Job(rank, world, local, of, environment["MASTER_ADDR"], port, agent)


def names(job: Job | None) -> Iterator[Finding]:
    """The host's name, its interfaces, and the variables that choose among them."""
    yield _host_name(several=job is not None and job.local_world < job.world)
    interfaces = [name for _, name in socket.if_nameindex()]
    asked = [x for x in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if x]
    if unknown := [x for x in asked if x not in interfaces]:
        text = f"GLOO_SOCKET_IFNAME names {', '.join(unknown)}; there are {', '.join(interfaces)}"
        remedy = "set GLOO_SOCKET_IFNAME to one of these, or unset it"
        yield Finding("interfaces", Status.PROBLEM, text, remedy)
    elif not interfaces:
        yield Finding("interfaces", Status.PROBLEM, "none", "ranks need at least the loopback interface, lo")
    else:
        yield Finding("interfaces", Status.OK, f"{', '.join(interfaces)}{f'; gloo uses {asked[0]}' if asked else ''}")
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SHOWN)]
    yield Finding("environment", Status.OK, ", ".join(found) or "nothing set that changes how ranks run")


def _host_name(several: bool) -> Finding:
    """Whether the host's own name leads anywhere: gloo listens at its address.  `several`: the job has other hosts."""
    name = socket.gethostname()
    try:
        found = sorted({str(x[4][0]) for x in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)})
    except OSError as error:
        status = Status.PROBLEM if several else Status.WARNING
        remedy = "set GLOO_SOCKET_IFNAME to the interface that reaches the other hosts, or add the name to /etc/hosts"
        return Finding("host name", status, f"{name} has no address: {error.strerror}", remedy)
    text = f"{name} is {', '.join(found)}"
    if several and all(address.startswith("127.") or address == "::1" for address in found):
        remedy = "set GLOO_SOCKET_IFNAME to the interface that reaches the other hosts"
        return Finding("host name", Status.PROBLEM, f"{text}: other hosts cannot reach that address", remedy)
    return Finding("host name", Status.OK, text)


def way_to_rank_0(job: Job, seconds: float) -> Finding:
    """Whether MASTER_ADDR:MASTER_PORT accepts a connection within `seconds`."""
    where, ends, error = f"MASTER_ADDR:MASTER_PORT = {job.address}:{job.port}", time.monotonic() + seconds, ""
    if job.opens_store:
        return Finding("rendezvous", Status.OK, f"{where}, which this rank opens")
    remedy = ""
    while (left := ends - time.monotonic()) > 0:
        try:
            socket.create_connection((job.address, job.port), min(left, ATTEMPT)).close()
            return Finding("rendezvous", Status.OK, f"{where} accepts connections")
        except socket.gaierror as failed:
            error = f"{where}: no such host: {failed.strerror}"
            remedy = "set MASTER_ADDR (torchrun --master-addr, --rdzv-endpoint) to an address that all hosts know"
            break
        except TimeoutError:
            error = f"{where} does not answer within {seconds:g} s: its packets are dropped"
            remedy = "open the port in the firewall between the hosts, or set MASTER_PORT to one that is open"
        except OSError as failed:
            error = f"{where}: {failed.strerror or failed}"
            remedy = "start rank 0 there, and look at its output; check MASTER_ADDR, MASTER_PORT and the firewall"
        time.sleep(max(0.0, min(0.2, ends - time.monotonic())))
    return Finding("rendezvous", Status.PROBLEM, error, remedy)
