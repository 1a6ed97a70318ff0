"""Backups of a log, and logs that begin with one; against a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import nats
import pytest
from broker import Broker
from test_jetstream import IMPATIENT, QUICK, ids, packet, update

from fmi_server.storage import (
    JetStreamStore,
    SqliteStore,
    backup_log,
    restore_backup,
    restore_log,
)
from fmi_server.storage.base import (
    LedgerConflictError,
    RevisionConflictError,
    SpendRecord,
    StoreCorruptError,
    StoreUnavailableError,
)
from fmi_server.storage.jetstream_log import BrokerLog
from fmi_server.storage.jetstream_snapshots import SnapshotStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fmi_server.storage import Store
    from fmi_server.storage.jetstream_view import ViewPosition


DATA = Path(__file__).with_name("data")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker") as started:
        yield started


async def fill(store: Store) -> None:
    await store.append([packet(f"p{number}") for number in range(30)])
    await store.append([packet("p0", domain_id="site-b")])
    await store.retire([3, 4])
    await store.set_quarantine(7, quarantined=True, reason="looked odd")
    await store.publish([update(1, 1), update(2, 2)])
    await store.put_cohort("health", b"spec", 1)
    await store.put_reputations("health", {"site-a": 0.5})
    await store.spend(SpendRecord("health", 1, 1, 1, 0.5, store.history_epoch))


async def contents(store: Store) -> list[object]:
    return [
        await store.load(),
        await store.live_packets("health"),
        await store.quarantined(),
        await store.updates_since(0),
        await store.cohorts(),
        await store.sites(),
        await store.ledger_totals(),
        await store.spends("health"),
    ]


async def stream_names(broker: Broker) -> set[str]:
    client = await nats.connect(f"nats://{broker.address}", allow_reconnect=False)
    found = {info.config.name for info in await client.jetstream().streams_info()}
    await client.close()
    return found


async def test_a_backup_of_a_log_becomes_a_file_or_another_log(
    broker: Broker, tmp_path: Path
) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=QUICK) as one:
        await fill(one)
        held, epoch = await contents(one), one.history_epoch
        size = await backup_log(broker.url(), tmp_path / "backup", options=QUICK)
        assert size == (tmp_path / "backup").stat().st_size
    file = restore_backup(tmp_path / "backup", tmp_path / "file.db")
    made = await restore_log(tmp_path / "backup", broker.url("other"), tmp_path, options=QUICK)
    assert len({epoch, file.history_epoch, made}) == 3
    async with (
        SqliteStore(tmp_path / "file.db") as embedded,
        JetStreamStore(broker.url("other"), tmp_path / "a.db", options=QUICK) as a,
        JetStreamStore(broker.url("other"), tmp_path / "b.db", options=QUICK) as b,
    ):
        assert {a.history_epoch, b.history_epoch} == {made}
        for store in (embedded, a, b):
            assert await contents(store) == held
            assert len(await store.lost_spans()) == 1
        # What the log of before would have refused, the new one refuses.
        assert [one.status for one in await a.append([packet("p5"), packet("new")])] == [
            "duplicate",
            "stored",
        ]
        with pytest.raises(RevisionConflictError):
            await a.publish([update(2, 2)])
        with pytest.raises(LedgerConflictError):
            await b.spend(SpendRecord("health", 1, 2, 1, 0.5, made))
        assert await b.publish([update(3, 3)]) == [3]
        await a.spend(SpendRecord("health", 2, 2, 1, 0.5, made))
        await a.catch_up()
        await b.catch_up()
        assert await contents(a) == await contents(b)
        # It is shortened like any other.
        await a.shorten_log()
        async with JetStreamStore(broker.url("other"), tmp_path / "c.db", options=QUICK) as c:
            assert await contents(c) == await contents(a)
    left = [path.name for path in tmp_path.iterdir()]  # noqa: ASYNC240 - a look at a folder
    assert not [name for name in left if name.startswith(".")]


async def test_an_embedded_store_moves_to_brokers(broker: Broker, tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "file.db") as embedded:
        await fill(embedded)
        held = await contents(embedded)
        await embedded.backup(tmp_path / "backup")
    await restore_log(tmp_path / "backup", broker.url(), tmp_path, options=QUICK)
    async with JetStreamStore(broker.url(), tmp_path / "view.db", options=QUICK) as store:
        assert await contents(store) == held
        await store.append([packet("new")])
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=QUICK) as store:
        assert (await ids(store))[-1] == "new"


@pytest.mark.parametrize("version", [1, 2])
async def test_a_store_of_an_older_version_moves_to_brokers(
    broker: Broker, tmp_path: Path, version: int
) -> None:
    dump = (DATA / f"schema-{version}.sql").read_text()
    with contextlib.closing(sqlite3.connect(tmp_path / "old.sqlite3")) as connection:
        connection.executescript(dump)
    restore_backup(tmp_path / "old.sqlite3", tmp_path / "file.db")
    await restore_log(tmp_path / "old.sqlite3", broker.url(), tmp_path, options=QUICK)
    async with (
        SqliteStore(tmp_path / "file.db") as embedded,
        JetStreamStore(broker.url(), tmp_path / "view.db", options=QUICK) as store,
    ):
        assert await store.load()
        assert await store.load() == await embedded.load()
        assert await store.cohorts() == await embedded.cohorts()
        assert await store.updates_since(0) == await embedded.updates_since(0)


async def test_a_backup_has_all_that_was_answered_before_it_began(
    broker: Broker, tmp_path: Path
) -> None:
    answered: list[str] = []
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=QUICK) as store:

        async def write() -> None:
            for number in range(100_000):
                await store.append([packet(f"p{number}")])
                answered.append(f"p{number}")

        writing = asyncio.create_task(write())
        while len(answered) < 50:  # noqa: ASYNC110 - it is a count that is waited for
            await asyncio.sleep(0.01)
        before = list(answered)
        await backup_log(broker.url(), tmp_path / "backup", options=QUICK)
        assert len(answered) > len(before), "writing went on"
        writing.cancel()
        await asyncio.wait([writing])
    restore_backup(tmp_path / "backup", tmp_path / "file.db")
    async with SqliteStore(tmp_path / "file.db") as embedded:
        found = [one.record.packet_id for one in await embedded.load(limit=100_000)]
    assert found[: len(before)] == before


async def test_what_is_there_is_not_touched(broker: Broker, tmp_path: Path) -> None:
    with pytest.raises(StoreCorruptError, match="there is no log"):
        await backup_log(broker.url(), tmp_path / "none", options=QUICK)
    assert await stream_names(broker) == set()
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=QUICK) as store:
        await fill(store)
        await store.shorten_log()
        held = await contents(store)
        await backup_log(broker.url(), tmp_path / "backup", options=QUICK)
        with pytest.raises(FileExistsError):
            await backup_log(broker.url(), tmp_path / "backup", options=QUICK)
        with pytest.raises(FileExistsError, match="has a log; choose another name"):
            await restore_log(tmp_path / "backup", broker.url(), tmp_path, options=QUICK)
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=QUICK) as store:
        assert await contents(store) == held


async def test_a_damaged_backup_makes_nothing(broker: Broker, tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "file.db") as embedded:
        await fill(embedded)
        await embedded.backup(tmp_path / "backup")
    whole = (tmp_path / "backup").read_bytes()
    (tmp_path / "backup").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreCorruptError):
        await restore_log(tmp_path / "backup", broker.url(), tmp_path, options=QUICK)
    assert await stream_names(broker) == set()


async def test_a_restore_that_is_cut_off_leaves_no_log(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SqliteStore(tmp_path / "file.db") as embedded:
        await fill(embedded)
        held = await contents(embedded)
        await embedded.backup(tmp_path / "backup")

    async def lost(*_args: object, **_named: object) -> None:
        raise StoreUnavailableError("no_answer", detail="lost", path="here")

    with monkeypatch.context() as patched:
        patched.setattr(BrokerLog, "create", lost)
        with pytest.raises(StoreUnavailableError):
            await restore_log(tmp_path / "backup", broker.url(), tmp_path, options=QUICK)
    # Who starts now begins anew, and not with half a backup.
    async with JetStreamStore(broker.url(), tmp_path / "empty.db", options=QUICK) as store:
        assert await store.load() == []
        await store.append([packet("other")])
        await store.shorten_log()
    async with JetStreamStore(broker.url(), tmp_path / "again.db", options=QUICK) as store:
        assert await ids(store) == ["other"]
    with monkeypatch.context() as patched:
        patched.setattr(BrokerLog, "create", lost)
        with pytest.raises(StoreUnavailableError):
            await restore_log(tmp_path / "backup", broker.url("b"), tmp_path, options=QUICK)
    await restore_log(tmp_path / "backup", broker.url("b"), tmp_path, options=QUICK)
    async with JetStreamStore(broker.url("b"), tmp_path / "b.db", options=QUICK) as store:
        assert await contents(store) == held


async def test_a_server_that_comes_first_keeps_its_log(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SqliteStore(tmp_path / "file.db") as embedded:
        await fill(embedded)
        await embedded.backup(tmp_path / "backup")
    create = BrokerLog.create

    async def late(self: BrokerLog, epoch: str, *, first: int = 1) -> object:
        if first > 1:
            monkeypatch.setattr(BrokerLog, "create", create)
            async with JetStreamStore(broker.url(), tmp_path / "quick.db", options=QUICK) as store:
                await store.append([packet("quick")])
        return await create(self, epoch, first=first)

    monkeypatch.setattr(BrokerLog, "create", late)
    with pytest.raises(FileExistsError, match="has a log"):
        await restore_log(tmp_path / "backup", broker.url(), tmp_path, options=QUICK)
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=QUICK) as store:
        assert await ids(store) == ["quick"]


async def test_of_two_restores_at_the_same_time_one_is_the_log_and_whole(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose log it becomes has its snapshot, though the other one saved its own behind it."""
    for name in ("a", "b"):
        async with SqliteStore(tmp_path / f"{name}.db") as embedded:
            await embedded.append([packet(f"of-{name}")])
            await embedded.backup(tmp_path / f"{name}.backup")
    save, create = SnapshotStream.save, BrokerLog.create
    saved: list[str] = []
    both, made = asyncio.Event(), asyncio.Event()

    async def save_both(self: SnapshotStream, file: Path, position: int) -> bool:
        done = await save(self, file, position)
        saved.append(self._log.epoch)
        if len(saved) == 2:
            both.set()
        await both.wait()
        return done

    async def first_come_first_made(self: BrokerLog, epoch: str, *, first: int = 1) -> object:
        if epoch != saved[0]:
            await made.wait()
        try:
            return await create(self, epoch, first=first)
        finally:
            made.set()

    with monkeypatch.context() as patched:
        patched.setattr(SnapshotStream, "save", save_both)
        patched.setattr(BrokerLog, "create", first_come_first_made)
        answers = await asyncio.gather(
            *(
                restore_log(tmp_path / f"{name}.backup", broker.url(), tmp_path, options=QUICK)
                for name in ("a", "b")
            ),
            return_exceptions=True,
        )
    (epoch,) = [answer for answer in answers if isinstance(answer, str)]
    (refused,) = [answer for answer in answers if not isinstance(answer, str)]
    assert isinstance(refused, FileExistsError)
    winner = "of-a" if answers[0] == epoch else "of-b"
    async with JetStreamStore(broker.url(), tmp_path / "view.db", options=QUICK) as store:
        assert store.history_epoch == epoch
        assert await ids(store) == [winner]
        await store.append([packet("new")])
        # What the other one left goes with the next snapshot.
        assert await snapshot_subjects(broker, but=epoch)
        await store.shorten_log()
        assert not await snapshot_subjects(broker, but=epoch)
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=QUICK) as store:
        assert await ids(store) == [winner, "new"]


