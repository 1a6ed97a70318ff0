"""Credentials: who may be sent a token, and mutual TLS against a real server."""

from __future__ import annotations

import asyncio

import grpc
import pytest
import trustme
from scripted_server import FAST, ScriptedServer

from fmi.v1 import interchange_service_pb2_grpc
from fmi_client import AsyncFMIClient, ConfigurationError, ConnectionFailedError, TLSConfig
from fmi_client._channel import is_loopback
from fmi_client._token import TokenSource


@pytest.mark.parametrize(
    ("target", "loopback"),
    [
        ("localhost:50061", True),
        ("LOCALHOST.:50061", True),
        ("127.0.0.1:50061", True),
        ("127.8.8.8:1", True),
        ("[::1]:50061", True),
        ("::1", True),
        ("dns:///localhost:50061", True),
        ("ipv4:127.0.0.1:50061", True),
        ("ipv6:[::1]:50061", True),
        ("unix:/run/fmi.sock", True),
        ("unix-abstract:fmi", True),
        ("fmi.example.org:50061", False),
        ("10.0.0.1:50061", False),
        ("[2001:db8::1]:50061", False),
        ("dns:///fmi.example.org:50061", False),
        ("localhost.example.org:50061", False),
        ("ipv4:127.0.0.1:50061,10.0.0.1:50061", False),
    ],
)
def test_is_loopback(target, loopback):
    assert is_loopback(target) is loopback


def test_token_does_not_leave_the_machine_in_plain_text():
    with pytest.raises(ConfigurationError, match="plain text"):
        AsyncFMIClient("fmi.example.org:50061", token="t0ken")  # noqa: S106
    AsyncFMIClient("fmi.example.org:50061", token="t0ken", insecure=True)  # noqa: S106
    AsyncFMIClient("fmi.example.org:50061", token="t0ken", tls=TLSConfig())  # noqa: S106
    AsyncFMIClient("fmi.example.org:50061")


async def test_what_is_for_this_machine_goes_through_no_proxy(monkeypatch):
    """A proxy sees what goes through it in plain text, and is not this machine."""
    asked = []

    async def proxy(reader, writer):
        asked.append(await reader.readline())
        writer.close()

    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        for name in ("http_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        scripted = ScriptedServer()
        server = grpc.aio.server()
        interchange_service_pb2_grpc.add_InterchangeServiceServicer_to_server(scripted, server)
        target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            token = "t0ken"
            async with AsyncFMIClient(target, domain_id="site", token=token) as client:
                await client.emit_msp(controller={"tau": 0.5})
            assert asked == []
            # It is asked for what is elsewhere.
            with pytest.raises(ConnectionFailedError):
                async with AsyncFMIClient("192.0.2.1:1", retry=FAST, timeout_s=5.0) as client:
                    await client.contract()
            assert asked[0].startswith(b"CONNECT 192.0.2.1:1 ")
        finally:
            await server.stop(None)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "ümlaut"])
def test_token_must_be_a_header(token):
    with pytest.raises(ConfigurationError, match="token"):
        AsyncFMIClient("localhost:50061", token=token)


def test_certificate_and_key_belong_together(tmp_path):
    with pytest.raises(ConfigurationError):
        TLSConfig(certificate=tmp_path / "cert.pem")


async def test_missing_file_is_named(tmp_path):
    tls = TLSConfig(root_certificates=tmp_path / "ca.pem")
    async with AsyncFMIClient("localhost:1", tls=tls) as client:
        with pytest.raises(ConfigurationError, match=r"ca\.pem"):
            await client.contract()


