"""Releases: when they are due, what is published, and what a fault or a restart leaves behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from google.protobuf import json_format
from parts import NOW, Clock, ccs, msp, pop

from fmi.v1 import cohort_pb2, packet_pb2, update_pb2
from fmi_server.aggregator import FMIAggregator
from fmi_server.cohorts import CohortRegistry
from fmi_server.contracts import FMIContractRegistry
from fmi_server.counted_time import as_counted
from fmi_server.emission import Intake
from fmi_server.errors import CohortUnknownError, CompactedError
from fmi_server.feed_requests import kind_name
from fmi_server.publication import TRIM_EVERY
from fmi_server.releases import RETRY_S, Releaser
from fmi_server.router import FMIRouter
from fmi_server.storage import MemoryStore, SqliteStore
from fmi_server.storage.base import PacketKey, StoredPacket, StoreUnavailableError, UpdateRecord
from fmi_server.telemetry import FMITelemetry
from fmi_server.validator import FMIValidator

CONTRACT = FMIContractRegistry()
PRIOR = update_pb2.UPDATE_KIND_PRIOR


class FaultyStore(MemoryStore):
    """Refuses what it is told to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse: set[str] = set()
        self.fail_after: set[str] = set()

    def _refuse(self, call: str) -> None:
        if call in self.refuse:
            raise StoreUnavailableError("disk_full", detail="the test filled it")

    async def publish(self, updates: Sequence[UpdateRecord], **named) -> list[int]:
        self._refuse("publish")
        sequences = await super().publish(updates, **named)
        if "publish" in self.fail_after:
            raise StoreUnavailableError("io_error", detail="the test lost the answer")
        return sequences

    async def live_packets(self, cohort, **how) -> list[StoredPacket]:
        self._refuse("live_packets")
        return await super().live_packets(cohort, **how)

    async def put_reputations(self, cohort, reputations) -> None:
        self._refuse("put_reputations")
        await super().put_reputations(cohort, reputations)


class Server:
    """The parts around a releaser, over a store that outlives them."""

    def __init__(self, store, clock: Clock, *, open_cohorts: bool = True, **spec) -> None:
        self.store, self.clock = store, clock
        self.telemetry = FMITelemetry()
        self.cohorts = CohortRegistry(CONTRACT, open_cohorts=open_cohorts)
        if spec:
            self.declare(**spec)
        self.router = FMIRouter(telemetry=self.telemetry)
        self.releaser = Releaser(
            store,
            self.cohorts,
            FMIAggregator(registry=CONTRACT, clock=clock),
            self.router,
            telemetry=self.telemetry,
            clock=clock,
        )
        self.told: list[update_pb2.Update] = []
        self.releaser.publisher.on_update(self.told.append)
        self._intake = Intake(CONTRACT, FMIValidator(CONTRACT, cohorts=self.cohorts, clock=clock))

    def declare(self, *, force: bool = False, **spec) -> None:
        message = json_format.ParseDict({"name": "care", **spec}, cohort_pb2.CohortSpec())
        self.cohorts.declare(message, force=force)

    async def send(self, *packets: packet_pb2.Packet) -> None:
        for packet in packets:
            self.cohorts.open(packet.header.cohort)
            candidate = self._intake.inspect(packet, received_at_us=int(self.clock() * 1e6))
            (outcome,) = await self.store.append([candidate.record])
            if outcome.status == "stored" and not outcome.quarantined:
                await self.releaser.count(as_counted(packet, outcome.received_at_us))

    async def release(self, cohort: str = "care") -> list[str]:
        return shown(await self.releaser.release(cohort))

    def due_in(self, cohort: str = "care") -> float | None:
        """Return in how many seconds a cohort is released by itself; None for never."""
        at = self.releaser._due().get(cohort)
        return None if at is None else max(0.0, at - self.clock())

    def prior(self) -> dict[str, float]:
        latest = self.releaser.publisher.log.latest[("care", PRIOR)]
        return dict(update_pb2.Update.FromString(latest.payload).prior_update.prior)


def shown(updates: Sequence[update_pb2.Update]) -> list[str]:
    return [f"{update.cohort}.{kind_name(update.kind)}@{update.revision}" for update in updates]


