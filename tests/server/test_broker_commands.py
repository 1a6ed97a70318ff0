"""`fmi-server backup` and `restore` of a store at brokers, and from a file to brokers and back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from ports import lasting_address
from server_harness import Client, eventually, msp
from server_process import COMMAND, LOCAL, ServerProcess, environment, started
from test_jetstream import packet
from test_store_commands import declare, inspected, publish, store_command

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_client import AsyncFMIClient, RetryPolicy
from fmi_server.storage import JetStreamStore


@pytest.fixture
async def broker(tmp_path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker", sync="2m") as started_broker:
        yield started_broker


def flags(store: str, data_dir: Path, listen: str = LOCAL[1]) -> tuple[str, ...]:
    return ("--store", store, "--data-dir", str(data_dir), "--listen", listen)


async def at(server: ServerProcess) -> float:
    async with Client(server.target) as client:
        return (await client.update("care")).prior_update.prior["tau"]


async def says(server: ServerProcess, tau: float) -> bool:
    return await at(server) == tau


async def test_a_log_is_backed_up_beside_its_servers_and_restored_under_another_name(
    broker, tmp_path
):
    """Subscribers go on in the new history, with the prior of the backup."""
    copy, seen = tmp_path / "copy.sqlite3", []

    async def follow(client: AsyncFMIClient) -> None:
        async with client.subscribe("care", "prior", mode="every") as updates:
            async for update in updates:
                tau = update.prior_update.prior["tau"]
                seen.append((update.history_epoch, tau))

    async with contextlib.AsyncExitStack() as stack:
        async with (
            started(*flags(broker.url(), tmp_path / "a", lasting_address())) as one,
            started(*flags(broker.url(), tmp_path / "b")) as other,
            Client(one.target) as client,
        ):
            await declare(client, "care")
            await publish(client, 0.1)
            follower = await stack.enter_async_context(
                AsyncFMIClient(one.target, retry=RetryPolicy(initial_s=0.1, max_s=0.5))
            )
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            following = tasks.create_task(follow(follower))
            stack.callback(following.cancel)
            await eventually(lambda: len(seen) == 1)
            made = await store_command("backup", "--store", broker.url(), "--json", copy)
            assert made.code == 0, made
            assert json.loads(made.out) == {
                "store": broker.url(),
                "backup": str(copy),
                "bytes": copy.stat().st_size,
            }
            await publish(client, 0.2)
            await eventually(lambda: says(other, 0.2))
        found = await inspected("--check", copy)
        assert found["cohorts"]["care"]["packets"]["msp"]["live"] == 1
        refused = await store_command("restore", "--store", broker.url(), copy)
        assert refused.code == 2
        assert "has a log; choose another name" in refused.line
        again = broker.url("again")
        ended = await store_command(
            "restore", "--store", again, "--data-dir", tmp_path / "c", "--json", copy
        )
        assert ended.code == 0, ended
        epoch = json.loads(ended.out)["history_epoch"]
        await eventually(lambda: len(seen) == 2)
        async with (
            started(*flags(again, tmp_path / "c", one.target)) as restored,
            started(*flags(again, tmp_path / "d")) as second,
        ):
            assert await at(restored) == await at(second) == 0.1
            await eventually(lambda: len(seen) == 3)
            view = await inspected("--store", again, "--data-dir", tmp_path / "d")
            assert view["history_epoch"] == epoch
            assert view["server_pid"] == second.pid
            async with Client(second.target) as client:
                assert await publish(client, 0.3) == 2
            await eventually(lambda: len(seen) == 4)
        following.cancel()
    assert [tau for _, tau in seen] == [0.1, 0.2, 0.1, 0.3]
    assert [name for name, _ in seen][2:] == [epoch, epoch]


async def test_a_store_moves_from_a_file_to_brokers_and_back(broker, tmp_path):
    first, second = tmp_path / "first.sqlite3", tmp_path / "second.sqlite3"
    here, there = tmp_path / "here", tmp_path / "there"
    packet = msp("site", "care", controller={"tau": 0.5})
    async with started(*flags("sqlite", here)) as server, Client(server.target) as client:
        await declare(client, "care")
        await client.emit(packet)
        await client.release("care")
        assert (await store_command("backup", "--data-dir", here, first)).code == 0
    ended = await store_command("restore", "--store", broker.url(), "--data-dir", here, first)
    assert ended.code == 0, ended
    async with started(*flags(broker.url(), here)) as server, Client(server.target) as client:
        # It says that what is served is not the file that lies there too.
        warned = await eventually(
            lambda: [line for line in server.err if "fmi.sqlite3 is not served" in line]
        )
        assert len(warned) == 1
        (answer,) = await client.emit(packet)
        assert answer.status == wire_pb2.EMIT_STATUS_DUPLICATE
        await publish(client, 0.75)
    assert (await store_command("backup", "--store", broker.url(), second)).code == 0
    assert (await store_command("restore", "--data-dir", there, second)).code == 0
    async with started(*flags("sqlite", there)) as server:
        assert await at(server) == 0.75


async def test_a_backup_that_is_terminated_leaves_nothing(broker, tmp_path):
    folder = tmp_path / "backups"
    folder.mkdir()
    async with JetStreamStore(broker.url(), tmp_path / "view.db") as store:
        for number in range(40):
            await store.append([packet(f"p{number}", payload=bytes([number]) * 900_000)])
    # One that is quicker than the signal is tried again.
    for _ in range(20):
        process = await asyncio.create_subprocess_exec(
            COMMAND[0], "backup", "--store", broker.url(), folder / "copy", env=environment()
        )
        await eventually(lambda: any(folder.iterdir()))
        process.terminate()
        async with asyncio.timeout(60):
            code = await process.wait()
        if code != 0:
            break
        (folder / "copy").unlink()
    assert code == 128 + signal.SIGTERM
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("backup", ("--store", "nats://127.0.0.1:9/fmi"), "no_broker"),
        ("backup", ("--store", "nats://a,,b"), "must name hosts"),
        ("backup", ("--store", "memory"), "what is in memory is nowhere else"),
        ("restore", ("--store", "nats://127.0.0.1:9/fmi", "--replace"), "can set nothing aside"),
        ("inspect", ("--store", "nats://127.0.0.1:9/fmi"), "view.sqlite3"),
    ],
)
async def test_what_cannot_be_done_is_told_in_one_line(tmp_path, command, arguments, words):
    target = () if command == "inspect" else (tmp_path / "copy",)
    ended = await store_command(command, "--data-dir", tmp_path / "data", *arguments, *target)
    assert ended.code == 2, ended
    assert words in ended.line
    assert not (tmp_path / "copy").exists()
