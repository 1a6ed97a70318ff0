"""The router: packets wait where nobody takes them, subscribers are counted, drained, and independent."""

from __future__ import annotations

import asyncio

import pytest
from histories import EPOCH, A, B, History, show
from parts import Clock, msp

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server import FMIRouter, RouterConfig
from fmi_server.access import AccessRules, Principal
from fmi_server.errors import (
    OverloadedError,
    ServerDrainingError,
    ThingNotFoundError,
    UnauthorizedError,
)
from fmi_server.feed_requests import FeedRequest
from fmi_server.router import AGGREGATOR, LEAST_RECONNECT_S
from fmi_server.telemetry import FMITelemetry

# Packets


async def test_the_overview_works_as_it_stands():
    packet = msp(controller={"tau": 0.9})
    router = FMIRouter(config=RouterConfig())
    await router.route(packet, destination="aggregator")
    assert await router.receive("aggregator") is packet


async def test_an_unknown_destination_is_refused():
    router = FMIRouter()
    for call in (router.route(msp(), destination="nowhere"), router.receive("nowhere")):
        with pytest.raises(ThingNotFoundError) as caught:
            await call
        assert caught.value.metadata == {"destination": "nowhere"}
    assert router.destinations == (AGGREGATOR,)


async def test_packets_come_out_in_the_order_they_went_in():
    router = FMIRouter()
    router.add_destination("archive")
    packets = [msp(controller={"tau": i}) for i in range(5)]
    for packet in packets:
        await router.route(packet, "archive")
    assert [await router.receive("archive") for _ in packets] == packets
    assert router.destinations == ("aggregator", "archive")


async def test_a_full_queue_makes_the_sender_wait_and_drops_nothing():
    router = FMIRouter(RouterConfig(queue_packets=2))
    first, second, third = (msp(controller={"tau": i}) for i in range(3))
    await router.route(first)
    await router.route(second)
    waiting = asyncio.create_task(router.route(third))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await router.receive() is first
    await asyncio.wait_for(waiting, 60)
    assert [await router.receive(), await router.receive()] == [second, third]


async def test_a_consumer_gets_packets_at_once_and_its_error_reaches_the_sender():
    router = FMIRouter(RouterConfig(queue_packets=1))
    taken = []

    async def take(packet) -> None:
        taken.append(packet)
        if len(taken) == 3:
            raise OverloadedError("the test")

    router.add_destination(AGGREGATOR, take)
    for _ in range(2):
        await router.route(msp())
    with pytest.raises(OverloadedError):
        await router.route(msp())
    assert len(taken) == 3


# Subscribers


class Hub:
    """A router over a history, as a server has them."""

    def __init__(self, **config) -> None:
        self.history = History(recent=1024)
        self.telemetry = FMITelemetry()
        self.router = FMIRouter(
            RouterConfig(**config), telemetry=self.telemetry, clock_ns=lambda: int(Clock()() * 1e9)
        )

    def subscribe(self, *cohorts: str, **fields):
        message = wire_pb2.SubscribeRequest(cohorts=cohorts or ["**"], **fields)
        request = FeedRequest.from_message(message, history_epoch=EPOCH, head=self.history.log.head)
        return self.router.subscribe(request, self.history.log, self.history)

    def publish(self, key, count: int = 1) -> None:
        for _ in range(count):
            self.history.publish(key)
            self.router.publish(self.history.log.latest[key])

    def counted(self, name: str) -> float:
        return self.telemetry.snapshot()[name]


async def take(stream) -> str:
    async with asyncio.timeout(60):
        return show(wire_pb2.SubscribeResponse.FromString(await anext(stream)))


async def test_every_subscriber_gets_what_it_wants_and_nothing_else():
    hub = Hub()
    everything, retail = hub.subscribe(), hub.subscribe("retail/*")
    assert await take(everything) == await take(retail) == "snapshot_end"
    hub.publish(A)
    hub.publish(("retail/eu", 1))
    assert await take(everything) == "care.1@1"
    assert await take(everything) == "retail/eu.1@1"
    assert await take(retail) == "retail/eu.1@1"
    late = hub.subscribe("care")
    assert [await take(late), await take(late)] == ["care.1@1", "snapshot_end"]
    hub.publish(A)
    assert await take(late) == await take(everything) == "care.1@2"
    assert hub.router.subscribers == 3
    assert hub.router.subscribers_of("care") == 2
    assert hub.router.subscribers_of("retail/us") == 2
    for stream in (everything, retail, late):
        await stream.aclose()
    assert hub.router.subscribers == hub.router.subscribers_of("care") == 0