def taus(*values: float, at: float = NOW, **more) -> list[packet_pb2.Packet]:
    return [msp(f"s{i}", controller={"tau": v}, at=at, **more) for i, v in enumerate(values)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store():
    async with FaultyStore() as opened:
        yield opened


@pytest.fixture
async def server(store, clock) -> Server:
    started = Server(store, clock)
    await started.releaser.load()
    return started


# When


async def test_nothing_is_due_where_nothing_came(server):
    assert server.due_in() is None
    assert not server.releaser.dirty("care")
    assert await server.release() == []


async def test_a_quorum_is_released_at_once_and_then_at_the_interval(server, clock):
    await server.send(*taus(0.1, 0.2))
    assert server.due_in() == 60.0, "without a quorum there is time until max_interval"
    clock.advance(5)
    assert server.due_in() == 55.0
    await server.send(msp("s2", controller={"tau": 0.3}))
    assert server.due_in() == 0.0
    assert await server.release() == ["care.prior@1", "care.warm_start@1"]
    assert server.due_in() is None
    assert server.releaser.released_at("care") == clock()
    clock.advance(0.25)
    await server.send(msp("s0", controller={"tau": 0.9}, at=NOW + 1))
    assert server.due_in() == 0.75
    clock.advance(0.75)
    assert server.due_in() == 0.0


async def test_the_intervals_are_the_cohorts(store, clock):
    server = Server(store, clock, release={"minInterval": "10s", "maxInterval": "20s"})
    await server.releaser.load()
    await server.send(*taus(0.1, 0.2))
    assert server.due_in() == 20.0
    await server.send(msp("s2", controller={"tau": 0.3}))
    await server.release()
    await server.send(msp("s2", controller={"tau": 0.4}, at=NOW + 1))
    assert server.due_in() == 10.0


async def test_packets_of_one_site_make_no_quorum(server):
    await server.send(*(msp("s0", controller={"tau": i}, at=NOW - i) for i in range(5)))
    assert server.due_in() == 60.0
    await server.releaser.reading("care")  # counts them
    assert server.due_in() == 60.0


async def test_without_a_quorum_the_reasons_are_released_at_the_latest(server, clock):
    await server.send(*taus(0.1, 0.2))
    clock.advance(60)
    assert server.due_in() == 0.0
    assert await server.release() == ["care.prior@1"]
    (update,) = server.told
    assert not update.prior_update.prior
    assert update.prior_update.estimates["tau"].reason == "below_quorum"


async def test_run_releases_what_is_due_and_waits_for_the_rest(server, clock):
    told: asyncio.Queue[str] = asyncio.Queue()
    server.releaser.publisher.on_update(lambda update: told.put_nowait(*shown([update])))
    running = asyncio.create_task(server.releaser.run())
    async with asyncio.timeout(60):
        await server.send(*taus(0.1, 0.2, 0.3))
        assert [await told.get(), await told.get()] == ["care.prior@1", "care.warm_start@1"]
        await server.send(msp("s0", controller={"tau": 0.9}, at=NOW + 1))
        await server.send(*(msp(f"o{i}", cohort="other", controller={"x": 1.0}) for i in range(3)))
        assert (await told.get()).startswith("other."), "one cohort does not wait for another"
        assert (await told.get()).startswith("other.")
        clock.advance(1)
        await server.send(msp("p", cohort="third", controller={"x": 1.0}))  # wakes it
        assert await told.get() == "care.prior@2"
    assert server.releaser.dirty("third")
    assert told.empty() or await told.get() == "care.warm_start@2"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


# What


async def test_what_did_not_change_is_not_published(server, clock):
    await server.send(*taus(0.1, 0.2, 0.3))
    await server.release()
    assert await server.release() == []
    clock.advance(5)
    # Packets that say the same: the lineage moves, the prior does not.
    await server.send(*taus(0.1, 0.2, 0.3, at=NOW + 5))
    assert server.releaser.dirty("care")
    assert await server.release() == []
    assert not server.releaser.dirty("care")
    counts = server.telemetry.snapshot()
    assert counts['fmi_releases_total{outcome="published"}'] == 1
    assert counts['fmi_releases_total{outcome="unchanged"}'] == 2


async def test_only_the_kinds_that_changed_get_a_revision(server):
    await server.send(*taus(0.1, 0.2, 0.3))
    await server.release()
    await server.send(*(ccs(f"s{i}", pairs=(("a", "b", 1.0),)) for i in range(3)))
    assert await server.release() == ["care.causal_consensus@1"]
    await server.send(*(pop(f"s{i}") for i in range(3)))
    assert await server.release() == ["care.policy_hint@1"]
    await server.send(msp("s0", controller={"tau": 0.7}, at=NOW + 1))
    assert await server.release() == ["care.prior@2", "care.warm_start@2"]


async def test_revisions_and_sequences_have_no_gaps(server, store):
    for turn in range(40):
        for cohort in ("care", "retail"):
            await server.send(*taus(0.1, 0.2 + turn, 0.3 + turn, at=NOW + turn, cohort=cohort))
            await server.release(cohort)
    assert [update.sequence for update in server.told] == list(range(1, len(server.told) + 1))
    by_key: dict[tuple[str, int], list[int]] = {}
    for update in server.told:
        by_key.setdefault((update.cohort, update.kind), []).append(update.revision)
        assert update.history_epoch == store.history_epoch
        if update.kind == PRIOR:
            assert update.prior_update.rev == update.revision
    assert len(by_key) == 4
    assert all(found == list(range(1, 41)) for found in by_key.values())
    stored = await server.releaser.publisher.updates.since(0, 1000)
    assert [update_pb2.Update.FromString(update.payload) for update in stored] == server.told


async def test_concurrent_releases_of_many_cohorts_have_no_gaps(server):
    names = [f"c{n}" for n in range(8)]
    for name in names:
        await server.send(*taus(0.1, 0.2, 0.3, cohort=name))
    await asyncio.gather(*(server.release(name) for name in [*names, *names]))
    assert [update.sequence for update in server.told] == list(range(1, 17))
    assert {update.revision for update in server.told} == {1}


async def test_an_unknown_cohort_is_not_released(store, clock):
    server = Server(store, clock, open_cohorts=False)
    await server.releaser.load()
    with pytest.raises(CohortUnknownError):
        await server.releaser.release("nowhere")
    assert server.releaser._due() == {}


async def test_histories_are_trimmed_and_say_so(store, clock):
    server = Server(store, clock, retention={"updates": 3})
    await server.releaser.load()
    for turn in range(TRIM_EVERY + 1):
        await server.send(*taus(0.1, 0.2 + turn, 0.3 + turn, at=NOW + turn))
        await server.release()
    key = ("care", int(PRIOR))
    oldest = await server.releaser.publisher.updates.oldest(key)
    assert oldest == TRIM_EVERY - 2
    assert (await server.releaser.publisher.updates.kept(key, oldest)).revision == oldest
    with pytest.raises(CompactedError) as caught:
        await server.releaser.publisher.updates.kept(key, oldest - 1)
    assert caught.value.oldest == oldest


# Faults


async def test_a_store_that_cannot_take_updates_is_retried_and_nobody_is_told(server, store, clock):
    await server.send(*taus(0.1, 0.2, 0.3))
    store.refuse = {"publish"}
    with pytest.raises(StoreUnavailableError):
        await server.releaser.release("care")
    assert server.told == []
    assert server.releaser.publisher.log.head == 0
    assert not server.releaser.publisher.log.latest
    assert server.releaser.dirty("care")
    await server.releaser._release_safely("care")
    assert server.due_in() == RETRY_S
    clock.advance(RETRY_S)
    assert server.due_in() == 0.0
    store.refuse = set()
    assert await server.release() == ["care.prior@1", "care.warm_start@1"]
    assert server.telemetry.snapshot()['fmi_releases_total{outcome="failed"}'] == 2


async def test_a_failure_keeps_what_came_meanwhile(server, store):
    await server.send(*taus(0.1, 0.2, 0.3))
    await server.release()
    store.refuse = {"publish"}
    await server.send(msp("s0", controller={"tau": 0.9}, at=NOW + 1))
    await server.releaser._release_safely("care")
    await server.send(msp("s1", controller={"tau": 0.9}, at=NOW + 1))
    store.refuse = set()
    assert (await server.release())[0] == "care.prior@2"
    assert server.prior()["tau"] == pytest.approx(0.9)


async def test_reputations_that_cannot_be_saved_are_saved_later(server, store):
    await server.send(*taus(0.50, 0.51, 0.52, 0.53, 9.0))
    store.refuse = {"put_reputations"}
    await server.releaser._release_safely("care")
    assert [update.revision for update in server.told] == [1, 1], "what is stored is told"
    store.refuse = set()
    assert await server.release() == []
    saved = {site.domain_id: site.reputation for site in await store.sites("care")}
    assert saved["s4"] is not None
    assert saved["s4"] < saved["s0"]


async def test_a_listener_that_fails_harms_nobody(server):
    def failing(_update) -> None:
        raise RuntimeError("of the test")

    server.releaser.publisher._listeners.insert(0, failing)
    await server.send(*taus(0.1, 0.2, 0.3))
    assert len(await server.release()) == len(server.told) == 2


async def test_packets_past_the_bound_are_counted_by_whoever_brings_them(server, monkeypatch):
    monkeypatch.setattr("fmi_server.releases.MAX_UNCOUNTED_BYTES", 1000)
    waited = 0
    for turn in range(25):
        await server.send(msp(f"s{turn % 4}", controller={"tau": 0.5}, at=NOW + turn / 100))
        waiting = server.releaser._work["care"].uncounted
        assert sum(packet.ByteSize() for _, packet in waiting) < 1000
        waited = max(waited, len(waiting))
    assert waited > 1
    state, _ = await server.releaser.reading("care")
    assert state.packets["msp"] == 25


async def test_packets_of_many_cohorts_are_bounded_together(server, monkeypatch):
    monkeypatch.setattr("fmi_server.releases.MAX_ALL_UNCOUNTED_BYTES", 1000)
    for turn in range(40):
        await server.send(msp("s", cohort=f"cohort-{turn}", controller={"tau": 0.5}))
        waiting = [p for work in server.releaser._work.values() for _, p in work.uncounted]
        assert sum(packet.ByteSize() for packet in waiting) < 1000


# Faults


async def test_a_rebuild_that_cannot_read_leaves_the_state_as_it_was(server, store):
    await server.send(*taus(0.1, 0.2, 0.3))
    await server.release()
    await server.send(msp("late", controller={"tau": 0.2}))
    store.refuse = {"live_packets"}
    with pytest.raises(StoreUnavailableError):
        await server.releaser.rebuild("care")
    with pytest.raises(StoreUnavailableError):
        await server.release()
    assert server.prior() == {"tau": pytest.approx(0.2)}
    work = server.releaser._work["care"]
    waiting = sum(packet.ByteSize() for _, packet in work.uncounted)
    assert work.uncounted_bytes == server.releaser._uncounted_bytes == waiting > 0
    store.refuse = set()
    await server.release()
    assert work.uncounted_bytes == server.releaser._uncounted_bytes == 0
    state, _ = await server.releaser.reading("care")
    assert (state.sites, state.packets["msp"]) == (4, 4)


async def test_an_update_that_got_in_although_its_write_failed_is_told_and_nothing_stops(
    server, store
):
    await server.send(*taus(0.1, 0.2, 0.3))
    await server.send(*[msp(f"s{i}", cohort="other", controller={"tau": 0.5}) for i in range(3)])
    store.fail_after = {"publish"}
    with pytest.raises(StoreUnavailableError):
        await server.release()
    assert server.told == []
    store.fail_after = set()
    assert await server.release("other") == ["other.prior@1", "other.warm_start@1"]
    assert shown(server.told) == [
        "care.prior@1", "care.warm_start@1", "other.prior@1", "other.warm_start@1",
    ]  # fmt: skip
    assert await server.release() == []
    assert [update.sequence for update in server.told] == [1, 2, 3, 4]


async def test_values_past_their_time_go_though_nobody_emits(server, clock, monkeypatch):
    monkeypatch.setattr("fmi_server.releases.SWEEP_S", 0.01)
    server.declare(retention={"siteTtl": "60s"})
    await server.send(*taus(0.1, 0.2, 0.3))
    await server.release()
    assert not server.releaser.dirty("care")
    server.releaser._wake.clear()
    clock.now += 61
    sweeping = asyncio.ensure_future(server.releaser.sweep())
    try:
        async with asyncio.timeout(60):
            await server.releaser._wake.wait()
    finally:
        sweeping.cancel()
    assert server.releaser.dirty("care")
    await server.release()
    assert server.prior() == {}


async def test_a_slow_cohort_delays_itself_and_not_the_others(server, monkeypatch):
    free = threading.Event()
    result = FMIAggregator.result

    def slow(self, state, *, now):
        if state.rules.name == "slow":
            free.wait(120)
        return result(self, state, now=now)

    monkeypatch.setattr(FMIAggregator, "result", slow)
    for cohort in ("slow", "care"):
        await server.send(*[msp(f"s{i}", cohort=cohort, controller={"tau": 0.5}) for i in range(3)])
    told = asyncio.Event()
    server.releaser.publisher.on_update(lambda _: told.set())
    running = asyncio.ensure_future(server.releaser.run())
    try:
        async with asyncio.timeout(60):
            await told.wait()
        assert {update.cohort for update in server.told} == {"care"}
    finally:
        free.set()
        running.cancel()


# Restarts


async def restarted(server: Server, **spec) -> Server:
    again = Server(server.store, server.clock, **spec)
    await again.releaser.load()
    return again


async def test_a_restart_brings_back_the_state_and_publishes_nothing_new(server, clock):
    await server.send(*taus(0.50, 0.51, 0.52, 0.53, 0.54, 40.0))
    await server.send(*(ccs(f"s{i}", pairs=(("a", "b", 1.0 + i),)) for i in range(4)))
    await server.send(*(pop(f"s{i}") for i in range(4)))
    await server.release()
    for turn in range(1, 6):
        clock.advance(10)
        drift = turn / 100
        await server.send(*taus(0.5 + drift, 0.51, 0.52, 0.53, 0.54, 40.0, at=clock()))
        await server.release()
    before = server.releaser.publisher.log
    again = await restarted(server)
    assert again.releaser.publisher.log.head == before.head
    assert again.releaser.publisher.log.latest == before.latest
    assert again.releaser.released_at("care") == server.releaser.released_at("care")
    state, _ = await again.releaser.reading("care")
    old, _ = await server.releaser.reading("care")
    assert state.reputations() == old.reputations()
    assert state.packets == old.packets
    assert again.due_in() == 1.0
    clock.advance(1)
    assert await again.release() == []
    assert again.told == []
    await again.send(msp("s0", controller={"tau": 0.7}, at=clock()))
    assert (await again.release())[0] == f"care.prior@{before.latest['care', PRIOR].revision + 1}"


async def test_what_was_stored_and_not_released_is_released_after_a_restart(server):
    await server.send(*taus(0.1, 0.2, 0.3))
    again = await restarted(server)
    assert again.due_in() == 0.0
    assert await again.release() == ["care.prior@1", "care.warm_start@1"]


async def test_what_is_past_its_time_is_not_counted_again(server, clock):
    await server.send(*taus(0.1, 0.2, 0.3))
    clock.advance(31 * 86_400)
    again = await restarted(server)
    state, _ = await again.releaser.reading("care")
    assert state.sites == 0


async def test_an_undeclared_cohort_is_kept_and_told_of(server, caplog):
    await server.send(*taus(0.1, 0.2, 0.3))
    await server.release()
    closed = Server(server.store, server.clock, open_cohorts=False)
    await closed.releaser.load()
    assert "care has packets but is not declared" in caplog.text
    assert closed.releaser._due() == {}
    assert (
        closed.releaser.publisher.log.latest.keys() == server.releaser.publisher.log.latest.keys()
    )


async def test_a_restart_on_disk_goes_on_with_the_next_revision(tmp_path, clock):
    for turn in range(3):
        async with SqliteStore(tmp_path / "fmi.sqlite3") as store:
            server = Server(store, clock)
            await server.releaser.load()
            assert server.releaser.publisher.log.head == 2 * turn
            clock.advance(60)
            await server.send(*taus(0.1 + turn, 0.2 + turn, 0.3 + turn, at=clock()))
            assert await server.release() == [
                f"care.prior@{turn + 1}",
                f"care.warm_start@{turn + 1}",
            ]


# Rebuilds


async def test_a_changed_spec_counts_everything_anew(server):
    await server.send(*taus(0.1, 0.2, 0.3, 0.4, 9.0))
    await server.release()
    assert server.prior()["tau"] == pytest.approx(0.3)
    server.declare(aggregation={"metricsAggregation": "mean"})
    await server.releaser.rebuild("care")
    assert server.releaser.dirty("care")
    assert (await server.release())[0] == "care.prior@2"
    state, _ = await server.releaser.reading("care")
    assert state.packets == {"msp": 5}
    assert server.prior()["tau"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 9.0) / 5, rel=0.2)


