"""The ranks of a ring check that they agree in every call of a compiled graph.

Every call of a compiled graph starts with one small collective, in which each rank sends a header: a digest of the
graph that it is about to run, a checksum of its inputs, one of weights (of all in a graph's first call, then of a few
in each, by turns) and a random seed.  All ranks see all headers, so they reach the same decision: continue with rank
0's seed, or raise the same MismatchError.  On a mismatch they exchange details through the store, to name the ranks and
the first difference.

    comparison = agreement.begin(args, number, device)     # the headers are gathered; rank 0's number is on the device
    comparison.finish()                                    # they are read on the host, and compared

On CUDA the caller may launch its work between the two, so that the device does not wait for the host
(`ringpass.compiled`).  Every wait is limited to `timeout` seconds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringpass.comm.headers import HostCopy, checksum, combined, digest, gather_headers, header_device, onto, to_host
from ringpass.comm.p2p import process_group
from ringpass.errors import InputError, MismatchError, OptionError, PeerError

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
Sheet = list[tuple[str, str]]
"""What a rank has to say of a call: (name, text) pairs."""


@dataclass
class Ring:
    """The ranks that share a sequence, seen from one of them.

    `pg`: their process group, None for a single process without one.  `timeout`: the longest wait for another rank, in
    seconds.  `calls`: number of compared calls so far; `since`: when the last one began, by the monotonic clock.
    `warm`: the GPUs on which all ranks have met.  `met`, `told`: the keys of the store in which ranks last met, and in
    which this one last told the others a text.  `renewals`: how often the process group was destroyed and made anew;
    its store may be the old one, and holds the keys of then.
    """

    pg: dist.ProcessGroup | None
    timeout: float
    calls: int = 0
    since: float = 0.0
    warm: set[torch.device] = field(default_factory=set)
    met: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    renewals: int = 0

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
    def limit(self) -> timedelta:
        """`timeout` as the type that torch.distributed takes."""
        return timedelta(seconds=self.timeout)

    @cached_property
    def store(self) -> dist.distributed_c10d.Store:
        """The part of the process group's key-value store that ringpass uses."""
        assert self.pg is not None, "a single process waits for nobody"
        return dist.distributed_c10d.PrefixStore(f"ringpass/{self.renewals}", self.pg.get_group_store())

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
        self.pg, self.calls, self.warm, self.met, self.told = now, 0, set(), (), ()
        self.renewals += 1
        self.__dict__.pop("store", None)

    def warm_up(self, device: torch.device) -> None:
        """Lets all ranks meet on a GPU once: NCCL connects all of them in a first collective, never in an exchange."""
        if device.type != "cuda" or device in self.warm or self.pg is None:
            return
        dist.all_reduce(torch.zeros(1, device=device), group=self.pg)
        self.warm.add(device)

    def await_everyone(self, key: str) -> list[int]:
        """Waits until all ranks have reached `key`; returns the ranks that did not within `timeout` seconds.

        Each rank asks the store three times, whatever P: the last one to come lets the others go on, and deletes the
        keys of the meeting before, which all have left.
        """
        store, count, here = self.store, f"count/{key}", f"here/{key}"
        store.set(f"met/{self.rank}", key)
        if store.add(count, 1) == self.world:
            _delete(store, self.met)
            store.set(here, "all")
        try:
            store.wait([here], self.limit)
        except RuntimeError:
            if store.add(count, -1) < self.world - 1:
                others = [rank for rank in range(self.world) if rank != self.rank]
                return [rank for rank in others if self._last(f"met/{rank}") != key] or others
            store.add(count, 1)  # the last rank came at the last moment, and goes on
            store.wait([here], self.limit)
        self.met = (count, here)
        return []

    def exchange_texts(self, mine: str) -> list[str]:
        """The text of each rank, by rank.  All ranks call this in the same call of a compiled model."""
        store, keys = self.store, [f"differ/{self.calls}/{rank}" for rank in range(self.world)]
        _delete(store, self.told)
        store.set(keys[self.rank], mine)
        self.told = (keys[self.rank],)
        store.wait(keys, self.limit)
        return [store.get(key).decode() for key in keys]

    def absent(self) -> list[int]:
        """The ranks that have not begun as many calls as this one."""
        return [rank for rank in range(self.world) if int(self._last(f"at/{rank}") or 0) < self.calls]

    def _last(self, key: str) -> str:
        """What the store has under `key`; nothing if nobody has set it."""
        return self.store.get(key).decode() if self.store.check([key]) else ""


def _delete(store: dist.distributed_c10d.Store, keys: Iterable[str]) -> None:
    for key in keys:
        store.delete_key(key)


def registered(name: str) -> dist.ProcessGroup | None:
    """The process group of this name that there is now."""
    try:
        return process_group(name)
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
    found = RINGS.setdefault(pg.group_name if pg else "alone", Ring(pg, timeout or TIMEOUT))
    if found.pg is not pg:  # the process group was destroyed and created again with the same name
        found = RINGS[found.name] = Ring(pg, timeout or TIMEOUT, renewals=found.renewals + 1)
    found.timeout = timeout or found.timeout
    return found


