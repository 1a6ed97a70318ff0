"""How commands reach the server."""

from __future__ import annotations

from typing import Final

from fmi_client import FMIClient, RetryPolicy, TLSConfig
from fmi_client.commands.options import Settings

__all__ = ["open_client", "tls_config"]

_ATTEMPTS: Final = 3
"""Attempts of a call. A person who waits wants to know soon, and can try again."""


def tls_config(settings: Settings) -> TLSConfig | None:
    """Return how the connection is secured; None for plain text.

    Raises:
        ConfigurationError: A certificate without its key, or the reverse.
    """
    if not settings.secure:
        return None
    return TLSConfig(
        root_certificates=settings.ca,
        certificate=settings.cert,
        private_key=settings.key,
        server_name=settings.server_name,
    )


def open_client(settings: Settings) -> FMIClient:
    """Make a client from the shared options. Nothing is connected yet.

    Raises:
        ConfigurationError: The options contradict each other.
    """
    return FMIClient(
        settings.target,
        tls=tls_config(settings),
        token=settings.token,
        insecure=settings.insecure,
        retry=RetryPolicy(max_attempts=_ATTEMPTS, deadline_s=settings.timeout_s),
        timeout_s=settings.timeout_s,
    )