@pytest.mark.parametrize("kind", ["no certificate", "no key", "another key"])
async def test_files_that_cannot_be_used_are_named_before_grpc_logs_of_them(tmp_path, kind, capfd):
    authority = trustme.CA()
    issued, other = authority.issue_cert("site"), authority.issue_cert("other")
    for name, pem in (("ca", authority.cert_pem), ("cert", issued.cert_chain_pems[0])):
        pem.write_to_path(tmp_path / f"{name}.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    other.private_key_pem.write_to_path(tmp_path / "other.pem")
    ca, cert, key = tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem"
    tls, told = {
        "no certificate": (TLSConfig(root_certificates=key), r"key\.pem holds no certificate"),
        "no key": (
            TLSConfig(ca, cert, ca),
            r"cert\.pem and .*ca\.pem are no certificate with its key",
        ),
        "another key": (TLSConfig(ca, cert, tmp_path / "other.pem"), "key values mismatch"),
    }[kind]
    async with AsyncFMIClient("localhost:1", tls=tls) as client:
        with pytest.raises(ConfigurationError, match=told):
            await client.contract()
    assert capfd.readouterr().err == ""


def test_what_is_no_path_is_told_at_once():
    with pytest.raises(
        ConfigurationError, match="root_certificates must be the path of a PEM file"
    ):
        TLSConfig(root_certificates=b"-----BEGIN CERTIFICATE-----")


def test_timeout_must_be_positive():
    with pytest.raises(ConfigurationError):
        AsyncFMIClient("localhost:1", timeout_s=0)


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """A throwaway authority, a server's certificate for localhost and a client's."""
    folder = tmp_path_factory.mktemp("pki")

    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("server", "site"):
        issued = authority.issue_cert("localhost")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
    return folder


async def test_mutual_tls(pki):
    scripted = ScriptedServer()
    server = grpc.aio.server()
    interchange_service_pb2_grpc.add_InterchangeServiceServicer_to_server(scripted, server)
    credentials = grpc.ssl_server_credentials(
        [((pki / "server.key").read_bytes(), (pki / "server.pem").read_bytes())],
        root_certificates=(pki / "ca.pem").read_bytes(),
        require_client_auth=True,
    )
    port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    try:
        mutual = TLSConfig(
            root_certificates=pki / "ca.pem",
            certificate=pki / "site.pem",
            private_key=pki / "site.key",
        )
        async with AsyncFMIClient(
            f"localhost:{port}",
            domain_id="s",
            tls=mutual,
            token="t0ken",  # noqa: S106
            retry=FAST,
        ) as client:
            assert (await client.emit_msp(controller={"tau": 1})).ok
        assert scripted.metadata[0]["authorization"] == "Bearer t0ken"

        named = TLSConfig(
            root_certificates=pki / "ca.pem",
            certificate=pki / "site.pem",
            private_key=pki / "site.key",
            server_name="fmi.example.org",
        )
        one_sided = TLSConfig(root_certificates=pki / "ca.pem")
        for refused in (named, one_sided, None):
            async with AsyncFMIClient(
                f"localhost:{port}", domain_id="s", tls=refused, retry=FAST
            ) as client:
                with pytest.raises(ConnectionFailedError):
                    await client.emit_msp(controller={"tau": 1})
    finally:
        await server.stop(None)


# A token in a file


def test_a_token_file_is_read_again_when_it_changes(tmp_path):
    file = tmp_path / "site.token"
    file.write_text("one\n")
    source = TokenSource(file)
    assert source.text == "one"
    file.with_name("new").write_text("two")
    file.with_name("new").replace(file)
    assert source.text == "two"
    file.write_text("")  # it is just being written
    assert source.text == "two"
    file.unlink()
    assert source.text == "two"
    assert "two" not in repr(source)
    assert "secret" not in repr(TokenSource("secret"))


@pytest.mark.parametrize("content", [None, b"", b" \n", b"two words", b"\xff\xfe"])
def test_a_file_without_a_token_is_told_before_anything_is_sent(tmp_path, content):
    file = tmp_path / "site.token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="token"):
        AsyncFMIClient("localhost:50061", token=file)


def test_a_token_in_a_file_does_not_leave_the_machine_in_plain_text_either(tmp_path):
    file = tmp_path / "site.token"
    file.write_text("t0ken")
    with pytest.raises(ConfigurationError, match="plain text"):
        AsyncFMIClient("fmi.example.org:50061", token=file)


async def test_each_call_shows_the_token_that_the_file_has_then(server, connect, tmp_path):
    file = tmp_path / "site.token"
    file.write_text("one")
    client = await connect(token=file)
    assert (await client.emit_msp(controller={"tau": 1})).ok
    file.with_name("new").write_text("two")
    file.with_name("new").replace(file)
    assert (await client.emit_msp(controller={"tau": 1})).ok
    shown = [metadata["authorization"] for metadata in server.metadata]
    assert shown == ["Bearer one", "Bearer two"]
