"""Where a server may listen, and whom it may call: what of it is reachable, and by what it is protected."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Iterator

from fmi_server.config import ServerSettings, SettingsError

__all__ = [
    "described",
    "probe_address",
    "reaches_beyond_loopback",
    "warn_of_open_listening",
    "wrong_addresses",
]

_log = logging.getLogger(__name__)


def wrong_addresses(settings: ServerSettings) -> Iterator[str]:
    """Say what is wrong with the addresses of settings.

    What other machines reach needs TLS and callers that are authenticated, unless `insecure` says that the
    network itself is protected. Tokens never cross a network in plain text, whatever it says.
    """
    exposed = not _loopback(_host(settings.listen))
    lacking = _lacking(settings)
    if exposed and lacking and not settings.insecure:
        yield (
            f"listen: {settings.listen} is reachable from other machines, and {lacking}; listen on "
            "127.0.0.1, or say --insecure if the network itself is protected"
        )
    if exposed and settings.tokens is not None and settings.tls_cert is None:
        yield (
            f"tokens: they would come to {settings.listen} in plain text; set tls_cert and tls_key, or "
            "listen on 127.0.0.1 behind a proxy that has TLS"
        )
    page = settings.metrics_listen
    if page is not None and not settings.insecure and not _loopback(_host(page)):
        yield (
            f"metrics_listen: {page} is reachable from other machines, and the page has no TLS; listen on "
            "127.0.0.1, or say --insecure if the network itself is protected"
        )
    parent = settings.parent
    if parent is not None and settings.parent_ca is None and not _loopback(_host(parent)):
        if settings.parent_token is not None:
            yield f"parent_token: it would go to {parent} in plain text; set parent_ca"
        elif not settings.insecure:
            yield (
                f"parent: {parent} is not on this machine, and there is no TLS to it; set parent_ca, or say "
                "--insecure if the network itself is protected"
            )
    if parent is not None and _same(parent, settings.listen):
        yield f"parent: {parent} is this server itself"


def probe_address(listen: str) -> None:
    """Find out why an address cannot be listened on, which gRPC's core tells in a log line only."""
    host, _, port = listen.rpartition(":")
    reasons = []
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise SettingsError(f"listen: {host} cannot be resolved: {error.strerror}") from None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC does: the connections of a server that has ended do not keep its port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return
        except OSError as error:
            reasons.append(error.strerror)
    raise SettingsError(f"listen: cannot listen on {listen}: {reasons[0]}; choose another address")


def _lacking(settings: ServerSettings) -> str:
    """Say what a server lacks to be reached by everybody; empty where it lacks nothing."""
    if settings.tls_cert is None:
        return "there is no TLS (tls_cert, tls_key)"
    if not settings.authenticated:
        return "nobody is authenticated (tls_client_ca or tokens)"
    return ""


def reaches_beyond_loopback(settings: ServerSettings) -> bool:
    """Say whether other machines reach the server's port."""
    return not _loopback(_host(settings.listen))


def warn_of_open_listening(settings: ServerSettings) -> None:
    """Warn of what other machines reach and nothing protects."""
    lacking = _lacking(settings)
    if lacking and not _loopback(_host(settings.listen)):
        _log.warning(
            "INSECURE: listening on %s, and %s: anybody who reaches it may emit in any site's name",
            settings.listen,
            lacking,
        )
    page = settings.metrics_listen
    if page is not None and not _loopback(_host(page)):
        _log.warning("INSECURE: anybody who reaches %s may read the metrics", page)


def described(settings: ServerSettings) -> str:
    """Say in a line what protects a server."""
    if settings.tls_cert is None:
        wire = "plain text"
    elif settings.tls_client_ca is None:
        wire = "TLS"
    else:
        wire = "TLS with client certificates"
    if not settings.authenticated:
        return f"{wire}; callers are not authenticated, so everyone may do everything"
    operators = len(settings.operators)
    told = "no operators" if not operators else f"{operators} operator{'s' * (operators > 1)}"
    return (
        f"{wire}{', tokens' * (settings.tokens is not None)}; what is not allowed is denied; {told}"
    )


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _same(address: str, listen: str) -> bool:
    """Tell whether an address leads to where a server listens, by whatever name."""
    if address.rpartition(":")[2] != listen.rpartition(":")[2]:
        return False
    theirs, ours = _resolved(_host(address)), _resolved(_host(listen))
    everywhere = any(own.is_unspecified for own in ours)
    return bool(theirs & ours) or (everywhere and any(found.is_loopback for found in theirs))


def _resolved(host: str) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return set()
    return {ipaddress.ip_address(item[4][0]) for item in found}


def _loopback(host: str) -> bool:
    found = _resolved(host)
    return bool(found) and all(address.is_loopback for address in found)
