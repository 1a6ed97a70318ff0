"""Why there is no connection, in words: gRPC tells it in the terms of its layers and of OpenSSL."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["connection_cause", "last_cause"]

_NO_CONNECTION: Final = "failed to connect"
_NO_ADDRESS: Final = ("errors resolving", "DNS resolution failed")
# The versions of gRPC that may be installed say it differently.
_HANDSHAKES: Final = ("Tls handshake failed", "Ssl handshake failed")
_WORDS: Final = (
    (
        ("Hostname Verification Check failed", "is not in peer certificate"),
        "the TLS handshake failed: the server's certificate is for another name",
    ),
    (
        ("Handshake read failed", "Handshake write failed"),
        "the TLS handshake failed: the server broke it off; it may not speak TLS",
    ),
    # So a server of gRPC ends a client without TLS, and one without the certificate that it wants.
    (
        ("Socket closed",),
        (
            "the server closed the connection before it said anything; it may want TLS, or a certificate "
            "of the client"
        ),
    ),
    (
        ("before receiving SETTINGS",),
        "what answers there takes connections and says nothing; it may want TLS, or be stuck",
    ),
    (
        ("Failed parsing HTTP/2",),
        "what answers there does not speak gRPC; it may want TLS, or be another server",
    ),
)
_OPENSSL: Final = re.compile(r"OPENSSL_internal:(?P<name>[A-Z0-9_]+)(?:: (?P<detail>[^:]+))?")


def connection_cause(text: str) -> str:
    """Put into words what gRPC tells of a connection that a name, TLS or its lack kept from being made.

    Anything else stays as it is. Text is all there is to go by: gRPC has one status for all of it.
    """
    if text.startswith(_NO_ADDRESS):
        return f"its name has no address: {text.rpartition(': ')[2].rstrip(']').lower()}"
    if not text.startswith(_NO_CONNECTION):
        return text
    if any(mark in text for mark in _HANDSHAKES):
        return _handshake_cause(text)
    return next((words for marks, words in _WORDS if any(mark in text for mark in marks)), text)


def _handshake_cause(text: str) -> str:
    found = _OPENSSL.search(text)
    if found is None:
        return "the TLS handshake failed; the server may not speak TLS"
    reason = found["name"].lower().replace("_", " ")
    match found["name"]:
        case "WRONG_VERSION_NUMBER" | "HTTP_REQUEST" | "HTTPS_PROXY_REQUEST":
            return f"the TLS handshake failed: {reason}; the server may not speak TLS"
        case "CERTIFICATE_VERIFY_FAILED":
            detail = found["detail"] or reason
            return f"the TLS handshake failed: the server's certificate is not trusted: {detail}"
        case _:
            return f"the TLS handshake failed: {reason}"


def last_cause(message: str, target: str) -> str:
    """Return what gRPC says last when it tells of every address and layer that failed."""
    message = message.removeprefix(f"{target}: ")
    cause = connection_cause(message)
    if cause != message or not message.startswith(_NO_CONNECTION):
        return cause
    # The last layer may have been well; that is no cause.
    told = [part for part in message.split(": ") if part != "OK"]
    return told[-1]
