"""What the store at NATS JetStream brokers promises beyond the contract; against real brokers."""

from __future__ import annotations

import asyncio
import ssl
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import nats
import pytest
import trustme
from broker import Broker

from fmi.plain import CURRENT_REVISION, new_packet_id
from fmi.v1 import packet_pb2, update_pb2
from fmi_server.service import FMIService
from fmi_server.storage import JetStreamStore, SqliteStore
from fmi_server.storage.base import (
    AppendOutcome,
    LedgerConflictError,
    PacketKey,
    PacketRecord,
    RevisionConflictError,
    SpendRecord,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreLockedError,
    StoreUnavailableError,
    StoreVersionError,
    UpdateRecord,
)
from fmi_server.storage.jetstream_broker import BrokerOptions
from fmi_server.storage.jetstream_errors import import_nats, is_refusal
from fmi_server.storage.records import content_hash
from fmi_server.storage.sqlite_writer import GroupLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from fmi_server.storage import Store

PRIOR = update_pb2.UPDATE_KIND_PRIOR

QUICK = BrokerOptions(
    connect_timeout_s=1.0, ack_timeout_s=0.3, patience_s=9.0, heartbeat_s=0.3, duplicate_window_s=10
)
IMPATIENT = replace(QUICK, patience_s=2.5)
"""For what is waited for in vain."""


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker") as started:
        yield started


def packet(packet_id: str, domain_id: str = "site-a", payload: bytes = b"") -> PacketRecord:
    payload = payload or packet_id.encode()
    return PacketRecord(
        domain_id, packet_id, "health", "msp", content_hash(payload), 1, 1, False, "", payload
    )


def update(sequence: int, revision: int, cohort: str = "health") -> UpdateRecord:
    return UpdateRecord(sequence, cohort, 1, revision, 10, b"hash", f"{cohort}{revision}".encode())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nothing says when a broker is ready
            await asyncio.sleep(0.005)


async def stubborn(store: JetStreamStore, record: PacketRecord) -> AppendOutcome:
    """Send a packet until it is answered, as a site does."""
    async with asyncio.timeout(60):
        while True:
            try:
                (outcome,) = await store.append([record])
            except StoreUnavailableError:
                await asyncio.sleep(0.01)
            else:
                return outcome


async def ids(store: JetStreamStore) -> list[str]:
    found: list[str] = []
    after = 0
    while page := await store.load(after=after):
        found += [p.record.packet_id for p in page]
        after = page[-1].sequence
    return found


# ONCE


async def test_a_repeat_is_known_beyond_the_brokers_window(broker: Broker, tmp_path: Path) -> None:
    options = BrokerOptions(patience_s=1.9, duplicate_window_s=2.0)
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=options) as store:
        (first,) = await store.append([packet("p1")])
        await asyncio.sleep(2.5)  # it is the passing of the window that is tested
        (again,) = await store.append([packet("p1")])
        assert again == replace(first, status="duplicate")
        (other,) = await store.append([packet("p1", payload=b"other")])
        assert (other.status, other.sequence) == ("reused", first.sequence)
    async with JetStreamStore(broker.url(), tmp_path / "anew.db") as store:
        (again,) = await store.append([packet("p1")])
        assert again == replace(first, status="duplicate"), "a view made anew knows it, too"
        assert await ids(store) == ["p1"]
        (site,) = await store.sites()
        assert (site.msp_count, site.duplicate_count, site.reused_count) == (1, 2, 1)


