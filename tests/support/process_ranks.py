"""Gloo ranks for tests: a reused pool, and throw-away sets of processes.

>>> workers.run(job, 3, tensor)               # job(group, tensor) on ranks 0..2 -> [result, result, result]
>>> spawn(job_that_dies, 2, timeout=20)       # [Outcome(exitcode=-9, ...), Outcome(exitcode=0, ...)]

A job is a module-level function ``job(group, *args, **kwargs)``. Arguments and results are copied (torch.save).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import io
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing

Job = Callable[..., Any]
Status = Literal["ok", "error"]

COLLECTIVE_TIMEOUT = timedelta(seconds=120)
GRACE = 10.0  # seconds that the other ranks get to report, once one has failed
CHILD_ENV = {
    "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",  # models that go through a set of strings make the same graph on every rank
}  # fmt: skip


class RankError(RuntimeError):
    """A job failed. ``errors`` maps each rank that raised to its exception, ``tracebacks`` to its traceback's text."""

    def __init__(self, message: str, errors: Mapping[int, BaseException], tracebacks: Mapping[int, str]) -> None:
        texts = (f"--- rank {rank} ---\n{text}" for rank, text in sorted(tracebacks.items()))
        super().__init__("\n".join([message, *texts]))
        self.errors = dict(errors)
        self.tracebacks = dict(tracebacks)


@dataclass(frozen=True)
class Outcome:
    """How one process of ``spawn`` ended: ``error`` is the traceback's text where the job raised, else ``None``.

    A process that was killed at the time limit, or died by itself, has neither result nor error.
    """

    exitcode: int | None
    result: Any = None
    error: str | None = None
    timed_out: bool = False


@dataclass
class _Reply:
    status: Status
    value: Any
    text: str = ""


class Workers:
    """A pool of ``ranks`` gloo processes, started at the first ``run``, with one subgroup for each P = 1..ranks.

    >>> with Workers(ranks=3) as workers:
    ...     workers.run(job, 2, torch.ones(3))
    """

    def __init__(self, ranks: int = 5) -> None:
        self.ranks = ranks
        self._members: list[_Member] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._generation = 0
        self._clean = True  # no unmatched message can be left in the process groups

    def run(self, job: Job, ranks: int, /, *args: Any, timeout: float = 300.0, **kwargs: Any) -> list[Any]:
        """Results of ``job(group, *args, **kwargs)`` on ranks 0..ranks-1; raises RankError or TimeoutError."""
        if not 1 <= ranks <= self.ranks:
            raise ValueError(f"expected 1 to {self.ranks} ranks, got {ranks}; a wider test makes its own Workers")
        self._ready()
        members = self._members[:ranks]
        self._clean = False
        for member in members:
            member.send(("run", _pack((job, ranks, args, kwargs))))
        replies = self._collect(members, timeout, f"{job.__name__} on {ranks} ranks")
        _raise_failures(job, replies)
        self._clean = True
        return [replies[rank].value for rank in range(ranks)]

    def close(self) -> None:
        """Kill the pool; the next ``run`` starts a new one."""
        for member in self._members:
            member.kill()
        self._members = []
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready(self) -> None:
        if self._members and not all(member.process.is_alive() for member in self._members):
            self.close()
        if not self._members:
            self._start()
        elif self._clean:
            return
        self._generation += 1
        for member in self._members:
            member.send(("join", str(self._path(f"store{self._generation}"))))
        _raise_failures(_join, self._collect(self._members, COLLECTIVE_TIMEOUT.total_seconds(), "starting the pool"))
        self._clean = True

    def _start(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="ringpass_workers_")
        stacks = [str(self._path(f"stacks{rank}")) for rank in range(self.ranks)]
        with _environment(CHILD_ENV):
            self._members = [_Member(rank, _serve, (rank, self.ranks, stacks[rank])) for rank in range(self.ranks)]

    def _path(self, name: str) -> Path:
        assert self._directory is not None
        return Path(self._directory.name, name)

    def _collect(self, members: list[_Member], timeout: float, what: str) -> dict[int, _Reply]:
        """Every member's reply; kills the pool where one dies, hangs, or does not follow another's failure."""
        inbox = _Inbox(members)
        inbox.read(timeout, stop_on_error=True)
        if inbox.failed():
            inbox.read(GRACE)
        if inbox.missing:
            stacks = self._stacks(inbox.missing)
            self.close()
            if not inbox.failed():
                raise TimeoutError(f"{what}: no reply within {timeout:g} s; the pool is restarted\n{stacks}")
            inbox.blame_missing(f"{what}: no reply within {GRACE:g} s of another rank's failure\n{stacks}")
        elif inbox.dead:
            self.close()
        return inbox.replies

    def _stacks(self, members: list[_Member]) -> str:
        """What each hanging rank is doing now, as Python stacks."""
        for member in members:
            member.signal(signal.SIGUSR1)
        time.sleep(0.5)
        paths = [(member.rank, self._path(f"stacks{member.rank}")) for member in members]
        return "\n".join(f"--- rank {rank} hangs at ---\n{path.read_text()}" for rank, path in paths if path.exists())


def spawn(
    job: Job,
    ranks: int,
    /,
    *args: Any,
    env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    **kwargs: Any,
) -> list[Outcome]:
    """Run ``job(dist.group.WORLD, ...)`` in new processes that may die or hang, and say how each one ended."""
    with tempfile.TemporaryDirectory(prefix="ringpass_spawn_") as directory:
        task = _pack((job, ranks, args, kwargs))
        with _environment(CHILD_ENV | dict(env or {})):
            members = [_Member(rank, _serve_once, (rank, ranks, f"{directory}/store", task)) for rank in range(ranks)]
        deadline = time.monotonic() + timeout
        inbox = _Inbox(members)
        inbox.read(timeout)
        for member in members:
            member.process.join(max(0.0, min(GRACE, deadline - time.monotonic())))
        hung = {member.rank for member in members if member.process.is_alive()}
        for member in members:
            member.kill()
        return [_outcome(member, inbox.replies.get(member.rank), member.rank in hung) for member in members]


