"""The errors that users see.  Each message says what was expected, what was given, and what to do."""


class RingpassError(Exception):
    """Base of every error that ringpass raises on purpose."""


class OptionError(RingpassError, ValueError):
    """An option is unknown, has an invalid value, or contradicts another."""


class InputError(RingpassError, ValueError):
    """A tensor passed to a function of ringpass is not valid for it."""


class UnsupportedError(RingpassError, ValueError):
    """The graph holds something that ringpass cannot partition, and `strict` (or exactness) forbids gathering it."""


class MismatchError(RingpassError, ValueError):
    """The ranks of a ring do not agree: on the model, the options, the shapes, the batch or the weights."""


class PeerError(RingpassError, RuntimeError):
    """Another rank of the ring died, stopped, or did not arrive within the time limit."""


class ScheduleError(RingpassError, AssertionError):
    """A schedule fails its proof.  A defect of ringpass, never of its user."""
