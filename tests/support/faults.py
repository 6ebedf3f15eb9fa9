"""Seeded faults under a proof: those that change anything are refused, and the message names a rank that they touch.

    caught_and_named(12, range(500), attempt)

`attempt(seed)` puts one fault somewhere.  None: there is no place for it, or executing it changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest

from ringpass.errors import ScheduleError


@dataclass(frozen=True)
class Attempt:
    """`check` must raise a message that matches `says`, and names one of `ranks`; none: which rank is not asked."""

    check: Callable[[], object]
    says: str
    ranks: frozenset[int] = frozenset()


def caught_and_named(each: int, seeds: Iterable[int], attempt: Callable[[int], Attempt | None]) -> None:
    """Makes attempts until `each` faults were caught; fails if one is not, or if `seeds` have too few."""
    caught = 0
    for seed in seeds:
        made = attempt(seed)
        if made is None:
            continue
        with pytest.raises(ScheduleError, match=made.says) as error:
            made.check()
        named = {int(rank) for rank in re.findall(r"rank (\d+)", str(error.value))}
        assert not made.ranks or made.ranks & named, f"seed {seed}, ranks {sorted(made.ranks)}: {error.value}"
        caught += 1
        if caught == each:
            return
    pytest.fail(f"only {caught} faults change anything")
