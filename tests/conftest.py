"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.workers import Workers


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Five gloo ranks, started by the first test that uses them and kept for all.

    >>> def test_sum(workers):
    ...     assert workers.run(sum_of_ranks, 3) == [3, 3, 3]
    """
    with Workers(ranks=5) as pool:
        yield pool
