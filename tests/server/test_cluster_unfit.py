"""Servers of a cluster that cannot do their part: others do it, health says so, all mends itself."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import nats
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from cluster_harness import care, member, owner, prior_of, shared_out, taus, two
from identity_harness import Office
from server_harness import (
    DEADLINE_S,
    NOT_SERVING,
    PRIOR,
    SERVING,
    Client,
    eventually,
    identity,
    msp,
    refusal_of,
    spec,
)
from server_process import assert_refused, run, started

from fmi.descriptors import DELIVERY, INGEST, SERVICE_NAMES
from fmi.v1 import error_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import registry_service_pb2 as registry_pb2
from fmi_server import broker_settings, partitions
from fmi_server.app import RunningServer
from fmi_server.partitions import PARTITIONS
from fmi_server.storage import JetStreamStore
from fmi_server.storage.base import StoreCorruptError, StoreUnavailableError
from fmi_server.storage.jetstream_leases import Lease


@pytest.fixture
async def broker(tmp_path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker", sync="2m") as started:
        yield started


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Brokers that do not answer are told of soon."""
    monkeypatch.setattr(broker_settings, "PATIENCE_S", 2.0)


def view_of(server: RunningServer):
    assert isinstance(server.service.store, JetStreamStore)
    return server.service.store._view


@pytest.mark.usefixtures("impatient")
async def test_who_cannot_write_its_view_leaves_its_cohorts_to_others(broker, tmp_path):
    async with two(broker, tmp_path) as servers:
        async with Client(servers[0].target) as client:
            await client.put_spec(care())
        await eventually(lambda: "care" in servers[1].service.cohorts)
        stuck = owner("care", *servers)
        (other,) = [server for server in servers if server is not stuck]
        async with Client(other.target) as there, Client(stuck.target) as here:
            await view_of(stuck).set_max_bytes(1)
            large = {f"signal-{n}": 0.5 for n in range(200)}
            while stuck.service.store.stats().fault != "disk_full":
                await there.emit(msp("s0", "care", metrics=large))
            await there.emit(*taus(0.1, 0.2, 0.3))

            async def released():
                with contextlib.suppress(grpc.aio.AioRpcError):
                    estimates = (await there.update("care")).prior_update.estimates
                    return "tau" in estimates and estimates["tau"].sites == 3

            await eventually(released)
            await eventually(lambda: other.service.cluster.partitions.owns("care"))
            await eventually(lambda: not stuck.service.cluster.partitions.owned)
            await eventually(lambda: not stuck.service.store_watch.sound)
            assert other.service.store_watch.sound
            # Its subscribers hear nothing more of what others write.
            await eventually(says(here, NOT_SERVING))
            assert await there.health(DELIVERY) == SERVING
            await view_of(stuck).set_max_bytes(None)
            await shared_out(*servers)
            await eventually(lambda: stuck.service.store_watch.sound)
            await eventually(says(here, SERVING))
            await there.emit(*taus(0.4, 0.5, 0.6))

            async def the_same():
                return await here.update("care") == await there.update("care")

            await eventually(lambda: newest(stuck) >= 2)  # of what came after it had room again
            await eventually(the_same)


async def test_who_stopped_at_an_entry_says_that_it_hears_nothing_more(broker, tmp_path, caplog):
    """Also until it has ended."""
    async with member(broker, tmp_path / "a") as server, Client(server.target) as client:
        await client.put_spec(care())
        assert await client.health(DELIVERY) == SERVING
        peer = await nats.connect(f"nats://{broker.address}", allow_reconnect=False)
        # Of a newer format than this version knows.
        await peer.jetstream().publish("fmi.fmi.log.state", b"\x02\x00\x00\x00\x00")
        await peer.close()
        await eventually(says(client, NOT_SERVING))
        await eventually(lambda: not server.service.store_watch.sound)
        await eventually(says(client, NOT_SERVING, INGEST))
        assert await client.health() == SERVING
        assert server.service.telemetry.snapshot()["fmi_follows"] == 0.0
        await eventually(lambda: not server.service.cluster.partitions.owned)
    # To restore a backup would be no help, and undo what the others do.
    assert "others go on where this server cannot follow, so it stops" in caplog.text
    assert "upgrade the server" in caplog.text
    assert "is damaged" not in caplog.text


