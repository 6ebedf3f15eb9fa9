"""Checks of options' values, for `ringpass.config`: each raises an OptionError that says what was expected.

>>> one_of("layout", "zigzak", ("striped", "zigzag"))
Traceback (most recent call last):
ringpass.errors.OptionError: option 'layout' must be one of 'striped', 'zigzag', got 'zigzak' (did you mean 'zigzag'?)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ringpass.errors import OptionError, did_you_mean

LONGEST_WAIT = 31_536_000  # seconds, a year: what the clocks below torch.distributed hold
TAKEN = {"post_grad_custom_pre_pass": "ringpass lowers its attention there"}
"""Options of Inductor that ringpass sets itself, and what for."""


def one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    """Refuses anything but the `valid` names."""
    if not isinstance(value, str) or value not in valid:
        hint = did_you_mean(value, valid)
        raise OptionError(f"option {name!r} must be one of {', '.join(map(repr, valid))}, got {value!r}{hint}")


def require(name: str, value: object, holds: bool, what: str) -> None:
    """Refuses a value unless `holds`; `what`: what was expected."""
    if not holds:
        raise OptionError(f"option {name!r} must be {what}, got {value!r}")


def require_number(name: str, value: object, least: float, most: float, what: str) -> None:
    """Refuses anything but a number from `least` to `most`, NaN too."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(name, value, number and least <= float_or_infinite(value) <= most, what)


def float_or_infinite(value: Any) -> float:
    """`value` as a float; infinite for an int beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def path_of(name: str, value: object, what: str) -> str | None:
    """The path that a text or `os.PathLike` names, None for None; refuses anything else, and no text at all."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    require(name, value, path is None or (isinstance(path, str) and path != "" and "\0" not in path), what)
    return None if path is None else str(path)


def require_selectors(name: str, selectors: Iterable[object]) -> None:
    """Refuses what selects no attention: anything but indices from 0, paths of modules and functions."""
    for selector in selectors:
        index = type(selector) is int and selector >= 0
        if not index and not isinstance(selector, str) and not callable(selector):
            raise OptionError(
                f"option {name!r} takes indices in graph order from 0, module paths such as 'layers.*.attn', and "
                f"functions of a site, got {selector!r}"
            )


def require_inductor(options: Mapping[Any, Any]) -> None:
    """Refuses what Inductor has no option for, values of another type, and those options that ringpass sets itself."""
    if not options:
        return
    import torch._inductor.config

    config: Any = torch._inductor.config
    known = torch._inductor.list_options()
    for name, value in options.items():
        if name not in known:
            raise OptionError(
                f"option 'inductor': Inductor has no option {name!r}{did_you_mean(name, known)}; "
                "torch._inductor.list_options() lists them"
            )
        if name in TAKEN:
            raise OptionError(f"option 'inductor': {name!r} cannot be set, since {TAKEN[name]}: drop it")
        kind = config.get_type(name)
        if isinstance(kind, type) and not isinstance(value, kind):
            raise OptionError(f"option 'inductor': {name!r} must be of type {kind.__name__}, got {value!r}")
