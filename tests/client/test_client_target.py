"""Targets: what can be none is refused when the client is made, before anything is tried."""

from __future__ import annotations

import pytest

from fmi_client import AsyncFMIClient, ConfigurationError, FMIClient
from fmi_client._target import Address, parse_target
from fmi_server.testing import running_server


@pytest.mark.parametrize(
    ("target", "addresses"),
    [
        ("localhost:1", [Address("localhost", 1)]),
        ("fmi.example.org:65535", [Address("fmi.example.org", 65_535)]),
        ("[::1]:50061", [Address("::1", 50_061)]),
        ("[fe80::1%eth0]:50061", [Address("fe80::1%eth0", 50_061)]),
        ("dns:///a.example:443", [Address("a.example", 443)]),
        ("dns://8.8.8.8:53/a.example:443", [Address("a.example", 443)]),
        ("dns://[2001:db8::1]:53/a.example:443", [Address("a.example", 443)]),
        ("DNS:///a.example:443", [Address("a.example", 443)]),
        ("IPv4:127.0.0.1:7", [Address("127.0.0.1", 7)]),
        ("a.example.:443", [Address("a.example.", 443)]),
        ("my_service-1:443", [Address("my_service-1", 443)]),
        ("_grpc.bücher.example:443", [Address("_grpc.bücher.example", 443)]),
        ("dns:a.example:443", [Address("a.example", 443)]),
        ("ipv4:127.0.0.1:7,10.0.0.1:8", [Address("127.0.0.1", 7), Address("10.0.0.1", 8)]),
        ("ipv6:[::1]:7", [Address("::1", 7)]),
        ("unix:/run/fmi.sock", [Address(path="/run/fmi.sock")]),
        ("unix:///run/fmi.sock", [Address(path="/run/fmi.sock")]),
        ("unix:fmi.sock", [Address(path="fmi.sock")]),
        ("unix-abstract:fmi", []),
        ("vsock:2:50061", []),
        ("xds:///fmi", []),
    ],
)
def test_what_grpc_can_reach(target, addresses):
    assert list(parse_target(target)) == addresses
    FMIClient(target).close()


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("", "'' is not HOST:PORT, for example 127.0.0.1:50061"),
        (" ", "is not HOST:PORT"),
        (":50061", "is not HOST:PORT"),
        ("localhost", "the port is missing, for example localhost:50061"),
        ("dns:///localhost", "the port is missing, for example localhost:50061"),
        ("[::1]", r"the port is missing, for example \[::1\]:50061"),
        ("localhost:", "is not HOST:PORT"),
        ("localhost:http", "is not HOST:PORT"),
        ("localhost:50061\n", "is not HOST:PORT"),
        ("localhost :50061", "is not HOST:PORT"),
        ("localhost:0", "0 is not a port; ports are 1 to 65535"),
        ("localhost:99999", "99999 is not a port"),
        ("::1:50061", r"in brackets: \[::1\]:50061"),
        ("[localhost]:50061", "no IPv6 address in its brackets"),
        ("http://localhost:50061", "is a URL: leave out"),
        ("https://localhost:50061/path", "is a URL: leave out"),
        ("a.example:443/path", "is not HOST:PORT"),
        ("ipv4:localhost:50061", "dns:///localhost:50061"),
        ("ipv4:127.0.0.1:1,127.0.0.1", "the port is missing"),
        ("ipv6:127.0.0.1:50061", "is not an address of ipv6"),
        ("\ud800:1", r"is not HOST:PORT: '\\ud800' cannot stand in an address"),
        ("unix:/a\0b", r"'\\x00' cannot stand in an address"),
        ("a\0b:1", r"'\\x00' cannot stand in an address"),
        ("..:1", "'..' is no host; a name has parts of 1 to 63 letters"),
        ("a..b:1", "'a..b' is no host"),
        ("-:1", "'-' is no host"),
        ("a-.example:1", "'a-.example' is no host"),
        (f"{'a' * 64}:1", "is no host"),
        (f"{'a.' * 128}a:1", "is no host"),
        ("user@h:1", "is asked without a user; write h:PORT"),
        ("dns:///user@h:1", "is asked without a user; write h:PORT"),
        ("HTTP://localhost:1", "is a URL: leave out"),
        (
            "dns://1.1.1.1/host:1",
            "the DNS server must be an IP address and a port, for example dns://",
        ),
        ("dns://ns.example:53/host:1", "the DNS server must be an IP address and a port"),
        ("ipv4://x/127.0.0.1:1", "ipv4 asks no server; write ipv4:ADDRESS:PORT"),
        ("unix:", "names no socket"),
        ("unix://", "names no socket"),
    ],
)
@pytest.mark.parametrize("kind", [FMIClient, AsyncFMIClient])
def test_what_cannot_be_a_target(kind, target, told):
    with pytest.raises(ConfigurationError, match=told):
        kind(target)


@pytest.mark.parametrize("target", ["a" * 90_000, f"{'a' * 90_000}:1", f"http://{'a' * 90_000}"])
def test_a_long_target_is_told_in_a_line(target):
    with pytest.raises(ConfigurationError) as caught:
        FMIClient(target)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("form", ["{}", "dns:///{}", "DNS:///{}", "ipv4:{}"])
async def test_calls_reach_the_server_by_every_form(form):
    async with (
        running_server() as server,
        AsyncFMIClient(form.format(server.target)) as client,
    ):
        assert (await client.contract()).revision
