"""A port of this host that nobody uses."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A free port of this host."""
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        port: int = here.getsockname()[1]
        return port
