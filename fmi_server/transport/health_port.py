"""Health in plain text at a port of its own, for probes that have no credentials.

Kubelets ask for health over gRPC without TLS, and a check within a container has no client certificate. So
that they need neither, this port answers them, and takes no other call.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

import grpc

from fmi_server.config import SettingsError

__all__ = ["health_port"]

_OPTIONS: Final = (
    # A request names a service, an answer is a number; few ask, and each of them seldom.
    ("grpc.max_receive_message_length", 4096),
    ("grpc.max_metadata_size", 4096),
    ("grpc.absolute_max_metadata_size", 8192),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.max_allowed_incoming_connections", 64),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.so_reuseport", 0),
)


@contextlib.asynccontextmanager
async def health_port(address: str | None, handler: grpc.GenericRpcHandler) -> AsyncIterator[int]:
    """Answer at an address how the server is, for as long as the context lasts.

    Args:
        address: `HOST:PORT`; port 0 picks one. None for no such port.
        handler: Answers.

    Returns:
        The port; 0 where there is none.

    Raises:
        SettingsError: Nothing can listen there.
    """
    if address is None:
        yield 0
        return
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((handler,))
    try:
        try:
            port = server.add_insecure_port(address)
        except RuntimeError:
            raise SettingsError(
                f"health_listen: cannot listen on {address}; is something else listening there already?"
            ) from None
        await server.start()
        yield port
    finally:
        await server.stop(0)
