"""request: the arguments of `ringpass.explain`, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNNAMED = "FILE:FACTORY"
"""Where a command names what makes the model."""


@dataclass(frozen=True)
class Request:
    """The arguments of `ringpass.explain`."""

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    world: int
    rank: int
    options: Mapping[str, Any]
    machine: Any
    device: str | int | None
    train: bool | None