async def test_the_broker_is_killed_while_packets_come(broker: Broker, tmp_path: Path) -> None:
    """No packet that was acknowledged is lost, none is doubled, and the writers only wait."""
    acknowledged: dict[str, int] = {}
    refused = 0
    stop = False

    async def site(store: JetStreamStore, name: str) -> None:
        nonlocal refused
        number = 0
        while not stop:
            batch = [packet(f"{name}-{number + i}", name, b"x" * 300) for i in range(7)]
            while True:
                try:
                    outcomes = await store.append(batch)
                    break
                except StoreUnavailableError:
                    refused += 1
            assert all(o.status in ("stored", "duplicate") for o in outcomes)
            acknowledged.update(
                (r.packet_id, o.sequence) for r, o in zip(batch, outcomes, strict=True)
            )
            number += 7

    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK) as store:
        async with asyncio.TaskGroup() as sites:
            for n in range(5):
                sites.create_task(site(store, f"s{n}"))
            for _ in range(3):
                known = len(acknowledged)
                await until(lambda known=known: len(acknowledged) > known + 200)
                broker.kill()
                await broker.start()
            known = len(acknowledged)
            await until(lambda: len(acknowledged) > known + 200)
            stop = True
        here = await ids(store)
    assert len(here) == len(set(here)) == len(acknowledged)
    assert set(here) == set(acknowledged)
    async with JetStreamStore(broker.url(), tmp_path / "anew.db", options=QUICK) as store:
        assert await ids(store) == here
        for packet_id, sequence in acknowledged.items():
            kept = await store.packet(PacketKey(packet_id.partition("-")[0], packet_id))
            assert kept is not None
            assert kept.sequence == sequence
        counted = sum(site.msp_count for site in await store.sites())
        assert counted == len(acknowledged)


async def test_a_write_goes_on_when_the_broker_comes_back(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK) as store:
        await store.append([packet("p1")])
        broker.kill()
        waiting = [asyncio.create_task(store.append([packet(f"q{n}")])) for n in range(20)]
        published = asyncio.create_task(store.publish([update(1, 1)]))
        await asyncio.sleep(0)
        await broker.start()
        answers = await asyncio.gather(*waiting)
        assert all(outcome.status == "stored" for (outcome,) in answers)
        assert await published == [1]
        assert store.stats().fault is None


# Two writers


@pytest.fixture
async def two(broker: Broker, tmp_path: Path) -> AsyncIterator[tuple[JetStreamStore, ...]]:
    one = JetStreamStore(broker.url(), tmp_path / "one.db", options=QUICK)
    other = JetStreamStore(broker.url(), tmp_path / "other.db", options=QUICK)
    async with one, other:
        yield one, other


async def test_who_publishes_late_is_refused(two: tuple[JetStreamStore, ...]) -> None:
    one, other = two
    assert one.history_epoch == other.history_epoch
    assert await one.publish([update(1, 1)]) == [1]
    with pytest.raises(RevisionConflictError) as caught:
        await other.publish([replace(update(1, 1), payload=b"late")])
    assert (caught.value.expected_revision, caught.value.expected_sequence) == (2, 2)
    assert await other.publish([update(2, 2)]) == [2]
    await one.catch_up()
    assert await one.updates("health", 1) == await other.updates("health", 1)
    assert [u.payload for u in await one.updates("health", 1)] == [b"health1", b"health2"]


async def test_of_many_who_publish_at_once_one_is_heard(two: tuple[JetStreamStore, ...]) -> None:
    for revision in range(1, 8):
        found = await asyncio.gather(
            *(store.publish([update(revision, revision)]) for store in two * 3),
            return_exceptions=True,
        )
        assert [answer for answer in found if isinstance(answer, list)] == [[revision]]
        assert sum(isinstance(answer, RevisionConflictError) for answer in found) == 5
    for store in two:
        await store.catch_up()
        assert [u.revision for u in await store.updates_since(0)] == list(range(1, 8))


async def test_of_two_who_spend_for_one_period_one_pays(two: tuple[JetStreamStore, ...]) -> None:
    for number in range(1, 5):
        spends = [SpendRecord("a b.c/*>", number, number, 1, 0.5, who) for who in "xyz"]
        found = await asyncio.gather(
            *(store.spend(spend) for store in two for spend in spends), return_exceptions=True
        )
        assert found.count(None) == 1
        assert sum(isinstance(answer, LedgerConflictError) for answer in found) == 5
    one, other = two
    await asyncio.gather(one.catch_up(), other.catch_up())
    assert await one.spends("a b.c/*>") == await other.spends("a b.c/*>")
    assert (await one.ledger_totals())["a b.c/*>"].rho == 2.0


