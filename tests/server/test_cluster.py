"""Several servers on one store at a real broker: whichever a client finds, it is the same federation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from cluster_harness import care, heard_of, member, prior_of, shared_out, taus, two
from server_harness import (
    DEADLINE_S,
    HINT,
    PRIOR,
    Client,
    Refusal,
    ccs,
    eventually,
    msp,
    pop,
    refusal_of,
    spec,
    trained_dictionary,
    zstd,
)
from server_process import assert_refused
from server_process import run as run_process

from fmi.v1 import admin_service_pb2 as admin_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import update_pb2
from fmi_server import broker_settings, partitions
from fmi_server.app import RunningServer
from fmi_server.partitions import PARTITIONS, partition_of, share_of
from fmi_server.testing import running_server


@pytest.fixture
async def broker(tmp_path) -> AsyncIterator[Broker]:
    async with Broker(tmp_path / "broker", sync="2m") as started:
        yield started


def test_shares_part_everything_and_only_what_must_move_moves():
    names = [f"server-{n}" for n in range(5)]
    before = {name: share_of(name, names) for name in names}
    assert sorted(p for share in before.values() for p in share) == list(range(PARTITIONS))
    assert all(share for share in before.values())
    left = names[1:]
    after = {name: share_of(name, left) for name in left}
    assert sorted(p for share in after.values() for p in share) == list(range(PARTITIONS))
    for name in left:
        assert before[name] <= after[name]
    assert {partition_of(f"cohort {n}") for n in range(2000)} == set(range(PARTITIONS))


async def test_what_is_sent_to_one_is_told_by_the_other(broker, tmp_path):
    async with two(broker, tmp_path) as servers:
        for sender, hearer in (servers, servers[::-1]):
            async with (
                Client(sender.target) as there,
                Client(hearer.target) as here,
                here.subscribed("care") as events,
            ):
                await there.put_spec(care())
                await events.until("snapshot_end")
                await there.emit(*taus(0.1, 0.2, 0.3 if sender is servers[0] else 0.6))
                found = await events.until("update")
                assert found[-1].update.cohort == "care"
                assert (await here.cohorts())["care"].packets >= 3
                assert (await here.sites("care")).keys() == (await there.sites("care")).keys()


async def test_packets_of_both_are_counted_together_and_once(broker, tmp_path):
    async with (
        two(broker, tmp_path) as servers,
        Client(servers[0].target) as a,
        Client(servers[1].target) as b,
    ):
        await a.put_spec(care())
        await servers[1].service.settle()
        packets = taus(0.1, 0.2, 0.3, 0.4, 0.5)
        for number, packet in enumerate(packets):
            (result,) = await (a, b)[number % 2].emit(packet)
            assert result.status == wire_pb2.EMIT_STATUS_ACCEPTED
        for number, packet in enumerate(packets):  # each once more, at the other one
            (result,) = await (b, a)[number % 2].emit(packet)
            assert result.status == wire_pb2.EMIT_STATUS_DUPLICATE

        async def counted():
            newest = [await heard_of(client.update("care")) for client in (a, b)]
            if None in newest or newest[0] != newest[1]:
                return False
            estimate = newest[0].prior_update.estimates["tau"]
            return estimate.sites == 5 and estimate.value == pytest.approx(0.3)

        await eventually(counted)
        for server in servers:
            await server.service.settle()
            async with server.service.releaser.settled("care") as state:
                assert state.packets["msp"] == 5


async def test_packets_that_come_while_a_spec_is_put_in_force_are_counted_once(
    broker, tmp_path, monkeypatch
):
    """The packets of before are counted anew then; those that come meanwhile are found among them."""
    async with two(broker, tmp_path) as (first, late), Client(first.target) as client:
        store, counted_anew = late.service.store, asyncio.Event()
        live_pages = store.live_pages

        async def come_meanwhile(cohort, **named):
            if not counted_anew.is_set():
                await client.emit(*taus(0.1, 0.2, 0.3))
                await eventually(lambda: three_are_there(store))
                counted_anew.set()
            async for page in live_pages(cohort, **named):
                yield page

        monkeypatch.setattr(store, "live_pages", come_meanwhile)
        await client.put_spec(care())
        async with asyncio.timeout(DEADLINE_S):
            await counted_anew.wait()
        for server in (first, late):
            await server.service.settle()
            async with server.service.releaser.settled("care") as state:
                assert state.packets["msp"] == 3
                assert state.sites == 3


async def three_are_there(store) -> bool:
    return await store.last_sequence() == 3


async def test_a_token_of_one_is_good_at_the_other(broker, tmp_path):
    async with (
        two(broker, tmp_path) as servers,
        Client(servers[0].target) as a,
        Client(servers[1].target) as b,
    ):
        await a.put_spec(care())
        every = {"mode": wire_pb2.DELIVERY_MODE_EVERY}
        async with a.subscribed("care", **every) as events:
            await a.emit(*taus(0.1, 0.2, 0.3))
            first = (await events.until("update"))[-1]
        await prior_of(b)
        for value in (0.4, 0.5, 0.6):
            before = (await b.update("care")).revision
            await b.emit(msp("s0", "care", controller={"tau": value}))
            await prior_of(b, before)
        newest = (await b.update("care")).revision
        assert newest > first.update.revision
        async with b.subscribed("care", resume_token=first.resume_token, **every) as events:
            revisions = [
                event.update.revision
                for event in await events.until("snapshot_end")
                if event.update.kind == PRIOR
            ]
            while not revisions or revisions[-1] < newest:
                event = await events.next()
                if event.update.kind == PRIOR:
                    revisions.append(event.update.revision)
        assert revisions == list(range(revisions[0], newest + 1))


async def test_rules_quarantine_and_dictionaries_of_one_are_in_force_at_the_other(broker, tmp_path):
    async with (
        two(broker, tmp_path) as servers,
        Client(servers[0].target) as a,
        Client(servers[1].target) as b,
    ):
        signals = [{"name": "tau", "section": 2, "lower": 0.0, "upper": 1.0}]
        await a.put_spec(care())
        await b.emit(*taus(0.1, 0.2, 0.3, 0.9))
        first = await prior_of(a)
        assert 0.2 <= first["tau"] <= 0.3

        packet = taus(0.1, 0.2, 0.3, 0.8)[3]
        await a.emit(packet)
        request = admin_pb2.SetQuarantineRequest(
            domain_id="s3", packet_id=packet.header.packet_id, quarantined=True, reason="odd"
        )
        assert (await b.admin.SetQuarantine(request)).changed

        async def recounted():
            for server in servers:
                async with server.service.releaser.settled("care") as state:
                    if state.packets["msp"] != 4:
                        return False
            return True

        await eventually(recounted)

        await b.put_spec(care(signals=signals), force=True)

        async def refused():
            call = a.emit(msp("s0", "care", controller={"tau": 7.0}))
            try:
                await call
            except grpc.aio.AioRpcError as error:
                return Refusal.read(error).reason == "COHORT_RULE_VIOLATION"
            return False

        await eventually(refused)

        dictionary = trained_dictionary()
        await a.admin.RegisterDictionary(
            admin_pb2.RegisterDictionaryRequest(data=dictionary.as_bytes())
        )

        async def decoded():
            with contextlib.suppress(grpc.aio.AioRpcError):
                packet = msp("s1", "care", controller={"tau": 0.5})
                return await b.emit_encoded(zstd(packet, dictionary=dictionary))

        await eventually(decoded)


async def test_a_release_can_be_asked_for_at_any_server(broker, tmp_path):
    async with (
        two(broker, tmp_path) as servers,
        Client(servers[0].target) as a,
        Client(servers[1].target) as b,
    ):
        await a.put_spec(spec("care"))
        await eventually(lambda: "care" in servers[1].service.cohorts)
        last = 0
        for number, client in enumerate((a, b, a, b)):
            # What one acknowledged the other has to know of.
            await (b, a)[number % 2].emit(*taus(*(0.1 * number + x for x in (0.1, 0.2, 0.3))))
            await client.release("care")
            found = await client.update("care")
            assert found.prior_update.prior["tau"] == pytest.approx(0.1 * number + 0.2)
            assert found.revision > last
            last = found.revision
        assert await a.release("care") == []
        assert await b.release("care") == []


async def test_the_cluster_says_what_one_server_with_sqlite_says(broker, tmp_path):
    # The first release comes by itself once there is a quorum: what was not sent by then is not in it.
    first = taus(0.5, 0.5, 0.5)
    history = [
        [
            *(
                msp(f"s{s}", "care", controller={"tau": 0.1 * s + turn / 50}, metrics={"acc": s})
                for s in range(6)
            ),
            *(pop(f"s{s}", "care", after={"gain": 2.0 + s / 10 + turn}) for s in range(4)),
            *(ccs(f"s{s}", "care") for s in range(4)),
        ]
        for turn in range(4)
    ]
    async with (
        two(broker, tmp_path) as servers,
        running_server(tmp_path / "sqlite") as alone,
        Client(servers[0].target) as a,
        Client(servers[1].target) as b,
        Client(alone.target) as one,
    ):
        for client in (a, one):
            await client.put_spec(spec("care"))
        await servers[1].service.settle()
        for client in (a, one):
            await client.emit(*first)
        for client in (a, b, one):
            await eventually(lambda client=client: heard_of(client.update("care")))
        for turn, packets in enumerate(history):
            # Who has not heard of a release takes what comes behind it for judged.
            for server in servers:
                await server.service.settle()
            for number, packet in enumerate(packets):
                await (a, b)[number % 2].emit(packet)
            await one.emit(*packets)
            await (a, b)[turn % 2].release("care")
            await one.release("care")
        for kind in (PRIOR, update_pb2.UPDATE_KIND_WARM_START, HINT, 4):
            assert told(await b.update("care", kind)) == told(await one.update("care", kind)), kind


def told(update: update_pb2.Update) -> update_pb2.Update:
    """What an update says, without when it was said and as the how manieth."""
    said = update_pb2.Update()
    said.CopyFrom(update)
    for name in ("revision", "sequence", "released_at", "history_epoch"):
        said.ClearField(name)
    for body in (said.prior_update, said.warm_start, said.policy_hint, said.causal_consensus):
        for field, value in body.ListFields():
            if field.name == "lineage":
                for time_field in ("window_start", "window_end"):
                    if time_field in value.DESCRIPTOR.fields_by_name:
                        value.ClearField(time_field)
    said.prior_update.ClearField("rev")
    return said


async def test_the_partitions_of_a_server_that_goes_are_the_others_at_once(
    broker, tmp_path, monkeypatch
):
    monkeypatch.setattr(partitions, "LOOKS", 60)  # who came or went is noticed within a second
    async with member(broker, tmp_path / "a", lease_s=60.0) as stays:
        await eventually(lambda: len(stays.service.cluster.partitions.owned) == PARTITIONS)
        async with member(broker, tmp_path / "b", lease_s=60.0) as goes:
            begun = time.monotonic()
            await shared_out(stays, goes)
            assert goes.service.cluster.partitions.owned
        await eventually(lambda: len(stays.service.cluster.partitions.owned) == PARTITIONS, 50.0)
        # A lease that was not given back would have lasted for longer.
        assert time.monotonic() - begun < 54.0


async def test_private_cohorts_spend_once_for_each_period_whoever_releases(broker, tmp_path):
    private = spec(
        "care",
        signals=[{"name": "tau", "section": 2, "lower": 0.0, "upper": 1.0}],
        privacy={"dp_epsilon": 50.0, "dp_delta": 1e-6, "dp_epochs": 100},
    )
    private.release.ClearField("min_interval")
    private.release.max_interval.FromMilliseconds(1000)
    async with member(broker, tmp_path / "a") as stays, Client(stays.target) as client:
        await client.put_spec(private)
        await client.emit(*taus(0.1, 0.2, 0.3))
        async with member(broker, tmp_path / "b") as goes:
            await shared_out(stays, goes)
            await eventually(lambda: len_of_ledger(stays) >= 3)
        before = len_of_ledger(stays)
        await eventually(lambda: len_of_ledger(stays) >= before + 2)
        # It goes on releasing: the ledger is read last, which has what was paid for before it was told.
        priors = await stays.service.store.updates("care", PRIOR)
        spends = await stays.service.store.spends("care")
        periods = [spend.period for spend in spends]
        assert periods == sorted(set(periods))
        released = [
            update_pb2.Update.FromString(record.payload).released_at.ToMicroseconds()
            for record in priors
        ]
        assert released == sorted(set(released))
        assert set(released) <= set(periods)


def len_of_ledger(server: RunningServer) -> int:
    total = server.service.releaser.private.totals.get("care")
    return 0 if total is None else total.last_number


async def test_without_brokers_emits_are_refused_and_subscriptions_stay(
    broker, tmp_path, monkeypatch
):
    monkeypatch.setattr(broker_settings, "PATIENCE_S", 2.0)
    async with member(broker, tmp_path / "a") as server, Client(server.target) as client:
        await client.put_spec(care())
        await client.emit(*taus(0.1, 0.2, 0.3))
        await prior_of(client)
        async with client.subscribed("care") as events:
            await events.until("snapshot_end")
            broker.kill()
            told = await refusal_of(client.emit(msp("s0", "care", controller={"tau": 0.4})))
            assert (told.code, told.reason) == (
                grpc.StatusCode.UNAVAILABLE,
                "STORE_UNAVAILABLE",
            )
            assert told.retry_s
            await eventually(lambda: not server.service.store_watch.sound)
            assert (await client.update("care")).revision == 1  # what reads goes on
            await broker.start()

            async def taken():
                with contextlib.suppress(grpc.aio.AioRpcError):
                    return await client.emit(msp("s0", "care", controller={"tau": 0.5}))

            await eventually(taken)
            found = await events.until("update")
            assert found[-1].update.cohort == "care"
            await eventually(lambda: server.service.store_watch.sound)


async def test_a_start_without_brokers_says_so(tmp_path):
    flags = ("--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "data"))
    assert_refused(
        await run_process("--store", "nats://a/B", *flags), "store:", "name of the federation"
    )
    assert_refused(
        await run_process("--store", "nats://a", "--store-login", "missing", *flags),
        "store_login: missing cannot be read",
    )
    login = tmp_path / "login"
    login.write_text("no colon")
    assert_refused(
        await run_process("--store", "nats://a", "--store-login", str(login), *flags),
        "must have one line USER:PASSWORD",
    )


async def test_brokers_that_want_a_login_get_it_from_a_file(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    login = tmp_path / "login"
    login.write_text("fmi:s3cret-word\n")
    guarded = Broker(
        tmp_path / "broker", extra="authorization { user: fmi, password: s3cret-word }"
    )
    async with (
        guarded,
        member(guarded, tmp_path / "a", store_login=login) as server,
        Client(server.target) as client,
    ):
        await client.put_spec(care())
    assert "s3cret" not in caplog.text
