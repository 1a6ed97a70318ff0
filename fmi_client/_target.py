"""What a gRPC target names, and whether it can be one at all.

gRPC takes any text, and tells of one that is no address only as of a server that does not answer.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from fmi_client.errors import ConfigurationError

__all__ = ["Address", "parse_target"]

_RESOLVED_BY_GRPC: Final = frozenset({"unix-abstract", "vsock", "xds", "google-c2p"})
_SCHEME: Final = re.compile(r"(?P<scheme>dns|ipv4|ipv6):(?://[^/]*/)?(?P<rest>.+)")
_HOST_PORT: Final = re.compile(
    r"(?:\[(?P<v6>[^\[\]\s]+)\]|(?P<host>[^:\[\]/,\s]+)):(?P<port>[0-9]{1,9})"
)
_HOST: Final = re.compile(r"\[[^\[\]\s]+\]|[^:\[\]/,\s]+")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is: a host and a port, or the path of a socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_target(target: str) -> tuple[Address, ...]:
    """Read a gRPC target: ``HOST:PORT``, or a name with a scheme that gRPC knows (``dns:///HOST:PORT``).

    Returns:
        The addresses that it names; none where only gRPC itself can tell, as of ``xds:``.

    Raises:
        ConfigurationError: No server can be there.
    """
    scheme, _, rest = target.partition(":")
    if scheme in _RESOLVED_BY_GRPC and rest:
        return ()
    if scheme == "unix":
        path = rest.removeprefix("//")
        if not path:
            raise ConfigurationError(f"target {target!r} names no socket; write unix:/PATH")
        return (Address(path=path),)
    known = _SCHEME.fullmatch(target)
    if known is None:
        if "://" in target:
            raise ConfigurationError(
                f"target {target!r} is a URL: leave out what is before the host, and any path"
            )
        return (_address(target, target),)
    if known["scheme"] == "dns":
        return (_address(known["rest"], target),)
    addresses = tuple(_address(part, target) for part in known["rest"].split(","))
    _check_family(addresses, known["scheme"], target)
    return addresses


def _address(written: str, target: str) -> Address:
    match = _HOST_PORT.fullmatch(written)
    if match is None:
        raise ConfigurationError(f"target {target!r} is not HOST:PORT{_advice(written)}")
    port = int(match["port"])
    if not 1 <= port <= 65_535:
        raise ConfigurationError(f"target {target!r}: {port} is not a port; ports are 1 to 65535")
    if match["v6"] and _ip_version(match["v6"]) != 6:
        raise ConfigurationError(f"target {target!r} has no IPv6 address in its brackets")
    return Address(match["v6"] or match["host"], port)


def _advice(written: str) -> str:
    if _HOST.fullmatch(written):
        return f": the port is missing, for example {written}:50061"
    if written.count(":") > 1:
        return "; an IPv6 address stands in brackets: [::1]:50061"
    return ", for example 127.0.0.1:50061"


def _check_family(addresses: tuple[Address, ...], scheme: str, target: str) -> None:
    for address in addresses:
        if f"ipv{_ip_version(address.host)}" != scheme:
            raise ConfigurationError(
                f"target {target!r}: {address.host} is not an address of {scheme}; for a name write "
                f"dns:///{address}"
            )


def _ip_version(host: str) -> int:
    """Return 4 or 6; 0 where it is a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return 0
