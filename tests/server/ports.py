"""Ports that are known before a server listens on them, or that it is started on again."""

from __future__ import annotations

import random
import socket

__all__ = ["lasting_address", "lasting_port"]

_BELOW_EPHEMERAL = range(20_000, 32_000)
"""Linux takes the ports of outgoing connections from 32768 on: one of those may be taken while its server is
down."""

_given: set[int] = set()
_chance = random.SystemRandom()


def lasting_port() -> int:
    """Return a port that nobody listens on and that no outgoing connection takes; another one each time."""
    while True:
        port = _chance.choice(_BELOW_EPHEMERAL)
        if port in _given:
            continue
        with socket.socket() as probe:
            # As servers do: what is left of old connections is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port


def lasting_address() -> str:
    """Return such a port of this machine, as `HOST:PORT`."""
    return f"127.0.0.1:{lasting_port()}"
