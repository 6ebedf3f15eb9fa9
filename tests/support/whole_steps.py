"""Masked steps as whole calls on a CPU: the choice that a CUDA device would make, with torch's dense arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from ringpass.kernels import flex


@contextmanager
def whole_steps() -> Iterator[list[int]]:
    """Within it, steps that only a mask acts on run whole; gives a list with the number of rows of each call."""
    rows: list[int] = []
    forward, backward = flex.flex_step, flex.flex_step_backward

    def noted(*given: object) -> object:
        rows.append(given[0].shape[2])  # type: ignore[attr-defined]
        return forward(*given)  # type: ignore[arg-type]

    def noted_backward(*given: object) -> object:
        rows.append(given[0].shape[2])  # type: ignore[attr-defined]
        return backward(*given)  # type: ignore[arg-type]

    with (
        patch.object(flex, "takes_step", lambda device, dtype, width: True),
        patch.object(flex, "flex_step", noted),
        patch.object(flex, "flex_step_backward", noted_backward),
    ):
        yield rows
