"""Subscriptions against a real server that breaks, repeats itself, lags and falls silent."""

# ruff: noqa: S106  resume tokens are no secrets

from __future__ import annotations

import asyncio
import itertools

import grpc
import pytest
from scripted_server import snapshot_end, status, streams, update, update_event

from fmi.v1 import interchange_service_pb2, update_pb2
from fmi_client import (
    AccessDeniedError,
    CompactedError,
    ConfigurationError,
    ConnectionFailedError,
    InvalidFilterError,
    RetryPolicy,
)
from fmi_client.subscription import SubscriptionStatistics

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
COMPACTED = status(
    grpc.StatusCode.OUT_OF_RANGE, "COMPACTED", "compacted", metadata={"oldest_revision": "40"}
)


async def take(subscription, count):
    return [await anext(subscription) for _ in range(count)]


def revisions(updates):
    return [update.revision for update in updates]


async def test_updates_come_as_they_are_released(server, connect):
    server.script("Subscribe", streams(update_event(1), snapshot_end(), update_event(2), hold=True))
    client = await connect()
    async with client.subscribe("care", "prior") as subscription:
        assert await take(subscription, 2) == [update(1), update(2)]
        assert subscription.resume_token == "t2"
    (request,) = server.seen("Subscribe")
    assert len(request.instance_id) >= 16
    assert request == interchange_service_pb2.SubscribeRequest(
        cohorts=["care"],
        kinds=[update_pb2.UPDATE_KIND_PRIOR],
        mode=interchange_service_pb2.DELIVERY_MODE_LATEST,
        subscriber="site_001",
        instance_id=request.instance_id,
    )


async def test_filter_start_and_mode_reach_the_server(server, connect):
    server.script("Subscribe", streams(update_event(5), hold=True))
    client = await connect()
    async with client.subscribe(
        ["care", "retail/*"],
        ["prior", "UPDATE_KIND_WARM_START", update_pb2.UPDATE_KIND_POLICY_HINT],
        mode="every",
        start={("care", "prior"): 5},
    ) as subscription:
        await anext(subscription)
    (request,) = server.seen("Subscribe")
    assert list(request.cohorts) == ["care", "retail/*"]
    assert list(request.kinds) == [1, 2, 3]
    assert request.mode == interchange_service_pb2.DELIVERY_MODE_EVERY
    assert list(request.start_revisions) == [
        interchange_service_pb2.StartRevision(
            cohort="care", kind=update_pb2.UPDATE_KIND_PRIOR, revision=5
        )
    ]


@pytest.mark.parametrize("failure", [UNAVAILABLE, grpc.StatusCode.CANCELLED, None])
async def test_broken_stream_goes_on_behind_the_last_event(server, connect, failure):
    start = interchange_service_pb2.StartRevision(cohort="care", kind=1, revision=1)
    server.script(
        "Subscribe",
        streams(update_event(1), update_event(2), then=failure),
        streams(update_event(3), hold=True),
    )
    client = await connect()
    async with client.subscribe("care", start=[start]) as subscription:
        assert revisions(await take(subscription, 3)) == [1, 2, 3]
        assert subscription.statistics == SubscriptionStatistics(updates=3, reconnects=1)
    first, second = server.seen("Subscribe")
    assert list(first.start_revisions) == [start]
    assert (second.resume_token, list(second.start_revisions)) == ("t2", [])


async def test_what_lies_before_a_start_does_not_come_after_a_cut(server, connect):
    """A token says one place for all: behind that of `retail` lie revisions of `care` that were had."""
    server.script(
        "Subscribe",
        streams(update_event(1, cohort="retail"), then=UNAVAILABLE),
        streams(*(update_event(revision) for revision in (2, 3, 4)), hold=True),
    )
    client = await connect()
    starts = {("care", "prior"): 4, ("retail", "prior"): 1}
    async with client.subscribe("*", mode="every", start=starts) as subscription:
        found = await take(subscription, 2)
        assert [(u.cohort, u.revision) for u in found] == [("retail", 1), ("care", 4)]
        assert subscription.statistics.duplicates == 2


