"""The order in which a rank starts and awaits the exchanges of a schedule, and reads and frees what they bring.

    >>> print(*order([1, 3], backward=True), sep="; ")  # doctest: +NORMALIZE_WHITESPACE
    start keys 1; read keys 0; wait keys 1; read keys 1; free keys 1; start gradients 1; start keys 3; wait keys 3;
    read keys 3; free keys 3; wait gradients 1; start gradients 3; read gradients 1; free gradients 1;
    wait gradients 3; read gradients 3; free gradients 3

Gloo matches messages by tag, so that two ranks may start the same exchanges in different orders.  NCCL does not: it
runs the exchanges of a process group one after the other in the order in which a rank starts them, and each waits until
both ends are at it.  So all ranks start them in the order of one global *key*: keys of step t at 2t, gradients of step
t at 2t + 3, one step behind.  A rank whose next step is t + 1 starts its keys (2t + 2) before the tiles of step t,
which hide them; a rank that leaves out step t + 1 starts the gradients of step t first.

An exchange has a buffer for what it brings, from its start until it is freed.  The tiles of a step read its keys, the
sums of gradients those that came back; the local keys, those of step 0, are nobody's to free.

Contract: the starts of a rank ascend by key, and both ends of an exchange have one key.  Then no exchange waits for one
with a larger key, and nothing waits in a circle, under either engine.  A buffer is read after its wait and before it is
freed, and freed once.  Two exchanges are in flight at most: keys, and in a backward the gradients of the step before.
`schedule.order_proof` proves all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KEYS, GRADIENTS = "keys", "gradients"
START, WAIT, READ, FREE = "start", "wait", "read", "free"


@dataclass(frozen=True)
class Event:
    """A rank starts, or waits for, the exchange of keys or gradients of the step with this shift, or reads or frees
    what it brought."""

    action: str  # start, wait, read or free
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
    return Event(START, KEYS, following).key < Event(START, GRADIENTS, shift).key


def order(shifts: Sequence[int], backward: bool) -> Iterator[Event]:
    """The events of a rank whose steps with exchanges have these shifts, ascending, as `ringpass.ops.ring` has them."""
    pending: int | None = None
    for shift, following in zip([0, *shifts], [*shifts, None], strict=True):
        if shift:
            yield Event(WAIT, KEYS, shift)
        early = following is not None and starts_early(shift, following, backward)
        if following is not None and early:
            yield Event(START, KEYS, following)
        yield Event(READ, KEYS, shift)
        if shift:
            yield Event(FREE, KEYS, shift)
        if backward and shift:
            if pending is not None:
                yield Event(WAIT, GRADIENTS, pending)
            yield Event(START, GRADIENTS, shift)
            if pending is not None:
                yield from _added(pending)
            pending = shift
        if following is not None and not early:
            yield Event(START, KEYS, following)
    if pending is not None:
        yield Event(WAIT, GRADIENTS, pending)
        yield from _added(pending)


def _added(shift: int) -> Iterator[Event]:
    """The gradients that came back of a step, added to those of the local keys."""
    yield Event(READ, GRADIENTS, shift)
    yield Event(FREE, GRADIENTS, shift)
