"""What `SqliteStore` promises about disks, crashes and strange files."""

from __future__ import annotations

import _sqlite3
import asyncio
import contextlib
import ctypes
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fmi_server.storage.base import (
    PacketRecord,
    SpendRecord,
    StoreBusyError,
    StoreCorruptError,
    StoredPacket,
    StoreLockedError,
    StoreUnavailableError,
    StoreVersionError,
    UpdateRecord,
)
from fmi_server.storage.sqlite import SqliteStore
from fmi_server.storage.sqlite_backup import restore_backup
from fmi_server.storage.sqlite_schema import APPLICATION_ID, SCHEMA_VERSION
from fmi_server.storage.sqlite_writer import GroupLimits

ROOT = Path(__file__).parents[2]


def packet(packet_id: str, payload: bytes = b"x" * 420) -> PacketRecord:
    return PacketRecord(
        domain_id="site",
        packet_id=packet_id,
        cohort="health",
        kind="msp",
        content_hash=b"h" * 16,
        received_at_us=1,
        emitted_at_us=1,
        quarantined=False,
        quarantine_reason="",
        payload=payload,
    )


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def load_all(store: SqliteStore) -> list[StoredPacket]:
    got: list[StoredPacket] = []
    while part := await store.load(after=got[-1].sequence if got else 0):
        got += part
    return got


CHILD = """
import asyncio, os, sys
from fmi_server.storage.base import PacketRecord
from fmi_server.storage.sqlite import SqliteStore

async def emit(store, worker, prefix):
    number = 0
    while True:
        ids = [f"{prefix}-{worker}-{number}-{k}" for k in range(worker + 1)]
        await store.append([
            PacketRecord("site", i, "health", "msp", b"h" * 16, 1, 1, False, "", i.encode() * 20)
            for i in ids
        ])
        os.write(1, (" ".join(ids) + "\\n").encode())
        number += 1

async def main():
    async with SqliteStore(sys.argv[1]) as store, asyncio.TaskGroup() as group:
        for worker in range(6):
            group.create_task(emit(store, worker, sys.argv[2]))

asyncio.run(main())
"""


def start_child(path: Path, prefix: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), prefix], stdout=subprocess.PIPE, cwd=ROOT
    )


async def test_each_commit_is_synced(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "fmi.db") as store:
        for name, expected in (("synchronous", 2), ("journal_mode", "wal")):
            assert await store._open_writer().run(
                lambda connection, name=name: connection.execute(f"PRAGMA {name}").fetchone()
            ) == (expected,)


async def test_kill_loses_no_acknowledged_packet(tmp_path: Path) -> None:
    path = tmp_path / "fmi.db"
    rng = random.Random(7)
    acknowledged: set[str] = set()
    epochs: set[str] = set()
    for round_number in range(4):
        child = start_child(path, str(round_number))
        assert child.stdout is not None
        with child.stdout:
            lines = [child.stdout.readline() for _ in range(rng.randrange(20, 400))]
            child.send_signal(signal.SIGKILL)
            # What it wrote into the pipe before it died was acknowledged as well. A last line
            # without its end was cut off by the kill.
            lines += child.stdout.read().splitlines(keepends=True)
        assert child.wait() == -signal.SIGKILL
        acknowledged.update(
            name for line in lines if line.endswith(b"\n") for name in line.decode().split()
        )
        async with SqliteStore(path) as store:
            epochs.add(store.history_epoch)
            kept = await load_all(store)
            ids = [p.record.packet_id for p in kept]
            assert len(ids) == len(set(ids))
            assert acknowledged <= set(ids)
            assert all(p.record.payload == p.record.packet_id.encode() * 20 for p in kept)
            (site,) = await store.sites()
            assert site.msp_count == len(ids)
            (again,) = await store.append([packet(next(iter(acknowledged)))])
            assert again.status == "duplicate"
    assert len(acknowledged) > 100
    assert len(epochs) == 1


async def test_everything_survives_reopening(tmp_path: Path) -> None:
    path = tmp_path / "fmi.db"
    async with SqliteStore(path) as store:
        epoch = store.history_epoch
        (first,) = await store.append([packet("p1")])
        await store.publish([UpdateRecord(1, "health", 1, 1, 5, b"h", b"payload")])
        await store.put_cohort("health", b"spec", 3)
        await store.put_dictionary(1, b"data", 9)
        await store.put_reputations("health", {"site": 0.25})
        before = (await store.load(), await store.updates_since(0), await store.sites())
    assert not path.with_name("fmi.db-wal").exists()
    async with SqliteStore(path) as store:
        assert store.history_epoch == epoch
        assert (await store.load(), await store.updates_since(0), await store.sites()) == before
        assert [c.revision for c in await store.cohorts()] == [3]
        assert [d.data for d in await store.dictionaries()] == [b"data"]
        (again,) = await store.append([packet("p1")])
        assert again == replace(first, status="duplicate")
        (later,) = await store.append([packet("p2")])
        assert later.sequence > first.sequence
        assert await store.next_update_sequence() == 2