async def snapshot_subjects(broker: Broker, *, but: str) -> list[str]:
    """What stands among the snapshots and is not of a history."""
    client = await nats.connect(f"nats://{broker.address}", allow_reconnect=False)
    found = await client.jetstream().stream_info("FMI-fmi-snapshots", ">")
    await client.close()
    return [subject for subject in found.state.subjects or {} if but not in subject]


async def test_a_replica_of_a_log_that_is_gone_leaves_the_snapshots_of_the_new_one(
    broker: Broker, tmp_path: Path
) -> None:
    async with SqliteStore(tmp_path / "file.db") as embedded:
        await embedded.append([packet("restored")])
        await embedded.backup(tmp_path / "backup")
    async with JetStreamStore(broker.url(), tmp_path / "old.db", options=QUICK) as old:
        for number in range(5):
            await old.append([packet(f"p{number}")])
        client = await nats.connect(f"nats://{broker.address}", allow_reconnect=False)
        await client.jetstream().delete_stream("FMI-fmi")
        await client.close()
        await restore_log(tmp_path / "backup", broker.url(), tmp_path, options=QUICK)
        with pytest.raises(StoreCorruptError, match="another log than before"):
            await old.shorten_log()
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=QUICK) as store:
        assert await ids(store) == ["restored"]


