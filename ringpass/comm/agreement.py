"""The ranks of a ring check that they agree before anything is sent.

Every call of a compiled graph starts with one small collective, in which each rank sends a header: a digest of the
graph that it is about to run, a checksum of its inputs, a checksum of the weights (in a graph's first call) and a
random seed.  All ranks see all headers, so they reach the same decision: continue with rank 0's seed, or raise the same
MismatchError.  On a mismatch they exchange details through the store, to name the ranks and the first difference.
Every wait is limited to `timeout` seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ringpass.errors import MismatchError, OptionError, PeerError

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLE = 65536


@dataclass
class Ring:
    """The ranks that share a sequence, seen from one of them.

    `pg`: their process group, None for a single process without one.  `timeout`: the longest wait for another rank, in
    seconds.  `calls`: number of compared calls so far.
    """

    pg: dist.ProcessGroup | None
    timeout: float
    calls: int = 0

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

    @property
    def store(self) -> dist.distributed_c10d.Store:
        """The part of the process group's key-value store that ringpass uses."""
        assert self.pg is not None, "a single process waits for nobody"
        return dist.distributed_c10d.PrefixStore("ringpass", self.pg.get_group_store())

    def await_everyone(self, key: str) -> list[int]:
        """Waits until all ranks have reached `key`; returns the ranks that did not within `timeout` seconds."""
        store = self.store
        store.set(f"{key}/{self.rank}", "here")
        missing: list[int] = []
        for rank in range(self.world):
            try:
                store.wait([f"{key}/{rank}"], self.limit if not missing else timedelta(milliseconds=10))
            except RuntimeError:
                missing.append(rank)
        return missing


def group_of(given: object) -> dist.ProcessGroup | None:
    """The process group that the option `group` names; None: the default one.

    Raises OptionError for anything but a process group, a mesh of one dimension, or None.
    """
    if given is None or isinstance(given, dist.ProcessGroup):
        return given
    expected = "a ProcessGroup or a DeviceMesh"
    if isinstance(given, DeviceMesh):
        if given.ndim == 1:
            return given.get_group()
        names = ", ".join(map(str, given.mesh_dim_names or range(given.ndim)))
        expected = f"one dimension of a mesh, the ring's, out of {names}"
    raise OptionError(f"option 'group' must be {expected}, got {given!r}")


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
        found = RINGS[found.name] = Ring(pg, timeout or TIMEOUT)
    found.timeout = timeout or found.timeout
    return found


