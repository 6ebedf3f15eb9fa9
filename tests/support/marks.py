"""Marks for single cases of parametrised tests."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*case: Any) -> Any:
    """A case of a parametrised test that only `-m slow` runs."""
    return pytest.param(*case, marks=pytest.mark.slow)
