"""The proof raises no false alarm: what plans would have is proved, and computes what the mask says."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from ringpass.layouts.ranges import spread
from ringpass.schedule.program import program
from tests.support.executed import allowed_pairs, execute
from tests.support.random_plans import random_plan

FEW, ALL, EXECUTED = 120, 10_000, 40


def check(seeds: Iterable[int]) -> None:
    for seed in seeds:
        try:
            random_plan(seed).prove()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {random_plan(seed)}") from error


@pytest.mark.parametrize("part", range(4))
def test_random_plans_are_proved(part: int) -> None:
    check(range(part, FEW, 4))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_ten_thousand_random_plans_are_proved(part: int) -> None:
    check(range(FEW + part, FEW + ALL, 20))


def test_what_is_proved_computes_what_the_mask_says() -> None:
    """The oracle of the tests of faults agrees with the masks."""
    for seed in range(EXECUTED):
        for problem in random_plan(seed).problems:
            found = execute([program(problem, rank) for rank in range(problem.world)])
            assert not found.failure, (seed, found.failure)
            for rank in range(problem.world):
                met = torch.zeros(problem.keys, dtype=torch.bool)
                met[torch.from_numpy(spread(problem.keys_met(rank)))] = True
                queries = spread(problem.query_layout.ranges(rank, problem.queries))
                want = (allowed_pairs(problem)[:, queries] & met).to(torch.int16)
                assert want.numpy().tobytes() == found.counts[rank], (seed, rank)


def test_the_plans_meet_every_circumstance() -> None:
    """In the default run."""
    plans = [random_plan(seed) for seed in range(FEW)]
    assert {plan.problem.world for plan in plans} == {*range(2, 9)}
    texts = " ".join(plan.problem.mask for plan in plans)
    assert all(part in texts for part in ("x0[", "x1[", " t", "//", "%", "h "))
    names = " ".join(plan.problem.key_layout.name for plan in plans)
    assert all(part in names for part in ("contiguous", "zigzag", "striped", "chunks", "cut", "replicated"))
    assert {bool(plan.dilation) for plan in plans} == {bool(plan.problem.constants) for plan in plans} == {True, False}
    assert any(plan.problem.split for plan in plans) and any(plan.degree == plan.problem.world for plan in plans)
    assert any(1 < plan.degree < plan.problem.world for plan in plans)
    assert any(plan.heads[0] != plan.heads[1] for plan in plans)
