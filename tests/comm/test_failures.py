"""Runs that fall apart: every rank that survives ends in a named error in time, or goes on with exact numbers."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import RestartAnalysis

from ringpass import backend
from ringpass.comm.ring import ring_of
from tests.failure_table import PATH, rows
from tests.support.deadly_failures import DEADLY, deadly
from tests.support.failure_cases import RANKS, Case, Told
from tests.support.living_failures import LIVING, living
from tests.support.marks import slow
from tests.support.model_parity import compiled, relative
from tests.support.models import WIDTH, Block
from tests.support.ports import free_port
from tests.support.process_ranks import Outcome, Workers, spawn

BOUND = 240.0  # seconds for all processes of a test, on a busy machine
EXACT = 1e-10
FAST, SLOW = (tuple(i for i, case in enumerate(LIVING) if case.slow is kind) for kind in (False, True))


def check(case: Case, rank: int, found: Told) -> None:
    """That a rank said what it should, in time."""
    assert all(text in found.text for text in case.wanted(rank)), (case.name, rank, found)
    assert found.seconds < case.limit + 10, (case.name, rank, found)
    assert found.after is None or found.after < EXACT, (case.name, rank, found)


def results(outcomes: list[Outcome], dead: int | None = None) -> dict[int, Told]:
    """What the surviving ranks said, by rank."""
    for rank, outcome in enumerate(outcomes):
        assert rank == dead or (outcome.result is not None and not outcome.timed_out), (rank, outcome)
    return {rank: outcome.result for rank, outcome in enumerate(outcomes) if rank != dead}


@pytest.mark.parametrize("numbers", [FAST, slow(SLOW)])
def test_ranks_that_live_on(numbers: tuple[int, ...]) -> None:
    for rank, found in results(spawn(living, RANKS, numbers, timeout=BOUND)).items():
        for number, told in zip(numbers, found, strict=True):  # type: ignore[call-overload]
            check(LIVING[number], rank, told)


class Scaled(nn.Module):
    """An attention whose result is scaled by a number that the caller gives."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(causal=True)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        y: Tensor = self.block(x) * scale
        return y


def compiled_anew(group: dist.ProcessGroup) -> int:
    """How often the ranks met after a failure, where Dynamo makes a number of the graph a tensor and starts again."""
    run, x, restarts = compiled(Scaled(), group), torch.randn(2, 23, WIDTH), []
    real, before = backend._compiled, ring_of(group).epoch

    def watched(*args: Any) -> Any:
        try:
            return real(*args)
        except RestartAnalysis as restart:
            restarts.append(restart)
            raise

    with patch.object(backend, "_compiled", watched):
        for scale in (1.0, 2.5):
            run(x, scale)
    assert restarts
    return ring_of(group).epoch - before


def test_a_compilation_that_starts_anew_is_no_failure(workers: Workers) -> None:
    assert workers.run(compiled_anew, 2) == [0, 0]


def compiled_alone(group: dist.ProcessGroup) -> float:
    """The error of a step after rank 0 alone failed to compile a function without attention."""
    model, x = Block(causal=True).double(), torch.randn(2, 23, WIDTH, dtype=torch.float64)
    run, wanted = compiled(model, group, timeout=20.0), model(x)
    run(x)
    if group.rank() == 0:
        with patch.object(backend, "compile_unpartitioned", side_effect=OSError("no compiler")), suppress(Exception):
            compiled(nn.Sigmoid(), group)(x)
    return max(relative(run(x) + 0, wanted) for _ in range(2))


def test_what_a_rank_compiles_alone_may_fail(workers: Workers) -> None:
    assert max(workers.run(compiled_alone, 2)) < EXACT


@pytest.mark.parametrize("number", [slow(i) if case.slow else i for i, case in enumerate(DEADLY)])
def test_a_rank_dies_or_stops(number: int) -> None:
    outcomes = spawn(deadly, RANKS, number, free_port(), timeout=BOUND)
    case = DEADLY[number]
    for rank, found in results(outcomes, case.victim).items():
        check(case, rank, found)


def test_the_page_lists_every_case() -> None:
    """What `python -m tests.failure_table` wrote has a row for each case, and every row is of a case."""
    assert rows(PATH.read_text()) == [case.name for case in (*LIVING, *DEADLY)]
    assert len(LIVING) + len(DEADLY) >= 16 and os.path.exists(PATH)