async def test_a_closed_vocabulary_takes_values_out_of_the_prior(server):
    await server.send(*taus(0.1, 0.2, 0.3))
    await server.release()
    tau = {"name": "other", "section": "SIGNAL_SECTION_CONTROLLER"}
    server.declare(signals=[tau])
    await server.releaser.rebuild("care")
    assert (await server.release())[0] == "care.prior@2"
    assert server.prior() == {}
    state, _ = await server.releaser.reading("care")
    assert state.ignored == {"undeclared": 3}


async def test_quarantine_takes_a_packet_out_and_back_in(server, store):
    packets = taus(0.1, 0.2, 0.3, 0.4)
    await server.send(*packets)
    await server.release()
    with_it = server.prior()
    header = packets[3].header
    key = PacketKey(header.domain_id, header.packet_id)
    for quarantined, expected in ((True, 0.2), (False, with_it["tau"])):
        assert await store.set_quarantine(key, quarantined=quarantined)
        await server.releaser.rebuild("care")
        await server.release()
        assert server.prior()["tau"] == pytest.approx(expected)
    assert [u.revision for u in server.told if u.kind == PRIOR] == [1, 2, 3]


async def test_a_rebuild_counts_what_was_waiting_once(server):
    await server.send(*taus(0.1, 0.2, 0.3))
    await server.releaser.rebuild("care")
    state, _ = await server.releaser.reading("care")
    assert state.packets == {"msp": 3}