async def test_a_packet_that_goes_to_both_counts_once(two: tuple[JetStreamStore, ...]) -> None:
    records = [packet(f"p{n}") for n in range(50)]
    answers = await asyncio.gather(*(store.append([record]) for record in records for store in two))
    statuses = [outcome.status for (outcome,) in answers]
    assert (statuses.count("stored"), statuses.count("duplicate")) == (50, 50)
    for (first,), (second,) in zip(answers[::2], answers[1::2], strict=True):
        assert first.sequence == second.sequence
    one, other = two
    await asyncio.gather(one.catch_up(), other.catch_up())
    assert await one.load() == await other.load()
    assert await one.sites() == await other.sites()


# Sizes and bounds


async def test_a_write_larger_than_an_entry_is_whole(broker: Broker, tmp_path: Path) -> None:
    big = [packet(f"p{n}", payload=bytes([n]) * 1_300_000) for n in range(4)]
    small = packet("small")
    async with JetStreamStore(broker.url(), tmp_path / "a.db") as store:
        answers = await asyncio.gather(store.append(big), store.append([small]))
        assert [o.status for answer in answers for o in answer] == ["stored"] * 5
        await store.put_cohort("health", b"s" * 3_000_000, 1)
    async with JetStreamStore(broker.url(), tmp_path / "anew.db") as store:
        kept = {p.record.packet_id: p.record for p in await store.load()}
        assert kept == {record.packet_id: record for record in [*big, small]}
        (cohort,) = await store.cohorts()
        assert cohort.spec == b"s" * 3_000_000


async def test_what_waits_is_bounded(broker: Broker, tmp_path: Path) -> None:
    limits = GroupLimits(pending_records=10)
    async with JetStreamStore(broker.url(), tmp_path / "a.db", limits=limits) as store:
        first = asyncio.create_task(store.append([packet(f"p{n}") for n in range(12)]))
        await asyncio.sleep(0)
        with pytest.raises(StoreBusyError) as caught:
            await store.append([packet("late")])
        assert caught.value.pending_records == 12
        assert len(await first) == 12
        assert [o.status for o in await store.append([packet("late")])] == ["stored"]


async def test_a_full_log_refuses_and_keeps_what_it_has(broker: Broker, tmp_path: Path) -> None:
    options = replace(IMPATIENT, max_bytes=100_000)
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=options) as store:
        await store.append([packet("p1")])
        with pytest.raises(StoreUnavailableError) as caught:
            await store.append([packet("big", payload=b"x" * 200_000)])
        assert caught.value.cause == "disk_full"
        assert store.stats().fault == "disk_full"
        await stubborn(store, packet("p2"))
        assert store.stats().fault is None
        assert await ids(store) == ["p1", "p2"]


async def test_the_disk_of_the_view_is_full_for_a_while(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=IMPATIENT) as store:
        await store.append([packet("p1")])
        await store._view.set_max_bytes(300_000)
        record = packet("big", payload=b"x" * 400_000)
        with pytest.raises(StoreUnavailableError) as caught:
            await store.append([record])
        assert caught.value.cause == "no_answer", "the log has it, the view not yet"
        await store._view.set_max_bytes(None)
        again = await stubborn(store, record)
        assert again.status == "duplicate"
        assert await ids(store) == ["p1", "big"]


# What stands in the way


async def test_no_broker_answers(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "broker")
    store = JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK)
    with pytest.raises(StoreUnavailableError) as caught:
        await store.open()
    assert caught.value.cause == "no_broker"
    assert str(broker.port) in str(caught.value)
    async with broker, store:
        await store.append([packet("p1")])


