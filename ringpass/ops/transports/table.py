"""The choice of a transport: how keys of other ranks are received and their gradients returned."""

from __future__ import annotations

from torch import Tensor

from ringpass.ops.transports.allgather import AllGather
from ringpass.ops.transports.base import Transport
from ringpass.ops.transports.dilated import DilatedTransport
from ringpass.ops.transports.ring import RingTransport
from ringpass.schedule.site import Site


def transport(site: Site, k: Tensor, v: Tensor) -> Transport:
    """The transport of a site."""
    if site.dilation:
        return DilatedTransport(site, k, v)
    return {"ring": RingTransport, "allgather": AllGather}[site.comm](site, k, v)
