"""How commands reach the server."""

from __future__ import annotations

from typing import Final

from fmi_client import FMIClient, RetryPolicy, TLSConfig
from fmi_client._channel import call_metadata, shows_token
from fmi_client._target import parse_target
from fmi_client._token import TokenSource
from fmi_client.commands.options import Settings
from fmi_client.errors import ConfigurationError

__all__ = ["call_credentials", "open_client", "tls_config"]

_ATTEMPTS: Final = 3
"""Attempts of a call. A person who waits wants to know soon, and can try again."""


def tls_config(settings: Settings) -> TLSConfig | None:
    """Return how the connection is secured; None for plain text.

    Raises:
        ConfigurationError: A certificate without its key, or the reverse.
    """
    if not settings.secure:
        return None
    if (settings.cert is None) != (settings.key is None):
        raise ConfigurationError("--cert and --key belong together; give both or neither")
    return TLSConfig(
        root_certificates=settings.ca,
        certificate=settings.cert,
        private_key=settings.key,
        server_name=settings.server_name,
    )


def call_credentials(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Return the metadata that goes with every call.

    The SDK checks the same; here the options are named, which are not its arguments.

    Raises:
        ConfigurationError: The token would cross a network in plain text, or cannot be a header.
    """
    if settings.bearer is not None and shows_token(
        settings.target, secure=settings.secure, insecure=settings.insecure
    ):
        raise ConfigurationError(
            f"a token for {settings.target} would be sent in plain text; use TLS (--tls or --ca), or give "
            "--insecure where the network itself is secured"
        )
    return call_metadata(
        settings.target,
        token=TokenSource(settings.bearer).text,
        tls=tls_config(settings),
        insecure=settings.insecure,
    )


def open_client(settings: Settings) -> FMIClient:
    """Make a client from the shared options. Nothing is connected yet.

    Raises:
        ConfigurationError: The options contradict each other, or no server can be at the target.
    """
    parse_target(settings.target)  # what is wrong with it comes before what it may be sent
    call_credentials(settings)
    return FMIClient(
        settings.target,
        tls=tls_config(settings),
        token=settings.bearer,
        insecure=settings.insecure,
        retry=RetryPolicy(max_attempts=_ATTEMPTS, deadline_s=settings.timeout_s),
        timeout_s=settings.timeout_s,
    )
