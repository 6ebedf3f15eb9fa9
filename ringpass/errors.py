"""The errors that users see.  Each message says what was expected, what was given, and what to do about it.

All but ScheduleError and PeerError are also ValueErrors; PeerError is also a RuntimeError.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RingpassError(Exception):
    """Base class of all errors of ringpass: catch it to catch any of them."""


class OptionError(RingpassError, ValueError):
    """An option is unknown, has an invalid value, or contradicts another."""


class InputError(RingpassError, ValueError):
    """An input of a compiled model, or an argument of `ringpass.sharded`, `local` or `tokens_of`, is not valid."""


class ParseError(RingpassError, ValueError):
    """A text is no mask expression or no name of a layout, or is longer or deeper than ringpass writes them."""


class UnsupportedError(RingpassError, ValueError):
    """Something in the model cannot be partitioned exactly, or, under the option `strict`, not without a gather."""


class MismatchError(RingpassError, ValueError):
    """The ranks of a ring differ in the model, the options, the shapes, the batch or the weights.

    All ranks raise it, before any token is sent.
    """


class PeerError(RingpassError, RuntimeError):
    """Another rank of the ring died, stopped, or did not arrive within the time limit."""


class ScheduleError(RingpassError, AssertionError):
    """A schedule fails its proof: a defect of ringpass, not of its user.  Please report it."""


def did_you_mean(given: object, valid: Iterable[str], cutoff: float = 0.6) -> str:
    """The part of a message that names the nearest valid name, if there is one.

    >>> did_you_mean("zigzak", ["contiguous", "zigzag"])
    " (did you mean 'zigzag'?)"
    """
    near = difflib.get_close_matches(str(given), [*valid], n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""
