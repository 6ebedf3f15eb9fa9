"""The order in which a rank starts and awaits the exchanges of a schedule, forward and backward.

    >>> for event in order([1, 3], backward=True): print(event)
    start keys 1
    wait keys 1
    start gradients 1
    start keys 3
    wait keys 3
    wait gradients 1
    start gradients 3
    wait gradients 3

Gloo matches messages by tag, so that two ranks may start the same exchanges in different orders.  NCCL does not: it
runs the exchanges of a process group one after the other in the order in which a rank starts them, and each waits until
both ends are at it.  So all ranks start them in the order of one global *key*: keys of step t at 2t, gradients of step
t at 2t + 3, one step behind.  A rank whose next step is t + 1 starts its keys (2t + 2) before the tiles of step t,
which hide them; a rank that leaves out step t + 1 starts the gradients of step t first.

Contract: the starts of a rank ascend by key, and both ends of an exchange have one key.  Then no exchange waits for one
with a larger key, and nothing waits in a circle, under either engine (`schedule.proof` proves it for both).  Two
exchanges are in flight at most: keys, and in a backward the gradients of the step before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KEYS, GRADIENTS = "keys", "gradients"


@dataclass(frozen=True)
class Event:
    """A rank starts, or waits for, the exchange of keys or of gradients of the step with this shift."""

    action: str  # start or wait
    what: str  # keys or gradients
    shift: int

    @property
    def key(self) -> int:
        """Its place in the global order of starts."""
        return 2 * self.shift + (3 if self.what == GRADIENTS else 0)

    def __str__(self) -> str:
        return f"{self.action} {self.what} {self.shift}"


@dataclass(frozen=True)
class Ends:
    """One exchange of a rank: keys go to rank `dst` and come from `src`, gradients the other way; None: nothing
    goes."""

    shift: int
    dst: int | None
    src: int | None

    @property
    def peers(self) -> set[int]:
        """The other ranks that take part."""
        return {rank for rank in (self.dst, self.src) if rank is not None}


def starts_early(shift: int, following: int, backward: bool) -> bool:
    """Whether the keys of step `following` are started before the tiles of step `shift`, which then hide them.

    In a forward always; in a backward if they come before the gradients of step `shift` in the global order.
    """
    if not backward or shift == 0:  # gradients of local keys go nowhere
        return True
    return Event("start", KEYS, following).key < Event("start", GRADIENTS, shift).key


def order(shifts: Sequence[int], backward: bool) -> Iterator[Event]:
    """The events of a rank whose steps with exchanges have these shifts, ascending, as `ringpass.ops.ring` has them."""
    pending: int | None = None
    for shift, following in zip([0, *shifts], [*shifts, None], strict=True):
        if shift:
            yield Event("wait", KEYS, shift)
        early = following is not None and starts_early(shift, following, backward)
        if following is not None and early:
            yield Event("start", KEYS, following)
        if backward and shift:
            if pending is not None:
                yield Event("wait", GRADIENTS, pending)
            yield Event("start", GRADIENTS, shift)
            pending = shift
        if following is not None and not early:
            yield Event("start", KEYS, following)
    if pending is not None:
        yield Event("wait", GRADIENTS, pending)
