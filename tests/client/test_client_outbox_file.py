"""The outbox in a file: what survives the process, what is refused, and one process at a time."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from scripted_server import FAST, aborts, status

from fmi_client import (
    AsyncFMIClient,
    ClientClosedError,
    CohortRuleError,
    FileOutbox,
    FMIClient,
    OutboxCorruptError,
    OutboxFullError,
    OutboxLockedError,
    OutboxUnavailableError,
    _outbox_file,
)
from fmi_client.receipts import EmitStatus

WAIT_S = 60.0
REFUSAL = status(grpc.StatusCode.INVALID_ARGUMENT, "COHORT_RULE_VIOLATION", "not in the vocabulary")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.outbox"


def msps(emitter, count):
    return [emitter.emit_msp(controller={"tau": i}) for i in range(count)]


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  what is watched is not in this event loop
            await asyncio.sleep(0.001)


def ids(packets):
    return [packet.header.packet_id for packet in packets]


def filled(path, packets):
    """Write packets as a process does that dies before it can send them."""
    outbox = FileOutbox(path)
    outbox.put(packets)
    outbox.close()


async def test_what_one_process_leaves_the_next_one_sends_in_order(server, path, emitter):
    packets = msps(emitter, 7)
    await server.stop()
    client = AsyncFMIClient(server.target, outbox=FileOutbox(path), retry=FAST)
    await client.emit_many(packets[:4])
    await client.emit(packets[4])
    await client.aclose(flush_s=0)
    await server.restart()

    outbox = FileOutbox(path)
    assert outbox.statistics.waiting == 5
    assert outbox.statistics.bytes > 0
    async with AsyncFMIClient(server.target, outbox=outbox, retry=FAST) as client:
        await client.emit_many(packets[5:])
        assert await client.flush(WAIT_S)
    assert list(server.taken) == ids(packets)
    assert len(FileOutbox(path)) == 0


async def test_what_waits_is_sent_though_nothing_is_emitted(server, path, emitter, connect):
    packets = msps(emitter, 3)
    filled(path, packets)
    client = await connect(outbox=FileOutbox(path))
    await until(lambda: not len(client.outbox))
    assert list(server.taken) == ids(packets)


async def test_the_blocking_client_sends_it_as_well(server, path, emitter):
    packets = msps(emitter, 3)
    filled(path, packets)

    def work():
        client = FMIClient(server.target, outbox=FileOutbox(path), retry=FAST)
        assert client.flush(WAIT_S)
        client.close()

    await asyncio.to_thread(work)
    assert list(server.taken) == ids(packets)


async def test_what_was_refused_is_kept_in_the_file(server, path, emitter):
    server.script("Emit", aborts(REFUSAL))
    async with AsyncFMIClient(server.target, outbox=FileOutbox(path), retry=FAST) as client:
        (packet,) = msps(emitter, 1)
        await client.emit(packet)
        assert await client.flush(WAIT_S)
    outbox = FileOutbox(path)
    (kept,) = outbox.refused
    assert kept.packet == packet
    assert isinstance(kept.error, CohortRuleError)
    assert kept.error.message == "not in the vocabulary"
    outbox.close()
    with pytest.raises(ClientClosedError):
        _ = outbox.refused


def test_a_packet_is_written_before_it_is_taken(path, emitter):
    """Seen through the eyes of another connection, as after a crash."""
    outbox = FileOutbox(path)
    (receipt,) = outbox.put(msps(emitter, 1))
    assert receipt.status is EmitStatus.SPOOLED
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT packet_id FROM packets").fetchall() == [(receipt.packet_id,)]
    other.close()
    assert outbox._store._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert outbox._store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_nobody_but_its_owner_reads_it(path, emitter):
    """What SQLite makes by itself everybody could read."""
    before = os.umask(0o022)
    try:
        outbox = FileOutbox(path)
        outbox.put(msps(emitter, 1))
        found = {file: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        outbox.close()
    finally:
        os.umask(before)
    assert len(found) >= 3
    assert set(found.values()) == {0o600}


def test_one_process_at_a_time(path):
    with pytest.raises(OutboxLockedError) as caught, closing(FileOutbox(path)):
        FileOutbox(path)
    assert caught.value.pid == os.getpid()
    code = (
        "import sys; from fmi_client import FileOutbox, OutboxLockedError\n"
        "try: FileOutbox(sys.argv[1])\n"
        "except OutboxLockedError as error: print(error.pid)\n"
    )
    with closing(FileOutbox(path)):
        done = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
        )
    assert done.stdout.strip() == str(os.getpid())
    FileOutbox(path).close()


def test_a_dropped_outbox_lets_the_file_go(path):
    FileOutbox(path)
    FileOutbox(path).close()


def spoil_the_beginning(path):
    data = path.read_bytes()
    path.write_bytes(b"\0" * 16 + data[16:])


def spoil_a_packet(path):
    with sqlite3.connect(path) as database:
        database.execute("UPDATE packets SET data = zeroblob(length(data)) WHERE sequence = 2")
    database.close()


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


def another_program(path):
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()


def a_text(path):
    path.write_text("not a database at all")


def of_the_future(path):
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()


@pytest.mark.parametrize(
    "spoil",
    [spoil_the_beginning, spoil_a_packet, cut_off, another_program, a_text, of_the_future],
)
def test_a_file_that_is_damaged_or_no_outbox_is_told_and_left_as_it_is(path, emitter, spoil):
    filled(path, msps(emitter, 40))
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(OutboxCorruptError, match=path.name):
        FileOutbox(path)
    assert path.read_bytes() == before
    with pytest.raises(OutboxCorruptError):  # and the lock is free again
        FileOutbox(path)


def test_a_folder_is_no_outbox(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutboxCorruptError):
        FileOutbox(tmp_path / "folder")
    with pytest.raises(OutboxUnavailableError, match="No such file"):
        FileOutbox(tmp_path / "nowhere" / "site.outbox")


def test_an_empty_file_is_a_new_outbox(path):
    path.touch()
    assert len(FileOutbox(path)) == 0


async def test_damage_that_comes_later_stops_the_sending_and_is_told(
    server, path, emitter, connect
):
    await server.stop()
    client = await connect(outbox=FileOutbox(path))
    await client.emit_many(msps(emitter, 3))
    spoil_a_packet(path)
    with pytest.raises(OutboxCorruptError, match="not as written"):
        await client.flush(WAIT_S)
    with pytest.raises(OutboxCorruptError):
        await client.emit(msps(emitter, 1)[0])
    assert not server.taken


async def test_a_full_disk_is_told_and_what_was_taken_is_kept(server, path, emitter, connect):
    await server.stop()
    outbox = FileOutbox(path)
    client = await connect(outbox=outbox)
    packets = msps(emitter, 60)
    await client.emit(packets[0])
    connection = outbox._store._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OutboxUnavailableError, match="full") as caught:
        await client.emit_many(packets[1:])
    assert caught.value.retryable
    assert list(caught.value.unanswered) == packets[1:]
    await client.emit_many(packets[1:])  # there is room again
    await server.restart()
    assert await client.flush(WAIT_S)
    assert list(server.taken) == ids(packets)


async def test_an_answer_that_cannot_be_noted_is_asked_for_again(
    server, path, emitter, connect, monkeypatch
):
    """The packet was taken by the server, and cannot be forgotten: it is sent again and counts once."""
    outbox = FileOutbox(path)
    settle = outbox._store.settle
    failures = [OutboxUnavailableError("disk full"), OutboxUnavailableError("disk full")]

    def fails(sequences, refused):
        if failures:
            raise failures.pop()
        settle(sequences, refused)

    monkeypatch.setattr(outbox._store, "settle", fails)
    client = await connect(outbox=outbox)
    packets = msps(emitter, 1)
    await client.emit_many(packets)
    assert await client.flush(WAIT_S)
    assert list(server.taken) == ids(packets)
    assert len(server.seen("Emit")) == 3
    assert client.outbox.statistics.duplicates == 1


def test_bounds_hold_for_what_an_earlier_process_left(path, emitter):
    packets = msps(emitter, 3)
    filled(path, packets[:2])
    outbox = FileOutbox(path, max_packets=2)
    with pytest.raises(OutboxFullError):
        outbox.put(packets[2:])
    outbox.close()
    dropping = FileOutbox(path, max_packets=2, when_full="drop_oldest")
    dropping.put(packets[2:])
    dropping.close()
    rest = FileOutbox(path)
    assert [item.packet_id for item, _ in rest.head(10, 10**6)] == ids(packets[1:])


def test_a_packet_that_waits_is_known_to_the_next_process(path, emitter):
    packets = msps(emitter, 1)
    filled(path, packets)
    outbox = FileOutbox(path)
    outbox.put(packets)
    assert len(outbox) == 1


def test_a_folder_that_cannot_be_synced_is_told(path, monkeypatch):
    def fails(_descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(_outbox_file.os, "fsync", fails)
    with pytest.raises(OutboxUnavailableError, match="Input/output error"):
        FileOutbox(path)
    monkeypatch.undo()
    FileOutbox(path).close()
