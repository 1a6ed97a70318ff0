"""Subscribers: who is there, who replaces whom, how they leave, and what they cost others."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc

import grpc
import pytest
from server_harness import DEADLINE_S, PRIOR, Client, eventually
from test_subscribe import EVERY, LATEST, SLOW_READER, Publisher, declare, start

from fmi.v1 import admin_service_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_client import AsyncFMIClient
from fmi_server.router import LEAST_RECONNECT_S
from fmi_server.testing import running_server

INSTANCE = "a-secret-of-16-and-more"


async def listed(client: Client, cohort="", **fields) -> list[admin_service_pb2.SubscriberStatus]:
    request = admin_service_pb2.ListSubscribersRequest(cohort=cohort, **fields)
    response = await client.admin.ListSubscribers(request, timeout=DEADLINE_S)
    return list(response.subscribers)


# Who is there


async def test_an_operator_sees_who_subscribes_to_what(client):
    await declare(client, "care")
    await Publisher(client, "care")(3)
    assert await listed(client) == []
    async with (
        client.subscribed("care", kinds=[PRIOR], subscriber="site_001") as first,
        client.subscribed(
            "trade", "care/**", mode=EVERY, instance_id=INSTANCE, subscriber="site_002"
        ) as second,
    ):
        await first.snapshot()
        await second.snapshot()
        await Publisher(client, "care")()
        await first.updates(1)
        one, other = await listed(client)
        assert other.behind == 0, "what others get is nothing that it is behind with"
        assert (one.subscriber, list(one.cohorts), list(one.kinds)) == ("site_001", ["care"], [1])
        assert (one.mode, one.live, one.sent, one.behind, one.conflated) == (LATEST, True, 2, 0, 0)
        assert other.connected_at.ToNanoseconds() >= one.connected_at.ToNanoseconds() > 0
        assert (other.subscriber, list(other.cohorts), other.mode) == (
            "site_002", ["trade", "care/**"], EVERY,
        )  # fmt: skip
        assert INSTANCE not in str(other), "who knows it could end the stream"
        assert [status.subscriber for status in await listed(client, "care")] == ["site_001"]

    async def nobody_is_left() -> bool:
        return await listed(client) == []

    await eventually(nobody_is_left)


async def test_who_does_not_read_is_seen_to_fall_behind(server, client):
    await declare(client, "care")
    publish = Publisher(client, "care", signals=500)
    async with (
        Client(server.target, SLOW_READER) as asleep,
        asleep.subscribed("care", kinds=[PRIOR], mode=EVERY, subscriber="every") as every,
        asleep.subscribed("care", kinds=[PRIOR], subscriber="latest") as latest,
    ):
        await every.snapshot()
        await latest.snapshot()
        await publish(30)
        seen = {status.subscriber: status for status in await listed(client)}
        assert seen["latest"].behind == 1
        assert 20 < seen["every"].behind <= 60


async def test_the_listing_comes_in_pages(client):
    async with contextlib.AsyncExitStack() as stack:
        for number in range(5):
            events = await stack.enter_async_context(
                client.subscribed("**", subscriber=f"site_{number}")
            )
            await events.snapshot()
        request = admin_service_pb2.ListSubscribersRequest(page_size=2)
        names = []
        for size in (2, 2, 1):
            response = await client.admin.ListSubscribers(request, timeout=DEADLINE_S)
            assert len(response.subscribers) == size
            names += [status.subscriber for status in response.subscribers]
            request.page_token = response.next_page_token
        assert not request.page_token
        assert names == [f"site_{number}" for number in range(5)]
    for wrong in ({"cohort": "nowhere"}, {"page_size": 251}, {"page_token": "-1"}):
        with pytest.raises(grpc.aio.AioRpcError):
            await listed(client, **wrong)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"subscriber": "a b"}, "subscriber"),
        ({"subscriber": "x" * 129}, "subscriber"),
        ({"subscriber": "x", "instance_id": "short"}, "instance_id"),
        ({"subscriber": "x", "instance_id": "y" * 65}, "instance_id"),
        ({"instance_id": INSTANCE}, "instance_id"),
        ({"handover": wire_pb2.Handover(cohorts=["a"])}, "handover.resume_token"),
        ({"handover": wire_pb2.Handover(resume_token="e:1")}, "handover.cohorts"),  # noqa: S106
        (
            {"handover": wire_pb2.Handover(cohorts=["*a" * 9], resume_token="e:1")},  # noqa: S106
            "handover.cohorts[0]",
        ),
        (
            {"handover": wire_pb2.Handover(cohorts=["a"], resume_token="x")},  # noqa: S106
            "handover.resume_token",
        ),
        (
            {
                "handover": wire_pb2.Handover(cohorts=["a"], resume_token="e:1"),  # noqa: S106
                "start_revisions": start("care", 1),
            },
            "handover",
        ),
    ],
)
async def test_a_request_that_cannot_be_meant_ends_typed(client, fields, field):
    async with client.subscribed("**", **fields) as events:
        refusal = await events.refusal()
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FILTER",
        )  # fmt: skip
        assert field in {violated for violated, _ in refusal.violations}


# Who replaces whom


async def test_a_newer_stream_of_the_same_instance_ends_the_one_before(server, client):
    name = {"subscriber": "site_001", "instance_id": INSTANCE}
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(client.subscribed("**", **name))
        await first.snapshot()
        second = await stack.enter_async_context(client.subscribed("**", **name))
        await second.snapshot()
        refusal = await first.refusal()
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "SUPERSEDED")
        assert refusal.metadata["subscriber"] == "site_001"
        assert refusal.retry_s is None
        await declare(client, "care")
        published = await Publisher(client, "care")()
        update, _ = await second.updates(2)
        assert update == published
        assert server.service.router.subscribers == 1
        # The first has left meanwhile, and did not take the place of the second with it.
        third = await stack.enter_async_context(client.subscribed("**", **name))
        assert len(await third.snapshot()) == 2
        assert (await second.refusal()).reason == "SUPERSEDED"


async def test_two_processes_of_a_site_may_both_subscribe(server, client):
    ways = [
        {"subscriber": "site_001"},
        {"subscriber": "site_001"},
        {"subscriber": "site_001", "instance_id": INSTANCE},
        {"subscriber": "site_001", "instance_id": INSTANCE + "2"},
        {"subscriber": "site_002", "instance_id": INSTANCE},
    ]
    async with contextlib.AsyncExitStack() as stack:
        for way in ways:
            events = await stack.enter_async_context(client.subscribed("**", **way))
            await events.snapshot()
        assert server.service.router.subscribers == len(ways)


async def test_a_reconnect_of_the_sdk_ends_the_stream_that_broke_unseen(server):
    async with (
        AsyncFMIClient(server.target, domain_id="site_001") as client,
        client.subscribe("**", silence_s=0.3) as subscription,
    ):
        events = subscription.events()
        assert (await anext(events)).HasField("snapshot_end")
        waiting = asyncio.ensure_future(anext(events))  # silent: it opens a new stream
        await eventually(lambda: subscription.statistics.reconnects >= 1)
        await eventually(lambda: server.service.router.subscribers == 1)
        waiting.cancel()


# How they leave


async def test_a_drain_tells_each_when_to_come_back_and_the_sdk_waits_for_it(data_dir):
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_server(data_dir))
        client = await stack.enter_async_context(Client(server.target))
        streams = []
        for _ in range(20):
            events = await stack.enter_async_context(client.subscribed("**"))
            await events.snapshot()
            streams.append(events)
        sdk = await stack.enter_async_context(AsyncFMIClient(server.target))
        states: list = []
        follower = sdk.subscribe("**", on_state=states.append)
        assert (await anext(follower.events())).HasField("snapshot_end")
        following = asyncio.ensure_future(anext(follower))
        loop = asyncio.get_running_loop()
        begun = loop.time()
        draining = asyncio.ensure_future(server.service.drain())
        refusals = [await events.refusal() for events in streams]
        await draining
        assert {refusal.reason for refusal in refusals} == {"SERVER_DRAINING"}
        delays = {refusal.retry_s for refusal in refusals}
        assert len(delays) == len(streams), "each has a time of its own"
        window_s = 21 / server.service.router.config.reconnects_per_s
        assert all(0 <= delay - LEAST_RECONNECT_S <= window_s for delay in delays)
        (lost,) = await eventually(lambda: states)
        assert lost.error.reason == "SERVER_DRAINING"
        assert follower._open_at - begun >= LEAST_RECONNECT_S
        following.cancel()


# What they cost others


async def test_a_huge_backlog_does_not_delay_who_is_up_to_date(server, client, monkeypatch):
    """Eight read 120 revisions of 60 kB each from the store, again and again; a ninth has its update soon."""
    log = server.service.releaser.publisher.log
    monkeypatch.setattr(log, "recent", type(log.recent)(maxlen=3))
    await declare(client, "care", "trade")
    publish, backlog, hogs = Publisher(client, "care", signals=500), 120, 8
    await publish(backlog)
    given, ended = 0, False

    async def read_all(reader: Client) -> None:
        nonlocal given
        while not ended:
            async with reader.subscribed(
                "care", kinds=[PRIOR], mode=EVERY, start_revisions=start("care", 1)
            ) as events:
                for _ in range(backlog):
                    await events.next()
                    given += 1
                    if ended:
                        return

    async with (
        Client(server.target) as reader,
        Client(server.target) as current,
        current.subscribed("trade", kinds=[PRIOR]) as quick,
        asyncio.timeout(60),
        asyncio.TaskGroup() as tasks,
    ):
        await quick.snapshot()
        for _ in range(hogs):
            tasks.create_task(read_all(reader))
        await eventually(lambda: given >= hogs)
        await Publisher(client, "trade")()
        before = given
        await quick.updates(1)
        meanwhile = given - before
        ended = True
    assert meanwhile < hogs * backlog // 8


async def python_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize(("mode", "most"), [(EVERY, 450_000), (LATEST, 200_000)])
async def test_subscribers_that_never_read_hold_bounded_memory(
    server, client, monkeypatch, mode, most
):
    """BOUNDED: eight who never read hold a page or one update each, however much passes them by."""
    log = server.service.releaser.publisher.log
    monkeypatch.setattr(log, "recent", type(log.recent)(maxlen=3))
    names = [f"care/{number}" for number in range(5)]
    await declare(client, *names)
    publishers = [Publisher(client, name, signals=500) for name in names]

    async def generation() -> int:
        """Replace the newest update of every cohort; return their size in bytes."""
        async with asyncio.TaskGroup() as tasks:
            for publish in publishers:
                tasks.create_task(publish())
        return sum(len(update.event) for key, update in log.latest.items() if key[1] == PRIOR)

    for _ in range(4):
        size = await generation()
    starts = [item for name in names for item in start(name, 1)] if mode == EVERY else []
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(tracemalloc.stop)
        tracemalloc.start()
        async with contextlib.AsyncExitStack() as sleepers:
            for _ in range(8):
                asleep = await sleepers.enter_async_context(Client(server.target, SLOW_READER))
                await sleepers.enter_async_context(
                    asleep.subscribed("**", kinds=[PRIOR], mode=mode, start_revisions=starts)
                )
                await generation()
            await eventually(lambda: server.service.router.subscribers == 8)
            with_sleepers = await python_bytes()
        await eventually(lambda: server.service.router.subscribers == 0)
        held = with_sleepers - await python_bytes()
    assert size > 400_000, "each would hold a generation, or all that it missed"
    assert held < 8 * most
