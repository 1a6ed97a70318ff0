"""Compaction beside everything else: what a start reads, what is forgotten, and that ONCE holds."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc

import pytest
from parts import NOW, Clock, ccs, msp, packet_id, pop
from test_releases import Server

from fmi.v1 import packet_pb2, update_pb2
from fmi_server.cohorts import DAY_S
from fmi_server.compaction import LARGEST_SLICE, SLICE_S, Compacted, Compactor, _next_size
from fmi_server.errors import PacketRefusedError
from fmi_server.operations import Operations
from fmi_server.service import FMIService
from fmi_server.storage import SqliteStore
from fmi_server.storage.base import (
    PacketKey,
    StoreCorruptError,
    StoredPacket,
    StoreUnavailableError,
)
from fmi_server.storage.sqlite_live import LIVE

HOUR_S = 3600.0


class CountingStore(SqliteStore):
    """Counts the packets that are read."""

    read = 0

    async def _packets(self, where, parameters) -> list[StoredPacket]:
        found = await super()._packets(where, parameters)
        self.read += len(found)
        return found


class CompactedServer(Server):
    def __init__(self, store, clock: Clock, **how) -> None:
        super().__init__(store, clock, **how)
        self.compactor = Compactor(store, self.cohorts, self.releaser, clock=clock)

    async def load(self) -> CompactedServer:
        await self.compactor.load()
        await self.releaser.load()
        return self


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path):
    async with CountingStore(tmp_path / "fmi.sqlite3") as opened:
        yield opened


@pytest.fixture
async def server(store, clock) -> CompactedServer:
    return await CompactedServer(store, clock).load()


async def send_history(server: CompactedServer, clock: Clock, turns: int) -> None:
    for turn in range(turns):
        clock.advance(1)
        await server.send(
            *(msp(f"s{i}", controller={"tau": i / 10 + turn / 1000}, at=clock()) for i in range(4))
        )


async def test_a_start_reads_what_is_live_and_not_the_history(server, store, clock):
    await send_history(server, clock, 30)
    await server.send(*(pop(f"s{i}", at=clock()) for i in range(3)))
    await server.send(ccs("s1", pairs=(("a", "b", 0.5),), at=clock()))
    await server.releaser.release("care")
    assert await server.compactor.compact("care") == Compacted(live=8, retired=116, forgotten=0)
    store.read = 0
    again = await CompactedServer(store, clock).load()
    assert store.read == 8
    state, _ = await again.releaser.reading("care")
    assert state.packets == {"msp": 120, "pop": 3, "ccs": 1}, "counts come from the sites"
    clock.advance(60)
    assert await again.release() == [], "nothing changed"
    assert again.prior() == server.prior()


async def test_live_packets_are_found_by_an_index_that_holds_nothing_else(store):
    query = f"EXPLAIN QUERY PLAN SELECT * FROM packets WHERE {LIVE}"  # noqa: S608 - constants only
    ((*_, plan),) = await store._read(lambda reader: reader.execute(query, ("", 0, 1)).fetchall())
    assert plan == "SEARCH packets USING INDEX packets_live (cohort=? AND sequence>?)"


async def test_a_packet_that_changed_on_disk_is_told(server, store, clock):
    await server.send(msp("s0", controller={"tau": 0.5}))
    damage = "UPDATE packets SET payload = CAST(substr(payload, 1, 20) || 'x' || substr(payload, 22) AS BLOB)"
    await store._open_writer().run(lambda connection: connection.execute(damage))
    with pytest.raises(StoreCorruptError, match="packet 1 is not as it was stored"):
        await CompactedServer(store, clock).load()


# ONCE


async def answer(server: CompactedServer, packet: packet_pb2.Packet) -> str:
    try:
        candidate = server._intake.inspect(packet, received_at_us=int(server.clock() * 1e6))
    except PacketRefusedError as refusal:
        return str(refusal.violations[0].rule_id)
    (outcome,) = await server.store.append([candidate.record])
    return outcome.status


async def test_a_repeat_is_a_duplicate_or_stale_and_never_counts_again(server, store, clock):
    first = [msp(f"s{i}", controller={"tau": 0.5}, at=clock()) for i in range(3)]
    first.append(
        msp("s0", controller={"tau": 0.9}, at=clock() + 299)
    )  # ahead of the server's clock
    await server.send(*first)
    seen: set[str] = set()
    for hour in range(10 * 24):
        clock.advance(HOUR_S)
        if hour % 6 == 0:
            await server.send(
                *(msp(f"s{i}", controller={"tau": 0.6}, at=clock()) for i in range(3))
            )
            await server.compactor.compact("care")
        answers = {await answer(server, packet) for packet in first}
        assert answers <= {"duplicate", "fmi.policy.max_age"}
        seen |= answers
        if hour % 50 == 0:
            server = await CompactedServer(store, clock).load()
    assert seen == {"duplicate", "fmi.policy.max_age"}
    known = [await store.packet(PacketKey(p.header.domain_id, p.header.packet_id)) for p in first]
    assert known == [None] * 4, "they were forgotten"


async def test_a_site_whose_clock_is_ahead_loses_nothing(server, store, clock):
    for value in (0.5, 0.6):
        clock.advance(1)
        await server.send(
            msp("ahead", controller={"tau": value}, at=clock() + 200),
            *(msp(f"s{i}", controller={"tau": value}, at=clock()) for i in range(3)),
        )
    await server.releaser.release("care")
    assert await server.compactor.compact("care") == Compacted(live=4, retired=4, forgotten=0)
    again = await CompactedServer(store, clock).load()
    await again.releaser.release("care")
    assert again.prior() == server.prior()
    assert server.prior()["tau"] == pytest.approx(0.6)


async def test_a_cohort_that_takes_older_packets_does_not_take_forgotten_ones_again(
    server, store, clock
):
    old = msp("s0", controller={"tau": 0.5}, at=clock() - 1)
    await server.send(old, msp("s0", controller={"tau": 0.6}, at=clock()))
    clock.advance(9 * DAY_S)
    await server.send(msp("s1", controller={"tau": 0.6}, at=clock()))
    assert (await server.compactor.compact("care")).forgotten == 1
    for fresh in (server, await CompactedServer(store, clock).load()):
        fresh.declare(ingest={"maxAge": f"{30 * 86_400}s"})
        assert await answer(fresh, old) == "fmi.policy.max_age"
        younger = msp("s0", controller={"tau": 0.5}, at=clock() - 6 * DAY_S)
        assert await answer(fresh, younger) == "stored"


async def test_retention_and_staleness_both_keep_a_packet(server, clock):
    server.declare(retention={"packets": f"{30 * 86_400}s"})
    await server.send(*(msp("s0", controller={"tau": 0.5}, at=clock() + i) for i in range(3)))
    clock.advance(29 * DAY_S)
    assert (await server.compactor.compact("care")).forgotten == 0
    server.declare(retention={"packets": "60s"}, ingest={"maxAge": f"{29 * 86_400}s"})
    assert (await server.compactor.compact("care")).forgotten == 0
    clock.advance(2 * HOUR_S)
    assert (await server.compactor.compact("care")).forgotten == 2


async def live_are(store: SqliteStore, cohort: str, count: int) -> None:
    while len(await store.live_packets(cohort)) != count:  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.01)


# What changes the rules


@pytest.fixture
async def service(tmp_path, clock):
    async with FMIService(store=SqliteStore(tmp_path / "s.sqlite3"), clock=clock) as opened:
        yield opened


def prior(service: FMIService) -> float:
    latest = service.releaser.publisher.log.latest["care", 1]
    return update_pb2.Update.FromString(latest.payload).prior_update.prior["tau"]


async def test_taking_out_the_newest_packet_brings_back_the_one_before(service, clock):
    newest = packet_id()
    for i in range(3):
        await service.emit(msp(f"s{i}", controller={"tau": 0.2}, at=clock() - 10))
    for i in range(3):
        name = newest if i == 0 else packet_id()
        await service.emit(msp(f"s{i}", controller={"tau": 0.4}, at=clock(), packet_id=name))
    assert (await service.compactor.compact("care")).retired == 3
    await service.release("care")
    assert prior(service) == pytest.approx(0.4)
    operations = Operations(service)
    for site in ("s0", "s1"):
        key = newest if site == "s0" else None
        if key is None:
            live = await service.store.live_packets("care")
            key = next(p.record.packet_id for p in live if p.record.domain_id == site)
        assert await operations.set_quarantine(site, key, quarantined=True, reason="wrong")
    await service.release("care")
    assert prior(service) == pytest.approx(0.2), (
        "two of three sites fell back to their older values"
    )
    state, _ = await service.releaser.reading("care")
    assert state.packets == {"msp": 4}


async def test_a_changed_spec_counts_what_was_retired(service, clock):
    for i in range(3):
        await service.emit(msp(f"s{i}", controller={"tau": 0.2}, at=clock() - 10))
        await service.emit(msp(f"s{i}", controller={"tau": 0.4}, at=clock()))
    assert (await service.compactor.compact("care")).retired == 3
    spec = service.cohorts.rules("care").spec
    changed = type(spec)()
    changed.CopyFrom(spec)
    changed.aggregation.metrics_aggregation = "mean"
    await service.put_cohort_spec(changed)
    assert len(await service.store.live_packets("care")) == 6
    assert (await service.compactor.compact("care")).retired == 3


async def test_nothing_is_retired_while_the_rules_change(server, store, clock):
    await send_history(server, clock, 3)
    async with server.compactor.suspended("care"):
        compacting = asyncio.ensure_future(server.compactor.compact("care"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(compacting), 0.2)
        assert len(await store.live_packets("care")) == 12
    assert (await compacting).retired == 8


# In slices


class SlicedStore(CountingStore):
    """Notes how much each transaction retires; calls `between` before it does."""

    def __init__(self, path) -> None:
        super().__init__(path)
        self.retired: list[int] = []
        self.between = None

    async def live_pages(self, cohort, *, page=20):
        async for found in super().live_pages(cohort, page=page):
            yield found

    async def retire(self, sequences):
        if self.between is not None:
            await self.between()
        self.retired.append(await super().retire(sequences))
        return self.retired[-1]


@pytest.fixture
async def sliced(tmp_path, clock):
    async with SlicedStore(tmp_path / "sliced.sqlite3") as opened:
        yield await CompactedServer(opened, clock).load()


async def test_a_pass_works_in_small_slices_and_others_come_in_between(sliced, clock, monkeypatch):
    monkeypatch.setattr("fmi_server.compaction.LARGEST_SLICE", 10)
    await send_history(sliced, clock, 30)

    async def emit() -> None:
        await sliced.send(msp("late", metrics={"loss": 1.0}, at=clock()))

    sliced.store.between = emit
    # The last of each site in a page, and what came in behind it, is judged in the next pass.
    done = await sliced.compactor.compact("care")
    assert done.retired == sum(sliced.store.retired) == 116
    assert max(sliced.store.retired) <= 10
    assert len(sliced.store.retired) >= 12


async def test_a_pass_ends_although_packets_keep_coming(sliced, clock):
    await send_history(sliced, clock, 10)

    async def emit() -> None:
        await send_history(sliced, clock, 10)

    sliced.store.between = emit
    async with asyncio.timeout(60):
        done = await sliced.compactor.compact("care")
    assert 36 <= done.retired + done.live <= 80


def test_a_slice_is_as_large_as_the_last_one_foretells():
    grown = [8]
    while grown[-1] != LARGEST_SLICE:
        grown.append(_next_size(grown[-1], 0.0))
    assert grown == [8, 16, 32, 64, 128, 256]
    assert _next_size(64, 2 * SLICE_S) == 32
    assert _next_size(8, 100 * SLICE_S) == 1
    assert _next_size(1, 0.3 * SLICE_S) == 2


async def test_a_crash_between_slices_leaves_what_was_retired_and_the_next_pass_goes_on(
    sliced, clock
):
    await send_history(sliced, clock, 30)
    await sliced.releaser.release("care")

    async def crash() -> None:
        if len(sliced.store.retired) == 3:
            raise StoreUnavailableError("io_error", detail="a crash")

    sliced.store.between = crash
    with pytest.raises(StoreUnavailableError):
        await sliced.compactor.compact("care")
    before = sum(sliced.store.retired)
    assert 0 < before < 116
    again = await CompactedServer(sliced.store, clock).load()
    assert len(await sliced.store.live_packets("care")) == 120 - before
    sliced.store.between = None
    assert (await again.compactor.compact("care")).retired == 116 - before
    clock.advance(60)
    assert await again.release() == [], "nothing changed"
    assert again.prior() == sliced.prior()


# Memory


def held_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def test_memory_does_not_grow_with_what_was_compacted(server, clock, monkeypatch):
    """What is kept of a site is soon full; from then on each turn only replaces it."""
    monkeypatch.setattr("fmi_server.site_records.MAX_OUTCOMES_PER_SITE", 20)
    monkeypatch.setattr("fmi_server.site_records.MAX_SUMMARIES_PER_SITE", 10)

    async def turn() -> None:
        for n in range(20):
            clock.advance(1)
            for site in ("s0", "s1", "s2"):
                await server.send(
                    msp(site, controller={"tau": n / 100}, at=clock()),
                    pop(site, bundle={"tau": n / 100}, at=clock()),
                    ccs(site, pairs=(("a", "b", n / 100),), at=clock()),
                )
        await server.release()
        done = await server.compactor.compact("care")
        assert done.live <= 3 * (1 + 20 + 11)

    tracemalloc.start()
    try:
        for _ in range(4):
            await turn()
        before = held_bytes()
        for _ in range(8):
            await turn()
        grown = held_bytes() - before
    finally:
        tracemalloc.stop()
    assert grown < 50_000, "1,440 packets came; the updates of eight releases are remembered"


# When


async def test_a_cohort_is_compacted_after_many_packets_and_all_now_and_then(
    server, store, clock, monkeypatch
):
    for name, value in (("LOOK_S", 0.01), ("LEAST_ARRIVALS", 10)):
        monkeypatch.setattr(f"fmi_server.compaction.{name}", value)
    await send_history(server, clock, 5)
    quiet = msp("lone", cohort="quiet", metrics={"loss": 1.0}, at=NOW)
    newer = replace_time(quiet, NOW + 1)
    await server.send(quiet, newer)
    async with compacting(server):
        await live_are(store, "care", 4)
        assert len(await store.live_packets("quiet")) == 2, "too few packets for a pass"
    monkeypatch.setattr("fmi_server.compaction.FIRST_SWEEP_S", 0.0)
    async with compacting(server):
        await live_are(store, "quiet", 1)
    assert server.compactor._due() == []


@contextlib.asynccontextmanager
async def compacting(server):
    running = asyncio.ensure_future(server.compactor.run())
    try:
        async with asyncio.timeout(60):
            yield
    finally:
        running.cancel()
        await asyncio.wait({running})


def replace_time(packet: packet_pb2.Packet, at: float) -> packet_pb2.Packet:
    changed = packet_pb2.Packet()
    changed.CopyFrom(packet)
    changed.header.packet_id = packet_id()
    changed.header.emitted_at.FromMicroseconds(round(at * 1e6))
    return changed


async def test_a_cohort_that_cannot_be_compacted_does_not_hold_up_the_others(
    server, store, clock, monkeypatch, caplog
):
    monkeypatch.setattr("fmi_server.compaction.LOOK_S", 0.01)
    monkeypatch.setattr("fmi_server.compaction.LEAST_ARRIVALS", 1)
    await send_history(server, clock, 3)
    await server.send(msp("s0", cohort="broken", controller={"tau": 0.1}))
    break_it = "UPDATE packets SET content_hash = zeroblob(16) WHERE cohort = 'broken'"
    await store._open_writer().run(lambda connection: connection.execute(break_it))
    server.releaser.arrivals = type(server.releaser.arrivals)({"broken": 9, "care": 9})
    async with compacting(server):
        await live_are(store, "care", 4)
    assert "cohort broken was not compacted" in caplog.text


async def test_a_warm_start_is_not_made_of_what_is_past_its_time(clock):
    """Nobody emits and nothing was released since: the question itself lets it go."""
    async with FMIService(clock=clock) as service:
        for site in ("a", "b", "c"):
            await service.emit(msp(site, controller={"tau": 0.4}, at=NOW))
        found, _ = await service.warm_start("care")
        assert dict(found.init) == {"tau": pytest.approx(0.4)}
        clock.advance(service.cohorts.rules("care").site_ttl_s + 1.0)
        found, _ = await service.warm_start("care")
        assert not found.init
