"""Runs one case of bad input or odd use on one device and on ranks, and says in one line how it ended.

    @use("backward twice")
    def retained(on_ring: OnRing) -> Values: ...

A case is a function of `on_ring`, which is the identity on one device and the backend on ranks: it compiles what it
is given.  It returns the tensors that are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError

from tests.support.model_parity import compiled, relative

OnRing = Callable[..., Any]
Values = Sequence[Tensor]
ONE_DEVICE = "as one device"
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The largest relative difference of tensors of a dtype."""


@dataclass(frozen=True)
class RankCase:
    """One case: its `title` in the table, what runs, and how it ends: ONE_DEVICE, or an error and words of it.

    `fast`: part of the default suite.  `as_one_device`: numbers of ranks that do not end in the error.
    """

    title: str
    run: Callable[[OnRing], Values]
    outcome: str
    said: str
    fast: bool
    ranks: tuple[int, ...]
    as_one_device: tuple[int, ...]


class Cases(dict[str, RankCase]):
    """Cases by the names of their functions."""

    def add(
        self,
        title: str,
        outcome: str = ONE_DEVICE,
        said: str = "",
        fast: bool = False,
        ranks: tuple[int, ...] = (1, 2, 3),
        as_one_device: tuple[int, ...] = (),
    ) -> Callable[[Callable[[OnRing], Values]], Callable[[OnRing], Values]]:
        """Registers the function that it decorates."""

        def register(run: Callable[[OnRing], Values]) -> Callable[[OnRing], Values]:
            self[run.__name__] = RankCase(title, run, outcome, said, fast, ranks, as_one_device)
            return run

        return register


def ended(group: dist.ProcessGroup, case: RankCase) -> tuple[str, str]:
    """How a case ended on this rank: ONE_DEVICE, the name of an error, or what else; and the error's message."""

    def on_ring(fn: Callable[..., Any], **options: Any) -> Any:
        return compiled(fn, group, **options)

    want, eager_error = _attempt(case, lambda fn, **_: fn)
    got, error = _attempt(case, on_ring)
    if error is not None and _alike(error, eager_error):
        return ONE_DEVICE, str(error)
    if error is not None:
        return type(error).__name__, str(error)
    if eager_error is not None:
        return f"{ONE_DEVICE} raises {type(eager_error).__name__}, ranks do not", str(eager_error)
    if len(got) != len(want):
        return f"{len(got)} tensors, on one device {len(want)}", ""
    worst = max((difference(a, b) for a, b in zip(got, want, strict=True)), default=float("inf"))
    return (ONE_DEVICE if worst <= 1 else f"differs from one device by {worst:.1e} times the tolerance"), ""


def _alike(error: BaseException, eager_error: BaseException | None) -> bool:
    """Whether ranks raise what one device raises, maybe in Dynamo's words, who finds some mistakes while it traces."""
    if eager_error is None:
        return False
    same = type(error) is type(eager_error) and str(error).splitlines()[:1] == str(eager_error).splitlines()[:1]
    return same or isinstance(error, TorchRuntimeError)


def difference(got: Tensor, want: Tensor) -> float:
    """The relative difference over its tolerance; NaN and infinity equal themselves, shapes and dtypes count."""
    got, want = got.detach(), want.detach()
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not (want.is_floating_point() or want.is_complex()):
        return 0.0 if torch.equal(got, want) else float("inf")
    got, want = (torch.view_as_real(x) if x.is_complex() else x for x in (got, want))
    finite = want.isfinite()
    special = torch.equal(got.nan_to_num(1.0, 2.0, 3.0)[~finite], want.nan_to_num(1.0, 2.0, 3.0)[~finite])
    if not special or not bool(got[finite].isfinite().all()):
        return float("inf")
    return relative(got[finite], want[finite], floor=1e-9) / TOLERANCES[want.dtype]


def _attempt(case: RankCase, on_ring: OnRing) -> tuple[Values, BaseException | None]:
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [x + 0 if type(x) is not Tensor else x for x in case.run(on_ring)], None
    except Exception as error:
        return [], _root(error)


def _root(error: BaseException) -> BaseException:
    """The error of a backend, without torch's wrapping."""
    while isinstance(error, BackendCompilerFailed):
        error = error.inner_exception
    return error
