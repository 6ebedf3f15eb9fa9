"""A thread that ends a wait for a rank which has told that it does not go on.

gloo ends a wait for an exchange in one way alone, by its limit, so the thread that waits cannot look around.  While it
does, this one looks once a second at the notices of the others, and breaks off the ring's process group if it finds
one.

    end_waits_in_vain()      # starts the thread, once in a process
    ring.waits_since         # when the wait began that the ring is in; None: it is in none
"""

from __future__ import annotations

import logging
import threading
import time
from functools import cache

from ringpass.comm.lost import LOOK, break_off
from ringpass.comm.notices import notices
from ringpass.comm.ring import RINGS, Ring

log = logging.getLogger(__name__)


@cache
def end_waits_in_vain() -> None:
    """Sees to it that waits of any ring of this process end when another rank has given up."""
    threading.Thread(target=_look_on, name="ringpass waits", daemon=True).start()


def _look_on() -> None:
    while True:
        time.sleep(LOOK)
        for ring in list(RINGS.values()):
            try:
                _look_at(ring)
            except Exception:  # of a group that is destroyed meanwhile; this thread serves all others
                log.debug("a look at the notices of ring %s failed", ring.name, exc_info=True)


def _look_at(ring: Ring) -> None:
    since = ring.waits_since
    if since is not None and time.monotonic() - since > LOOK:
        carrier = ring.carrier
        if notices(ring, waiting=True) and ring.waits_since == since and ring.carrier is carrier:
            break_off(carrier)
