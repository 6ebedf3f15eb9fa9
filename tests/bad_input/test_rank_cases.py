"""Odd inputs and odd uses equal one device, or end in the error that their case names, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.bad_input.all_cases import CASES
from tests.bad_input.rank_cases import ONE_DEVICE, ended
from tests.support.process_ranks import Workers


def outcome(group: dist.ProcessGroup, name: str) -> tuple[str, str]:
    """How the case ended on this rank."""
    return ended(group, CASES[name])


def runs() -> list[Any]:
    """(case, ranks): fast cases on their last number of ranks by default, all on all with `-m slow`."""
    return [
        pytest.param(name, ranks, marks=() if case.fast and ranks == 2 else pytest.mark.slow)
        for name, case in CASES.items()
        for ranks in case.ranks
    ]


@pytest.mark.parametrize(("name", "ranks"), runs())
def test_as_one_device_or_a_named_error(workers: Workers, name: str, ranks: int) -> None:
    case = CASES[name]
    for rank, (ending, said) in enumerate(workers.run(outcome, ranks, name)):
        assert ending == (ONE_DEVICE if ranks in case.as_one_device else case.outcome), (rank, said)
        assert ending == ONE_DEVICE or case.said in said, (rank, said)