@pytest.mark.parametrize("mode", [wire_pb2.DELIVERY_MODE_EVERY, wire_pb2.DELIVERY_MODE_LATEST])
async def test_a_huge_backlog_and_a_wide_filter_take_turns_with_who_is_up_to_date(mode):
    """However much one has to be given, another has its update after a few of these."""
    hub = Hub()
    for number in range(1500):
        hub.publish((f"c{number}", 1))
    hub.history.forget_memory()
    quick = hub.subscribe("quick")
    await take(quick)
    given = 0

    async def follow_all() -> None:
        nonlocal given
        async for _ in hub.subscribe(mode=mode):
            given += 1
            await asyncio.sleep(0)  # the least that a write to the network is

    async with asyncio.timeout(60):
        hog = asyncio.create_task(follow_all())
        while given < 10:  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0)
        waiting = asyncio.create_task(take(quick))
        hub.publish(("quick", 1))
        before = given
        assert await waiting == "quick.1@1"
        assert given - before < 10
        while given < 1500:  # noqa: ASYNC110 - the same
            await asyncio.sleep(0)
    hog.cancel()
    await quick.aclose()


async def test_subscribers_are_counted_by_the_kinds_they_want():
    hub = Hub()
    stream = hub.subscribe("care", kinds=[2])
    await take(stream)
    hub.publish(A)
    hub.publish(B)
    assert await take(stream) == "care.2@1"
    assert hub.router.subscribers_of("care") == 1
    await stream.aclose()


async def test_counting_subscribers_of_many_cohorts_keeps_nothing_and_lets_others_run():
    hub = Hub()
    streams = [hub.subscribe(f"c{n}", "*7*7", "care") for n in range(200)]
    for stream in streams:
        await take(stream)
    hub.publish(A)
    known = dict(hub.router._interested)
    names = [*(f"c{n}" for n in range(200)), "care", "c77x7"]
    turns = 0
    counting = asyncio.ensure_future(hub.router.count_subscribers(names))
    while not counting.done():
        turns += 1
        await asyncio.sleep(0)
    counts = await counting
    assert counts == {name: hub.router.subscribers_of(name) for name in names}
    assert (counts["care"], counts["c1"], counts["c177"], counts["c77x7"]) == (200, 1, 200, 200)
    assert turns > 2
    assert hub.router._interested == known
    for stream in streams:
        await stream.aclose()


async def test_a_subscriber_costs_nothing_for_cohorts_that_it_does_not_want():
    hub = Hub()
    for number in range(100):
        hub.publish((f"c{number}", 1))
    stream = hub.subscribe("care")
    await take(stream)
    (feed,) = hub.router._feeds
    for number in range(100):
        hub.publish((f"d{number}", 1))
    hub.publish(A)
    assert await take(stream) == "care.1@1"
    assert set(feed._given) == {A}
    assert sum(feed in feeds for feeds in hub.router._interested.values()) == 1
    await stream.aclose()


async def test_nothing_falls_between_the_snapshot_and_what_is_live():
    hub = Hub()
    hub.publish(A)
    hub.publish(B)
    stream = hub.subscribe()
    assert await take(stream) == "care.1@1"
    hub.publish(A)  # while the snapshot is being read
    hub.publish(("new", 1))
    rest = [await take(stream) for _ in range(4)]
    assert rest == ["care.2@1", "snapshot_end", "care.1@2", "new.1@1"]
    await stream.aclose()


async def test_one_slow_subscriber_slows_nobody_and_is_bounded():
    hub = Hub()
    slow, quick = hub.subscribe(), hub.subscribe()
    await take(slow)
    await take(quick)
    for revision in range(1, 2001):
        hub.publish(A)
        assert await take(quick) == f"care.1@{revision}"
    assert [await take(slow), await take(slow)] == ["care.1 lagged 1-1999", "care.1@2000"]
    hub.publish(A)
    await take(slow)
    assert hub.counted("fmi_conflated_updates_total") == 1999
    await slow.aclose()
    await quick.aclose()


async def test_there_are_no_more_subscribers_than_allowed():
    hub = Hub(max_subscribers=2)
    first, second = hub.subscribe(), hub.subscribe()
    await take(first)
    await take(second)
    assert hub.counted("fmi_subscribers") == 2
    with pytest.raises(OverloadedError) as caught:
        await take(hub.subscribe())
    assert caught.value.retry_after_s == 5.0
    await first.aclose()
    third = hub.subscribe()
    assert await take(third) == "snapshot_end"
    await second.aclose()
    await third.aclose()
    assert hub.counted("fmi_subscribers") == 0


