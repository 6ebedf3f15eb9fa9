"""Says which rank waits for whom, long before the limit ends the wait.

    >>> import ringpass
    >>> stop = ringpass.watch(30)        # warn of each wait that lasts longer than 30 s
    >>> stop()

A thread looks at the waits of this process (`ringpass.metrics` knows them) a few times in that span.  Of a wait that
lasts too long it says once, as a warning of the logger `ringpass.stalls`, where it is, which ranks have not come to
this call, and where the others wait:

    rank 1 has waited 30 s for site0 receive_step1_from_rank0, in call 12: rank 0 is in call 12 and waits for nobody (it
    computes, is stopped, or died); rank 2 is in call 12 and waits for site0 receive_step1_from_rank1

What the others say comes from the store, where each rank that watches writes a wait of half the span.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.distributed_c10d import Store

from ringpass import metrics
from ringpass.comm.ring import RINGS, Ring
from ringpass.comm.store import text_under
from ringpass.errors import OptionError

log = logging.getLogger(__name__)
LOOKS = 8  # in the span of seconds


def watch(seconds: float = 30.0) -> Callable[[], None]:
    """Warns, from now on, of each wait for other ranks that lasts longer than `seconds`; returns what ends that.

        stop = ringpass.watch(30)

    Call it on every rank: a rank that does not watch is said to wait for nobody.  It enables `ringpass.metrics`,
    where "stalls" counts the warnings, and "waiting" has the waits that last now.  On a GPU the host waits in few
    places (where ranks compare calls, and for host copies), so a stall shows there.  Raises OptionError unless
    `seconds` is above 0.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise OptionError(f"watch expects a number of seconds above 0, such as 30, got {seconds!r}")
    metrics.enable()
    watcher = Watcher(seconds)
    threading.Thread(target=watcher.run, name="ringpass.watch", daemon=True).start()
    return watcher.ended.set


class Watcher:
    """Looks at this process's waits; `look` does it once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ended = threading.Event()
        self.told: set[tuple[int, float]] = set()  # waits, by thread and start, that the store has
        self.warned: set[tuple[int, float]] = set()
        self.stores: dict[str, tuple[Store, Store]] = {}  # by ring: its store, and our connection to that

    def run(self) -> None:
        """Looks until it is ended."""
        while not self.ended.wait(self.seconds / LOOKS):
            self.look()

    def look(self) -> None:
        """Tells the store of waits that last half the span, and warns of those that last all of it."""
        recorder = metrics.recorder.active
        waits = dict(recorder.open) if recorder else {}
        now = time.monotonic()
        for thread, (label, since) in waits.items():
            wait = (thread, since)
            if now - since >= self.seconds / 2 and wait not in self.told:
                self.told.add(wait)
                self._say(self._tell, label)
            if now - since >= self.seconds and wait not in self.warned:
                self.warned.add(wait)
                if recorder:
                    recorder.stalls += 1
                self._say(self._warn, label, now - since)
        over = {wait for wait in self.told if waits.get(wait[0], ("", 0.0))[1] != wait[1]}
        if over:
            self.told, self.warned = self.told - over, self.warned - over
            self._say(self._tell, "")

    def _say(self, act: Callable[..., None], *about: Any) -> None:
        """Does `act(ring, *about)` for the ring of this process's last call, in which it waits."""
        rings = [ring for ring in RINGS.values() if ring.world > 1]
        if not rings:
            return
        ring = max(rings, key=lambda ring: ring.since)
        try:
            act(ring, *about)
        except RuntimeError as error:  # the store went with the rank that hosted it
            log.warning("rank %d waits, and the store of its ring does not answer: %s", ring.rank, error)

    def _store(self, ring: Ring) -> Store:
        """A connection of its own: the ring's may be blocked by the very wait.  Another one for a new process group."""
        store: Any = ring.store
        held = self.stores.get(ring.name)
        if held is None or held[0] is not store:
            held = self.stores[ring.name] = store, store.clone()
        return held[1]

    def _tell(self, ring: Ring, label: str) -> None:
        self._store(ring).set(f"waits/{ring.rank}", label)

    def _warn(self, ring: Ring, label: str, seconds: float) -> None:
        others = "; ".join(self._of(ring, rank) for rank in range(ring.world) if rank != ring.rank)
        where = f"for {awaited(label)}, in call {ring.calls}"
        log.warning("rank %d has waited %.3g s %s: %s", ring.rank, seconds, where, others)

    def _of(self, ring: Ring, rank: int) -> str:
        """What the store says of another rank."""
        at, label = (text_under(self._store(ring), f"{what}/{rank}") for what in ("at", "waits"))
        call = int(at.partition(" ")[0] or 0)
        behind = " (behind)" if call < ring.calls else ""
        what = f"waits for {awaited(label)}" if label else "waits for nobody (it computes, is stopped, or died)"
        return f"rank {rank} is in call {call}{behind} and {what}"


def awaited(label: str) -> str:
    """What a wait of this label waits for.

    >>> awaited("wait for site0 receive_step1_from_rank0"), awaited("compare the ranks")
    ('site0 receive_step1_from_rank0', 'the other ranks (compare the ranks)')
    """
    return label.removeprefix("wait for ") if label.startswith("wait for ") else f"the other ranks ({label})"
