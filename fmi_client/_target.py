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
_SCHEME: Final = re.compile(r"(?P<scheme>dns|ipv4|ipv6):(?://(?P<authority>[^/]*)/)?(?P<rest>.+)")
_HOST_PORT: Final = re.compile(
    r"(?:\[(?P<v6>[^\[\]\s]+)\]|(?P<host>[^:\[\]/,\s]+)):(?P<port>[0-9]{1,9})"
)
_HOST: Final = re.compile(r"\[[^\[\]\s]+\]|[^:\[\]/,\s]+")
_LABEL: Final = re.compile(r"[^\W_](?:[\w-]{0,61}\w)?|_[\w-]{0,62}")
_MAX_SHOWN: Final = 100
"""Characters told of a target that cannot be one."""


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
    _check_characters(target)
    before, colon, rest = target.partition(":")
    scheme = before.lower()  # as gRPC compares it
    if scheme in _RESOLVED_BY_GRPC and rest:
        return ()
    if scheme == "unix":
        path = rest.removeprefix("//")
        if not path:
            raise ConfigurationError(f"target {target!r} names no socket; write unix:/PATH")
        return (Address(path=path),)
    known = _SCHEME.fullmatch(f"{scheme}{colon}{rest}")
    if known is None:
        if "://" in target:
            raise ConfigurationError(
                f"target {_shown(target)} is a URL: leave out what is before the host, and any path"
            )
        return (_address(target, target),)
    _check_authority(known["authority"], scheme, target)
    if scheme == "dns":
        return (_address(known["rest"], target),)
    addresses = tuple(_address(part, target) for part in known["rest"].split(","))
    _check_family(addresses, scheme, target)
    return addresses


def _check_characters(target: str) -> None:
    for char in target:
        if not char.isprintable():
            raise ConfigurationError(
                f"target {_shown(target)} is not HOST:PORT: {char!r} cannot stand in an address"
            )


def _check_authority(authority: str | None, scheme: str, target: str) -> None:
    """Check what stands between `//` and `/`: the server that is asked for the host's address."""
    if not authority:
        return
    if scheme != "dns":
        raise ConfigurationError(
            f"target {_shown(target)}: {scheme} asks no server; write {scheme}:ADDRESS:PORT"
        )
    match = _HOST_PORT.fullmatch(authority)
    if match is None or not _ip_version(match["v6"] or match["host"]):
        raise ConfigurationError(
            f"target {_shown(target)}: the DNS server must be an IP address and a port, for example "
            "dns://192.0.2.1:53/HOST:PORT; to ask the system's, write dns:///HOST:PORT"
        )


def _address(written: str, target: str) -> Address:
    match = _HOST_PORT.fullmatch(written)
    if match is None:
        raise ConfigurationError(f"target {_shown(target)} is not HOST:PORT{_advice(written)}")
    port = int(match["port"])
    if not 1 <= port <= 65_535:
        raise ConfigurationError(
            f"target {_shown(target)}: {port} is not a port; ports are 1 to 65535"
        )
    if match["v6"] and _ip_version(match["v6"]) != 6:
        raise ConfigurationError(f"target {_shown(target)} has no IPv6 address in its brackets")
    if match["host"]:
        _check_host(match["host"], target)
    return Address(match["v6"] or match["host"], port)


def _check_host(host: str, target: str) -> None:
    if "@" in host:
        name = host.rpartition("@")[2]
        raise ConfigurationError(
            f"target {_shown(target)}: a server is asked without a user; write {_cut(name)}:PORT"
        )
    labels = host.removesuffix(".").split(".")
    if len(host) > 254 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ConfigurationError(
            f"target {_shown(target)}: {_shown(host)} is no host; a name has parts of 1 to 63 letters, "
            "digits and hyphens, with dots between them"
        )


def _advice(written: str) -> str:
    if _HOST.fullmatch(written):
        return f": the port is missing, for example {_cut(written)}:50061"
    if written.count(":") > 1:
        return "; an IPv6 address stands in brackets: [::1]:50061"
    return ", for example 127.0.0.1:50061"


def _check_family(addresses: tuple[Address, ...], scheme: str, target: str) -> None:
    for address in addresses:
        if f"ipv{_ip_version(address.host)}" != scheme:
            raise ConfigurationError(
                f"target {_shown(target)}: {address.host} is not an address of {scheme}; for a name write "
                f"dns:///{address}"
            )


def _ip_version(host: str) -> int:
    """Return 4 or 6; 0 where it is a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return 0


def _shown(text: str) -> str:
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
