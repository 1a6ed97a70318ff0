"""What `fmi doctor` does to a server: raw sockets first, so that each layer is judged by itself.

gRPC says `UNAVAILABLE` to a closed port, to a web server, to an expired certificate and to a firewall
alike; these probes tell them apart.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final

from fmi_client._target import Address

__all__ = [
    "Certificate",
    "Greeting",
    "connect",
    "greet",
    "proxies",
    "read_certificate",
    "tls_connect",
    "tls_context",
]

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""The client's preface of HTTP/2 and empty settings (RFC 9113, section 3.4)."""

_FRAME_HEADER: Final = 9
_SETTINGS: Final = 4
_TLS_ALERT: Final = 0x15
_NO_CHECK_TIME: Final = ssl.VerifyFlags(0x200000)
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which the ssl module does not name."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a server's certificate says.

    Attributes:
        names: The names that it is for.
        not_before: Unix time in seconds from which it is valid.
        not_after: Unix time in seconds until which it is valid.
        issuer: The common name of who signed it.
        self_signed: Whether it signed itself.
    """

    names: tuple[str, ...]
    not_before: float
    not_after: float
    issuer: str
    self_signed: bool


class Greeting(Enum):
    """What answers to the preface of HTTP/2."""

    HTTP2 = auto()
    HTTP1 = auto()
    TLS_ALERT = auto()
    CLOSED = auto()
    SILENT = auto()
    OTHER = auto()


def connect(address: Address, timeout_s: float) -> socket.socket:
    """Open a connection.

    Raises:
        OSError: There is none; `TimeoutError` and `ConnectionRefusedError` say why.
    """
    if not address.path:
        return socket.create_connection((address.host, address.port), timeout_s)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(timeout_s)
        made.connect(address.path)
    except OSError:
        made.close()
        raise
    return made


def greet(connection: socket.socket, timeout_s: float) -> tuple[Greeting, bytes]:
    """Send the preface of HTTP/2; say what answers, and its first bytes.

    Raises:
        ssl.SSLError: The server ended TLS, for example because it wants a certificate.
    """
    connection.settimeout(timeout_s)
    answer = b""
    try:
        connection.sendall(_PREFACE)
        while len(answer) < _FRAME_HEADER:
            more = connection.recv(64)
            if not more:
                break
            answer += more
    except ssl.SSLError:
        raise
    except TimeoutError:
        return (Greeting.OTHER if answer else Greeting.SILENT), answer
    except OSError:  # reset; what was read before it counts
        pass
    if not answer:
        return Greeting.CLOSED, answer
    if len(answer) >= _FRAME_HEADER and answer[3] == _SETTINGS and answer[5:9] == bytes(4):
        return Greeting.HTTP2, answer
    if answer.startswith(b"HTTP/1"):
        return Greeting.HTTP1, answer
    if answer[0] == _TLS_ALERT and answer[1:2] == b"\x03":
        return Greeting.TLS_ALERT, answer
    return Greeting.OTHER, answer


def tls_context(
    ca: Path | None, cert: Path | None, key: Path | None, *, verified: bool = True
) -> ssl.SSLContext:
    """Make the settings of a TLS connection.

    Raises:
        OSError: A file cannot be read; `ssl.SSLError`, one of its kinds, where it is not PEM or the key
            is not the certificate's.
    """
    context = ssl.create_default_context(cafile=str(ca) if ca else None)
    context.set_alpn_protocols(["h2"])
    if not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cert is not None:
        # A key with a passphrase is refused rather than asked for: gRPC cannot use it.
        context.load_cert_chain(cert, key, password="")
    return context


def tls_connect(
    address: Address, context: ssl.SSLContext, name: str, timeout_s: float
) -> ssl.SSLSocket:
    """Open a connection with TLS.

    Raises:
        ssl.SSLError: The handshake failed.
        OSError: There is no connection.
    """
    plain = connect(address, timeout_s)
    try:
        return context.wrap_socket(plain, server_hostname=name)
    except BaseException:
        plain.close()
        raise


def read_certificate(
    address: Address,
    name: str,
    timeout_s: float,
    files: tuple[Path | None, Path | None] = (None, None),
) -> Certificate | None:
    """Read the certificate of a server, valid or not; None where it shows none.

    The ssl module decodes verified certificates only. So the certificate is fetched unverified first and
    then, for one connection that carries nothing, trusted by itself.
    """
    cert, key = files
    try:
        with tls_connect(
            address, tls_context(None, cert, key, verified=False), name, timeout_s
        ) as first:
            encoded = first.getpeercert(binary_form=True)
        if not encoded:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
        context.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(encoded))
        if cert is not None:
            context.load_cert_chain(cert, key, password="")
        with tls_connect(address, context, name, timeout_s) as second:
            told: Mapping[str, Any] = second.getpeercert() or {}
    except OSError:
        return None
    return Certificate(
        names=tuple(value for _, value in told.get("subjectAltName", ())),
        not_before=ssl.cert_time_to_seconds(told["notBefore"]),
        not_after=ssl.cert_time_to_seconds(told["notAfter"]),
        issuer=_common_name(told.get("issuer", ())),
        self_signed=told.get("issuer") == told.get("subject"),
    )


def proxies() -> list[str]:
    """Name the variables of the environment that send gRPC through a proxy."""
    names = ("grpc_proxy", "https_proxy", "http_proxy")
    return [name for name in names if os.environ.get(name)]


def _common_name(name: Any) -> str:
    parts = dict(pair for part in name for pair in part)
    return str(parts.get("commonName") or parts.get("organizationName") or "unknown")
