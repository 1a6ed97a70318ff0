"""Snapshots and a short log: what is dropped, who begins with what, and that nothing of the state is lost."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import nats
import pytest
from broker import Broker
from newer_server import newer_schema
from test_jetstream import IMPATIENT, QUICK, ids, packet, until, update

from fmi_server.storage import JetStreamStore
from fmi_server.storage.base import (
    LedgerConflictError,
    RevisionConflictError,
    SpendRecord,
    StoreCorruptError,
    StoreUnavailableError,
    StoreVersionError,
)
from fmi_server.storage.jetstream_snapshots import SnapshotStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fmi_server.storage.jetstream_snapshots import Manifest

SHORT = replace(QUICK, kept_entries=0)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker") as started:
        yield started


async def streams(broker: Broker) -> dict[str, nats.js.api.StreamState]:
    client = await nats.connect(broker.url().rpartition("/")[0], allow_reconnect=False)
    found = {info.config.name: info.state for info in await client.jetstream().streams_info()}
    await client.close()
    return found


async def delete_consumers(broker: Broker) -> None:
    client = await nats.connect(broker.url().rpartition("/")[0], allow_reconnect=False)
    manager = client.jetstream()
    for consumer in await manager.consumers_info("FMI-fmi"):
        await manager.delete_consumer("FMI-fmi", consumer.name)
    await client.close()


async def test_a_new_replica_begins_with_the_snapshot(broker: Broker, tmp_path: Path) -> None:
    one = JetStreamStore(broker.url(), tmp_path / "one.db", options=SHORT)
    other = JetStreamStore(broker.url(), tmp_path / "other.db", options=SHORT)
    async with one:
        await one.append([packet(f"p{n}", payload=bytes([n]) * 20_000) for n in range(100)])
        await one.publish([update(1, 1)])
        await one.spend(SpendRecord("health", 1, 1, 1, 0.5, "epoch"))
        assert await one.shorten_log() >= 3
        state = (await streams(broker))["FMI-fmi"]
        assert (state.messages, state.first_seq) == (0, state.last_seq + 1)
        async with other:
            assert await other.load() == await one.load()
            assert await other.sites() == await one.sites()
            assert other.history_epoch == one.history_epoch
            (again,) = await other.append([packet("p7", payload=bytes([7]) * 20_000)])
            assert again.status == "duplicate"
            # The fences hold where all that stood under their subjects is gone.
            with pytest.raises(RevisionConflictError):
                await other.publish([update(1, 1)])
            with pytest.raises(LedgerConflictError):
                await other.spend(SpendRecord("health", 1, 1, 1, 0.5, "epoch"))
            assert await one.publish([update(2, 2)]) == [2]
            assert await other.publish([update(3, 3)]) == [3]
            await other.spend(SpendRecord("health", 2, 2, 1, 0.5, "epoch"))
            await one.catch_up()
            assert await one.updates_since(0) == await other.updates_since(0)
            assert await one.ledger_totals() == await other.ledger_totals()
    assert not list(tmp_path.glob("*snapshot*"))  # noqa: ASYNC240 - a look at a folder


async def test_a_replica_that_was_away_goes_on_with_the_snapshot(
    broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fmi_server.storage")
    one = JetStreamStore(broker.url(), tmp_path / "one.db", options=SHORT)
    other = JetStreamStore(broker.url(), tmp_path / "other.db", options=SHORT)
    async with one:
        async with other:
            await other.append([packet("p0")])
        for n in range(1, 5):
            await one.append([packet(f"p{n}")])
        await one.shorten_log()
        await one.append([packet("last")])
        async with other:
            assert await ids(other) == ["p0", "p1", "p2", "p3", "p4", "last"]
    assert "made from a snapshot" in caplog.text


async def test_a_replica_that_lags_too_far_says_so(broker: Broker, tmp_path: Path) -> None:
    """One that is open cannot change its view under its readers; it stops, and its next start is quick."""
    one = JetStreamStore(broker.url(), tmp_path / "one.db", options=SHORT)
    other = JetStreamStore(broker.url(), tmp_path / "other.db", options=SHORT)
    async with one, other:
        await one.append([packet("p0")])
        await other.catch_up()
        await other._view.set_max_bytes(1)  # its disk is full: it cannot follow
        await one.append([packet("p1", payload=b"x" * 200_000)])
        await until(lambda: other.stats().fault == "disk_full")
        await delete_consumers(broker)
        await one.append([packet("p2")])
        await one.shorten_log()
        await other._view.set_max_bytes(None)
        await until(lambda: other._replica is not None and other._replica._broken is not None)
        with pytest.raises(StoreUnavailableError, match="start this replica again") as caught:
            await other.append([packet("q0")])
        assert caught.value.cause == other.stats().fault == "no_stream"
        assert await ids(other) == ["p0", "p1"], "reads go on"
    async with other:
        assert await ids(other) == ["p0", "p1", "p2"]


async def test_entries_are_kept_for_who_lags(broker: Broker, tmp_path: Path) -> None:
    options = replace(QUICK, kept_entries=3)
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=options) as store:
        for n in range(8):
            await store.append([packet(f"p{n}")])
        assert await store.shorten_log() == 8
        assert (await streams(broker))["FMI-fmi"].messages == 3
        assert await store.shorten_log() == 8
        assert (await streams(broker))["FMI-fmi"].messages == 3


async def test_only_the_newest_snapshot_is_kept(broker: Broker, tmp_path: Path) -> None:
    one = JetStreamStore(broker.url(), tmp_path / "one.db", options=SHORT)
    other = JetStreamStore(broker.url(), tmp_path / "other.db", options=SHORT)
    async with one, other:
        for n in range(4):
            await one.append([packet(f"p{n}")])
            await other.catch_up()
            await asyncio.gather(one.shorten_log(), other.shorten_log())
        pieces = (await streams(broker))["FMI-fmi-snapshots"].messages
        await one.append([packet("last")])
        await one.shorten_log()
        after = (await streams(broker))["FMI-fmi-snapshots"].messages
        assert after <= pieces + 1  # one more manifest, and no more pieces than one snapshot has
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=SHORT) as anew:
        assert await ids(anew) == ["p0", "p1", "p2", "p3", "last"]


async def test_a_log_that_grows_is_shortened_by_itself(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmi_server.storage.jetstream_shortening._LOOK_EVERY_S", 0.02)
    options = replace(QUICK, kept_entries=0, snapshot_bytes=50_000)
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=options) as store:
        for n in range(30):
            await store.append([packet(f"p{n}", payload=b"x" * 40_000)])
        async with asyncio.timeout(60):
            while (await streams(broker))["FMI-fmi"].first_seq <= 1:  # noqa: ASYNC110 - nothing says so
                await asyncio.sleep(0.02)
        assert len(await ids(store)) == 30
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=options) as anew:
        assert len(await ids(anew)) == 30


async def test_a_snapshot_that_is_damaged_is_not_taken(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=SHORT) as store:
        await store.append([packet("p0")])
        await store.shorten_log()
    client = await nats.connect(broker.url().rpartition("/")[0], allow_reconnect=False)
    jetstream = client.jetstream()
    stands = await jetstream.stream_info("FMI-fmi-snapshots", ">")
    (subject,) = [name for name in stands.state.subjects or {} if "manifest" in name]
    found = await jetstream.get_last_msg("FMI-fmi-snapshots", subject)
    manifest = (found.data or b"").replace(b'"digest": "', b'"digest": "0')
    await jetstream.publish(subject, manifest)
    with pytest.raises(StoreCorruptError, match="not what was saved"):
        await JetStreamStore(broker.url(), tmp_path / "anew.db", options=SHORT).open()
    await jetstream.publish(subject, b"{}")
    with pytest.raises(StoreCorruptError, match="no manifest"):
        await JetStreamStore(broker.url(), tmp_path / "anew.db", options=SHORT).open()
    await jetstream.purge_stream("FMI-fmi-snapshots")
    with pytest.raises(StoreCorruptError, match="no snapshot"):
        await JetStreamStore(broker.url(), tmp_path / "anew.db", options=SHORT).open()
    await client.close()
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=SHORT) as store:
        assert await ids(store) == ["p0"], "who has the view needs no snapshot"


async def test_a_snapshot_of_a_newer_schema_takes_no_views_place(
    broker: Broker, tmp_path: Path
) -> None:
    """Whoever was away for so long waits for the newer version, which goes on from what it has."""
    view = tmp_path / "older.db"
    older = JetStreamStore(broker.url(), view, options=SHORT)
    async with older:
        await older.append([packet("p0")])
    before = view.read_bytes()
    with newer_schema():
        async with JetStreamStore(broker.url(), tmp_path / "newer.db", options=SHORT) as newer:
            await newer.append([packet("p1")])
            await newer.shorten_log()
            await newer.append([packet("p2")])
    with pytest.raises(StoreVersionError, match=r"snapshot at entry 2 for .* schema version 4"):
        await older.open()
    assert view.read_bytes() == before
    assert not list(tmp_path.glob("*snapshot*"))  # noqa: ASYNC240 - a look at a folder
    anew = JetStreamStore(broker.url(), tmp_path / "anew.db", options=SHORT)
    with pytest.raises(StoreVersionError, match="upgrade the server"):
        await anew.open()
    for store in (older, anew):
        with newer_schema():
            async with store:
                assert await ids(store) == ["p0", "p1", "p2"]


async def test_a_snapshot_that_is_replaced_while_it_is_read(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newer one is read in its stead."""
    fetch, fetched = SnapshotStream.fetch, 0
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=SHORT) as one:
        await one.append([packet("p0")])
        await one.shorten_log()

        async def slow(self: SnapshotStream, manifest: Manifest, target: Path) -> None:
            nonlocal fetched
            fetched += 1
            if fetched == 1:
                await one.append([packet("p1")])
                await one.shorten_log()
            await fetch(self, manifest, target)

        monkeypatch.setattr(SnapshotStream, "fetch", slow)
        async with JetStreamStore(broker.url(), tmp_path / "new.db", options=SHORT) as new:
            assert await ids(new) == ["p0", "p1"]
    assert fetched == 2