def newest(server: RunningServer) -> int:
    return server.service.releaser.publisher.log.newest_revision(("care", PRIOR))


async def test_who_cannot_take_in_one_thing_goes_on_with_the_rest(broker, tmp_path, monkeypatch):
    async with (
        two(broker, tmp_path) as servers,
        Client(servers[0].target) as a,
        Client(servers[1].target) as b,
        b.subscribed("care") as events,
    ):
        await a.put_spec(care())
        put, failing = servers[0].service.specs._store.cohorts, True

        async def cohorts():
            if failing:
                raise ValueError("the test's")
            return await put()

        monkeypatch.setattr(servers[0].service.specs._store, "cohorts", cohorts)
        await b.put_spec(spec("kept"))
        await eventually(lambda: not servers[0].service.cluster.partitions.owned)
        await eventually(lambda: len(servers[1].service.cluster.partitions.owned) == PARTITIONS)
        # Health says so of what it does not do, and of nothing else; so does the metric.
        await eventually(says(a, NOT_SERVING))
        for name in ("", INGEST, *SERVICE_NAMES):
            assert await a.health(name) == SERVING
            assert await b.health(name) == SERVING
        assert servers[0].service.telemetry.snapshot()["fmi_follows"] == 0.0
        for server, partitions_ in zip(servers, (0.0, PARTITIONS), strict=True):
            shown = server.service.telemetry.snapshot
            await eventually(lambda n=partitions_, shown=shown: shown()["fmi_partitions"] == n)
        await a.emit(*taus(0.1, 0.2, 0.3))
        found = await events.until("update")
        # The rest of what others write is taken in all the same.
        token = found[-1].resume_token
        async with a.subscribed("care", resume_token=token) as going_on:
            await going_on.until("snapshot_end")
        failing = False
        await eventually(says(a, SERVING))
        await eventually(lambda: servers[0].service.cluster.partitions.owned)
        await shared_out(*servers)
        assert servers[0].service.telemetry.snapshot()["fmi_follows"] == 1.0


def says(client: Client, status: int, part: str = DELIVERY):
    """A condition: health says so of a part of the server, by default of what comes to subscribers."""

    async def said() -> bool:
        return await client.health(part) == status

    return said


async def test_who_cannot_keep_a_spec_that_others_put_in_force_stops(broker, tmp_path):
    """By the rules of before it would show everybody what is no longer for everybody."""
    flags = ("--store", broker.url(), "--data-dir", str(tmp_path / "open"))
    async with started("--listen", "127.0.0.1:0", *flags) as open_to_all:
        async with Client(open_to_all.target) as client:
            await client.put_spec(care())
        # Put into the store by a server that does authenticate, as far as this one hears.
        closed = care()
        closed.access.subscribe.append("somebody")
        async with JetStreamStore(broker.url(), tmp_path / "other.db") as store:
            await store.put_cohort("care", closed.SerializeToString(), 1)
        async with asyncio.timeout(60):
            assert await open_to_all.ended() == 2
        said = "".join(open_to_all.err)
        assert "a spec that another server put in force cannot be kept here" in said
        assert "fmi-server: access.subscribe: of cohort 'care'" in said
        assert "Traceback" not in said
    # Nor does it start again.
    ended = await run("--listen", "127.0.0.1:0", *flags)
    assert_refused(ended, "access.subscribe", "care")


async def test_a_cohort_that_lets_nobody_is_not_shown_by_a_server_that_authenticates_nobody(
    broker, tmp_path
):
    """Without lists it would look like one that nobody closed."""
    office = Office(tmp_path / "office")
    office.token("somebody")
    settings = {**office.tls, "tokens": office.tokens}
    async with member(broker, tmp_path / "a") as server, Client(server.target) as client:
        await client.put_spec(care())
        await client.emit(*taus(0.1, 0.2, 0.3))
        await prior_of(client)
        async with member(broker, tmp_path / "b", **settings) as closing:
            await closing.service.put_cohort_spec(care(), force=True)
            changed = care()
            changed.ingest.max_packet_bytes = 100_000
            await closing.service.put_cohort_spec(changed, force=True)
        await eventually(server.stop.is_set)
        assert server.service.specs.unkept.setting == "access"
        told = await refusal_of(client.update("care"))
        assert told.reason == "SERVER_DRAINING"