async def test_a_drain_ends_every_subscription_with_a_hint_and_takes_no_more():
    hub = Hub()
    streams = [hub.subscribe() for _ in range(3)]
    for stream in streams:
        await take(stream)
    hub.router.drain()
    for stream in (*streams, hub.subscribe()):
        with pytest.raises(ServerDrainingError) as caught:
            await take(stream)
        assert caught.value.retry_after_s >= LEAST_RECONNECT_S
    assert hub.router.subscribers == 0


async def test_a_drain_spreads_the_reconnects_evenly_over_a_window_that_grows_with_their_number():
    hub = Hub(reconnects_per_s=10.0)
    streams = [hub.subscribe() for _ in range(40)]
    for stream in streams:
        await take(stream)
    hub.router.drain()
    delays = []
    for stream in streams:
        with pytest.raises(ServerDrainingError) as caught:
            await take(stream)
        delays.append(caught.value.retry_after_s - LEAST_RECONNECT_S)
        hub.router.drain()  # once is enough: the hints stay as they are
    for place, delay in enumerate(sorted(delays)):
        assert place / 10 <= delay <= (place + 1) / 10, "one in each tenth of a second"
    assert delays != sorted(delays), "and not in the order in which they came"


async def test_signs_of_life_reach_every_idle_subscriber_once_per_interval():
    hub = Hub(progress_interval_s=0.2)
    streams = [hub.subscribe() for _ in range(30)]
    for stream in streams:
        await take(stream)
    beating = asyncio.create_task(hub.router.give_signs_of_life())
    assert [await take(stream) for stream in streams] == ["progress"] * 30
    beating.cancel()
    for stream in streams:
        await stream.aclose()


# Who may read a cohort


READERS = AccessRules.of(subscribe=["ann"])


def reading(hub: Hub, permits, **fields):
    """A subscription of Ann's to all that `permits` lets her read."""
    message = wire_pb2.SubscribeRequest(cohorts=["**"], **fields)
    request = FeedRequest.from_message(
        message,
        history_epoch=EPOCH,
        head=hub.history.log.head,
        caller=Principal("ann"),
        permits=permits,
    )
    return hub.router.subscribe(request, hub.history.log, hub.history)


async def until_sent_away(stream) -> list[str]:
    events = []
    try:
        while True:
            events.append(await take(stream))
    except UnauthorizedError:
        return events


@pytest.mark.parametrize("mode", [wire_pb2.DELIVERY_MODE_EVERY, wire_pb2.DELIVERY_MODE_LATEST])
@pytest.mark.parametrize("moment", range(1, 4))
async def test_a_right_that_is_lost_while_a_subscription_begins_gives_nothing_away(mode, moment):
    """Whenever it is asked, also between an answer and its use."""
    hub = Hub()
    other = hub.subscribe()
    assert await take(other) == "snapshot_end"
    hub.publish(A)
    asked = 0
    allowed = True

    def permits(_cohort: str) -> bool:
        nonlocal asked, allowed
        asked += 1
        answer = allowed
        if asked == moment:  # right after this answer
            allowed = False
            hub.router.access_changed("care", READERS, AccessRules(), hub.history.log)
        return answer

    stream = reading(hub, permits, mode=mode)
    assert set(await until_sent_away(stream)) <= {"snapshot_end"}
    hub.publish(A)
    assert hub.router.subscribers == 1
    await other.aclose()


async def test_callers_who_are_not_what_they_were_are_sent_away():
    hub = Hub()
    ann, everybody = reading(hub, lambda _: True), hub.subscribe()
    assert await take(ann) == await take(everybody) == "snapshot_end"
    await hub.router.check_callers(lambda _: None)
    hub.publish(A)
    assert await take(ann) == await take(everybody) == "care.1@1"
    gone = UnauthorizedError("the token was revoked")
    await hub.router.check_callers(lambda caller: gone if caller.name == "ann" else None)
    with pytest.raises(UnauthorizedError, match="revoked"):
        await take(ann)
    hub.publish(A)
    assert await take(everybody) == "care.1@2"
    await everybody.aclose()


async def test_subscribers_are_counted_by_what_they_may_read():
    hub = Hub()
    streams = [reading(hub, lambda _: True), reading(hub, lambda name: name == "other")]
    for stream in streams:
        assert await take(stream) == "snapshot_end"
    assert await hub.router.count_subscribers(["care", "other"]) == {"care": 1, "other": 2}
    for stream in streams:
        await stream.aclose()