def _outcome(member: _Member, reply: _Reply | None, hung: bool) -> Outcome:
    code = member.process.exitcode
    if reply is None or member.rank in member.silent:
        return Outcome(code, timed_out=hung)
    if reply.status == "error":
        return Outcome(code, error=reply.text, timed_out=hung)
    return Outcome(code, result=reply.value, timed_out=hung)


# The parent's side: one process with a pipe, and the replies of several.


class _Member:
    def __init__(self, rank: int, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.rank = rank
        self.silent: set[int] = set()
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=target, args=(theirs, *args), name=f"rank {rank}")
        self.process.start()
        theirs.close()

    def send(self, message: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead rank is reported where its reply is read
            self.pipe.send(message)

    def signal(self, number: int) -> None:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


@dataclass
class _Inbox:
    members: list[_Member]
    replies: dict[int, _Reply] = field(default_factory=dict)
    dead: bool = False

    @property
    def missing(self) -> list[_Member]:
        return [member for member in self.members if member.rank not in self.replies]

    def failed(self) -> bool:
        return any(reply.status == "error" for reply in self.replies.values())

    def read(self, timeout: float, stop_on_error: bool = False) -> None:
        """Take replies until all are there, the time is over, or (where asked) one is an error."""
        deadline = time.monotonic() + timeout
        while self.missing and not (stop_on_error and self.failed()):
            by_pipe: dict[Any, _Member] = {member.pipe: member for member in self.missing}
            ready = wait(list(by_pipe), max(0.0, deadline - time.monotonic()))
            if not ready:
                return
            for pipe in ready:
                self._take(by_pipe[pipe])

    def blame_missing(self, text: str) -> None:
        for member in self.missing:
            self.replies[member.rank] = _Reply("error", None, text)

    def _take(self, member: _Member) -> None:
        try:
            self.replies[member.rank] = _unpack(member.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            member.process.join(GRACE)
            member.silent.add(member.rank)
            self.dead = True
            text = f"the process ended without a reply, exit code {member.process.exitcode}"
            self.replies[member.rank] = _Reply("error", None, text)


def _raise_failures(job: Job, replies: Mapping[int, _Reply]) -> None:
    failed = {rank: reply for rank, reply in sorted(replies.items()) if reply.status == "error"}
    if not failed:
        return
    errors = {rank: reply.value for rank, reply in failed.items() if reply.value is not None}
    names = ", ".join(map(str, failed))
    message = f"{job.__name__} failed on rank {names} of {len(replies)}"
    raise RankError(message, errors, {rank: reply.text for rank, reply in failed.items()}) from next(
        iter(errors.values()), None
    )


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment of the processes started inside: set before they import torch."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# The rank's side.


def _serve(pipe: Connection, rank: int, ranks: int, stacks: str) -> None:
    """Answer jobs until the parent closes the pipe."""
    with open(stacks, "w") as file, contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        torch.set_num_threads(1)
        groups: list[Any] = []
        while True:
            kind, payload = pipe.recv()
            if kind == "join":
                reply = _attempt(_join, rank, ranks, payload)
                groups = reply.value if reply.status == "ok" else []
                reply.value = None if reply.status == "ok" else reply.value
            else:
                reply = _attempt(_perform, groups, payload)
            pipe.send_bytes(_pack_reply(reply))
            del reply


def _serve_once(pipe: Connection, rank: int, ranks: int, store: str, payload: bytes) -> None:
    """One job on a default process group of its own; exit code 1 where it raised."""
    torch.set_num_threads(1)
    reply = _attempt(_join, rank, ranks, store, subgroups=False)
    if reply.status == "ok":
        reply = _attempt(_perform, [dist.group.WORLD] * ranks, payload)
    pipe.send_bytes(_pack_reply(reply))
    pipe.close()
    os._exit(int(reply.status == "error"))  # no wait for peers that died or hang


def _join(rank: int, ranks: int, store: str, subgroups: bool = True) -> list[Any]:
    """Join a new default group; returns the subgroups of ranks 0..P-1 for P = 1..ranks."""
    importlib.import_module("torch._dynamo")  # seconds, which no job's time limit should pay
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT
    )
    return [dist.new_group(list(range(size))) for size in range(1, ranks + 1)] if subgroups else []


def _perform(groups: list[Any], payload: bytes) -> Any:
    torch._dynamo.reset()
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    gc.collect()
    job, ranks, args, kwargs = _unpack(payload)
    return job(groups[ranks - 1], *args, **kwargs)


def _attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> _Reply:
    try:
        return _Reply("ok", function(*args, **kwargs))
    except (Exception, SystemExit) as error:
        return _Reply("error", error, traceback.format_exc())


def _pack_reply(reply: _Reply) -> bytes:
    """A reply that cannot be copied becomes an error that says so; an exception that cannot, only its text."""
    if reply.status == "error":
        reply.value = _portable(reply.value)
        return _pack(reply)
    try:
        return _pack(reply)
    except Exception:
        return _pack(_Reply("error", None, f"the job's result cannot be pickled\n{traceback.format_exc()}"))


def _portable(error: BaseException) -> BaseException | None:
    """The exception without traceback, cause and context, if it survives a copy."""
    try:
        copy: BaseException = pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return copy if type(copy) is type(error) else None


def _pack(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