async def test_a_write_in_parts_goes_through_a_snapshot(broker: Broker, tmp_path: Path) -> None:
    """The parts of what is not whole yet are in the snapshot, too."""
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=SHORT) as store:
        large = packet("large", payload=b"x" * 2_500_000)
        size = store._broker.largest_message if store._broker is not None else 0
        waiting = asyncio.create_task(store.append([large]))
        await until(lambda: store._replica is not None and store._replica.position >= 1)
        await store.shorten_log()
        (outcome,) = await waiting
        assert outcome.status == "stored"
        assert size < 2_500_000
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=SHORT) as anew:
        (kept,) = await anew.load()
        assert kept.record == large


async def test_the_shortening_waits_for_a_broker(broker: Broker, tmp_path: Path) -> None:
    options = replace(IMPATIENT, kept_entries=0)
    async with JetStreamStore(broker.url(), tmp_path / "one.db", options=options) as store:
        await store.append([packet("p0")])
        broker.kill()
        with pytest.raises(StoreUnavailableError):
            await store.shorten_log()
        await broker.start()
        async with asyncio.timeout(60):
            while True:
                try:
                    await store.shorten_log()
                    break
                except StoreUnavailableError:
                    await asyncio.sleep(0.02)
        assert await ids(store) == ["p0"]