async def test_a_start_says_nothing_of_another_history(server, connect):
    server.script(
        "Subscribe", streams(update_event(2, epoch="e2"), update_event(3, epoch="e2"), hold=True)
    )
    client = await connect()
    start = interchange_service_pb2.StartRevision(
        cohort="care", kind=update_pb2.UPDATE_KIND_PRIOR, revision=9, history_epoch="e1"
    )
    async with client.subscribe("care", start=[start]) as subscription:
        assert revisions(await take(subscription, 2)) == [2, 3]


async def test_resume_token_of_an_earlier_subscription(server, connect):
    server.script("Subscribe", streams(update_event(8), hold=True))
    client = await connect()
    async with client.subscribe("care", resume_token="t7") as subscription:
        assert subscription.resume_token == "t7"
        await anext(subscription)
        assert subscription.resume_token == "t8"
    assert server.seen("Subscribe")[0].resume_token == "t7"


async def test_lost_connection_is_replaced(server, connect):
    server.script(
        "Subscribe", streams(update_event(1), hold=True), streams(update_event(2), hold=True)
    )
    client = await connect(retry=RetryPolicy(initial_s=0.05, max_s=0.2))
    async with client.subscribe("care") as subscription:
        assert (await anext(subscription)).revision == 1
        await server.restart()
        assert (await anext(subscription)).revision == 2


async def test_revisions_rise_strictly_whatever_is_delivered(server, connect):
    """ORDERED: repeats and stale updates are dropped, per cohort and kind."""
    hint = {"kind": update_pb2.UPDATE_KIND_POLICY_HINT}
    server.script(
        "Subscribe",
        streams(
            update_event(1),
            update_event(2),
            update_event(2),
            update_event(1),
            update_event(1, **hint),
            update_event(1, cohort="other"),
            then=UNAVAILABLE,
        ),
        streams(update_event(2), update_event(1, **hint), update_event(4), hold=True),
    )
    client = await connect()
    async with client.subscribe("**") as subscription:
        given = [(u.cohort, u.kind, u.revision) for u in await take(subscription, 5)]
        assert given == [
            ("care", 1, 1),
            ("care", 1, 2),
            ("care", 3, 1),
            ("other", 1, 1),
            ("care", 1, 4),
        ]
        assert subscription.statistics.duplicates == 4


async def test_new_history_begins_anew(server, connect):
    """A server restored from a backup sends a whole snapshot, in which revisions are lower."""
    server.script(
        "Subscribe",
        streams(update_event(9), then=UNAVAILABLE),
        streams(
            update_event(4, epoch="e2"),
            snapshot_end(history_changed=True),
            update_event(4, epoch="e2"),
            update_event(5, epoch="e2"),
            hold=True,
        ),
    )
    client = await connect()
    async with client.subscribe("care") as subscription:
        assert revisions(await take(subscription, 3)) == [9, 4, 5]


async def test_compacted_raises_and_ends(server, connect):
    server.script("Subscribe", streams(then=COMPACTED))
    client = await connect()
    async with client.subscribe(
        "care", "prior", mode="every", start={("care", "prior"): 1}
    ) as subscription:
        with pytest.raises(CompactedError) as caught:
            await anext(subscription)
        assert caught.value.oldest_revision == 40
        assert subscription.closed
        assert [u async for u in subscription] == []


async def test_compacted_starts_over_where_that_is_wanted(server, connect):
    server.script(
        "Subscribe",
        streams(update_event(1), then=UNAVAILABLE),
        streams(then=COMPACTED),
        streams(update_event(50), hold=True),
    )
    client = await connect()
    async with client.subscribe("care", on_compacted="snapshot") as subscription:
        assert revisions(await take(subscription, 2)) == [1, 50]
    assert [r.resume_token for r in server.seen("Subscribe")] == ["", "t1", ""]


async def test_silence_opens_the_stream_again(server, connect):
    server.script(
        "Subscribe", streams(update_event(1), hold=True), streams(update_event(2), hold=True)
    )
    client = await connect()
    async with client.subscribe("care", silence_s=1.0) as subscription:
        assert revisions(await take(subscription, 2)) == [1, 2]
        assert subscription.statistics.reconnects == 1