async def test_nothing_is_shown_from_the_moment_on_that_a_spec_cannot_be_kept(broker, tmp_path):
    """A drain lets calls end, and reads go on meanwhile: for seconds, by the rules of before."""
    async with (
        member(broker, tmp_path / "open") as server,
        Client(server.target) as client,
        client.subscribed("care") as events,
    ):
        await client.put_spec(care())
        await client.emit(*taus(0.1, 0.2, 0.3))
        await events.until("update")
        closed = care()
        closed.access.subscribe.append("somebody")
        async with JetStreamStore(broker.url(), tmp_path / "other.db") as store:
            await store.put_cohort("care", closed.SerializeToString(), 1)
        await eventually(server.stop.is_set)  # which nobody heeds here: it serves on
        for call in (
            client.update("care"),
            client.emit(msp("s9", "care")),
            client.put_spec(care()),
            client.registry.ListCohortSpecs(registry_pb2.ListCohortSpecsRequest()),
        ):
            assert (await refusal_of(call)).reason == "SERVER_DRAINING"
        assert (await events.refusal()).reason == "SERVER_DRAINING"


async def test_a_spec_that_cannot_be_read_stops_a_server_too(broker, tmp_path):
    async with member(broker, tmp_path / "a") as server, Client(server.target) as client:
        await client.put_spec(care())
        async with JetStreamStore(broker.url(), tmp_path / "other.db") as store:
            await store.put_cohort("care", b"\xff", 1)
        await eventually(server.stop.is_set)
        assert "not as it was stored" in str(server.service.specs.unkept)
    with pytest.raises(StoreCorruptError, match="the spec of cohort 'care'"):
        async with member(broker, tmp_path / "a"):
            pass


async def test_who_may_do_what_does_not_wait_for_packets_to_be_made_live(
    broker, tmp_path, monkeypatch
):
    office = Office(tmp_path / "office")
    office.token("somebody")
    settings = {**office.tls, "tokens": office.tokens}
    async with (
        member(broker, tmp_path / "a", **settings) as server,
        member(broker, tmp_path / "b", **settings) as other,
    ):
        opened = care()
        opened.access.subscribe.append("somebody")
        await server.service.put_cohort_spec(opened)
        await eventually(lambda: "care" in other.service.cohorts)

        async def revive(*_args, **_named):
            raise StoreUnavailableError("io_error", detail="the test's", path="here")

        monkeypatch.setattr(other.service.compactor, "compacted", lambda _: True)
        monkeypatch.setattr(other.service.store, "revive", revive)
        await server.service.put_cohort_spec(care())
        await eventually(lambda: not other.service.cohorts.access("care").names)


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_nobody_emits_to_says_that_brokers_are_away_and_mends_itself(
    broker, tmp_path
):
    async with member(broker, tmp_path / "a") as server, Client(server.target) as client:
        await client.put_spec(care())
        broker.kill()
        await eventually(lambda: not server.service.store_watch.sound)
        await broker.start()
        await eventually(lambda: server.service.store_watch.sound)
        await eventually(lambda: len(server.service.cluster.partitions.owned) == PARTITIONS)


@pytest.mark.usefixtures("impatient")
async def test_health_comes_back_though_nobody_emits_to_a_server_that_is_not_well(broker, tmp_path):
    async with member(broker, tmp_path / "a") as server, Client(server.target) as client:
        await client.put_spec(care())
        broker.kill()
        told = await refusal_of(client.emit(msp("s0", "care")))
        assert told.reason == "STORE_UNAVAILABLE"
        await eventually(lambda: not server.service.store_watch.sound)
        await broker.start()
        await eventually(lambda: server.service.store_watch.sound)


async def test_a_spec_is_compiled_once_at_each_server(broker, tmp_path, monkeypatch):
    async with two(broker, tmp_path) as servers:
        compiled: list[int] = []
        for number, server in enumerate(servers):
            compile_ = server.service.cohorts.compile

            def counted(spec, *, number=number, compile_=compile_):
                compiled.append(number)
                return compile_(spec)

            monkeypatch.setattr(server.service.cohorts, "compile", counted)
        async with Client(servers[0].target) as client:
            await client.put_spec(care())
        await eventually(lambda: "care" in servers[1].service.cohorts)
        assert sorted(compiled) == [0, 1]


