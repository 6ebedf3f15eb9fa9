"""The choice of a transport: how keys of other ranks are received and their gradients returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ringpass.ops.transports.allgather import AllGather
from ringpass.ops.transports.base import Transport
from ringpass.ops.transports.dilated import DilatedTransport
from ringpass.ops.transports.ring import RingTransport
from ringpass.schedule.site import Site


@dataclass(frozen=True)
class TransportKind:
    """A way for keys to reach other ranks and for their gradients to return.

    plain: (site, k, v) -> the transport of a site.
    dilated: (site, k, v) -> that of a dilated site; None: dilation is refused.
    """

    plain: Callable[[Site, Tensor, Tensor], Transport]
    dilated: Callable[[Site, Tensor, Tensor], Transport] | None = None


TRANSPORTS: Mapping[str, TransportKind] = {
    "ring": TransportKind(RingTransport, DilatedTransport),
    "allgather": TransportKind(AllGather),
}
"""The values of the option `comm`."""


def make_transport(site: Site, k: Tensor, v: Tensor, name: str = "") -> Transport:
    """The transport of a site, from the local k (B, G, Lk, D) and v (B, G, Lk, Dv); `name`: as profilers show it."""
    kind = TRANSPORTS[site.comm]
    make = kind.dilated if site.dilation else kind.plain
    assert make is not None, "the options refuse dilation with this transport"
    made = make(site, k, v)
    made.name = name
    return made