async def test_callers_share_a_group(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "fmi.db") as store:
        await asyncio.gather(*(store.append([packet(f"p{i}")]) for i in range(500)))
        stats = store.stats()
        assert stats.records_stored == 500
        # The first may go alone; whatever waits while a group commits goes together.
        assert stats.groups < 100
        assert stats.largest_group > 5


async def test_a_full_disk_refuses_all_waiters_and_recovers(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "fmi.db") as store:
        await store.append([packet("first")])
        await store.set_max_bytes(1)  # SQLite never shrinks: from here on no page more
        big = b"x" * 50_000
        results = await asyncio.gather(
            *(store.append([packet(f"p{i}", big)]) for i in range(10)), return_exceptions=True
        )
        assert len({id(result) for result in results}) == 10
        for result in results:
            assert isinstance(result, StoreUnavailableError)
            assert result.cause == "disk_full"
            assert isinstance(result.__cause__, sqlite3.OperationalError)
        assert [p.record.packet_id for p in await store.load()] == ["first"]
        assert store.stats().failed_groups >= 1
        assert (await store.sites())[0].msp_count == 1
        await store.set_max_bytes(None)
        outcomes = [(await store.append([packet(f"p{i}", big)]))[0] for i in range(10)]
        assert {o.status for o in outcomes} == {"stored"}
        assert store.stats().pending_bytes == 0


async def test_the_size_limit_holds_from_the_start(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "fmi.db", max_bytes=400_000) as store:

        async def fill() -> None:
            for number in range(100):
                await store.append([packet(f"p{number}", b"x" * 20_000)])

        with pytest.raises(StoreUnavailableError) as caught:
            await fill()
        assert caught.value.cause == "disk_full"
        assert 5 < store.stats().records_stored < 25


async def test_too_much_waiting_is_refused_at_once(tmp_path: Path) -> None:
    limits = GroupLimits(group_records=8, pending_records=10, pending_bytes=10_000)
    async with SqliteStore(tmp_path / "fmi.db", limits=limits) as store:
        gate = threading.Event()
        blocker = asyncio.ensure_future(store._open_writer().run(lambda _: gate.wait()))
        await asyncio.sleep(0)
        try:
            waiting = asyncio.ensure_future(store.append([packet(f"p{i}") for i in range(10)]))
            await asyncio.sleep(0)
            assert store.stats().pending_records == 10
            with pytest.raises(StoreBusyError) as caught:
                await store.append([packet("more")])
            assert caught.value.pending_records == 10
            assert caught.value.cause == "busy"
        finally:
            gate.set()
        assert await blocker
        assert len(await waiting) == 10
        # One call beyond the bound is taken when nothing else waits.
        assert len(await store.append([packet(f"q{i}", b"x" * 2_000) for i in range(30)])) == 30


async def test_reads_do_not_wait_for_the_writer(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "fmi.db") as store:
        await store.append([packet("p1")])
        gate = threading.Event()
        blocker = asyncio.ensure_future(store._open_writer().run(lambda _: gate.wait()))
        await asyncio.sleep(0)
        try:
            assert len(await store.load()) == 1
            assert not blocker.done()
        finally:
            gate.set()
        assert await blocker


async def test_pages_in_memory_are_bounded(tmp_path: Path) -> None:
    try:
        used = ctypes.CDLL(_sqlite3.__file__).sqlite3_memory_used
    except AttributeError:
        pytest.skip("this build of Python hides SQLite's own functions")
    used.restype = ctypes.c_int64
    before = used()
    async with SqliteStore(tmp_path / "fmi.sqlite3") as store:
        for turn in range(20):
            many = [packet(f"p{turn}-{n}", random.randbytes(100_000)) for n in range(20)]
            await store.append(many)
            await asyncio.gather(*(store.load(after=turn * 20) for _ in range(2)))
        # 40 MB were written and read: 16 MiB of pages for the writer, 2 MiB for each of two readers.
        assert 8 * 2**20 < used() - before < 24 * 2**20
    async with SqliteStore(tmp_path / "fmi.sqlite3") as store:
        await asyncio.gather(*(store.load() for _ in range(4)))
        assert used() - before < 24 * 2**20


async def test_only_one_opener(tmp_path: Path) -> None:
    path = tmp_path / "fmi.db"
    link = tmp_path / "other.db"
    async with SqliteStore(path) as store:
        link.symlink_to(path)
        for name in (path, link):
            with pytest.raises(StoreLockedError) as caught:
                await SqliteStore(name).open()
            assert caught.value.holder_pid == os.getpid()
            assert caught.value.cause == "locked"
        assert (await store.append([packet("p1")]))[0].status == "stored"
    async with SqliteStore(link) as store:
        assert len(await store.load()) == 1


