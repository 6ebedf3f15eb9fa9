"""Ways for a run to fall apart, as jobs for three ranks: what each rank says, and after how many seconds.

A case of `LIVING` leaves all processes alive; its ranks are one set of processes for all of them, and a process group
for each.  In a case of `DEADLY` rank 1 (rank 0, if the case says so) dies or stops, in processes of its own.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringpass.comm import all_reduce, p2p, pooling
from ringpass.comm.ring import ring_of
from ringpass.errors import RingpassError
from ringpass.kernels import table as kernels
from ringpass.passes.dump import Dump
from tests.support.model_parity import compiled, relative
from tests.support.models import MODELS, batch_for, loss_of

LIMIT = 4.0  # seconds: the option `timeout`
TO_BEGIN = 90.0  # the same in the first call, which all ranks compile
RANKS = 3
TEXTS = batch_for("nanogpt", 23)


@dataclass(frozen=True)
class Told:
    """What a rank said of a case: the error, or what it did; the seconds from the start of the step in which it failed.

    `after`: the error of the loss and all gradients of the next batch, against one device; None: there was none.
    """

    text: str
    seconds: float
    after: float | None = None


@dataclass(frozen=True)
class Case:
    """`job(run)` on each rank; `said`: what each surviving rank's text must contain, by rank or for all.

    `goes_on`: the next batch must then be exact on all ranks.  `slow`: only `-m slow` runs it.  `victim`: who dies.
    `own_store`: rank 0 hosts the store, as under plain launchers.  `limit`: the option `timeout`, once all have begun.
    """

    name: str
    job: Callable[[Run], Any]
    said: tuple[str, ...] | dict[int, tuple[str, ...]]
    goes_on: bool = False
    slow: bool = False
    victim: int | None = None
    own_store: bool = False
    limit: float = LIMIT
    options: tuple[tuple[str, Any], ...] = ()
    begins: bool = True  # with a step that is fine

    def wanted(self, rank: int) -> tuple[str, ...]:
        """What the text of a rank must contain."""
        return self.said[rank] if isinstance(self.said, dict) else self.said


class Run:
    """A model on the ring of `group`, and how a case breaks it."""

    def __init__(self, group: dist.ProcessGroup, case: Case) -> None:
        self.group, self.rank = group, group.rank()
        self.options = {"timeout": TO_BEGIN, **dict(case.options)}
        self.model: nn.Module = MODELS["nanogpt"].make()
        self.run = self.compiled()
        if case.begins:
            self.step()
            self.options["timeout"] = ring_of(group).timeout = case.limit

    def compiled(self, **options: Any) -> Any:
        """The model compiled anew."""
        torch._dynamo.reset()
        return compiled(self.model, self.group, **{**self.options, **options})

    def step(self, run: Any = None, **changed: Tensor) -> Tensor:
        """Forward and backward of a batch."""
        self.model.zero_grad()
        loss = loss_of((self.run if run is None else run)(**{**TEXTS, **changed}))
        loss.backward()
        return loss.detach()

    def error(self) -> float:
        """The largest error of the loss and the gradients of a step, against one device."""
        found = []
        for run in (self.run, self.model):
            loss = self.step(run)
            found.append([loss, *(p.grad.clone() for p in self.model.parameters() if p.grad is not None)])
        return max(relative(a, b) for a, b in zip(*found, strict=True))

    @contextmanager
    def breaking(
        self, where: Any, name: str, at: int, fault: Callable[[], None], rank: int | None = 1
    ) -> Iterator[None]:
        """Calls `fault` in the `at`-th call of `where.name` on `rank`; None: on all ranks."""
        real, calls = getattr(where, name), [0]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == at and rank in (None, self.rank):
                fault()
            return real(*args, **kwargs)

        with patch.object(where, name, wrapped):
            yield


def out_of_memory() -> None:
    """What a tile raises for which there is no memory."""
    raise torch.OutOfMemoryError("a tile needs 12 GiB")


def full_disk() -> None:
    """What a write raises on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


