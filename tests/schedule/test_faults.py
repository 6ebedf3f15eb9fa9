"""The proof under attack: seeded faults in random plans are caught, and the message names the place.

Whether a fault changes anything is not the proof's to say: `tests.support.executed` executes the programs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from random import Random

import pytest

from ringpass.errors import ScheduleError
from ringpass.schedule import proof as verify
from ringpass.schedule.program import program
from ringpass.schedule.proof import check
from tests.support.executed import execute
from tests.support.marks import slow
from tests.support.programs import Programs
from tests.support.random_plans import random_plan
from tests.support.schedule_faults import FAULTS, seeded

EACH, MANY = 12, 100  # faults of each kind: in the default run, and with -m slow
PLACE = re.compile(r"step \d+|tile |token |queries|query \d|keys|the program is another")
"""What a message says beside the rank."""


@lru_cache(maxsize=256)
def programs_of(seed: int) -> Programs:
    """The programs of all ranks of one schedule of a random plan."""
    problem = Random(seed).choice(random_plan(seed).problems)
    return [program(problem, rank) for rank in range(problem.world)]


def refused(run: Callable[[], object]) -> str:
    """The message of the proof; "" if it lets the fault pass."""
    try:
        run()
    except ScheduleError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("each", [EACH, slow(MANY)])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_changes_anything_is_caught_and_named(fault: str, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both where coverage is checked pair by pair and where it is checked by intervals."""
    caught, tried = 0, 0
    first = 0 if each == EACH else 10_000
    for seed, (wrong, ranks), right in seeded(fault, count(first), programs_of):
        tried += 1
        assert tried < 40 * each, f"only {caught} of {tried} faults change anything"
        if execute(wrong) == execute(right):
            continue
        for brute in (verify.BRUTE, 0):
            with monkeypatch.context() as patched:
                patched.setattr(verify, "BRUTE", brute)
                message = refused(lambda wrong=wrong: check(wrong))  # type: ignore[misc]
            assert message, f"seed {seed}, pair by pair: {bool(brute)}: passes"
            named = {int(rank) for rank in re.findall(r"ranks? (\d+)", message)}
            assert named & ranks and PLACE.search(message), f"seed {seed}, ranks {ranks}: {message}"
        caught += 1
        if caught == each:
            return
