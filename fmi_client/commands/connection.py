"""The lower half of `fmi doctor`: address, TCP, TLS, and what protocol answers."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from typing import Final

from fmi_client._counts import counted
from fmi_client._target import Address, parse_target
from fmi_client.commands.exits import ExitCode
from fmi_client.commands.findings import Finding, fault, warning, well
from fmi_client.commands.options import Settings
from fmi_client.commands.probes import (
    Certificate,
    Greeting,
    connect,
    greet,
    read_certificate,
    tls_connect,
    tls_context,
)
from fmi_client.errors import ConfigurationError

__all__ = ["examine_connection"]

_DAY_S: Final = 86_400
_EXPIRY_WARNING_S: Final = 14 * _DAY_S

# Numbers of OpenSSL (x509_vfy.h); the texts differ between its versions.
_EXPIRED: Final = 10
_NOT_YET_VALID: Final = 9
_WRONG_NAME: Final = frozenset({62, 64})


def examine_connection(settings: Settings) -> Iterator[Finding]:
    """Examine the way to a server, one layer after the other, up to the first that fails."""
    try:
        addresses = parse_target(settings.target)
    except ConfigurationError as error:
        yield fault("address", error.message, "Correct --target or FMI_TARGET.", ExitCode.USAGE)
        return
    if not addresses:
        yield well(
            "address", f"{settings.target} is resolved by gRPC itself, and tested as a whole"
        )
        return
    address = addresses[0]
    resolved = _resolve(address)
    yield resolved
    if resolved.final:
        return
    timeout_s = settings.timeout_s
    reached = _reach(address, timeout_s)
    yield reached
    if reached.final:
        return
    if settings.secure:
        yield from _examine_tls(address, settings)
    else:
        yield _examine_plain(address, settings)


def _resolve(address: Address) -> Finding:
    if address.path:
        return well("address", f"socket {address.path}")
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return fault(
            "address",
            f"{address.host} does not resolve: {getattr(error, 'strerror', None) or error}",
            "Check the name, and the name server or /etc/hosts of this machine.",
            ExitCode.UNREACHABLE,
        )
    hosts = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    same = hosts == [address.host]
    return well("address", f"{address}" if same else f"{address} is {', '.join(hosts[:4])}")


def _reach(address: Address, timeout_s: float) -> Finding:
    if address.path:
        return _reach_socket(address.path, timeout_s)
    began = time.perf_counter()
    try:
        connect(address, timeout_s).close()
    except ConnectionRefusedError:
        return fault(
            "tcp",
            f"nothing listens on {address}",
            "Start the server (`fmi-server serve`), or correct the port in --target.",
            ExitCode.UNREACHABLE,
        )
    except TimeoutError:
        return fault(
            "tcp",
            f"no answer from {address} within {timeout_s:g} s",
            "A firewall drops the connection, or the host is down or another one.",
            ExitCode.UNREACHABLE,
        )
    except OSError as error:
        return fault(
            "tcp",
            f"no connection to {address}: {error.strerror or error}",
            "Check the network between this machine and the server.",
            ExitCode.UNREACHABLE,
        )
    taken_ms = (time.perf_counter() - began) * 1000
    return well("tcp", f"something listens; connected in {taken_ms:.1f} ms", connect_ms=taken_ms)


def _reach_socket(path: str, timeout_s: float) -> Finding:
    began = time.perf_counter()
    try:
        connect(Address(path=path), timeout_s).close()
    except FileNotFoundError:
        told = f"there is no socket file {path}"
        advice = "Start the server that makes it, or correct the path in --target."
    except ConnectionRefusedError:
        told = f"{path} is there, and nothing listens on it"
        advice = "Start the server that made it, or correct the path in --target."
    except PermissionError:
        told = f"the socket file {path} may not be used"
        advice = "Ask for the right to write to it and to enter its folders."
    except TimeoutError:
        told = f"no answer on {path} within {timeout_s:g} s"
        advice = "The server is overloaded or stuck; its log says which."
    except OSError as error:
        told = f"no connection to the socket file {path}: {error.strerror or error}"
        advice = "Correct the path in --target."
    else:
        taken_ms = (time.perf_counter() - began) * 1000
        told = f"something listens; connected in {taken_ms:.1f} ms"
        return well("socket", told, connect_ms=taken_ms)
    return fault("socket", told, advice, ExitCode.UNREACHABLE)


def _examine_plain(address: Address, settings: Settings) -> Finding:
    with connect(address, settings.timeout_s) as connection:
        greeting, answer = greet(connection, settings.timeout_s)
    if greeting is Greeting.HTTP2:
        return well("protocol", "HTTP/2 in plain text")
    if greeting in (Greeting.TLS_ALERT, Greeting.CLOSED, Greeting.SILENT) and _speaks_tls(
        address, settings.timeout_s
    ):
        return fault(
            "protocol",
            "the server speaks TLS, and plain text was tried",
            "Give --ca FILE with the authority of its certificate, or --tls for the system's own.",
            ExitCode.UNREACHABLE,
        )
    return _not_http2(address, greeting, answer, settings.timeout_s)


def _not_http2(address: Address, greeting: Greeting, answer: bytes, timeout_s: float) -> Finding:
    match greeting:
        case Greeting.HTTP1:
            told = "a web server (HTTP/1) listens there, not gRPC"
        case Greeting.SILENT:
            told = (
                f"it takes connections and says nothing within {timeout_s:g} s; not gRPC, or stuck"
            )
        case Greeting.CLOSED:
            told = "it takes connections and closes them at once; not gRPC, or a proxy without a server"
        case _:
            told = f"something else than gRPC listens there; it says {answer[:24]!r}"
    return fault(
        "protocol",
        told,
        f"Check the {_place(address)} in --target; the server's log names the one it listens on.",
        ExitCode.UNREACHABLE,
    )


def _speaks_tls(address: Address, timeout_s: float) -> bool:
    try:
        context = tls_context(None, None, None, verified=False)
        with tls_connect(address, context, address.host or "localhost", timeout_s):
            return True
    except ssl.SSLError as error:
        # An alert is an answer in TLS, whatever it refuses.
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def _examine_tls(address: Address, settings: Settings) -> Iterator[Finding]:
    if (settings.cert is None) != (settings.key is None):
        yield fault(
            "tls", "--cert and --key belong together", "Give both or neither.", ExitCode.USAGE
        )
        return
    try:
        context = tls_context(settings.ca, settings.cert, settings.key)
    except OSError as error:
        yield fault(
            "tls",
            f"a file of --ca, --cert or --key cannot be used: {_reason(error)}",
            "They are PEM files; --key is the key of --cert, without a passphrase.",
            ExitCode.USAGE,
        )
        return
    name = settings.server_name or address.host
    if not name:
        yield fault(
            "tls",
            "a socket file has no name that a certificate could be for",
            "Give --server-name NAME with the name in the server's certificate.",
            ExitCode.USAGE,
        )
        return
    certificate = read_certificate(address, name, settings.timeout_s, (settings.cert, settings.key))
    try:
        with tls_connect(address, context, name, settings.timeout_s) as connection:
            version = connection.version() or "TLS"
            yield _trusted(certificate, version)
            greeting, answer = greet(connection, settings.timeout_s)
    except ssl.SSLCertVerificationError as error:
        yield _distrusted(error, certificate, name)
        return
    except ssl.SSLError as error:
        yield _failed_handshake(address, settings, error)
        return
    except OSError as error:
        yield _broken_handshake(address, settings, error)
        return
    if greeting is Greeting.HTTP2:
        yield well("protocol", "HTTP/2 over TLS")
    elif greeting is Greeting.CLOSED:
        # Servers differ in whether an alert says why; after a good handshake this is the usual reason.
        yield _own_certificate_refused() if settings.cert else _wants_certificate()
    else:
        yield _not_http2(address, greeting, answer, settings.timeout_s)


def _trusted(certificate: Certificate | None, version: str) -> Finding:
    if certificate is None:
        return well("tls", f"{version}, the certificate is trusted")
    until = _date(certificate.not_after)
    left_s = certificate.not_after - time.time()
    if left_s < _EXPIRY_WARNING_S:
        left = counted(round(left_s / _DAY_S), "day")
        return warning(
            "tls",
            f"{version}, the certificate is trusted and expires on {until}, in {left}",
            "Renew the server's certificate.",
            not_after=until,
        )
    return well("tls", f"{version}, the certificate is trusted until {until}", not_after=until)


def _distrusted(
    error: ssl.SSLCertVerificationError, certificate: Certificate | None, name: str
) -> Finding:
    if error.verify_code == _EXPIRED:
        when = f" on {_date(certificate.not_after)}" if certificate else ""
        return fault(
            "tls",
            f"a certificate of the server expired{when}",
            "Renew it on the server. If the date is in the future, this machine's clock is wrong.",
            ExitCode.UNREACHABLE,
        )
    if error.verify_code == _NOT_YET_VALID:
        when = f" before {_date(certificate.not_before)}" if certificate else ""
        return fault(
            "tls",
            f"a certificate of the server is not valid{when}",
            "Check the clocks of this machine and of the one that made the certificate.",
            ExitCode.UNREACHABLE,
        )
    if error.verify_code in _WRONG_NAME:
        names = ", ".join(certificate.names[:6]) if certificate and certificate.names else "no name"
        return fault(
            "tls",
            f"the certificate is for {names}, not for {name}",
            "Use one of these names in --target, or say it with --server-name.",
            ExitCode.UNREACHABLE,
        )
    told = "the certificate is signed by an authority that is not known here"
    if certificate and certificate.self_signed:
        told = "the certificate is self-signed, and is not among the known ones"
    elif certificate:
        told += f": {certificate.issuer}"
    return fault(
        "tls",
        told,
        "Give --ca FILE with the certificate of that authority; ask the server's operator for it.",
        ExitCode.UNREACHABLE,
    )


def _failed_handshake(address: Address, settings: Settings, error: ssl.SSLError) -> Finding:
    reason = error.reason or ""
    if "CERTIFICATE_REQUIRED" in reason or ("HANDSHAKE_FAILURE" in reason and not settings.cert):
        return _wants_certificate()
    if "UNKNOWN_CA" in reason or "BAD_CERTIFICATE" in reason or "CERTIFICATE_UNKNOWN" in reason:
        return _own_certificate_refused()
    return _broken_handshake(address, settings, error)


def _broken_handshake(address: Address, settings: Settings, error: OSError) -> Finding:
    try:
        with connect(address, settings.timeout_s) as connection:
            plain, _ = greet(connection, settings.timeout_s)
    except OSError:
        plain = Greeting.CLOSED
    if plain is Greeting.HTTP2:
        return fault(
            "tls",
            "the server speaks plain text, and TLS was tried",
            "Leave out --tls, --ca, --cert and --key; or switch TLS on at the server.",
            ExitCode.UNREACHABLE,
        )
    if plain is Greeting.HTTP1:
        return _not_http2(address, plain, b"", settings.timeout_s)
    return fault(
        "tls",
        f"no TLS with what listens there: {_reason(error)}",
        f"Check the {_place(address)} in --target.",
        ExitCode.UNREACHABLE,
    )


def _wants_certificate() -> Finding:
    return fault(
        "tls",
        "the server wants a certificate of this site (mutual TLS)",
        "Give --cert and --key; the server's operator issues them.",
        ExitCode.UNREACHABLE,
    )


def _own_certificate_refused() -> Finding:
    return fault(
        "tls",
        "the server does not accept the certificate of this site",
        "Check that --cert was signed by the authority that the server trusts, and has not expired.",
        ExitCode.UNREACHABLE,
    )


def _place(address: Address) -> str:
    return "path" if address.path else "port"


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return error.strerror or str(error)


def _date(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(unix_s))
