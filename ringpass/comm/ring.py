"""The ranks that share a sequence, seen from one of them: their process group, their store, the call that they are in.

ring = ring_of(pg, timeout)      # one per process group, so that all ranks count the same calls
ring.store.set("at/0", "12")     # what ranks tell each other beside the tensors of a call
ring.carrier                     # the process group that carries messages
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringpass.comm.store import RingStore
from ringpass.errors import OptionError, PeerError, UnsupportedError

READ = 10.0
"""Seconds that a rank which has read a mismatch waits for the others to have read it."""


@dataclass(frozen=True)
class Running:
    """What a rank is doing: `part`, "forward" or "backward", of call number `call`; between calls, nothing.

    `sites`: where in the model the graph's attentions are, by number; `line`: where the graph begins in the model.
    """

    call: int = 0
    part: str = ""
    sites: tuple[str, ...] = ()
    line: str = ""

    @property
    def tags(self) -> int:
        """Where the tags of exchanges begin: those of two calls, or of a forward and a backward, never match."""
        return (2 * (self.call % 512) + (self.part == "backward")) << 20

    def __str__(self) -> str:
        """`the forward of call 12 (model.py:31)`."""
        of = f"the {self.part} of call {self.call}" if self.part else f"what followed call {self.call}"
        return f"{of} ({self.line})" if self.line else of


@dataclass
class Ring:
    """The ranks that share a sequence, seen from one of them.

    `pg`: their process group, None for a single process without one.  `timeout`: the longest wait for another rank, in
    seconds.  `calls`: number of compared calls so far; `since`: when the last one began, by the monotonic clock;
    `headers`: how often the ranks were compared, in calls and, over gloo, in backwards.
    `warm`: the GPUs on which all ranks have met.  `met`, `told`: the keys of the store in which ranks last met, and in
    which this one last told the others a text.

    `running`: what this rank is doing; `backward`: the backward that began and has not ended, and `backward_task`, the
    graph task of autograd in which it did; `backwards`: the calls whose backward began since the ranks were last
    compared.  `waits_since`: when the exchange began that the host waits for.  `noticed`: whether a notice of this rank
    stands, `notices`: how many it has given; `heard`: how many all ranks had given when none was news to this one
    (`comm.notices`).

    Of calls that failed here (`comm.recovery`): `gave_up`, what this rank says of the last one, until all ranks have
    met again; `epoch`, how often they have; `own`, the process group that they then made; `left` and `kept`, exchanges
    that are under way for ever, of the last one and of the first.

    `calling`: held by the thread that makes a call.
    """

    pg: dist.ProcessGroup | None
    timeout: float
    calls: int = 0
    headers: int = 0
    since: float = 0.0
    warm: set[torch.device] = field(default_factory=set)
    met: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    running: Running = Running()
    gave_up: str = ""
    epoch: int = 0
    own: dist.ProcessGroup | None = None
    left: list[object] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)
    noticed: bool = False
    notices: int = 0
    heard: int = 0
    waits_since: float | None = None
    backward: Running | None = None
    backward_task: int = -1
    backwards: list[int] = field(default_factory=list)
    calling: threading.RLock = field(default_factory=threading.RLock)

    @property
    def rank(self) -> int:
        """This process's rank in the ring; 0 without a process group."""
        return self.pg.rank() if self.pg else 0

    @property
    def world(self) -> int:
        """Number of ranks P in the ring; 1 without a process group."""
        return self.pg.size() if self.pg else 1

    @property
    def name(self) -> str:
        """The name of the process group, by which operators in a graph refer to it."""
        return self.pg.group_name if self.pg else "alone"

    @property
    def carrier(self) -> dist.ProcessGroup:
        """The process group that carries messages: the given one, or the one that replaced it after a failed call."""
        carrier = self.own or self.pg
        assert carrier is not None, "a single process sends nothing"
        return carrier

    @property
    def limit(self) -> timedelta:
        """`timeout` as the type that torch.distributed takes."""
        return timedelta(seconds=self.timeout)

    @cached_property
    def store(self) -> RingStore:
        """The part of the process group's key-value store that ringpass uses."""
        assert self.pg is not None, "a single process waits for nobody"
        return RingStore(self.pg.get_group_store(), self.rank, self.world)

    def leave_store(self) -> None:
        """Ends the connection to the store, which is made again when it is used."""
        if "store" in self.__dict__:
            self.__dict__.pop("store").close()

    def renew(self) -> None:
        """Takes the process group of today if that of before was destroyed and made anew.

        Raises OptionError if there is none of this name, or if it has other ranks than those that graphs are for.
        """
        if self.pg is None or (now := registered(self.name)) is self.pg:
            return
        if now is None:
            raise OptionError(
                f"the process group {self.name!r}, for whose ranks the model was compiled, was destroyed: call "
                "init_process_group, or new_group and torch.compile, before the model"
            )
        if (now.rank(), now.size()) != (self.rank, self.world):
            raise OptionError(
                f"the model was compiled for rank {self.rank} of {self.world}, and the process group {self.name!r} was "
                f"made anew, where this is rank {now.rank()} of {now.size()}: call torch._dynamo.reset(), after which "
                "the model is compiled for the ranks of today"
            )
        fresh = Ring(now, self.timeout)
        self.leave_store()
        self.__dict__.update({of.name: getattr(fresh, of.name) for of in fields(fresh)})

    def warm_up(self, device: torch.device) -> None:
        """Lets all ranks meet on a GPU once: NCCL connects all of them in a first collective, never in an exchange."""
        if device.type != "cuda" or device in self.warm or self.pg is None:
            return
        dist.all_reduce(torch.zeros(1, device=device), group=self.carrier)
        self.warm.add(device)

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Raises UnsupportedError if another thread is inside: several ranks know calls by their order alone."""
        if self.world == 1:
            yield
            return
        calling = self.calling  # `renew` makes another
        if not calling.acquire(blocking=False):
            raise UnsupportedError(
                f"two threads of rank {self.rank} run compiled models of one ring at once, forward or backward, and "
                "ranks know calls by their order alone: make them one after the other, in the same order on all ranks, "
                "or give each thread a process group of its own (option 'group')"
            )
        try:
            yield
        finally:
            calling.release()

    @contextmanager
    def doing(self, running: Running) -> Iterator[None]:
        """What this rank is doing inside, for the messages of errors; a call may be made within a backward."""
        self.running = running
        try:
            yield
        finally:
            self.running = self.backward or replace(running, part="")

    def await_everyone(self, key: str, seconds: float | None = None) -> list[int]:
        """Waits until all ranks have reached `key`; returns the ranks that did not within `seconds`, or `timeout`.

        Each rank asks the store three times, whatever P: the last one to come lets the others go on, and deletes the
        keys of the meeting before, which all have left.
        """
        seconds = self.timeout if seconds is None else seconds
        store, count, here = self.store, f"count/{key}", f"here/{key}"
        store.set(f"met/{self.rank}", key)
        if store.add(count, 1) == self.world:
            store.delete(self.met)
            store.set(here, "all")
        if not store.wait([here], seconds):
            if store.add(count, -1) < self.world - 1:
                others = [rank for rank in range(self.world) if rank != self.rank]
                last = store.get_all(f"met/{rank}" for rank in others)
                return [rank for rank, at in zip(others, last, strict=True) if at != key] or others
            store.add(count, 1)  # the last rank came at the last moment, and goes on
            store.wait([here], seconds)
        self.met = (count, here)
        return []

    def exchange_texts(self, mine: str) -> list[str]:
        """The text of each rank, by rank.  All ranks call this after the same comparison.

        Returns once all ranks have read all texts, or after `READ` seconds: the rank that hosts the store may then end.
        Raises PeerError if a rank does not tell its text in time.
        """
        store, keys = self.store, [f"differ/{self.headers}/{rank}" for rank in range(self.world)]
        store.delete(self.told)
        store.set(keys[self.rank], mine)
        self.told = (keys[self.rank],)
        if not store.wait(keys, self.timeout):
            silent = [rank for rank, text in enumerate(store.get_all(keys)) if not text]
            raise PeerError(
                f"the ranks of the ring differ in call {self.calls}, and rank {', '.join(map(str, silent))} did not "
                f"say what it has within {self.timeout:g} s (option 'timeout'): it died or ended first. Look for the "
                "first error in its output."
            )
        texts = store.get_all(keys)
        with suppress(PeerError):  # the rank that hosts the store may end once all have read
            self.await_everyone(f"read/{self.headers}", min(READ, self.timeout))
        return texts

    def come(self) -> None:
        """Notes, in the store too, that this rank comes to a comparison: one key per rank, for those that wait."""
        self.headers += 1
        self.store.set(f"at/{self.rank}", f"{self.calls} {self.headers}")

    def begun(self) -> list[int]:
        """How many calls each rank has begun, by rank."""
        return [calls for calls, _ in self._at()]

    def absent(self) -> list[int]:
        """The ranks that have not come to the comparison to which this one has."""
        return [rank for rank, (_, headers) in enumerate(self._at()) if headers < self.headers]

    def _at(self) -> list[tuple[int, int]]:
        """(calls, headers) of each rank, by rank."""
        texts = self.store.get_all(f"at/{rank}" for rank in range(self.world))
        return [(int(calls), int(headers)) for calls, _, headers in ((text or "0 0").partition(" ") for text in texts)]


def resolved(name: str) -> dist.ProcessGroup:
    """The process group of this name, as torch's functional collectives find it; RuntimeError where there is none."""
    c10d: Any = dist.distributed_c10d
    group: dist.ProcessGroup = c10d._resolve_process_group(name)
    return group


