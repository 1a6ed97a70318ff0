"""A target with several addresses: the sites are spread over them, and go on at another when one is lost."""

from __future__ import annotations

import contextlib

import pytest
import trustme
from scripted_server import ScriptedServer, snapshot_end, streams, update_event

from fmi_client import AsyncFMIClient, TLSConfig
from fmi_server.testing import running_server

BODY = {"msp": {"metrics": {"gain_p50": 0.15}}}


@pytest.fixture
async def servers():
    async with contextlib.AsyncExitStack() as stack:
        made = [ScriptedServer() for _ in range(3)]
        for server in made:
            await server.start()
            stack.push_async_callback(server.stop)
        yield made


def target_of(servers) -> str:
    return "ipv4:" + ",".join(server.target for server in servers)


def site(servers, **options) -> AsyncFMIClient:
    return AsyncFMIClient(target_of(servers), domain_id="site_001", cohort="care", **options)


async def test_sites_are_spread_over_the_servers(servers):
    for _ in range(40):
        async with site(servers) as client:
            await client.emit(BODY)
    # That one of three is left out by 40 sites happens once in three million runs.
    assert all(server.seen("Emit") for server in servers)


async def test_a_site_has_all_that_it_does_at_one_server(servers):
    async with site(servers) as client:
        for _ in range(20):
            await client.emit(BODY)
    assert sorted(len(server.seen("Emit")) for server in servers) == [0, 0, 20]


async def test_a_site_goes_on_at_another_server(servers):
    async with site(servers) as client:
        for left in (2, 1):
            await client.emit(BODY)
            (used,) = [server for server in servers if server.seen("Emit")]
            await used.stop()
            servers.remove(used)
            assert len(servers) == left
        await client.emit(BODY)
    assert len(servers[0].seen("Emit")) == 1


async def test_a_subscription_goes_on_at_another_server_where_it_was(servers):
    for server in servers:
        server.script("Subscribe", streams(update_event(1), snapshot_end(), hold=True))
    async with site(servers) as client, client.subscribe(["care"]) as updates:
        assert (await anext(updates)).revision == 1
        (used,) = [server for server in servers if server.seen("Subscribe")]
        others = [server for server in servers if server is not used]
        for server in others:
            server.scripts["Subscribe"].clear()
            server.script("Subscribe", streams(update_event(2), hold=True))
        await used.stop()
        assert (await anext(updates)).revision == 2
    (then,) = [server for server in others if server.seen("Subscribe")]
    assert then.seen("Subscribe")[0].resume_token


async def test_with_tls_the_name_of_the_servers_is_said(tmp_path):
    """Of a list of addresses gRPC makes a name that no certificate has."""
    authority = trustme.CA()
    issued = authority.issue_cert("fmi")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o600)
    shown = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    tls = TLSConfig(root_certificates=tmp_path / "ca.pem", server_name="fmi")
    async with (
        running_server(tmp_path / "1", **shown) as one,
        running_server(tmp_path / "2", **shown) as other,
        site([one, other], tls=tls) as client,
    ):
        assert (await client.contract()).revision
