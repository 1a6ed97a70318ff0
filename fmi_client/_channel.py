"""How the SDK connects: channel options, TLS, credentials."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from fmi_client._arguments import check_kind
from fmi_client.errors import ConfigurationError

__all__ = [
    "MAX_RECEIVE_BYTES",
    "MAX_SEND_BYTES",
    "TLSConfig",
    "call_metadata",
    "is_loopback",
    "open_channel",
    "shows_token",
]

MAX_SEND_BYTES: Final = 4 * 1024 * 1024
"""The largest message sent: what a server takes by default (its `max_message_bytes`)."""

MAX_RECEIVE_BYTES: Final = 16 * 1024 * 1024
"""The largest message taken. A server does not bound what it sends."""

_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    ("grpc.max_send_message_length", MAX_SEND_BYTES),
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    # Half as often as the server allows (60 s), or it answers GOAWAY too_many_pings; and often enough
    # for load balancers that drop connections which are idle for 4 minutes.
    ("grpc.keepalive_time_ms", 120_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    # A name is asked for again when a connection breaks, but no more often than this; gRPC's own 30 s
    # would keep a site on the address that a server has left.
    ("grpc.dns_min_time_between_resolutions_ms", 5_000),
    # One place decides about retries, and it keeps packet ids: ours.
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
    # Of several addresses one is taken at random, and another one when it breaks: so the sites are spread
    # over the servers, and each has all that it does at one of them.
    (
        "grpc.service_config",
        '{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}',
    ),
    # A new client does not inherit the reconnect backoff of another one in the process.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.primary_user_agent", "fmi-client"),
)


_THROUGH_NO_PROXY: Final = (("grpc.enable_http_proxy", 0),)
"""For what is on this machine: gRPC would give it, and tokens in plain text, to the proxy of `http_proxy`."""


@dataclass(frozen=True, slots=True)
class TLSConfig:
    """How a connection is secured.

    Attributes:
        root_certificates: PEM file of the authorities that the server's certificate is checked
            against. None means those of the system.
        certificate: PEM file of the client's own certificate chain, for mutual TLS.
        private_key: PEM file of the key of `certificate`.
        server_name: The name that the server's certificate must have, where it is not the target's.
    """

    root_certificates: str | Path | None = None
    certificate: str | Path | None = None
    private_key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("root_certificates", "certificate", "private_key"):
            path = getattr(self, name)
            if not isinstance(path, str | Path | None):
                raise ConfigurationError(
                    f"TLSConfig: {name} must be the path of a PEM file, not {type(path).__name__}"
                )
        check_kind("TLSConfig: server_name", self.server_name, str, optional=True)
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigurationError(
                "TLSConfig: certificate and private_key belong together; give both or neither"
            )


def open_channel(target: str, *, tls: TLSConfig | None) -> grpc.aio.Channel:
    """Open a channel in the running event loop. Nothing is connected yet.

    Raises:
        ConfigurationError: A certificate or key file cannot be read, or is none.
    """
    if tls is None:
        options = (*_OPTIONS, *_THROUGH_NO_PROXY) if is_loopback(target) else _OPTIONS
        return grpc.aio.insecure_channel(target, options=options)
    roots, key, chain = map(_read, (tls.root_certificates, tls.private_key, tls.certificate))
    _check_files(tls)
    credentials = grpc.ssl_channel_credentials(roots, key, chain)
    named = (("grpc.ssl_target_name_override", tls.server_name),) if tls.server_name else ()
    return grpc.aio.secure_channel(target, credentials, options=(*_OPTIONS, *named))


def _check_files(tls: TLSConfig) -> None:
    """Refuse files that gRPC cannot use: it would say so in its own log only, at the first call."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")  # which keys are strong enough is gRPC's to say
    try:
        if tls.root_certificates is not None:
            context.load_verify_locations(tls.root_certificates)
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"TLSConfig: {tls.root_certificates} holds no certificate that can be read: {_reason(error)}"
        ) from error
    try:
        if tls.certificate is not None:
            # A key with a passphrase is refused rather than asked for: gRPC cannot use it.
            context.load_cert_chain(tls.certificate, tls.private_key, password="")
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"TLSConfig: {tls.certificate} and {tls.private_key} are no certificate with its key: "
            f"{_reason(error)}"
        ) from error


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


def call_metadata(
    target: str, *, token: str | None, tls: TLSConfig | None, insecure: bool
) -> tuple[tuple[str, str], ...]:
    """Build the metadata that goes with every call.

    Raises:
        ConfigurationError: The token would cross a network in plain text, or cannot be a header.
    """
    if token is None:
        return ()
    if shows_token(target, secure=tls is not None, insecure=insecure):
        raise ConfigurationError(
            f"a token for {target} would be sent in plain text; give tls=TLSConfig(...), or "
            "insecure=True where the network itself is secured"
        )
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError("the token must be printable ASCII without spaces")
    return (("authorization", f"Bearer {token}"),)


def shows_token(target: str, *, secure: bool, insecure: bool) -> bool:
    """Say whether a token would cross a network in plain text, and nobody said that this is meant."""
    return not secure and not insecure and not is_loopback(target)


def is_loopback(target: str) -> bool:
    """Say whether a gRPC target can only be this machine."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme in ("dns", "ipv4", "ipv6"):
        target = rest.rpartition("/")[2]
    host = target.rpartition(":")[0] if target.count(":") == 1 or "]:" in target else target
    host = host.strip("[]").lower().removesuffix(".")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"TLSConfig: cannot read {path}: {error.strerror}") from error
