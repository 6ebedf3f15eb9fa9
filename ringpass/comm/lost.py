"""Waits with the limit of the ring, and the error of a wait that fails: what was under way, with whom, and why.

await_work(works, ring, device)                           # within the option `timeout`
raise lost(peers, error, ring, label) from error          # `exchange of step 2 of attention 3 (layers.3.attn) with
                                                          # rank 1 broke in the backward of call 12 ...`
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from ringpass.comm.flight_recorder import recording
from ringpass.comm.notices import notices
from ringpass.comm.ring import Ring
from ringpass.errors import PeerError

LOOK = 1.0
"""Seconds between two looks, while a rank waits long, at whether another one has given up."""
_EXCHANGE = re.compile(r"site(\d+) receive(_gradients)?_step(\d+)")
_OF_SITE = re.compile(r"site(\d+) ?(.*)")


AT_ONCE = timedelta(milliseconds=1)


class GaveUpError(RuntimeError):
    """Another rank has told that it does not go on."""


def await_work(works: Sequence[dist.Work], ring: Ring | None, device: torch.device, between_two: bool = False) -> None:
    """Waits for what was started, on the host at most for the limit of the ring; on a GPU, the device waits.

    While it waits, it looks every second whether another rank has given up; `between_two`: exchanges, of which gloo
    allows one wait alone, and `comm.waits` looks.  Raises RuntimeError if a rank is lost or the limit passes.
    """
    if ring is None or ring.pg is None or device.type != "cpu":
        for work in works:
            work.wait()
        return
    begun = time.monotonic()
    end = begun + ring.timeout
    if not between_two:
        for work in works:
            _await_collective(work, ring, end)
        return
    ring.waits_since = begun
    try:
        for work in works:
            work.wait(timedelta(seconds=max(0.001, end - time.monotonic())))
    finally:
        ring.waits_since = None


def _await_collective(work: dist.Work, ring: Ring, end: float) -> None:
    while True:
        left = end - time.monotonic()
        try:
            work.wait(timedelta(seconds=max(0.001, min(LOOK, left))))
            return
        except RuntimeError as error:
            if work.is_completed():  # as the limit passed, or with an error, which this wait raises
                work.wait()
                return
            told = notices(ring, waiting=True)
            if told or left <= LOOK:
                break_off(ring.carrier)
                if told:
                    raise GaveUpError("; ".join(told)) from error
                raise


def lost(
    peers: tuple[int | None, ...], error: Exception, ring: Ring | None = None, label: str = "", kind: str = ""
) -> PeerError:
    """The error for an exchange that broke with `error`; `peers`: the ranks at its other ends, if known.

    `label`: what the exchange is, as profilers show it; `kind`: which collective, if it is one.
    """
    names = ", ".join(str(p) for p in sorted({p for p in peers if p is not None}))
    transfer = " of ".join(filter(None, (kind, what(label, ring) if label or not kind else "")))
    broke = f"{transfer} with {f'rank {names}' if names else 'the other ranks'} broke"
    if ring is None:
        told, where, limit = "", "in the ring", "in time"
    else:
        told = str(error) if isinstance(error, GaveUpError) else "; ".join([*_ahead(ring), *notices(ring)])
        where, limit = f"in {ring.running}", f"within {ring.timeout:g} s (option 'timeout')"
    cause = told or (
        f"a rank died, raised an error, or did not arrive {limit}: look for the first error in the output of the "
        f"others. {first_sentence(error)}"
    )
    return PeerError(f"{broke} {where}: {cause}{recording()}")


def _ahead(ring: Ring) -> list[str]:
    """Which ranks have begun more calls than this one."""
    if ring.pg is None:
        return []
    with suppress(PeerError):
        return [f"rank {r} went on to call {n} without it" for r, n in enumerate(ring.begun()) if n > ring.calls]
    return []


def first_sentence(error: Exception) -> str:
    """What an error of gloo says, without its advice."""
    return str(error).partition(" This is typically caused")[0]


def what(label: str, ring: Ring | None) -> str:
    """What a label of `ringpass.profiling` names, for a message.

    >>> what("site3 receive_step2_from_rank1", None)
    'exchange of step 2 of attention 3'
    """
    if found := _EXCHANGE.match(label):
        kind = "exchange of gradients" if found[2] else "exchange"
        return f"{kind} of step {found[3]} of {_site(int(found[1]), ring)}"
    if found := _OF_SITE.match(label):
        return f"{found[2].replace('_', ' ') or 'exchange'} of {_site(int(found[1]), ring)}"
    return label or "exchange"


def _site(index: int, ring: Ring | None) -> str:
    sites = ring.running.sites if ring is not None else ()
    path = sites[index] if index < len(sites) else ""
    return f"attention {index} ({path})" if path else f"attention {index}"


def break_off(pg: dist.ProcessGroup) -> None:
    """Ends all that is under way on a group of gloo, here with an error, and soon on the other ranks too.

    Otherwise a process whose collective waits for a rank that never comes does not end before the group's own timeout.
    """
    if "gloo" not in str(dist.get_backend_config(pg)) or pg.size() == 1:
        return
    for distance in range(1, pg.size()):  # a wait of gloo that runs out closes all connections of its group
        with suppress(RuntimeError, ValueError):  # that connection is closed already
            waiting = dist.irecv(torch.empty(1), group=pg, group_src=(pg.rank() + distance) % pg.size(), tag=2**30)
            if waiting is not None:
                waiting.wait(AT_ONCE)
