"""The ranks of a ring check that they agree in every call of a compiled graph.

Every call of a compiled graph, and over gloo every backward, starts with one small exchange, in which each rank sends a
header: a digest of the graph that it is about to run, of the order of backwards since the last call, a checksum of its
inputs, one of weights (of all in a graph's first call, then of a few in each, by turns) and a random seed.  All ranks
see all headers, so they reach the same decision: continue with rank 0's seed, or raise the same MismatchError.  On a
mismatch they exchange details through the store, to name the ranks and the first difference.

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
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ringpass.comm.flight_recorder import recording
from ringpass.comm.headers import (
    HostCopy,
    as_messages,
    checksum,
    combined,
    digest,
    gather_headers,
    header_device,
    onto,
    to_host,
)
from ringpass.comm.lost import GaveUpError, first_sentence
from ringpass.comm.notices import notices, withdraw_notice
from ringpass.comm.recovery import begin_backward, give_up, giving_up, settle
from ringpass.comm.ring import Ring, Running
from ringpass.errors import InputError, MismatchError, OptionError, PeerError
from ringpass.profiling import profiled

log = logging.getLogger(__name__)
CPU = torch.device("cpu")
Sheet = list[tuple[str, str]]
"""What a rank has to say of a call: (name, text) pairs."""


@dataclass
class Agreement:
    """What the ranks compare for one compiled graph.

    `facts`: (name, text) pairs that must be equal on all ranks.  `names`: those of the arguments, in order.
    `every`: all weights are compared in the first call, and in the first one after a call that failed (`epoch`: of the
    ring, in the last call); from then on each in one of so many calls; 0: never again.  `compared`: number of calls.
    For messages, `sites`: where in the model its attentions are, `line`: where the graph begins.  `backward`: what is
    compared is that backward, and not a call.  The fact "call" says what kind of call it is.
    """

    ring: Ring
    facts: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    every: int = 0
    compared: int = 0
    epoch: int = 0
    sites: tuple[str, ...] = ()
    line: str = ""
    backward: Running | None = None

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
        if a rank does not arrive in time, OptionError if the process group is gone, InputError for tensors that hold no
        values.
        """
        ring = self.ring
        if ring.pg is None or ring.world == 1:
            mine_alone = torch.tensor([mine], dtype=torch.int64)
            return Comparison(self, Said([], [], []), to_host(mine_alone), onto(mine_alone[0], device))
        if any(isinstance(x, Tensor) and (x.is_meta or isinstance(x, FakeTensor)) for x in args):
            raise InputError(
                "the inputs are fake tensors, or on the device 'meta', and hold no values that ranks could send: for "
                "shapes alone call the model without torch.compile, for a report ringpass.explain"
            )
        ring.renew()
        settle(ring)
        withdraw_notice(ring)
        ring.calls, ring.since = ring.calls + 1, time.monotonic()
        where = header_device(ring.pg, device)
        if where is None:
            raise OptionError(
                f"the ring's process group ({dist.get_backend_config(ring.pg)}) moves no tensors of the host, and this "
                "call has no others: move the model and its inputs to the GPU, or pass init_process_group(device_id=..)"
            )
        with giving_up(ring, self.comparing):
            said = self._said(args)
            log.debug("rank %d comes to %s: %s", ring.rank, self.came, said)
            comparison = self._gathered(said, mine, where)
        log.debug("rank %d: all %d ranks came to %s", ring.rank, ring.world, self.came)
        return replace(comparison, seed=onto(comparison.seed, device))

    def begin_backward(self, running: Running, device: torch.device) -> None:
        """Notes that the backward of a call on `device` begins: over gloo, after a check that all ranks begin it.

        Elsewhere the host would have to wait for the device, so the next call compares the order of backwards.  Raises
        MismatchError, on all ranks, if one is at another backward or call, and PeerError as `begin` does.
        """
        ring = self.ring
        ring.renew()
        settle(ring)
        where = header_device(ring.carrier, device)
        if where is not None and as_messages(ring.carrier, where):
            agreement = Agreement(ring, (("call", str(running)),), (), backward=running)
            with ring.one_thread(), profiled("compare the ranks"):
                with giving_up(ring, running):
                    comparison = agreement._gathered(Said([], [], []), 0, where)
                comparison.finish()
        begin_backward(ring, running)

    def _gathered(self, said: Said, mine: int, where: torch.device) -> Comparison:
        """The headers of all ranks on `where`, to be compared.  Raises PeerError if a rank does not come."""
        ring = self.ring
        ring.come()
        checksums = [_stacked(tensors, where) for tensors in (said.inputs, said.weights)]
        try:
            headers = gather_headers(self._header(said, mine, checksums), ring)
        except RuntimeError as error:
            raise self.lost(error) from error
        copied = to_host(torch.cat([headers.view(-1), *checksums]))
        return Comparison(self, said, copied, headers[0, 0].clone())

    def _said(self, args: Sequence[object]) -> Said:
        """What the header and the details say of the arguments, and of those weights whose turn it is."""
        since, self.ring.backwards = self.ring.backwards, []
        said, number = Said([], [], [], later=self.compared > 0, backwards=_calls(since)), 0
        every_weight = not self.compared or self.epoch != self.ring.epoch  # of a call that failed some may be updated
        self.epoch = self.ring.epoch
        for name, value in zip(self.names, args, strict=False):
            if isinstance(value, torch.nn.Parameter):
                if every_weight or (self.every and (self.compared - number) % self.every == 0):
                    said.weights.append((name, checksum(value)))
                number += 1
            elif isinstance(value, Tensor):
                said.inputs.append((name, checksum(value)))
            else:
                said.others.append((name, value if isinstance(value, str) else str(digest(repr(value)))))
        return said

    def _header(self, said: Said, mine: int, checksums: Sequence[Tensor]) -> Tensor:
        """[mine, graph, other inputs, inputs, weights], int64, on the device of the checksums."""
        others = digest(json.dumps([said.backwards, said.others]))
        known = torch.tensor([mine, self.graph, others], dtype=torch.int64)
        return torch.cat([onto(known, checksums[0].device), *map(combined, checksums)])

    def running(self, part: str) -> Running:
        """What this rank does in a `part` of the call, for messages."""
        return Running(self.ring.calls, part, self.sites, self.line)

    @property
    def comparing(self) -> Running:
        """What this rank does while it is compared, for messages."""
        return self.backward or self.running("comparison")

    @property
    def came(self) -> str:
        """To what this rank has come, for messages."""
        if self.backward is not None:
            return str(self.backward)
        kind = dict(self.facts).get("call", "a compiled model")
        return f"call {self.ring.calls} of {kind}{f' ({self.line})' if self.line else ''}"

    def lost(self, error: Exception) -> PeerError:
        """The error of a call to which not all ranks came; `error`: how it showed."""
        return PeerError(f"{self._absent(error)}{recording()}")

    def _absent(self, error: Exception) -> str:
        """A message that says which ranks did not reach this call, and why, where they have told."""
        ring = self.ring
        came = f"rank {ring.rank} came to {self.came}"
        if told := str(error) if isinstance(error, GaveUpError) else "; ".join(notices(ring)):
            return f"{came}, and others do not: {told.rstrip('.')}."
        absent = ring.absent()
        who = f"rank {', '.join(map(str, absent))}" if absent else "another rank"
        return (
            f"{came}, {who} did not arrive within "
            f"{ring.timeout:g} s (option 'timeout') or died on the way: look for the first error in its output. "
            f"Every rank of the ring must call the same models, in the same order. {first_sentence(error)}"
        )

    def mismatch(self, mine: Sheet) -> MismatchError:
        """The error that names the first rank that differs from rank 0, and its first difference.

        `mine`: what this rank has to say.  All ranks that see the difference call this together.  Ranks that came to
        different calls give them up.
        """
        ring = self.ring
        texts = ring.exchange_texts(json.dumps([ring.calls, self.came, *self.facts, *mine]))
        (_, came, *ours), *_ = found = [json.loads(text) for text in texts]
        for other, (_, came_there, *theirs) in enumerate(found):
            difference = _first_difference(ours, theirs)
            if difference is not None and difference[0] == "call":
                error = MismatchError(_advice(other, "call", came, came_there))
                give_up(ring, error, self.comparing)
                ring.calls = max(calls for calls, *_ in found)  # none has gone on
                return error
            if difference is not None:
                return MismatchError(_advice(other, *difference))
        return MismatchError("the ranks' checksums differ, their details do not: this is a defect of ringpass")