async def test_what_was_put_in_force_anywhere_is_known_to_who_asks_elsewhere(broker, tmp_path):
    async with (
        two(broker, tmp_path) as servers,
        Client(servers[0].target) as a,
        Client(servers[1].target) as b,
    ):
        signal = {"name": "tau", "section": 2, "lower": 0.0}
        following = servers[1].service.cluster.following
        assert following is not None
        async with following._turn:  # it has not heard of anything yet
            await a.put_spec(spec("care", signals=[{**signal, "upper": 2.0}]))
            released = asyncio.ensure_future(b.release("care"))
            narrowed = asyncio.ensure_future(
                refusal_of(b.put_spec(spec("care", signals=[{**signal, "upper": 1.0}])))
            )
            await asyncio.wait({released, narrowed}, timeout=0.5)
        assert await released
        assert (await narrowed).reason == "SPEC_CHANGE_UNSAFE"


async def test_a_cohort_declared_anywhere_takes_packets_elsewhere(broker, tmp_path):
    async with (
        member(broker, tmp_path / "a", open_cohorts=False) as first,
        member(broker, tmp_path / "b", open_cohorts=False) as second,
        Client(first.target) as a,
        Client(second.target) as b,
    ):
        following = second.service.cluster.following
        assert following is not None
        refused = await refusal_of(b.emit(msp("s0", "one")))
        assert refused.reason == "COHORT_UNKNOWN"
        checked = registry_pb2.ValidatePacketRequest(packet=msp("s0", "one"))
        assert not (await b.registry.ValidatePacket(checked, timeout=DEADLINE_S)).valid
        async with following._turn:  # it has not heard of them yet
            await a.put_spec(spec("one"))
            await a.put_spec(spec("other"))
            calls = [
                asyncio.ensure_future(b.emit(msp("s0", "one"))),
                asyncio.ensure_future(
                    b.emit_encoded(identity(msp("s0", "other"), msp("s0", "no")))
                ),
                asyncio.ensure_future(b.registry.ValidatePacket(checked, timeout=DEADLINE_S)),
            ]
            await asyncio.wait(calls, timeout=0.5)
        (alone,) = await calls[0]
        assert alone.status == wire_pb2.EMIT_STATUS_ACCEPTED
        taken, left = (await calls[1]).results
        assert taken.status == wire_pb2.EMIT_STATUS_ACCEPTED
        assert left.refusal.reason == error_pb2.ERROR_REASON_COHORT_UNKNOWN
        assert (await calls[2]).valid


async def test_a_cohort_that_becomes_known_while_its_packet_is_checked_takes_it(
    broker, tmp_path, monkeypatch
):
    async with (
        member(broker, tmp_path / "a", open_cohorts=False) as server,
        Client(server.target) as client,
    ):
        check = server.service._checking.check

        async def late(items, **given):
            found = await check(items, **given)
            if "one" not in server.service.cohorts:
                await client.put_spec(spec("one"))
            return found

        monkeypatch.setattr(server.service._checking, "check", late)
        (answer,) = await client.emit(msp("s0", "one"))
        assert answer.status == wire_pb2.EMIT_STATUS_ACCEPTED


async def test_renewals_whose_answers_are_lost_lose_nothing(broker, tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "RENEWED_AT", 2.0)  # at each look
    gained: list[frozenset[int]] = []

    async def gain(new: frozenset[int]) -> None:
        gained.append(new)

    async with JetStreamStore(broker.url(), tmp_path / "a.db") as store:
        leases = await store.leases(ttl_s=60.0)
        held = partitions.Partitions(leases, server="a", on_gain=gain)
        await held._look()
        assert len(held.owned) == PARTITIONS
        renew = leases.renew

        async def deaf(lease: Lease) -> Lease:
            renewed = await renew(lease)
            if lease.name.endswith("7"):
                raise StoreUnavailableError("no_answer", detail="lost", path=store.location)
            return renewed

        leases.renew = deaf  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailableError):
            await held._look()
        assert len(held.owned) == PARTITIONS, "what was held is as good as it was"
        leases.renew = renew  # type: ignore[method-assign]
        await held._look()
        assert len(held.owned) == PARTITIONS
        # Others may have had these between: they are taken as if they were new.
        assert gained == [
            frozenset(range(PARTITIONS)),
            frozenset(p for p in range(PARTITIONS) if p % 10 == 7),
        ]
