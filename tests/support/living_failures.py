"""Ways for a run to fall apart in which all processes live: one set of them for all cases, a process group for each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.fx import GraphModule

from ringpass.comm import agreement, collectives
from ringpass.comm.ring import Running
from ringpass.errors import PeerError
from ringpass.kernels import table as kernels
from ringpass.passes.dump import Dump
from ringpass.passes.pipeline import Pipeline
from tests.support.failure_cases import LIMIT, TEXTS, TO_BEGIN, Case, Run, Told, full_disk, out_of_memory, told
from tests.support.model_parity import compiled
from tests.support.models import MODELS, batch_for, loss_of


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
    """Rank 1 tries again at once, the others later."""
    run.run = run.compiled(dump=os.environ.get("RINGPASS_TEST_DUMP", "/tmp/ringpass_test_dump"))
    with run.breaking(Dump, "write", 2, full_disk), _pausing(run.rank != 1):
        run.step()


def full_disk_in_two_compilations(run: Run) -> Any:
    with suppress(Exception):
        full_disk_in_a_compilation(run)
    full_disk_in_a_compilation(run)


@contextmanager
def _pausing(pauses: bool) -> Iterator[None]:
    """Takes some time after an error, as for a message to the user."""
    try:
        yield
    except Exception:
        time.sleep(PAUSE * pauses)
        raise


def full_disk_in_a_backward(run: Run) -> Any:
    """A backward is compiled when it first runs."""
    run.run = run.compiled()
    real, failed = Pipeline.lowered, list[str]()

    def lowered(self: Pipeline, stage: str, gm: GraphModule) -> None:
        if stage == "backward" and run.rank == 1 and not failed:
            failed.append(stage)
            full_disk()
        real(self, stage, gm)

    with patch.object(Pipeline, "lowered", lowered):
        run.step()


def memory_in_an_output(run: Run) -> Any:
    """Outputs are gathered when they are used, after the call."""
    outputs = run.run(**TEXTS)
    with run.breaking(collectives, "gather", 1, out_of_memory):
        outputs[0].sum()


def memory_in_a_comparison(run: Run) -> Any:
    with run.breaking(agreement, "checksum", 1, out_of_memory):
        run.step()


def step_after_a_failure(run: Run) -> Any:
    """Rank 1 updates its weights after a call that failed on all ranks."""
    with run.breaking(kernels, "forward", 3, out_of_memory, rank=None), suppress(torch.OutOfMemoryError, PeerError):
        run.step()
    *_, last = run.model.parameters()
    before = last.detach().clone()
    try:
        with torch.no_grad():
            last.add_(float(run.rank == 1))
        run.step()
    finally:
        with torch.no_grad():
            last.copy_(before)


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
    with _pausing(run.rank == 1):
        if run.rank == 1:
            run.run(**TEXTS)
        run.step()


def backwards_in_another_order(run: Run) -> Any:
    run.model.zero_grad()
    losses = [loss_of(run.run(**TEXTS)) for _ in range(2)]
    for loss in losses if run.rank != 1 else reversed(losses):
        loss.backward()


def backwards_without_tags(run: Run) -> Any:
    """As with NCCL, whose exchanges carry no tags: those of two backwards meet, and no wait fails."""
    with patch.object(Running, "tags", 0), patch.object(agreement, "as_messages", lambda *_: False):
        backwards_in_another_order(run)
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


PAUSE = 2.0  # seconds, longer than ranks look for each other
MEMORY = ("OutOfMemoryError",)
DISK = "rank 1 gave up the compilation of call 2", "No space left"
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
        others("in the backward of call 2", first=MEMORY),
        goes_on=True,
        slow=True,
    ),
    Case(
        "out of memory on one rank, while an output is gathered",
        memory_in_an_output,
        others("rank 1 gave up what followed call 2", *MEMORY, first=MEMORY),
        goes_on=True,
    ),
    Case(
        "out of memory on one rank, while the ranks are compared",
        memory_in_a_comparison,
        others("rank 1 gave up the comparison of call 2", *MEMORY, first=MEMORY),
        goes_on=True,
        slow=True,
    ),
    Case(
        "a step of one rank after a call that failed on all",
        step_after_a_failure,
        ("MismatchError", "updated weights"),
        goes_on=True,
    ),
    Case(
        "a full disk on one rank, in a compilation",
        full_disk_in_a_compilation,
        others(*DISK, first=DISK[1:]),
        goes_on=True,
        limit=TO_BEGIN,
    ),
    Case(
        "a full disk on one rank, in two compilations",
        full_disk_in_two_compilations,
        others("rank 1 gave up the compilation of call 3", *DISK[1:], first=DISK[1:]),
        goes_on=True,
        slow=True,
        limit=TO_BEGIN,
    ),
    Case(
        "a full disk on one rank, in the compilation of a backward",
        full_disk_in_a_backward,
        others("rank 1 gave up the backward of call 2", DISK[1], first=DISK[1:]),
        goes_on=True,
        limit=TO_BEGIN,
    ),
    Case("another batch on one rank", other_batch, ("MismatchError", "differ in values of input"), goes_on=True),
    Case(
        "another compiler on one rank",
        other_compiler,
        ("MismatchError", "differ in options"),
        slow=True,
        limit=TO_BEGIN,
    ),
    Case(
        "other requires_grad on one rank",
        other_gradients,
        ("MismatchError", "needs a gradient"),
        slow=True,
        limit=TO_BEGIN,
    ),
    Case(
        "one call more on two ranks",
        one_call_more,
        others("came to call 3", "rank 1 did not arrive", first=("PeerError",)),
        slow=True,
    ),
    Case(
        "a backward that one rank skips",
        skipped_backward,
        others("came to the backward of call 3", "rank 1 did not arrive", first=("PeerError",)),
        slow=True,
    ),
    Case(
        "a backward that one rank skips, going on",
        skipped_backward_and_on,
        ("MismatchError", "rank 0 has the backward of call 2", "rank 1 has call 3 of a compiled model"),
        goes_on=True,
        options=(("comm", "allgather"),),  # a collective of another size than a header
    ),
    Case(
        "two backwards in another order on one rank",
        backwards_in_another_order,
        ("MismatchError", "rank 0 has the backward of call 2", "rank 1 has the backward of call 3"),
        goes_on=True,
        options=(("comm", "allgather"),),
    ),
    Case(
        "two backwards in another order on one rank, as with NCCL",
        backwards_without_tags,
        ("MismatchError", "backwards since the last call", "that of call 3, that of call 2"),
        goes_on=True,
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