@dataclass
class Agreement:
    """What the ranks compare for one compiled graph.

    `facts`: (name, text) pairs that must be equal on all ranks.  `names`: those of the arguments, in order.
    `every`: all weights are compared in the first call, and from then on each in one of so many calls; 0: never again.
    `compared`: number of calls that were.
    """

    ring: Ring
    facts: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    every: int = 0
    compared: int = 0

    @cached_property
    def graph(self) -> int:
        """A digest of `facts`."""
        return digest(json.dumps(self.facts))

    def numbers(self, args: Sequence[object], mine: int, device: torch.device = CPU) -> list[int]:
        """The number `mine` of each rank, by rank, after a check that all ranks make the same call: `begin`, `finish`.

        Raises MismatchError, on all ranks, if the calls differ, and PeerError if a rank does not arrive in time.
        """
        return self.begin(args, mine, device).finish()

    def begin(self, args: Sequence[object], mine: int, device: torch.device = CPU) -> Comparison:
        """Gathers the headers of a call on `device`, to which this rank contributes the number `mine`.

        `args`: values that must be equal on all ranks; a text stands for a tensor and describes it.  Raises PeerError
        if a rank does not arrive in time, OptionError if the process group is gone, InputError on the device "meta".
        """
        ring = self.ring
        if ring.pg is None or ring.world == 1:
            mine_alone = torch.tensor([mine], dtype=torch.int64)
            return Comparison(self, Said([], [], []), to_host(mine_alone), onto(mine_alone[0], device))
        if any(isinstance(x, Tensor) and x.is_meta for x in args):
            raise InputError(
                "the inputs are on the device 'meta' and hold no values that ranks could send: for shapes alone call "
                "the model without torch.compile"
            )
        ring.renew()
        ring.calls, ring.since = ring.calls + 1, time.monotonic()
        ring.store.set(f"at/{ring.rank}", str(ring.calls))  # one key per rank, for those that wait in vain
        where = header_device(ring.pg, device)
        if where is None:
            raise OptionError(
                f"the ring's process group ({dist.get_backend_config(ring.pg)}) moves no tensors of the host, and this "
                "call has no others: move the model and its inputs to the GPU, or pass init_process_group(device_id=..)"
            )
        said = self._said(args)
        log.debug("rank %d comes to call %d: %s", ring.rank, ring.calls, said)
        checksums = [_stacked(tensors, where) for tensors in (said.inputs, said.weights)]
        try:
            headers = gather_headers(self._header(said, mine, checksums), ring.pg, ring.limit)
        except RuntimeError as error:
            raise self.lost(error) from error
        log.debug("rank %d: all %d ranks came to call %d", ring.rank, ring.world, ring.calls)
        copied = to_host(torch.cat([headers.view(-1), *checksums]))
        return Comparison(self, said, copied, onto(headers[0, 0].clone(), device))

    def _said(self, args: Sequence[object]) -> Said:
        """What the header and the details say of the arguments, and of those weights whose turn it is."""
        said, number = Said([], [], [], later=self.compared > 0), 0
        for name, value in zip(self.names, args, strict=False):
            if isinstance(value, torch.nn.Parameter):
                if not self.compared or (self.every and (self.compared - number) % self.every == 0):
                    said.weights.append((name, checksum(value)))
                number += 1
            elif isinstance(value, Tensor):
                said.inputs.append((name, checksum(value)))
            else:
                said.others.append((name, value if isinstance(value, str) else str(digest(repr(value)))))
        return said

    def _header(self, said: Said, mine: int, checksums: Sequence[Tensor]) -> Tensor:
        """[mine, graph, other inputs, inputs, weights], int64, on the device of the checksums."""
        known = torch.tensor([mine, self.graph, digest(json.dumps(said.others))], dtype=torch.int64)
        return torch.cat([onto(known, checksums[0].device), *map(combined, checksums)])

    def lost(self, error: Exception) -> PeerError:
        """The error of a call to which not all ranks came; `error`: how it showed."""
        return PeerError(f"{self._absent()} {error}")

    def _absent(self) -> str:
        """A message that says which ranks did not reach this call."""
        absent = self.ring.absent()
        who = f"rank {', '.join(map(str, absent))}" if absent else "another rank"
        return (
            f"rank {self.ring.rank} came to call {self.ring.calls} of a compiled model, {who} did not arrive within "
            f"{self.ring.timeout:g} s (option 'timeout') or died on the way: look for the first error in its output. "
            "Every rank of the ring must call the same models, in the same order."
        )

    def mismatch(self, mine: Sheet) -> MismatchError:
        """The error that names the first rank that differs from rank 0, and its first difference.

        `mine`: what this rank has to say.  All ranks that see the difference call this together.
        """
        sheets = self.ring.exchange_texts(json.dumps([*self.facts, *mine]))
        ours, *_ = found = [[(name, text) for name, text in json.loads(sheet)] for sheet in sheets]
        for other, sheet in enumerate(found):
            if difference := _first_difference(ours, sheet):
                return MismatchError(_advice(other, *difference))
        return MismatchError("the ranks' checksums differ, their details do not: this is a defect of ringpass")