def killed() -> None:
    """As by `kill -9`, or the kernel's out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    """As by Ctrl-Z, or a host that hangs."""
    os.kill(os.getpid(), signal.SIGSTOP)


def told(action: Callable[[], Any]) -> Told:
    """What came of an action."""
    begun = time.monotonic()
    try:
        action()
        text = "no error"
    except (RingpassError, torch.OutOfMemoryError, OSError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
    except Exception as error:  # Dynamo's wrapper of an error of the backend
        text = (
            f"{type(error).__name__}: {error}"
            if error.__cause__ is None
            else f"{type(error.__cause__).__name__}: {error}"
        )
    return Told(text, time.monotonic() - begun)


# --- cases in which all processes live --------------------------------------------------------------------------------


def memory_in_a_forward(run: Run) -> Any:
    with run.breaking(kernels, "forward", 3, out_of_memory, rank=None):
        run.step()


def memory_in_a_backward(run: Run) -> Any:
    with run.breaking(kernels, "backward", 3, out_of_memory, rank=None):
        run.step()


def memory_at_different_tiles(run: Run) -> Any:
    with run.breaking(kernels, "forward", 1 + 2 * run.rank, out_of_memory, rank=None):
        run.step()


def memory_on_one_rank(run: Run) -> Any:
    with run.breaking(kernels, "forward", 3, out_of_memory):
        run.step()


def memory_on_one_rank_unseen(run: Run) -> Any:
    """Its last tile: the others do not miss it before the sums of gradients."""
    with run.breaking(kernels, "backward", 5, out_of_memory):
        run.step()
        run.step()


def full_disk_in_a_compilation(run: Run) -> Any:
    run.run = run.compiled(dump=os.environ.get("RINGPASS_TEST_DUMP", "/tmp/ringpass_test_dump"))
    with run.breaking(Dump, "write", 2, full_disk):
        run.step()


def other_batch(run: Run) -> Any:
    ids = TEXTS["idx"].clone()
    ids[0, 0] += int(run.rank == 1)
    run.step(idx=ids)


def other_compiler(run: Run) -> Any:
    run.step(run.compiled(compiler="inductor") if run.rank == 1 else run.compiled())


def other_gradients(run: Run) -> Any:
    run.model.requires_grad_(run.rank != 1)
    try:
        run.step(run.compiled())
    finally:
        run.model.requires_grad_(True)


def one_call_more(run: Run) -> Any:
    run.step()
    if run.rank == 1:
        return _while_others_fail(run)
    run.step()


def skipped_backward(run: Run) -> Any:
    run.step()
    if run.rank == 1:
        run.run(**TEXTS)
        return _while_others_fail(run)
    run.step()


def skipped_backward_and_on(run: Run) -> Any:
    """Rank 1 goes on with the next call."""
    if run.rank == 1:
        run.run(**TEXTS)
    run.step()


def other_order(run: Run) -> Any:
    other = MODELS["gpt2"].make()
    batch = batch_for("gpt2", 23)
    second = compiled(other, run.group, timeout=TO_BEGIN)
    steps = [run.step, lambda: loss_of(second(**batch)).backward()]
    for step in steps if run.rank != 1 else reversed(steps):
        step()


def output_alone(run: Run) -> Any:
    outputs = run.run(**TEXTS)
    if run.rank == 1:
        return _while_others_fail(run)
    outputs[0].sum()


def _while_others_fail(run: Run) -> None:
    """Lives on until the others have failed, and then goes on to the next call."""
    time.sleep(LIMIT + 2)
    run.step()


def others(*texts: str, first: tuple[str, ...]) -> dict[int, tuple[str, ...]]:
    """What ranks 0 and 2 say, and what rank 1 does."""
    return {0: ("PeerError", *texts), 1: first, 2: ("PeerError", *texts)}


MEMORY = ("OutOfMemoryError",)
DISK = "rank 1 failed to compile a graph", "No space left"
BACKWARD = "in the backward of call "
LIVING = (
    Case("out of memory in a tile of the forward, on all ranks", memory_in_a_forward, MEMORY, goes_on=True),
    Case("out of memory in a tile of the backward, on all ranks", memory_in_a_backward, MEMORY, goes_on=True),
    Case("out of memory at different tiles", memory_at_different_tiles, ("Error: ",), goes_on=True, slow=True),
    Case(
        "out of memory on one rank, in the forward",
        memory_on_one_rank,
        others("rank 1 gave up the forward of call 2", *MEMORY, first=MEMORY),
        goes_on=True,
    ),
    Case(
        "out of memory on one rank, in the backward",
        memory_on_one_rank_unseen,
        others(f"{BACKWARD}2", first=MEMORY),
        goes_on=True,
        slow=True,
    ),
    Case("a full disk on one rank, in a compilation", full_disk_in_a_compilation, others(*DISK, first=DISK[1:])),
    Case("another batch on one rank", other_batch, ("MismatchError", "differ in values of input"), goes_on=True),
    Case(
        "another compiler on one rank",
        other_compiler,
        ("MismatchError", "differ in options"),
        slow=True,
        limit=TO_BEGIN,
    ),
    Case("other requires_grad on one rank", other_gradients, ("MismatchError", "needs a gradient"), limit=TO_BEGIN),
    Case(
        "one call more on two ranks",
        one_call_more,
        others("came to call 3", "rank 1 did not arrive", first=("PeerError",)),
        slow=True,
    ),
    Case("a backward that one rank skips", skipped_backward, others(f"{BACKWARD}3", first=("PeerError",)), slow=True),
    Case(
        "a backward that one rank skips, going on",
        skipped_backward_and_on,
        others(f"{BACKWARD}2", "rank 1 went on to call 3 without it", first=("PeerError", "call 3")),
    ),
    Case("other models first on one rank", other_order, ("MismatchError",), slow=True, limit=TO_BEGIN),
    Case("an output that one rank does not use", output_alone, others("was used on rank", first=()), slow=True),
)


def living(group: dist.ProcessGroup, cases: tuple[int, ...]) -> list[Told]:
    """What this rank says of these cases, one after the other, each on a process group of its own."""
    said = []
    for number in cases:
        case = LIVING[number]
        run = Run(dist.new_group(timeout=timedelta(seconds=60)), case)
        found = told(lambda: case.job(run))  # noqa: B023
        after = run.error() if case.goes_on else None
        said.append(Told(found.text, found.seconds, after))
    return said


# --- cases in which a rank dies or stops ------------------------------------------------------------------------------


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