def registered(name: str) -> dist.ProcessGroup | None:
    """The process group of this name that there is now."""
    try:
        return resolved(name)
    except RuntimeError:
        return None


def group_of(given: object) -> dist.ProcessGroup | None:
    """The process group that the option `group` names; None: the default one.

    Raises OptionError for anything but a process group, a mesh of one dimension or two, or None.
    """
    if given is None:
        return None
    if isinstance(given, dist.ProcessGroup):
        if registered(given.group_name) is not given:
            raise OptionError(
                f"option 'group': the process group {given.group_name!r} was destroyed: pass torch.compile one "
                "that was made since, or none for the default group"
            )
        return given
    expected = "a ProcessGroup or a DeviceMesh"
    if isinstance(given, DeviceMesh):
        if given.ndim <= 2:
            return given.get_group() if given.ndim == 1 else _flattened(given)
        names = ", ".join(map(str, given.mesh_dim_names or range(given.ndim)))
        expected = f"one dimension of a mesh, the ring's, or two, out of {names}"
    raise OptionError(f"option 'group' must be {expected}, got {given!r}")


def _flattened(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The group of all ranks of a mesh of two dimensions, the inner one fastest; made once per mesh, on all ranks.

    Raises OptionError for a mesh without names, or of which the ranks do not ascend, as those of a group do.
    """
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise OptionError(
            f"option 'group' must be a mesh whose ranks ascend, the inner dimension fastest, to form one ring, got "
            f"{mesh.mesh.tolist()}: exchange its dimensions, or pass one of them"
        )
    try:
        return mesh._flatten().get_group()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise OptionError(
            f"option 'group' must be a mesh that torch can flatten to form one ring, got {mesh!r}: {error}; name its "
            "dimensions (mesh_dim_names), or pass the group of its ranks"
        ) from error


TIMEOUT = 300.0  # seconds, by default
RINGS: dict[str, Ring] = {}


def ring_of(pg: dist.ProcessGroup | None, timeout: float | None = None) -> Ring:
    """The Ring of a process group, None for the default group: one per group, so that all ranks count the same calls.

    `timeout`: its limit in seconds from now on; None: its limit so far, or the default.
    """
    if pg is None and dist.is_available() and dist.is_initialized():
        pg = dist.group.WORLD
    name = pg.group_name if pg else "alone"
    for ring in list(RINGS.values()):
        if ring.pg is not None and registered(ring.name) is None:  # destroyed, and maybe made anew later
            ring.leave_store()
    found = RINGS.get(name)
    if found is None:
        found = RINGS[name] = Ring(pg, timeout or TIMEOUT)
    elif found.pg is not pg and pg is not None and (found.rank, found.world) == (pg.rank(), pg.size()):
        found.renew()  # destroyed, and made again with the same name: graphs that are compiled hold this ring
    elif found.pg is not pg:
        found.leave_store()
        found = RINGS[name] = Ring(pg, timeout or TIMEOUT)
    found.timeout = timeout or found.timeout
    return found
