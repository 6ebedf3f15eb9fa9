"""The header of a call: what ranks compare, as one vector of int64 that is made on the device and read once.

    header      [number, digests.., checksums..] of this rank
    headers     those of all ranks, (P, n), gathered into one tensor
    HostCopy    these on their way to the host

Over gloo they are messages with a number in place of a collective: where ranks differ in what they do, a collective
meets another one, of another size, at which gloo ends the process.

On CUDA nothing waits for the device but `HostCopy.read`: what the host knows goes there from pinned memory, checksums
are combined there, and the headers come back by an asynchronous copy.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringpass.comm.lost import await_work
from ringpass.comm.ring import Ring
from ringpass.comm.waits import end_waits_in_vain
from ringpass.torch_features import gather_equal

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLE = 65536
POLL = 1e-4  # seconds between two looks at a copy that is under way
TAGS = 2**30 + 1  # where the tags of headers begin, beyond those of exchanges (`Running.tags`)


def digest(text: str) -> int:
    """A 63-bit digest of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def checksum(x: Tensor) -> Tensor:
    """A checksum of a tensor's bits, (), int64, on its device.

    Cheap, and the same for any number of threads.  Each element of a small tensor, and a sample of a large one, counts
    by a hash of its bits and its place (`mixed`); of the others of a large tensor, the sum of the bits counts.
    """
    if not x.numel():
        return torch.zeros((), dtype=torch.int64, device=x.device)
    x = x.detach().resolve_conj().resolve_neg()  # these views hold other bits than they show
    x = torch.view_as_real(x) if x.is_complex() else x
    bits = x.contiguous().view(-1).view(BITS[x.element_size()])
    some = bits[:: max(1, bits.numel() // SAMPLE)].to(torch.int64)
    return _sum(bits) * 31 + mixed(some)


def _sum(bits: Tensor) -> Tensor:
    """The sum of a tensor's bits as words of 8 bytes, in which torch sums many times faster than in narrower ones."""
    each = 8 // bits.element_size()
    whole = bits.numel() // each * each
    bits = bits.clone() if bits.storage_offset() % each else bits  # a word begins at a multiple of 8 bytes
    return bits[:whole].view(torch.int64).sum() + bits[whole:].sum(dtype=torch.int64)


def combined(checksums: Tensor) -> Tensor:
    """One checksum of several, (n,), int64: (1,)."""
    return mixed(checksums).view(1)


def mixed(x: Tensor) -> Tensor:
    """A hash of the numbers (n,), int64, and their places: (), int64.

    The sum of the numbers' hashes, each after its place is added to it: steps of SplitMix64 (Steele, Lea and Flood
    2014), without which differences of several numbers could cancel in the sum.
    """
    hashed = x + (torch.arange(len(x), device=x.device) + 1) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        hashed = (hashed ^ (hashed >> shift)) * factor
    return (hashed ^ (hashed >> 31)).sum()


def onto(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; from the host to a GPU without waiting for either."""
    if x.device == device:
        return x
    pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
    return pinned.to(device, non_blocking=pinned is not x)


@dataclass(frozen=True)
class HostCopy:
    """A tensor on its way to the host: `values` is complete once `done()`."""

    values: Tensor
    done: Callable[[], bool]

    def read(self, limit: float) -> list[int]:
        """The numbers of the tensor (n,).  Raises TimeoutError if they do not arrive within `limit` seconds."""
        end = time.monotonic() + limit
        while not self.done():
            if time.monotonic() > end:
                raise TimeoutError(f"the device did not come to this call within {limit:g} s")
            time.sleep(POLL)
        numbers: list[int] = self.values.tolist()
        return numbers


def to_host(x: Tensor) -> HostCopy:
    """Starts the copy of `x` to the host: one, asynchronous on CUDA; a tensor on the host stands for itself."""
    if x.device.type != "cuda":
        return HostCopy(x, lambda: True)
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))
    return HostCopy(host, event.query)


def gather_headers(header: Tensor, ring: Ring) -> Tensor:
    """(P, n): the headers of all ranks.  Raises RuntimeError if a rank is lost, or, on the host, after the limit.

    On CUDA it returns at once: the device waits.
    """
    everyone = header.new_empty((ring.world, *header.shape))
    if as_messages(ring.carrier, header.device):
        _exchange(header, everyone, ring)
    else:
        work: dist.Work = gather_equal()(everyone.view(-1), header, group=ring.carrier, async_op=True)
        await_work([work], ring, header.device)
    return everyone


def as_messages(pg: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether headers on `device` are messages: those that gloo carries."""
    return device.type == "cpu" and _backends(pg).get("cpu") == "gloo"


def _exchange(header: Tensor, everyone: Tensor, ring: Ring) -> None:
    """Fills `everyone` (P, n) with the headers that all ranks sent under this number."""
    end_waits_in_vain()
    pg, tag = ring.carrier, TAGS + ring.headers % 2**20
    everyone[ring.rank] = header
    others = [rank for rank in range(ring.world) if rank != ring.rank]
    works: list[Any] = []
    try:
        works += [dist.irecv(everyone[rank], group=pg, group_src=rank, tag=tag) for rank in others]
        works += [dist.isend(header, group=pg, group_dst=rank, tag=tag) for rank in others]
        await_work(works, ring, header.device, between_two=True)
    except RuntimeError:
        ring.left.append((works, everyone))  # what is under way stays alive
        raise


def header_device(pg: dist.ProcessGroup, device: torch.device) -> torch.device | None:
    """Where a header of a call on `device` is gathered: there, unless its backend is gloo, which takes the host's.

    None: the group moves no tensors of the host, and is bound to no device.
    """
    backends = _backends(pg)
    if backends.get(device.type, "gloo") != "gloo":
        return device
    return torch.device("cpu") if "cpu" in backends else pg.bound_device_id


def _backends(pg: dist.ProcessGroup) -> dict[str, str]:
    """The backend of each type of device."""
    return dict(entry.split(":") for entry in str(dist.get_backend_config(pg)).split(","))