async def test_what_is_spent_while_a_backup_is_taken_is_known_to_be_missing(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy takes as long as the store is large, and is of the moment at which it began."""
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=QUICK) as store:
        await fill(store)
        catch_up = store.catch_up

        async def slow() -> None:
            await catch_up()
            known.append(time.time_ns() // 1000)
            await asyncio.sleep(0.01)

        known: list[int] = []
        monkeypatch.setattr(store, "catch_up", slow)
        await store.backup(tmp_path / "of-log")
    async with SqliteStore(tmp_path / "file.db") as embedded:
        await fill(embedded)

        def copied(_copy: sqlite3.Connection) -> None:
            known.append(time.time_ns() // 1000)
            time.sleep(0.01)

        await embedded.backup(tmp_path / "of-file", finish=copied)
    for name, of_at_least in zip(("of-log", "of-file"), known, strict=True):
        restore_backup(tmp_path / name, tmp_path / f"{name}.db")
        async with SqliteStore(tmp_path / f"{name}.db") as restored:
            (span,) = await restored.lost_spans()
        assert span.from_us <= of_at_least


async def test_the_disk_is_full_where_a_view_is_made(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told as that, and not as brokers that do not answer."""
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=QUICK) as one:
        await one.append([packet(f"p{n}", payload=bytes([n]) * 60_000) for n in range(20)])
    small = replace(IMPATIENT, open_patience_s=60.0)
    store = JetStreamStore(broker.url(), tmp_path / "other.db", options=small)
    opened = JetStreamStore._open_database

    async def open_small(self: JetStreamStore) -> ViewPosition:
        position = await opened(self)
        await self._view.set_max_bytes(1)
        return position

    monkeypatch.setattr(JetStreamStore, "_open_database", open_small)
    with pytest.raises(StoreUnavailableError, match=r"other\.db") as caught:
        await store.open()
    assert caught.value.cause == "disk_full"


