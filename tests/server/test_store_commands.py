"""`fmi-server backup`, `restore` and `inspect`, beside a server and without one."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sqlite3
import stat
import sys
from pathlib import Path

import pytest
from ports import lasting_address
from server_harness import PRIOR, Client, eventually, msp, packet_keys, spec
from server_process import COMMAND, LOCAL, Ended, environment, started

from fmi.v1 import cohort_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_client import AsyncFMIClient, RetryPolicy

EVERY = wire_pb2.DELIVERY_MODE_EVERY


async def store_command(name: str, *arguments: str | Path) -> Ended:
    """Run a command of the store in a process of its own, as an operator does."""
    process = await asyncio.create_subprocess_exec(
        COMMAND[0],
        name,
        *map(str, arguments),
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def inspected(*arguments: str | Path) -> dict:
    ended = await store_command("inspect", "--json", *arguments)
    assert ended.code == 0, ended
    return json.loads(ended.out)


async def declare(client: Client, cohort: str) -> None:
    aggregation = cohort_pb2.AggregationSpec(vote_min_sites=1)
    await client.put_spec(spec(cohort, aggregation=aggregation))


async def publish(client: Client, value: float) -> int:
    """Release a prior of its own; return its revision."""
    await client.emit(msp("site", "care", controller={"tau": value}))
    await client.release("care")
    latest = await client.update("care")
    assert latest.prior_update.prior["tau"] == value
    return latest.revision


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flags(data_dir: Path, listen: str = LOCAL[1]) -> tuple[str, ...]:
    return ("--listen", listen, "--data-dir", str(data_dir))


async def test_a_backup_under_load_has_what_was_acknowledged_before_it(tmp_path):
    data_dir, copy = tmp_path / "data", tmp_path / "copy.sqlite3"
    async with started(*flags(data_dir)) as server, Client(server.target) as client:
        acknowledged: list[str] = []

        async def emit() -> None:
            while True:
                packet = msp("site")
                await client.emit(packet)
                acknowledged.append(packet.header.packet_id)

        async with asyncio.TaskGroup() as tasks:
            emitting = [tasks.create_task(emit()) for _ in range(4)]
            await eventually(lambda: len(acknowledged) >= 50)
            before = list(acknowledged)
            made = await store_command("backup", "--data-dir", data_dir, "--json", copy)
            after = len(acknowledged)
            for task in emitting:
                task.cancel()
        assert made.code == 0, made
        assert json.loads(made.out)["bytes"] == copy.stat().st_size
        assert after > len(before)  # the server went on meanwhile
        live = await inspected("--data-dir", data_dir)
        assert live["server_pid"] == server.pid
    with contextlib.closing(sqlite3.connect(copy)) as connection:
        kept = {row[0] for row in connection.execute("SELECT packet_id FROM packets")}
    assert set(before) <= kept
    found = await inspected("--check", copy)
    assert (
        found["checked_packets"]
        == len(kept)
        == found["cohorts"]["default"]["packets"]["msp"]["live"]
    )
    assert found["history_epoch"] == live["history_epoch"]


async def test_nobody_but_its_owner_reads_a_store_or_a_backup(tmp_path):
    """They have every packet. What SQLite makes by itself everybody could read."""
    data_dir, copy, again = tmp_path / "data", tmp_path / "copy.sqlite3", tmp_path / "again"
    before = os.umask(0o022)
    try:
        async with started(*flags(data_dir)) as server, Client(server.target) as client:
            await client.emit(msp("site"))
            assert (await store_command("backup", "--data-dir", data_dir, copy)).code == 0
            running = modes(data_dir)
            assert {path.name.rpartition("-")[2] for path in running} > {"wal", "shm"}
        assert (await store_command("restore", "--data-dir", again, copy)).code == 0
    finally:
        os.umask(before)
    found = {**running, **modes(again), copy: stat.S_IMODE(copy.stat().st_mode)}
    assert {mode for path, mode in found.items() if path not in (data_dir, again)} == {0o600}
    assert found[data_dir] == found[again] == 0o700


def modes(folder: Path) -> dict[Path, int]:
    return {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}


async def test_nothing_is_written_over(tmp_path):
    data_dir, copy = tmp_path / "data", tmp_path / "copy"
    async with started(*flags(data_dir)) as server, Client(server.target) as client:
        await client.emit(msp())
    copy.write_bytes(b"mine")
    ended = await store_command("backup", "--data-dir", data_dir, copy)
    assert (ended.code, copy.read_bytes()) == (2, b"mine")
    assert "exists" in ended.line
    copy.unlink()
    assert (await store_command("backup", "--data-dir", data_dir, copy)).code == 0
    before = digest(data_dir / "fmi.sqlite3")
    ended = await store_command("restore", "--data-dir", data_dir, copy)
    assert ended.code == 2
    assert "--replace" in ended.line
    assert digest(data_dir / "fmi.sqlite3") == before


async def test_what_cannot_be_written_is_told_by_its_own_name(tmp_path):
    data_dir = tmp_path / "data"
    async with started(*flags(data_dir)) as server, Client(server.target) as client:
        await client.emit(msp())
        missing = tmp_path / "nowhere" / "copy"
        ended = await store_command("backup", "--data-dir", data_dir, missing)
        assert (ended.code, str(missing) in ended.line) == (2, True), ended
        assert "No such file or directory" in ended.line
        copy = tmp_path / "copy"
        assert (await store_command("backup", "--data-dir", data_dir, copy)).code == 0
    for folder in (copy, copy / "below"):
        ended = await store_command("restore", "--data-dir", folder, copy)
        assert (ended.code, f"data_dir: {folder}" in ended.line) == (2, True), ended
    assert (await store_command("inspect", "--check", copy)).code == 0


async def test_a_store_in_use_is_not_restored(tmp_path):
    data_dir, copy = tmp_path / "data", tmp_path / "copy"
    async with started(*flags(data_dir)) as server, Client(server.target) as client:
        await client.emit(msp())
        assert (await store_command("backup", "--data-dir", data_dir, copy)).code == 0
        ended = await store_command("restore", "--data-dir", data_dir, "--replace", copy)
        assert ended.code == 2
        assert f"process {server.pid}" in ended.line
        await client.emit(msp("site-2"))
        names = {path.name for path in data_dir.iterdir()}
        assert not any("partial" in name or "replaced" in name for name in names)


async def test_subscribers_go_on_in_the_restored_history(tmp_path):
    """What came after the backup is gone: a token of then gets a snapshot, and the SDK the older prior."""
    data_dir, copy = tmp_path / "data", tmp_path / "copy"
    seen: list[tuple[str, int, float]] = []

    async def follow(client: AsyncFMIClient) -> None:
        async with client.subscribe("care", "prior", mode="every") as updates:
            async for update in updates:
                tau = update.prior_update.prior["tau"]
                seen.append((update.history_epoch, update.revision, tau))

    address = lasting_address()  # to which they come back

    async with contextlib.AsyncExitStack() as stack:
        async with started(*flags(data_dir, address)) as server, Client(address) as client:
            await declare(client, "care")
            for value in (0.1, 0.2):
                await publish(client, value)
            follower = await stack.enter_async_context(
                AsyncFMIClient(server.target, retry=RetryPolicy(initial_s=0.1, max_s=0.5))
            )
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            following = tasks.create_task(follow(follower))
            stack.callback(following.cancel)
            await eventually(lambda: len(seen) == 1)
            assert (await store_command("backup", "--data-dir", data_dir, copy)).code == 0
            for value in (0.3, 0.4):
                await publish(client, value)
            async with client.subscribed("care", kinds=[PRIOR]) as events:
                token = (await events.until("snapshot_end"))[-1].resume_token
            await eventually(lambda: len(seen) == 3)
            os.kill(server.pid, signal.SIGKILL)
            await server.process.wait()
        ended = await store_command("restore", "--data-dir", data_dir, "--replace", "--json", copy)
        assert ended.code == 0, ended
        said = json.loads(ended.out)
        aside = Path(said["set_aside"])
        with contextlib.closing(sqlite3.connect(aside)) as connection:
            assert connection.execute("SELECT max(revision) FROM updates").fetchone() == (4,)
        async with (
            started(*flags(data_dir, address)) as server,
            Client(server.target) as client,
        ):
            for mode in (wire_pb2.DELIVERY_MODE_LATEST, EVERY):
                async with client.subscribed(
                    "care", kinds=[PRIOR], mode=mode, resume_token=token
                ) as events:
                    update, end = await events.until("snapshot_end")
                assert (update.update.revision, update.update.prior_update.prior["tau"]) == (2, 0.2)
                assert update.update.history_epoch == said["history_epoch"]
                assert end.snapshot_end.history_changed
                assert end.snapshot_end.history_epoch == said["history_epoch"]
            assert (await client.update("care")).history_epoch == said["history_epoch"]
            await eventually(lambda: len(seen) == 4)
            await publish(client, 0.5)
            await eventually(lambda: len(seen) == 5)
            old, new = seen[0][0], said["history_epoch"]
            assert seen == [
                (old, 2, 0.2),
                (old, 3, 0.3),
                (old, 4, 0.4),
                (new, 2, 0.2),
                (new, 3, 0.5),
            ]
            following.cancel()


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "page", "newer", "other program"])
async def test_what_is_no_backup_changes_nothing(tmp_path, damage):
    data_dir, copy = tmp_path / "data", tmp_path / "copy"
    async with started(*flags(data_dir)) as server, Client(server.target) as client:
        for turn in range(40):
            await client.emit(msp(f"site-{turn}"))
    assert (await store_command("backup", "--data-dir", data_dir, copy)).code == 0
    before, names = digest(data_dir / "fmi.sqlite3"), {p.name for p in data_dir.iterdir()}
    spoil(copy, damage)
    ended = await store_command("restore", "--data-dir", data_dir, "--replace", copy)
    assert ended.code == 2, ended
    assert str(copy) in ended.line
    assert digest(data_dir / "fmi.sqlite3") == before
    assert {p.name for p in data_dir.iterdir()} == names
    assert len(packet_keys(data_dir)) == 40


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    match damage:
        case "text":
            content = bytearray(b"these are not the bytes of a database")
        case "empty":
            content = bytearray()
        case "cut":
            del content[len(content) // 2 :]
        case "page":
            page = 8192
            content[page * 3 : page * 4] = os.urandom(page)
        case "newer":
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.execute("PRAGMA user_version = 99")
            return
        case "other program":
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.execute("PRAGMA application_id = 1")
            return
    path.write_bytes(content)


async def test_a_live_database_is_not_taken_for_a_backup(tmp_path):
    """Copied by hand without its log, it would lack what was acknowledged last."""
    data_dir = tmp_path / "data"
    async with started(*flags(data_dir)) as server, Client(server.target) as client:
        await client.emit(msp())
        ended = await store_command(
            "restore", "--data-dir", tmp_path / "new", data_dir / "fmi.sqlite3"
        )
        assert ended.code == 2
        assert "live database" in ended.line
    assert not (tmp_path / "new" / "fmi.sqlite3").exists()


async def test_inspect_says_what_is_held_and_finds_a_flipped_bit(tmp_path):
    data_dir = tmp_path / "data"
    async with started(*flags(data_dir)) as server, Client(server.target) as client:
        await declare(client, "care")
        for value in (0.1, 0.2, 0.3):
            await publish(client, value)
        await client.emit(msp("other", "trade"))
        server.process.send_signal(signal.SIGTERM)
        assert await server.process.wait() == 0
    before = digest(data_dir / "fmi.sqlite3")
    found = await inspected("--data-dir", data_dir, "--check")
    assert digest(data_dir / "fmi.sqlite3") == before
    assert found["server_pid"] is None
    assert found["checked_packets"] == 4
    care, trade = found["cohorts"]["care"], found["cohorts"]["trade"]
    assert (care["declared"], care["sites"]) == (True, 1)
    assert care["packets"] == {"msp": {"live": 3, "retired": 0, "quarantined": 0}}
    assert care["oldest"] <= care["newest"]
    assert care["updates"]["prior"]["oldest_revision"] == 1
    assert care["updates"]["prior"]["newest_revision"] == 3
    assert (trade["declared"], trade["packets"]["msp"]["live"]) == (False, 1)
    ended = await store_command("inspect", "--data-dir", data_dir)
    assert ended.code == 0
    assert "care" in ended.out
    assert "1-3" in ended.out
    with contextlib.closing(sqlite3.connect(data_dir / "fmi.sqlite3")) as connection:
        (payload,) = connection.execute("SELECT payload FROM packets LIMIT 1").fetchone()
        spoilt = bytes([payload[0], payload[1] ^ 1]) + payload[2:]
        connection.execute("UPDATE packets SET payload = ? WHERE sequence = 1", (spoilt,))
        connection.commit()
    assert (await store_command("inspect", "--data-dir", data_dir)).code == 0
    ended = await store_command("inspect", "--check", "--data-dir", data_dir)
    assert ended.code == 2
    assert "packet 1 is not as it was stored" in ended.line


async def test_where_there_is_no_store_none_is_made(tmp_path):
    for name, *arguments in (("inspect",), ("backup", tmp_path / "copy")):
        ended = await store_command(name, "--data-dir", tmp_path / "data", *arguments)
        assert ended.code == 2
        assert "there is no store" in ended.line
    assert list(tmp_path.iterdir()) == []


async def test_a_killed_restore_leaves_one_store_or_the_other(tmp_path, command):
    """Killed at each of its steps, it leaves a whole store, the old or the new one, and can be repeated."""
    data_dir, copy = tmp_path / "data", tmp_path / "copy"
    async with started(*flags(data_dir)) as server, Client(server.target) as client:
        for turn in range(200):
            await client.emit(msp(f"site-{turn}"))
        server.process.send_signal(signal.SIGTERM)
        await server.process.wait()
    assert (await store_command("backup", "--data-dir", data_dir, copy)).code == 0
    code = (
        "import os, sys, signal, random\n"
        "from pathlib import Path\n"
        "from fmi_server.storage import restore_backup\n"
        "at, calls = int(sys.argv[1]), 0\n"
        "def audit(event, args):\n"
        "    global calls\n"
        "    if event in ('open', 'os.link', 'os.rename', 'os.remove', 'sqlite3.connect'):\n"
        "        calls += 1\n"
        "        if calls == at:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(audit)\n"
        "restore_backup(Path(sys.argv[2]), Path(sys.argv[3]), replace=True)\n"
    )
    path = data_dir / "fmi.sqlite3"
    killed = 0
    for at in range(1, 100):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, str(at), str(copy), str(path), env=environment()
        )
        if await process.wait() == 0:
            break
        killed += 1
        inspected = command("--json", "--data-dir", str(data_dir), "--check", name="inspect")
        assert inspected.code == 0, inspected
        assert json.loads(inspected.out)["checked_packets"] == 200
    assert killed >= 8, "the restore was killed at each of its steps"
    async with started(*flags(data_dir)):
        assert len(packet_keys(data_dir)) == 200