@dataclass
class Agreement:
    """What the ranks compare for one compiled graph.

    `facts`: (name, text) pairs that must be equal on all ranks.  `names`: those of the arguments, in order.  `first`:
    no call was compared yet, so weights are compared too.
    """

    ring: Ring
    facts: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    first: bool = True
    history: list[str] = field(default_factory=list)

    @property
    def graph(self) -> int:
        """A digest of `facts`."""
        return _digest(json.dumps(self.facts))

    def seed(self, args: Sequence[object], seed: int) -> int:
        """The seed that all ranks use in this call: rank 0's, from the `seed` of each.

        Raises MismatchError, on all ranks, if the calls differ, and PeerError if a rank does not arrive in time.
        """
        return self.numbers(args, seed)[0]

    def numbers(self, args: Sequence[object], mine: int) -> list[int]:
        """The number `mine` of each rank, by rank, after a check that all ranks make the same call.

        `args`: values that must be equal on all ranks; a text stands for a tensor and describes it.  Raises
        MismatchError, on all ranks, if the calls differ, and PeerError if a rank does not arrive in time.
        """
        if self.ring.world == 1:
            return [mine]
        self.ring.calls += 1
        inputs = [
            (n, a if isinstance(a, str) else checksum(a))
            for n, a in zip(self.names, args, strict=False)
            if not isinstance(a, torch.nn.Parameter)
        ]
        weights = [
            (n, checksum(a))
            for n, a in zip(self.names, args, strict=False)
            if isinstance(a, torch.nn.Parameter) and self.first
        ]
        header = [self.graph, _digest(json.dumps(inputs)), _digest(json.dumps(weights)), mine]
        headers = self._exchange(header)
        if any(h[:3] != header[:3] for h in headers):
            raise self._mismatch(inputs, weights)
        self.first = False
        return [h[3] for h in headers]

    def _exchange(self, mine: list[int]) -> list[list[int]]:
        """The headers of all ranks, by rank, given this rank's."""
        ring = self.ring
        device = (
            torch.device("cpu")
            if "gloo" in str(dist.get_backend_config(ring.pg))
            else torch.device("cuda", torch.cuda.current_device())
        )
        store, call = ring.store, ring.calls
        store.set(f"at/{ring.rank}", str(call))
        sent = torch.tensor(mine, dtype=torch.int64, device=device)
        received = [torch.empty_like(sent) for _ in range(ring.world)]
        try:
            work = dist.all_gather(received, sent, group=ring.pg, async_op=True)
            work.wait(ring.limit)
        except RuntimeError as error:
            raise PeerError(f"{self._absent()} {error}") from error
        return [x.tolist() for x in received]

    def _absent(self) -> str:
        """A message that says which ranks did not reach this call."""
        absent = []
        for rank in range(self.ring.world):
            key = f"at/{rank}"
            reached = int(self.ring.store.get(key)) if self.ring.store.check([key]) else 0
            if reached < self.ring.calls:
                absent.append(rank)
        who = f"rank {', '.join(map(str, absent))}" if absent else "another rank"
        return (
            f"rank {self.ring.rank} came to call {self.ring.calls} of a compiled model, {who} did not arrive within "
            f"{self.ring.timeout:g} s (option 'timeout') or died on the way: look for the first error in its output. "
            "Every rank of the ring must call the same models, in the same order."
        )

    def _mismatch(self, inputs: list[tuple[str, int | str]], weights: list[tuple[str, int]]) -> MismatchError:
        """The error that names the first rank that differs from rank 0, and its first difference."""
        store, key = self.ring.store, f"differ/{self.ring.calls}"
        mine = [
            *self.facts,
            *((f"values of input {n}", str(c)) for n, c in inputs),
            *((f"weights {n}", str(c)) for n, c in weights),
        ]
        store.set(f"{key}/{self.ring.rank}", json.dumps(mine))
        sheets = []
        for rank in range(self.ring.world):
            store.wait([f"{key}/{rank}"], self.ring.limit)
            sheets.append([(name, text) for name, text in json.loads(store.get(f"{key}/{rank}"))])
        for other, sheet in enumerate(sheets):
            found = _first_difference(sheets[0], sheet)
            if found:
                return MismatchError(_advice(other, *found))
        return MismatchError("the ranks' checksums differ, their details do not: this is a defect of ringpass")


def _first_difference(a: Iterable[tuple[str, str]], b: Iterable[tuple[str, str]]) -> tuple[str, str, str] | None:
    """(name, text in `a`, text in `b`) of the first pair that differs."""
    ours, theirs = dict(a), dict(b)
    for name in [*ours, *(n for n in theirs if n not in ours)]:
        if ours.get(name) != theirs.get(name):
            return name, ours.get(name, "nothing"), theirs.get(name, "nothing")
    return None


ADVICE = {
    "call": "Every rank must make the same calls in the same order: all share an input by ringpass.sharded, or none.",
    "values": "Every rank of the ring must pass the same batch: a DistributedSampler, or shuffling with a seed per "
    "rank, gives each its own. Shard the data over the data-parallel ranks only.",
    "weights": "Every rank must start from the same weights: call torch.manual_seed with one seed before building the "
    "model, or broadcast the state dict from rank 0.",
    "graph": "Every rank must run the same model, in the same mode (train or eval), with the same arguments.",
    "inputs": "Every rank must pass inputs of the same shapes and dtypes: the whole sequence, not a shard of it, or "
    "every rank its shard, by ringpass.sharded.",
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


def checksum(x: object) -> int:
    """A 63-bit checksum of a tensor's bits, or of another value's repr.

    Cheap, and the same for any number of threads; two tensors that differ almost certainly have different checksums.
    """
    if not isinstance(x, Tensor):
        return _digest(repr(x))
    if not x.numel():
        return 0
    x = torch.view_as_real(x) if x.is_complex() else x
    bits = x.detach().contiguous().view(-1).view(BITS[x.element_size()])
    some = bits[:: max(1, bits.numel() // SAMPLE)].to(torch.int64)
    weighted = (some * (torch.arange(some.numel(), device=some.device) * 2 + 1)).sum()
    return int(bits.sum(dtype=torch.int64) * 31 + weighted) & (2**63 - 1)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