async def test_a_client_that_overhears_that_its_time_is_over_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Python 3.12 it drops a cancellation that comes with an answer; it would connect for ever."""
    overheard = False

    async def overhears(_client: nats.NATS, _server: object) -> None:
        nonlocal overheard
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if overheard:
                raise
            overheard = True
            raise ConnectionRefusedError("the answer that came with it") from None

    monkeypatch.setattr(nats.NATS, "_connect_to_server", overhears)
    store = JetStreamStore("nats://127.0.0.1:9", tmp_path / "a.db", options=QUICK)
    async with asyncio.timeout(60):
        with pytest.raises(StoreUnavailableError) as caught:
            await store.open()
    assert caught.value.cause == "no_broker"
    assert overheard


async def test_a_broker_without_jetstream(tmp_path: Path) -> None:
    folder = tmp_path / "broker"
    broker = Broker(folder)
    (folder / "broker.conf").write_text(f"listen: 127.0.0.1:{broker.port}\n")
    broker._launch()
    try:
        async with asyncio.timeout(60):
            while True:
                with pytest.raises(StoreUnavailableError) as caught:
                    await JetStreamStore(broker.url(), tmp_path / "a.db", options=IMPATIENT).open()
                if caught.value.cause != "no_broker":  # it is still starting
                    break
        assert caught.value.cause in ("unsupported", "no_quorum")
    finally:
        broker.kill()


async def test_more_replicas_than_brokers(broker: Broker, tmp_path: Path) -> None:
    options = replace(QUICK, replicas=3)
    with pytest.raises(StoreUnavailableError) as caught:
        await JetStreamStore(broker.url(), tmp_path / "a.db", options=options).open()
    assert caught.value.cause == "unsupported"


async def test_credentials_are_checked_and_never_shown(tmp_path: Path) -> None:
    extra = "authorization { user: fmi, password: secret }"
    async with Broker(tmp_path / "broker", extra=extra) as broker:
        address = f"127.0.0.1:{broker.port}"
        store = JetStreamStore(f"nats://fmi:wrong@{address}", tmp_path / "a.db", options=QUICK)
        with pytest.raises(StoreUnavailableError) as caught:
            await store.open()
        assert caught.value.cause == "denied"
        assert "wrong" not in str(caught.value)
        store = JetStreamStore(f"nats://fmi:secret@{address}", tmp_path / "a.db", options=QUICK)
        assert store.location == f"nats://{address}/fmi"
        async with store:
            await store.append([packet("p1")])


async def test_brokers_that_speak_tls_alone(tmp_path: Path) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("127.0.0.1")
    own.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    extra = f'tls {{ cert_file: "{tmp_path}/cert.pem", key_file: "{tmp_path}/key.pem" }}'
    async with Broker(tmp_path / "broker", extra=extra) as broker:
        url = f"tls://{broker.address}"
        with pytest.raises(StoreUnavailableError) as caught:
            await JetStreamStore(url, tmp_path / "a.db", options=QUICK).open()
        assert caught.value.cause == "no_broker"
        known = ssl.create_default_context()
        authority.configure_trust(known)
        options = replace(QUICK, tls=known)
        async with JetStreamStore(url, tmp_path / "a.db", options=options) as store:
            await store.append([packet("p1")])


async def test_without_the_client_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nats", None)
    with pytest.raises(StoreUnavailableError, match=r"install fmi-federation\[nats\]") as caught:
        await JetStreamStore("nats://127.0.0.1", tmp_path / "a.db").open()
    assert caught.value.cause == "unsupported"


async def test_the_broker_goes_away(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=IMPATIENT) as store:
        await store.append([packet("p1")])
        broker.kill()
        with pytest.raises(StoreUnavailableError) as caught:
            await store.append([packet("p2")])
        assert caught.value.cause in ("no_broker", "no_answer")
        with pytest.raises(StoreUnavailableError):
            await store.probe()
        assert await ids(store) == ["p1"], "reads go on"
        assert store.stats().fault in ("no_broker", "no_answer")
        await broker.start()
        outcome = await stubborn(store, packet("p2"))
        assert outcome.status in ("stored", "duplicate")
        assert await ids(store) == ["p1", "p2"]


async def test_one_view_has_one_replica(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db"):
        with pytest.raises(StoreLockedError):
            await JetStreamStore(broker.url(), tmp_path / "a.db").open()


async def test_a_store_of_its_own_is_no_view(broker: Broker, tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "own.db") as own:
        await own.append([packet("p1")])
    with pytest.raises(StoreCorruptError, match="no view of a log"):
        await JetStreamStore(broker.url(), tmp_path / "own.db").open()
    async with SqliteStore(tmp_path / "own.db") as own:
        assert len(await own.load()) == 1


async def test_the_view_of_another_log_is_refused(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url("one"), tmp_path / "a.db") as store:
        await store.append([packet("p1")])
    with pytest.raises(StoreCorruptError, match="view of another log"):
        await JetStreamStore(broker.url("two"), tmp_path / "a.db").open()


async def raw(broker: Broker) -> nats.NATS:
    return await nats.connect(broker.url().rpartition("/")[0], allow_reconnect=False)


async def test_a_log_that_was_set_back_is_refused(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK) as store:
        await store.append([packet("p1")])
        await store.append([packet("p2")])
    broker.kill()
    kept = tmp_path / "broker" / "files"
    aside = tmp_path / "aside"
    kept.rename(aside)
    await broker.start()
    client = await raw(broker)
    # The same log, by its epoch, that has lost its entries.
    manager = client.jetstream()
    await manager.add_stream(
        name="FMI-fmi",
        subjects=["fmi.fmi.log.>"],
        metadata={"fmi_history_epoch": store._epoch},
    )
    await client.close()
    with pytest.raises(StoreCorruptError, match="lost what they had acknowledged") as caught:
        await JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK).open()
    assert "2" in caught.value.detail


async def test_other_entries_under_the_same_numbers_are_noticed(
    broker: Broker, tmp_path: Path
) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK) as store:
        await store.append([packet("p1")])
    client = await raw(broker)
    manager = client.jetstream()
    info = await manager.stream_info("FMI-fmi")
    await manager.delete_stream("FMI-fmi")
    await manager.add_stream(info.config)
    await manager.publish("fmi.fmi.log.state", b"other", headers={"Nats-Msg-Id": "another"})
    await client.close()
    with pytest.raises(StoreCorruptError, match="lost what they had acknowledged"):
        await JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK).open()


async def test_an_entry_that_is_no_write_stops_the_replica(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK) as store:
        await store.append([packet("p1")])
        client = await raw(broker)
        await client.jetstream().publish("fmi.fmi.log.state", b"\x01\x00\x00\x00\x02{}")
        await client.close()
        await until(lambda: store.stats().damage is not None)
        with pytest.raises(StoreCorruptError, match="entry 2"):
            await store.append([packet("p2")])
        assert await ids(store) == ["p1"], "reads go on"


async def test_a_newer_format_stops_the_replica(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK) as store:
        client = await raw(broker)
        await client.jetstream().publish("fmi.fmi.log.state", b"\x02\x00\x00\x00\x00")
        await client.close()
        await until(lambda: store.stats().damage is not None)
        with pytest.raises(StoreVersionError, match="upgrade the server"):
            await store.probe()


async def test_the_stream_is_deleted_under_a_replica(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=IMPATIENT) as store:
        await store.append([packet("p1")])
        client = await raw(broker)
        await client.jetstream().delete_stream("FMI-fmi")
        await client.close()
        with pytest.raises(StoreUnavailableError) as caught:
            await store.append([packet("p2")])
        assert caught.value.cause in ("no_quorum", "no_stream", "no_answer")
        assert await ids(store) == ["p1"]


async def test_a_lost_consumer_is_made_anew(broker: Broker, tmp_path: Path) -> None:
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK) as store:
        client = await raw(broker)
        manager = client.jetstream()
        for n in range(3):
            await store.append([packet(f"p{n}")])
            for consumer in await manager.consumers_info("FMI-fmi"):
                await manager.delete_consumer("FMI-fmi", consumer.name)
        (outcome,) = await store.append([packet("last")])
        assert outcome.status == "stored"
        await client.close()


# A whole service on it


def msp(site: str, tau: float) -> packet_pb2.Packet:
    made = packet_pb2.Packet()
    made.header.packet_id = new_packet_id()
    made.header.domain_id = site
    made.header.cohort = "care"
    made.header.rev = CURRENT_REVISION
    made.header.emitted_at.GetCurrentTime()
    made.msp.metrics["gain"] = 0.5
    made.msp.controller["tau"] = tau
    return made


async def test_a_service_goes_on_where_another_replica_was(broker: Broker, tmp_path: Path) -> None:
    sent = msp("s0", 0.5)
    store = JetStreamStore(broker.url(), tmp_path / "one.db", options=QUICK)
    async with FMIService(store=store) as service:
        assert (await service.emit(sent)).status == "accepted"
        for number in range(1, 5):
            assert (await service.emit(msp(f"s{number}", 0.5))).status == "accepted"
        await service.release("care")  # where the service has not done so by itself
        first = await service.update("care", PRIOR)
        assert first.prior_update.prior["tau"] == pytest.approx(0.5)
        epoch = store.history_epoch
    store = JetStreamStore(broker.url(), tmp_path / "other.db", options=QUICK)
    async with FMIService(store=store) as service:
        assert store.history_epoch == epoch
        assert (await service.emit(sent)).status == "duplicate"
        for number in range(5):
            await service.emit(msp(f"s{number}", 0.75))
        await service.release("care")
        second = await service.update("care", PRIOR)
        assert second.prior_update.prior["tau"] == pytest.approx(0.75)
        assert second.revision > first.revision
        kept = await store.updates("care", PRIOR)
        assert [update.revision for update in kept] == list(range(1, second.revision + 1))


async def test_who_releases_second_gives_way(broker: Broker, tmp_path: Path) -> None:
    """Two replicas release one cohort, as when a lease was lost unnoticed: whoever is second is refused."""
    one = FMIService(store=JetStreamStore(broker.url(), tmp_path / "one.db", options=QUICK))
    other = FMIService(store=JetStreamStore(broker.url(), tmp_path / "other.db", options=QUICK))
    refused: list[RevisionConflictError] = []
    for service in (one, other):
        note_conflicts(service.store, refused)
    async with one, other:
        for turn in range(200):
            for number in range(5):
                await one.emit(msp(f"s{number}", 0.1 + turn / 500))
                await other.emit(msp(f"s{number}", 0.5 + turn / 500))
            found = await asyncio.gather(one.release("care"), other.release("care"))
            assert all(isinstance(answer, list) for answer in found)
            if refused:
                break
        assert refused, "they never released at the same time"
        await asyncio.gather(one.store.catch_up(), other.store.catch_up())
        updates = await one.store.updates_since(0)
        assert updates == await other.store.updates_since(0)
        for kind in {update.kind for update in updates}:
            revisions = [update.revision for update in updates if update.kind == kind]
            assert revisions == list(range(revisions[0], revisions[-1] + 1))


def note_conflicts(store: Store, refused: list[RevisionConflictError]) -> None:
    """Note each publication that the store refuses because another came first."""
    publish = store.publish

    async def noted(updates: Sequence[UpdateRecord], **named: Any) -> list[int]:
        try:
            return await publish(updates, **named)
        except RevisionConflictError as error:
            refused.append(error)
            raise

    store.publish = noted  # type: ignore[method-assign]


async def test_who_waits_when_a_replica_stops_is_told(broker: Broker, tmp_path: Path) -> None:
    """Calls of all sizes are on their way or wait for their turn; none of them waits for ever."""
    async with JetStreamStore(broker.url(), tmp_path / "a.db", options=QUICK) as store:
        await store._view.set_max_bytes(1)  # the view cannot follow, so nothing is answered
        client = await raw(broker)
        await client.jetstream().publish("fmi.fmi.log.state", b"\x02\x00\x00\x00\x00")
        calls = [
            asyncio.create_task(store.append([packet(f"{n}-{i}") for i in range(size)]))
            for n, size in enumerate([1, 2000, 1, 700, 1500, 1, 3000, 5])
        ]
        await asyncio.sleep(0)
        await store._view.set_max_bytes(None)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(answer, StoreError) for answer in answers)
        assert any(isinstance(answer, StoreVersionError) for answer in answers)
        assert (store.stats().pending_records, store.stats().pending_bytes) == (0, 0)
        await client.close()


def test_what_becomes_of_a_repeat_that_is_in_process_is_waited_for():
    """It is no refusal: told as one, what the brokers store in the next moment would count as not written."""
    errors = import_nats().js.errors
    assert not is_refusal(errors.APIError(code=409, err_code=10158))
    assert not is_refusal(errors.ServiceUnavailableError(code=503))
    assert is_refusal(errors.APIError(code=400, err_code=10077))