@dataclass(frozen=True)
class Said:
    """What a rank says of its arguments: texts, and checksums of tensors, which are on their devices.

    `later`: the weights were equal in an earlier call.  `backwards`: of which calls the backward has run since the last
    one, in order.
    """

    others: Sheet
    inputs: list[tuple[str, Tensor]]
    weights: list[tuple[str, Tensor]]
    later: bool = False
    backwards: str = ""

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
        texts = [(BACKWARDS, self.backwards), *((f"values of input {name}", text) for name, text in self.others)]
        return texts + [(name, str(x)) for name, x in zip(names, checksums, strict=True)]


def _calls(numbers: Sequence[int]) -> str:
    """Calls as a message lists them.

    >>> _calls([3, 2])
    'that of call 3, that of call 2'
    """
    return ", ".join(f"that of call {number}" for number in numbers) or "none"


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
                failure = self.agreement.lost(error)
                give_up(self.agreement.ring, failure, self.agreement.comparing)
                raise failure from error
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


BACKWARDS = "backwards since the last call"
ONE_HASH_SEED = "Where the model goes through a set of strings, start all ranks with one PYTHONHASHSEED."
ADVICE = {
    "call": "Every rank must make the same calls, and run their backwards, in the same order; all share an input by "
    "ringpass.sharded, or none.",
    "values": "Every rank of the ring must pass the same batch: a DistributedSampler, or shuffling with a seed per "
    "rank, gives each its own. Shard the data over the data-parallel ranks only.",
    "backwards": "Every rank must run the backward of the same calls in the same order: what NCCL sends carries no "
    "name, and meets what another call sends. Do not use the gradients since then: go on from a checkpoint.",
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