async def test_the_view_of_a_log_that_was_deleted_is_refused_for_the_new_one(
    broker: Broker, tmp_path: Path
) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "view.db", options=QUICK) as store:
        await fill(store)
        await store.shorten_log()
        held = await contents(store)
        await backup_log(broker.url(), tmp_path / "backup", options=QUICK)
    client = await nats.connect(f"nats://{broker.address}", allow_reconnect=False)
    await client.jetstream().delete_stream("FMI-fmi")  # and not the snapshots
    await client.close()
    await restore_log(tmp_path / "backup", broker.url(), tmp_path, options=QUICK)
    with pytest.raises(StoreCorruptError, match="it is the view of another log; move it away"):
        async with JetStreamStore(broker.url(), tmp_path / "view.db", options=QUICK):
            pass
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=QUICK) as store:
        assert await contents(store) == held


def test_a_backup_is_no_view(tmp_path: Path) -> None:
    """Its tables are those of an embedded store, whichever it was taken of."""

    async def taken() -> None:
        async with Broker(tmp_path / "broker") as broker:
            async with JetStreamStore(broker.url(), tmp_path / "v.db", options=QUICK) as store:
                await fill(store)
            await backup_log(broker.url(), tmp_path / "backup", options=QUICK)
        async with SqliteStore(tmp_path / "file.db") as embedded:
            await embedded.backup(tmp_path / "plain")

    asyncio.run(taken())
    tables = [
        {
            name
            for (name,) in sqlite3.connect(tmp_path / file).execute(
                "SELECT name FROM sqlite_schema"
            )
        }
        for file in ("backup", "plain")
    ]
    assert tables[0] == tables[1]
