"""What is told of a connection that TLS, or its lack, kept from being made: by gRPC itself, in words."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys

import grpc
import pytest
import trustme
from scripted_server import FAST, ScriptedServer

from fmi.v1 import interchange_service_pb2_grpc
from fmi_client import AsyncFMIClient, ConnectionFailedError, TLSConfig
from fmi_client._causes import last_cause

AUTHORITY = trustme.CA()
STRANGER = trustme.CA(organization_name="stranger")


@pytest.fixture
async def target_of():
    """Start a server, with the credentials given; give its target."""
    servers = []

    async def start(credentials: grpc.ServerCredentials | None = None) -> str:
        server = grpc.aio.server()
        scripted = ScriptedServer()
        interchange_service_pb2_grpc.add_InterchangeServiceServicer_to_server(scripted, server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(None)


def signed_for(name: str, *, wants_client: bool = False) -> grpc.ServerCredentials:
    issued = AUTHORITY.issue_cert(name)
    chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
    return grpc.ssl_server_credentials(
        [(issued.private_key_pem.bytes(), chain)],
        root_certificates=AUTHORITY.cert_pem.bytes() if wants_client else None,
        require_client_auth=wants_client,
    )


@pytest.fixture
def trusting(tmp_path):
    """Make the settings of a client that trusts an authority."""

    def make(authority: trustme.CA = AUTHORITY) -> TLSConfig:
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        return TLSConfig(root_certificates=tmp_path / "ca.pem")

    return make


async def message(target: str, tls: TLSConfig | None) -> str:
    async with AsyncFMIClient(target, domain_id="s", tls=tls, retry=FAST) as client:
        with pytest.raises(ConnectionFailedError) as caught:
            await client.emit_msp(controller={"tau": 1})
    told = caught.value.message
    assert told.startswith(f"{target}: ")
    return told.removeprefix(f"{target}: ")


async def test_tls_to_a_server_in_plain_text(target_of, trusting):
    told = await message(await target_of(), trusting())
    assert told == "the TLS handshake failed: wrong version number; the server may not speak TLS"


async def test_plain_text_to_a_server_with_tls(target_of):
    told = await message(await target_of(signed_for("127.0.0.1")), None)
    assert told.startswith(
        "the server closed the connection before it said anything; it may want TLS"
    )


@pytest.mark.parametrize("how", ["closes", "resets"])
async def test_tls_to_what_breaks_the_handshake_off(trusting, how):
    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if how == "resets":
            # Closed with something unread and nothing to linger for.
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async with await asyncio.start_server(rude, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        told = await message(f"127.0.0.1:{port}", trusting())
    assert told == "the TLS handshake failed: the server broke it off; it may not speak TLS"


async def test_a_server_that_wants_a_certificate(target_of, trusting):
    target = await target_of(signed_for("127.0.0.1", wants_client=True))
    assert "a certificate of the client" in await message(target, trusting())


async def test_a_certificate_of_an_unknown_authority(target_of, trusting):
    told = await message(await target_of(signed_for("127.0.0.1")), trusting(STRANGER))
    assert told.startswith("the TLS handshake failed: the server's certificate is not trusted: ")
    assert "issuer" in told


async def test_a_certificate_for_another_name(target_of, trusting):
    told = await message(await target_of(signed_for("fmi.example")), trusting())
    assert told == "the TLS handshake failed: the server's certificate is for another name"


ADDRESSES = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (f"{ADDRESSES}Failed to connect to remote host: Connection refused", "Connection refused"),
        (f"{ADDRESSES}something new: OK", "something new"),
        (
            f"{ADDRESSES}Tls handshake failed (TSI_X): OK",
            "the TLS handshake failed; the server may not speak TLS",
        ),
        (
            (
                f"{ADDRESSES}Ssl handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:100000f7:SSL "
                "routines:OPENSSL_internal:WRONG_VERSION_NUMBER: Invalid certificate verification context"
            ),
            "the TLS handshake failed: wrong version number; the server may not speak TLS",
        ),
        (
            f"{ADDRESSES}Peer name 127.0.0.1 is not in peer certificate",
            "the TLS handshake failed: the server's certificate is for another name",
        ),
        *(
            (
                f"{ADDRESSES}Handshake read failed ({how})",
                "the TLS handshake failed: the server broke it off; it may not speak TLS",
            )
            for how in (
                "Socket closed",
                "recvmsg:Connection reset by peer (104)",
                "Endpoint closing",
            )
        ),
        (
            f"{ADDRESSES}connection attempt timed out before receiving SETTINGS frame",
            "what answers there takes connections and says nothing; it may want TLS, or be stuck",
        ),
        *(
            (f"{layers}: {said}", "its name has no address: domain name not found")
            for layers, said in (
                ("errors resolving t:1: [field:hostname lookup error", "Domain name not found]"),
                ("DNS resolution failed for t:1: C-ares status qtype=A", "Domain name not found"),
            )
        ),
        ("the server ended the stream", "the server ended the stream"),
        ("it says: OK", "it says: OK"),
    ],
)
def test_a_cause_is_never_that_all_is_well(text, cause):
    assert last_cause(text, "t:1") == last_cause(f"t:1: {text}", "t:1") == cause


SCENE = """
import os, sys
from fmi_client import FMIClient, FMIError, RetryPolicy, TLSConfig
with FMIClient(sys.argv[1], tls=TLSConfig(), retry=RetryPolicy(max_attempts=1)) as client:
    try:
        client.contract()
    except FMIError as error:
        print(error.message.partition(": ")[2].partition(":")[0], "GRPC_VERBOSITY" in os.environ)
"""


async def test_what_grpc_writes_to_stderr_of_no_error_is_left_out(target_of):
    target = await target_of()
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
    process = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", SCENE, target],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.stdout == "the TLS handshake failed False\n"
    assert process.stderr == ""
