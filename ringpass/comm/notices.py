"""What a rank tells the others, through the store, when it gives up: a call, a compilation, or altogether.

    give_notice(ring, "gave up the forward of call 12 by OutOfMemoryError: ..")      # a rank that fails
    notices(ring)                                                                    # one that waits in vain

A notice is one key of the store per rank, beside one that counts all of them.  It is withdrawn when the rank begins its
next call.  Notices are numbered on each rank, and a rank that has given as many itself does not heed another's: what
failed on all ranks is no news.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from textwrap import shorten
from types import TracebackType

from ringpass.comm.ring import RINGS, Ring, registered
from ringpass.comm.store import SilentStoreError
from ringpass.errors import PeerError

LONGEST = 400  # characters of a notice


def give_notice(ring: Ring, text: str) -> None:
    """Tells the other ranks of a ring why this one does not go on; nothing if it has told so before, or is alone."""
    if ring.pg is None or ring.world == 1 or ring.noticed:
        return
    ring.noticed, ring.notices = True, ring.notices + 1
    with suppress(PeerError):  # without a store there is nobody to tell
        ring.store.set(f"notice/{ring.rank}", f"{ring.notices} {text[:LONGEST]}")
        ring.store.add("notices", 1)


def withdraw_notice(ring: Ring) -> None:
    """Takes back what this rank has told, since it goes on."""
    if ring.noticed:
        ring.noticed = False
        ring.store.delete([f"notice/{ring.rank}"])


def notices(ring: Ring, waiting: bool = False) -> list[str]:
    """What other ranks have told, by rank, or that the store is lost.

    `waiting`: the rank waits on if there are none; a store that is silent is none, since it may answer yet.
    """
    if ring.pg is None or ring.world == 1:
        return []
    others = [rank for rank in range(ring.world) if rank != ring.rank]
    try:
        number_of_all = int(ring.store.get("notices") or 0)
        if number_of_all == ring.heard:  # one request a second of each rank that waits, for any number of ranks
            return []
        given = ring.store.get_all(f"notice/{rank}" for rank in others)
        met = ring.store.get_all(f"gave_up/{ring.epoch}/{rank}" for rank in others)
    except PeerError as error:
        return [] if waiting and isinstance(error, SilentStoreError) else [str(error)]
    found = []
    for rank, notice, gave_up in zip(others, given, met, strict=True):
        number, _, text = notice.partition(" ")
        news = text if text and int(number) > ring.notices else gave_up.partition(" ")[2]
        found += [f"rank {rank} {news}"] if news else []
    ring.heard = ring.heard if found else number_of_all
    return found


def described(error: BaseException) -> str:
    """An error as a notice shows it: its type, the first line of its text, and the line of code that raised it."""
    first = shorten((str(error).strip().splitlines() or [""])[0], 200, placeholder=" ..")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    where = f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {first}{where}"


@contextmanager
def telling(ring: Ring, what: str) -> Iterator[None]:
    """Tells the other ranks of an exception that leaves the block: `what` happened, and by which error."""
    try:
        yield
    except Exception as error:
        give_notice(ring, f"{what} by {described(error)}")
        raise


@cache
def notice_when_python_ends() -> None:
    """Lets a process that ends by an exception tell the other ranks which, and where it was raised."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)  # first: the store may not answer
        for ring in list(RINGS.values()):
            if registered(ring.name) is ring.pg:  # its process group was not destroyed
                give_notice(ring, f"ended after call {ring.calls} by {described(error)}")

    sys.excepthook = hook
