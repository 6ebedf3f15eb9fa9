"""Schedules that are made in calls are proved: some of them by default, all by an option, alike on all ranks."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ringpass import Dilation
from ringpass.errors import ScheduleError
from ringpass.masks.constants import ConstantArray
from ringpass.schedule import program as schedules
from ringpass.schedule import run_time_proof
from ringpass.schedule.run_time_proof import EVERY, FIRST, prove_call
from ringpass.schedule.site import Site, lookup, register
from ringpass.schedule.site_proof import prove_problems
from ringpass.schedule.tiles import tiling
from tests.support.model_parity import compiled
from tests.support.process_ranks import Workers
from tests.support.sites import site

TOKENS = 24
DOCUMENTS = "k <= q & x0[b, q] == x0[b, k]"


@pytest.fixture(autouse=True)
def fresh() -> Any:
    with patch.dict(run_time_proof.CALLS, clear=True):
        yield
    run_time_proof._prove.cache_clear()


def called(planned: Site, number: int) -> Site:
    """What a call with other documents runs."""
    end = number % (TOKENS - 1) + 1
    return planned.with_constants([ConstantArray([[0] * end + [1] * (TOKENS - end)])])


def proved(planned: Site, calls: int) -> list[int]:
    key = register(planned)
    return [n for n in range(calls) if prove_call(key, planned, called(planned, n), kv_heads=1)]


def test_some_calls_are_proved_the_same_on_all_ranks() -> None:
    found = [proved(site(DOCUMENTS, TOKENS, "zigzag", r, 3, pruning=(0,)), 2 * EVERY + 2) for r in range(3)]
    assert found == [[*range(FIRST), EVERY, 2 * EVERY]] * 3


def test_all_calls_are_proved_by_option() -> None:
    assert proved(site(DOCUMENTS, TOKENS, "zigzag", 0, 2, pruning=(0,), prove="all"), 40) == [*range(40)]


def test_what_was_planned_is_not_proved_again() -> None:
    planned = site("k <= q", TOKENS, "zigzag", 0, 2)
    assert not prove_call(register(planned), planned, planned, kv_heads=1)


def test_lengths_that_were_not_planned_are_proved_once() -> None:
    planned = site("k <= q", TOKENS, "zigzag", 0, 2, prove="all", dilation=Dilation((8, 24), (1, 2)), heads=2)
    key = register(planned)
    with patch.object(run_time_proof, "prove_problems", wraps=prove_problems) as proving:
        for length in (32, 33, 32, 33, 32):
            assert prove_call(key, planned, lookup(key, length, length), kv_heads=2)
    assert proving.call_count == 2


@pytest.mark.parametrize(("prove", "refused"), [("sample", False), ("all", True)])
def test_a_wrong_schedule_is_found_when_it_is_its_turn(prove: str, refused: bool) -> None:
    planned = site(DOCUMENTS, TOKENS, "zigzag", 0, 2, pruning=(0,), prove=prove)
    key = register(planned)
    for n in range(FIRST):
        prove_call(key, planned, called(planned, n), kv_heads=1)
    made = called(planned, 17)
    whole = tiling(made.problem)
    less = whole.take(slice(1, None))
    with patch.object(schedules, "tiling", lambda problem: less):
        if refused:
            with pytest.raises(ScheduleError, match=r"rank \d"):
                prove_call(key, planned, made, kv_heads=1)
        else:
            assert not prove_call(key, planned, made, kv_heads=1)


class Packed(nn.Module):
    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        allowed = ids[:, None, :, None] == ids[:, None, None, :]
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=allowed)


def counted(group: dist.ProcessGroup, prove: str) -> list[bool]:
    """Whether each of eight calls, with other documents each, was proved on this rank."""
    run = compiled(Packed(), group, runtime_pruning=True, prove=prove, compiler="aot_eager", tile=4)
    found: list[bool] = []
    real = run_time_proof.prove_call

    def watching(*args: Any, **more: Any) -> bool:
        found.append(real(*args, **more))
        return found[-1]

    with patch("ringpass.ops.attention.prove_call", watching), torch.no_grad():
        for n in range(8):
            run(torch.ones(1, 1, TOKENS, 4), (torch.arange(TOKENS) > n)[None].long())
    return found


def test_calls_on_ranks(workers: Workers) -> None:
    assert workers.run(counted, 2, "sample") == [[True] * FIRST + [False] * (8 - FIRST)] * 2
    assert workers.run(counted, 2, "all") == [[True] * 8] * 2