@dataclass(frozen=True)
class Said:
    """What a rank says of its arguments: texts, and checksums of tensors, which are on their devices.

    `later`: the weights were equal in an earlier call.
    """

    others: Sheet
    inputs: list[tuple[str, Tensor]]
    weights: list[tuple[str, Tensor]]
    later: bool = False

    def __str__(self) -> str:
        """How many values of each kind are compared."""
        return f"compares {len(self.inputs)} inputs, {len(self.weights)} weights, {len(self.others)} other values"

    @property
    def checksums(self) -> int:
        """The number of tensors."""
        return len(self.inputs) + len(self.weights)

    def sheet(self, checksums: Sequence[int]) -> Sheet:
        """All of it as texts, given the checksums on the host."""
        weights = "updated weights" if self.later else "weights"
        names = [f"values of input {name}" for name, _ in self.inputs]
        names += [f"{weights} {name}" for name, _ in self.weights]
        texts = [(f"values of input {name}", text) for name, text in self.others]
        return texts + [(name, str(x)) for name, x in zip(names, checksums, strict=True)]


def _stacked(checksums: Sequence[tuple[str, Tensor]], device: torch.device) -> Tensor:
    """(n,), int64, on `device`."""
    if not checksums:
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.stack([onto(x, device) for _, x in checksums])


@dataclass
class Comparison:
    """The headers of one call, gathered and not compared yet.

    `copied`: the headers of all ranks, one after the other, then the checksums of this rank.  `seed`: rank 0's number,
    (), int64, on the device of the call.
    """

    agreement: Agreement
    said: Said
    copied: HostCopy
    seed: Tensor
    numbers: list[int] | None = None

    def finish(self) -> list[int]:
        """The number of each rank, by rank, after a check that all ranks make the same call.  Later calls do nothing.

        Raises MismatchError, on all ranks, if the calls differ, and PeerError if a rank does not arrive in time.
        """
        if self.numbers is None:
            try:
                numbers = self.copied.read(self.agreement.ring.timeout)
            except (RuntimeError, TimeoutError) as error:
                raise self.agreement.lost(error) from error
            width = (len(numbers) - self.said.checksums) // self.agreement.ring.world
            rows = [numbers[i : i + width] for i in range(0, width * self.agreement.ring.world, width)]
            self.numbers = [number for number, *_ in rows]
            if any(row[1:] != rows[0][1:] for row in rows):
                raise self.agreement.mismatch(self.said.sheet(numbers[width * len(rows) :]))
            self.agreement.compared += 1
        return self.numbers


def _first_difference(a: Iterable[tuple[str, str]], b: Iterable[tuple[str, str]]) -> tuple[str, str, str] | None:
    """(name, text in `a`, text in `b`) of the first pair that differs."""
    ours, theirs = dict(a), dict(b)
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        if ours.get(name) != theirs.get(name):
            return name, ours.get(name, "nothing"), theirs.get(name, "nothing")
    return None


ONE_HASH_SEED = "Where the model goes through a set of strings, start all ranks with one PYTHONHASHSEED."
ADVICE = {
    "call": "Every rank must make the same calls in the same order: all share an input by ringpass.sharded, or none.",
    "values": "Every rank of the ring must pass the same batch: a DistributedSampler, or shuffling with a seed per "
    "rank, gives each its own. Shard the data over the data-parallel ranks only.",
    "weights": "Every rank must start from the same weights: call torch.manual_seed with one seed before building the "
    "model, or broadcast the state dict from rank 0.",
    "updated": "They were equal in an earlier call: every rank must take and skip the same optimizer steps, with the "
    "same learning rates and states, load the same checkpoint, and clip or edit gradients alike.",
    "graph": "Every rank must run the same model, in the same mode (train or eval), with the same arguments. "
    f"{ONE_HASH_SEED}",
    "inputs": "Every rank must pass inputs of the same shapes and dtypes: the whole sequence, not a shard of it, or "
    "every rank its shard, by ringpass.sharded; the same inputs and parameters need gradients on all ranks. "
    f"{ONE_HASH_SEED}",
    "shard": "Every rank must pass its own tokens of one tensor to ringpass.sharded, with the same dim and layout.",
    "options": "Every rank must pass the same options to torch.compile.",
}


def _advice(other: int, name: str, first: str, second: str) -> str:
    shown = [_excerpt(text, first, second) for text in (first, second)]
    advice = ADVICE.get(name.split()[0], "Run the same versions on every rank.")
    return f"the ranks of the ring differ in {name}: rank 0 has {shown[0]}, rank {other} has {shown[1]}. {advice}"


def _excerpt(text: str, first: str, second: str, width: int = 100) -> str:
    """The part of `text` around the first difference of two texts."""
    at = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), min(len(first), len(second)))
    start = max(0, at - width // 2)
    return f"{'...' if start else ''}{text[start : start + width]}{'...' if len(text) > start + width else ''}"
