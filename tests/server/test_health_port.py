"""Health in plain text at a port of its own, and the probe that asks there."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from identity_harness import Office
from ports import lasting_address
from server_process import LOCAL, ServerProcess, assert_refused, environment, run, started

from fmi.descriptors import DELIVERY, INGEST, SERVICE_NAMES
from fmi.v1 import registry_service_pb2, registry_service_pb2_grpc

PROBE = (sys.executable, "-m", "fmi_server.probe")


async def probe(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *PROBE,
        *arguments,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        told, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, told.decode()


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path / "office")


@pytest.fixture
async def guarded(tmp_path: Path, office: Office):
    """A server that lets nobody in without a client certificate, and its address of health."""
    address = lasting_address()
    flags = {**office.mutual, "data_dir": tmp_path / "data", "health_listen": address}
    given = [part for name, value in flags.items() for part in (_flag(name), str(value))]
    async with started(*LOCAL, *given) as server:
        yield server, address


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


async def test_who_has_no_certificate_hears_whether_the_server_is_well(
    guarded: tuple[ServerProcess, str],
) -> None:
    server, address = guarded
    for name in ("", INGEST, DELIVERY, *SERVICE_NAMES):
        assert await probe(address, name) == (0, "")
    code, told = await probe(server.target)
    assert code == 1
    assert "UNAVAILABLE" in told or "DEADLINE_EXCEEDED" in told


async def test_the_port_of_health_takes_no_other_call(guarded: tuple[ServerProcess, str]) -> None:
    _, address = guarded
    async with grpc.aio.insecure_channel(address) as channel:
        stub = registry_service_pb2_grpc.RegistryServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetContract(registry_service_pb2.GetContractRequest(), timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="x" * 10_000)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health.Check(request, timeout=20)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_service_that_nobody_knows_is_not_well(guarded: tuple[ServerProcess, str]) -> None:
    _, address = guarded
    code, told = await probe(address, "fmi.v1.Nothing")
    assert (code, "NOT_FOUND" in told) == (1, True)


async def test_a_server_that_drains_says_so_until_its_end(
    guarded: tuple[ServerProcess, str],
) -> None:
    server, address = guarded
    async with grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        states = [(await watching.read()).status]
        server.process.send_signal(signal.SIGTERM)
        states.append((await watching.read()).status)
        answer = health_pb2.HealthCheckResponse
        assert states == [answer.SERVING, answer.NOT_SERVING]
    async with asyncio.timeout(60):
        assert await server.process.wait() == 0
    code, told = await probe(address)
    assert (code, "UNAVAILABLE" in told) == (1, True)


async def test_an_address_in_use_stops_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = await run(*LOCAL, "--data-dir", str(tmp_path / "data"), "--health-listen", address)
    assert_refused(ended, "health_listen", address)


@pytest.mark.parametrize("arguments", [(), ("127.0.0.1:1", "a", "b")])
async def test_a_probe_without_an_address_is_told_what_to_write(arguments: tuple[str, ...]) -> None:
    code, told = await probe(*arguments)
    assert (code, told.startswith("usage: ")) == (2, True)
