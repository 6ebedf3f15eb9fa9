"""What a way for a run to fall apart is made of: a model on three ranks, what breaks it, and what each rank says.

The cases are in `living_failures`, which leave all processes alive, and in `deadly_failures`, in which one dies or
stops.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringpass.comm.ring import ring_of
from ringpass.errors import RingpassError
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