async def test_silence_is_noticed_by_a_consumer_that_polls(server, connect):
    server.script("Subscribe", streams(hold=True), streams(update_event(1), hold=True))
    client = await connect()
    async with client.subscribe("care", silence_s=0.5) as subscription:
        for _ in itertools.count():
            try:
                async with asyncio.timeout(0.02):
                    first = await anext(subscription)
                break
            except TimeoutError:
                continue
        assert first.revision == 1


async def test_signs_of_life_keep_the_stream(server, connect):
    progress = interchange_service_pb2.SubscribeResponse(
        resume_token="p", progress=interchange_service_pb2.Progress()
    )

    async def breathes(_request, _context):
        for _ in range(12):
            await asyncio.sleep(0.1)
            yield progress
        yield update_event(1)
        await asyncio.Event().wait()

    server.script("Subscribe", breathes)
    client = await connect()
    async with client.subscribe("care", silence_s=1.0) as subscription:
        assert (await anext(subscription)).revision == 1
        assert subscription.statistics.reconnects == 0


async def test_events_show_everything_and_lag_is_counted(server, connect):
    lagged = interchange_service_pb2.SubscribeResponse(
        resume_token="l",
        lagged=interchange_service_pb2.Lagged(
            cohort="care", kind=1, from_revision=2, to_revision=6
        ),
    )
    server.script(
        "Subscribe",
        streams(update_event(1), snapshot_end(), lagged, update_event(7), hold=True),
    )
    client = await connect()
    async with client.subscribe("care") as subscription:
        kinds = []
        async for event in subscription.events():
            kinds.append(event.WhichOneof("event"))
            if len(kinds) == 4:
                break
        assert kinds == ["update", "snapshot_end", "lagged", "update"]
        assert subscription.statistics == SubscriptionStatistics(
            updates=2, conflated=1, lagged_revisions=5
        )


async def test_cancelled_wait_loses_nothing(server, connect):
    release = asyncio.Event()

    async def waits(_request, _context):
        yield update_event(1)
        await release.wait()
        yield update_event(2)
        yield update_event(3)
        await asyncio.Event().wait()

    server.script("Subscribe", waits)
    client = await connect()
    async with client.subscribe("care") as subscription:
        await anext(subscription)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anext(subscription)
        release.set()
        assert revisions(await take(subscription, 2)) == [2, 3]
        assert subscription.statistics.reconnects == 0


async def test_stream_that_fails_to_open_is_tried_again_and_at_last_told_of(server, connect):
    server.script("Subscribe", *[streams(then=grpc.StatusCode.CANCELLED)] * 9)
    client = await connect()
    async with client.subscribe("care") as subscription:
        with pytest.raises(ConnectionFailedError):
            await anext(subscription)
    assert len(server.seen("Subscribe")) == 5


async def test_after_the_first_event_it_tries_for_as_long_as_it_is_open(server, connect):
    server.script(
        "Subscribe",
        streams(update_event(1), then=UNAVAILABLE),
        *[streams(then=UNAVAILABLE)] * 20,
        streams(update_event(2), hold=True),
    )
    client = await connect()
    async with client.subscribe("care") as subscription:
        assert revisions(await take(subscription, 2)) == [1, 2]
        assert subscription.statistics.reconnects == 21


async def test_draining_server_is_left_and_found_again(server, connect):
    draining = status(UNAVAILABLE, "SERVER_DRAINING", retry_after_s=0.02)
    server.script(
        "Subscribe",
        streams(update_event(1), then=draining),
        streams(update_event(2), hold=True),
    )
    client = await connect()
    async with client.subscribe("care") as subscription:
        assert revisions(await take(subscription, 2)) == [1, 2]


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (status(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FILTER"), InvalidFilterError),
        (status(grpc.StatusCode.PERMISSION_DENIED), AccessDeniedError),
    ],
)
async def test_refusal_ends_it(server, connect, refusal, error):
    server.script("Subscribe", streams(then=refusal))
    client = await connect()
    async with client.subscribe("care") as subscription:
        with pytest.raises(error):
            await anext(subscription)
        assert subscription.closed


async def test_closing_ends_a_waiting_consumer(server, connect):
    server.script("Subscribe", streams(update_event(1), hold=True))
    client = await connect()
    subscription = client.subscribe("care")
    assert (await anext(subscription)).revision == 1
    waiting = asyncio.create_task(anext(subscription, None))
    await asyncio.sleep(0)
    await subscription.aclose()
    assert await waiting is None
    await subscription.aclose()