@pytest.mark.parametrize(
    "content", [b"hello\n", b"x" * 100_000, b"SQLite format 3\x00" + b"x" * 99]
)
async def test_a_file_that_is_not_a_database_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fmi.db"
    path.write_bytes(content)
    with pytest.raises(StoreCorruptError) as caught:
        await SqliteStore(path).open()
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == content


async def test_a_directory_is_not_a_database(tmp_path: Path) -> None:
    with pytest.raises(StoreCorruptError):
        await SqliteStore(tmp_path).open()


async def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "fmi.db"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StoreCorruptError, match="another program"):
        await SqliteStore(path).open()
    assert path.read_bytes() == before


async def test_a_newer_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "fmi.db"
    async with SqliteStore(path):
        pass
    with contextlib.closing(sqlite3.connect(path)) as newer:
        assert newer.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        newer.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(StoreVersionError) as caught:
        await SqliteStore(path).open()
    assert (caught.value.found, caught.value.supported) == (SCHEMA_VERSION + 1, SCHEMA_VERSION)
    assert path.read_bytes() == before


async def test_missing_parts_and_a_cut_file_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "fmi.db"
    async with SqliteStore(path) as store:
        await store.append([packet(f"p{i}") for i in range(1000)])
    whole = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("DROP INDEX packets_by_key")
    with pytest.raises(StoreCorruptError, match="packets_by_key"):
        await SqliteStore(path).open()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreCorruptError):
        await SqliteStore(path).open()
    path.write_bytes(whole)
    async with SqliteStore(path) as store:
        assert len(await load_all(store)) == 1000


async def test_an_interrupted_creation_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "fmi.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")
    assert path.stat().st_size > 0
    async with SqliteStore(path) as store:
        assert (await store.append([packet("p1")]))[0].status == "stored"


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        await SqliteStore(tmp_path / "missing" / "fmi.db").open()
    assert caught.value.cause == "no_directory"
    assert "missing" in caught.value.path


def test_a_read_only_directory_is_refused() -> None:
    # Not tmp_path: where the tests run as root they give the rights up, and must still get there.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(StoreUnavailableError) as caught:
                asyncio.run(SqliteStore(directory / "fmi.db").open())
        finally:
            if root:
                os.seteuid(0)
            directory.chmod(0o755)
        assert caught.value.cause == "read_only"
        assert list(directory.iterdir()) == []


async def test_backup_under_load_and_restore_as_a_new_history(tmp_path: Path) -> None:
    path, copy, restored = (tmp_path / name for name in ("fmi.db", "copy.db", "restored.db"))
    async with SqliteStore(path) as store:
        await store.append([packet(f"p{i}") for i in range(2000)])
        epoch = store.history_epoch
        await asyncio.gather(
            store.backup(copy), *(store.append([packet(f"q{i}")]) for i in range(50))
        )
        with pytest.raises(FileExistsError):
            await store.backup(copy)
        with pytest.raises(StoreUnavailableError) as caught:
            await store.backup(tmp_path / "missing" / "copy.db")
        assert caught.value.cause in ("no_directory", "read_only")
        everything = await load_all(store)
    new_epoch = restore_backup(copy, restored).history_epoch
    with pytest.raises(FileExistsError):
        restore_backup(copy, path)
    async with SqliteStore(restored) as store:
        assert store.history_epoch == new_epoch != epoch
        kept = await load_all(store)
        assert kept == everything[: len(kept)]
        assert len(kept) >= 2000
    assert names_in(tmp_path) == {
        "fmi.db",
        "fmi.db.lock",
        "copy.db",
        "restored.db",
        "restored.db.lock",
    }


async def test_restore_refuses_what_is_not_a_backup(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"hello")
    with pytest.raises(StoreCorruptError):
        restore_backup(tmp_path / "text", tmp_path / "fmi.db")
    with pytest.raises(StoreUnavailableError):
        restore_backup(tmp_path / "missing", tmp_path / "fmi.db")
    assert names_in(tmp_path) == {"text"}


async def test_nobody_changes_an_entry_of_the_privacy_ledger(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    entry = SpendRecord("care", 1, 7, 1_000, 0.5, "epoch")
    async with SqliteStore(path) as store:
        await store.spend(entry)
    copied = "SELECT cohort, {}, spent_at_us, {}, history_epoch FROM privacy_ledger"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for change in (
            "UPDATE privacy_ledger SET rho = 0.1",
            "DELETE FROM privacy_ledger",
            f"INSERT OR REPLACE INTO privacy_ledger {copied.format('number, period', 0.0)}",
            f"INSERT INTO privacy_ledger {copied.format('9, period + 1', 0.5)}",
            f"INSERT INTO privacy_ledger {copied.format('number + 1, period', 0.5)}",
            "DELETE FROM privacy_ledger WHERE number = 1",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(change)
    async with SqliteStore(path) as store:
        assert await store.spends("care") == [entry]
