"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.process_ranks import Workers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Five gloo ranks, started by the first test that uses them and kept for all.

    >>> def test_sum(workers):
    ...     assert workers.run(sum_of_ranks, 3) == [3, 3, 3]
    """
    with Workers(ranks=5) as pool:
        yield pool