async def test_closing_the_client_ends_its_subscriptions(server, connect):
    server.script("Subscribe", streams(update_event(1), hold=True))
    client = await connect()
    subscription = client.subscribe("care")
    assert (await anext(subscription)).revision == 1
    await client.aclose()
    assert subscription.closed
    assert await anext(subscription, None) is None


async def test_closing_during_a_backoff_does_not_wait_for_it(server, connect):
    server.script("Subscribe", *[streams(update_event(1), then=UNAVAILABLE)] * 2)
    client = await connect(retry=RetryPolicy(initial_s=1e6, max_s=1e6))
    subscription = client.subscribe("care")
    assert (await anext(subscription)).revision == 1
    waiting = asyncio.create_task(anext(subscription, None))
    while subscription._call is not None:  # noqa: ASYNC110  until the break is noticed
        await asyncio.sleep(0)
    await subscription.aclose()
    assert await waiting is None


async def test_one_consumer_at_a_time(server, connect):
    server.script("Subscribe", streams(update_event(1), hold=True))
    client = await connect()
    async with client.subscribe("care") as subscription:
        await anext(subscription)
        first = asyncio.create_task(anext(subscription, None))
        await asyncio.sleep(0)
        with pytest.raises(ConfigurationError):
            await anext(subscription)
        await subscription.aclose()
        assert await first is None


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_callback_gets_every_update(server, connect, asynchronous):
    server.script("Subscribe", streams(update_event(1), update_event(2), hold=True))
    seen = []
    done = asyncio.Event()

    def note(update):
        seen.append(update.revision)
        if len(seen) == 2:
            done.set()

    async def note_later(update):
        await asyncio.sleep(0)
        note(update)

    client = await connect()
    callback = note_later if asynchronous else note
    async with client.subscribe("care", on_update=callback) as subscription:
        await done.wait()
        assert seen == [1, 2]
    await subscription.wait()


async def test_error_of_the_callback_comes_out_once(server, connect):
    def fails(update):
        raise LookupError(update.revision)

    server.script("Subscribe", *[streams(update_event(1), hold=True)] * 2)
    client = await connect()
    subscription = client.subscribe("care", on_update=fails)
    with pytest.raises(LookupError):
        await subscription.wait()
    assert subscription.closed
    await subscription.aclose()

    closed = client.subscribe("care", on_update=fails)
    while not closed.closed:  # noqa: ASYNC110  the callback has failed then
        await asyncio.sleep(0)
    with pytest.raises(LookupError):
        await closed.aclose()
    await closed.aclose()


async def test_refusal_comes_out_of_the_callback_form(server, connect):
    server.script("Subscribe", streams(then=COMPACTED))
    client = await connect()
    subscription = client.subscribe("care", on_update=lambda _update: None)
    with pytest.raises(CompactedError):
        await subscription.wait()


async def test_callback_may_close_its_subscription(server, connect):
    server.script("Subscribe", streams(update_event(1), update_event(2), hold=True))
    seen = []

    async def once(update):
        seen.append(update.revision)
        await subscription.aclose()

    client = await connect()
    subscription = client.subscribe("care", on_update=once)
    await subscription.wait()
    assert seen == [1]


async def test_wrong_arguments(connect):
    client = await connect()
    with pytest.raises(InvalidFilterError):
        client.subscribe("care", "priors")
    with pytest.raises(InvalidFilterError):
        client.subscribe("care", [99])
    with pytest.raises(ConfigurationError):
        client.subscribe("care", mode="all")
    with pytest.raises(ConfigurationError):
        client.subscribe("care", on_compacted="ignore")
    with pytest.raises(ConfigurationError):
        client.subscribe("care", start={("care", "prior"): 1}, resume_token="t")
    with pytest.raises(ConfigurationError):
        await client.subscribe("care").wait()


async def test_unknown_events_are_passed_over(server, connect):
    unknown = interchange_service_pb2.SubscribeResponse(resume_token="u")
    server.script("Subscribe", streams(unknown, update_event(1), hold=True))
    client = await connect()
    async with client.subscribe("care") as subscription:
        async for event in subscription.events():
            assert event.WhichOneof("event") == "update"
            break
