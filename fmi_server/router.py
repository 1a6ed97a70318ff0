"""FMIRouter: packets to named destinations, updates to subscribers."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from fmi.v1 import packet_pb2
from fmi_server.access import AccessRules, Action, Principal
from fmi_server.config import RouterConfig
from fmi_server.errors import (
    FMIError,
    OverloadedError,
    ServerDrainingError,
    SupersededError,
    ThingNotFoundError,
    UnauthorizedError,
)
from fmi_server.every_feed import EveryFeed
from fmi_server.feed_requests import PAUSE_S, FeedRequest
from fmi_server.feeds import Feed
from fmi_server.latest_feed import LatestFeed
from fmi_server.telemetry import FMITelemetry
from fmi_server.update_log import PublishedUpdate, UpdateLog, UpdateReader

__all__ = ["AGGREGATOR", "FMIRouter", "OpenSubscription", "open_feed"]

AGGREGATOR: Final = "aggregator"
"""The destination where packets are counted. Every router has it."""

LEAST_RECONNECT_S: Final = 1.0
"""Seconds until the first subscriber may come back after a drain: a restart takes about that."""

LONGEST_WINDOW_S: Final = 120.0
"""Seconds over which subscribers are spread at most, however many there are."""

Consumer = Callable[[packet_pb2.Packet], Awaitable[None]]


def open_feed(
    request: FeedRequest, log: UpdateLog, reader: UpdateReader, *, page_updates: int
) -> Feed:
    """Make the feed of the mode that was asked for; see `Feed`."""
    mode = EveryFeed if request.every else LatestFeed
    return mode(request, log, reader, page_updates=page_updates)


@dataclass(frozen=True, slots=True)
class OpenSubscription:
    """A subscription that is open.

    Attributes:
        number: Counts the subscriptions of a router, from 1.
        feed: What it is given.
        opened_ns: When it was opened, Unix nanoseconds.
    """

    number: int
    feed: Feed
    opened_ns: int


class FMIRouter:
    """Routes packets to named destinations and fans updates out to subscribers.

    A destination holds packets in a bounded queue until somebody receives them; with a consumer
    attached, they go there at once. Where a queue is full, `route` waits: the sender is slowed, nothing
    is dropped.

    A router belongs to one event loop.

    Args:
        config: Bounds and intervals.
        telemetry: Counts subscribers and conflated updates.
        clock_ns: Unix time in nanoseconds.
    """

    def __init__(
        self,
        config: RouterConfig | None = None,
        *,
        telemetry: FMITelemetry | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.config = config or RouterConfig()
        self._telemetry = telemetry or FMITelemetry()
        self._clock_ns = clock_ns
        self._queues: dict[str, asyncio.Queue[packet_pb2.Packet]] = {}
        self._consumers: dict[str, Consumer] = {}
        self._feeds: dict[Feed, OpenSubscription] = {}
        self._opened = 0
        self._instances: dict[tuple[str, str], Feed] = {}
        # The feeds that want something of a cohort, found at its first update and kept while feeds come
        # and go.
        self._interested: dict[str, set[Feed]] = {}
        self._reconnect_window_s: float | None = None  # None until the server goes down
        self.add_destination(AGGREGATOR)

    # Packets

    @property
    def destinations(self) -> tuple[str, ...]:
        """The names of the destinations."""
        return tuple(sorted(self._queues))

    def add_destination(self, name: str, consumer: Consumer | None = None) -> None:
        """Add a destination, or attach a consumer to one that is there.

        Args:
            name: Its name.
            consumer: Takes each packet; where it is not given, packets wait for `receive`.
        """
        self._queues.setdefault(name, asyncio.Queue(self.config.queue_packets))
        if consumer is not None:
            self._consumers[name] = consumer

    async def route(self, packet: packet_pb2.Packet, destination: str = AGGREGATOR) -> None:
        """Give a packet to a destination. Waits while its queue is full.

        Raises:
            ThingNotFoundError: There is no such destination.
        """
        consumer = self._consumers.get(destination)
        if consumer is not None:
            await consumer(packet)
            return
        await self._queue(destination).put(packet)

    async def receive(self, destination: str = AGGREGATOR) -> packet_pb2.Packet:
        """Wait for the next packet at a destination that has no consumer.

        Raises:
            ThingNotFoundError: There is no such destination.
        """
        return await self._queue(destination).get()

    def _queue(self, destination: str) -> asyncio.Queue[packet_pb2.Packet]:
        if destination not in self._queues:
            raise ThingNotFoundError("destination", destination)
        return self._queues[destination]

    # Updates

    @property
    def subscribers(self) -> int:
        """Open subscriptions."""
        return len(self._feeds)

    def subscribers_of(self, cohort: str) -> int:
        """Return how many open subscriptions want something of a cohort."""
        interested = self._interested.get(cohort)
        if interested is not None:
            return len(interested)
        return sum(feed.request.wants_cohort(cohort) for feed in self._feeds)

    async def count_subscribers(self, cohorts: Iterable[str]) -> dict[str, int]:
        """Return `subscribers_of` of each cohort, and let others run in between."""
        counts: dict[str, int] = {}
        alike: defaultdict[object, list[FeedRequest]] = defaultdict(list)
        for feed in self._feeds:
            alike[feed.request.patterns, feed.request.permits].append(feed.request)
        pause = time.monotonic() + PAUSE_S
        for cohort in list(cohorts):
            interested = self._interested.get(cohort)
            if interested is not None:
                counts[cohort] = len(interested)
                continue
            counts[cohort] = 0
            for requests in alike.values():
                if requests[0].wants_cohort(cohort):
                    counts[cohort] += len(requests)
                if time.monotonic() > pause:
                    await asyncio.sleep(0)
                    pause = time.monotonic() + PAUSE_S
        return counts

    async def open_subscriptions(
        self, cohort: str = "", *, after: int = 0, limit: int = 100
    ) -> list[OpenSubscription]:
        """List open subscriptions, those open longest first, and let others run in between.

        Args:
            cohort: Only those whose filter matches it; empty for all.
            after: Only those with a higher number.
            limit: The most listed.
        """
        found: list[OpenSubscription] = []
        pause = time.monotonic() + PAUSE_S
        for subscription in list(self._feeds.values()):
            request = subscription.feed.request
            if subscription.number > after and (not cohort or request.wants_cohort(cohort)):
                found.append(subscription)
                if len(found) == limit:
                    break
            if time.monotonic() > pause:
                await asyncio.sleep(0)
                pause = time.monotonic() + PAUSE_S
        return found

    async def subscribe(
        self, request: FeedRequest, log: UpdateLog, reader: UpdateReader
    ) -> AsyncIterator[bytes]:
        """Give the events of a subscription, as serialised `SubscribeResponse` messages, until it ends.

        Args:
            request: What is wanted.
            log: The updates in memory.
            reader: Reads those that are not.

        Raises:
            OverloadedError: There are as many subscriptions as are allowed.
            ServerDrainingError: The server is going down.
            SupersededError: The same subscriber and instance subscribed again.
            CompactedError: A revision that comes next is no longer kept.
            InvalidFilterError: A start revision is ahead of the history.
            UnauthorizedError: What allowed the subscription is gone.
        """
        if self._reconnect_window_s is not None:
            raise _draining(self._reconnect_window_s * random.random())  # noqa: S311 - no secret
        if len(self._feeds) >= self.config.max_subscribers:
            raise OverloadedError("subscriptions", retry_after_s=5.0)
        feed = open_feed(request, log, reader, page_updates=self.config.page_updates)
        # It is known before its snapshot is read, so that no update falls between the two.
        self._enter(feed)
        conflated = 0
        try:
            for cohort, wanted in (await request.answers(self._interested)).items():
                interested = self._interested.get(cohort)
                # Who may read it may have changed meanwhile; where it is found anew, the feed is in already.
                if wanted and interested is not None and request.permits(cohort):
                    interested.add(feed)
            async for event in feed.events(self._clock_ns):
                if feed.conflated > conflated:
                    self._telemetry.conflated(feed.conflated - conflated)
                    conflated = feed.conflated
                yield event
        finally:
            self._leave(feed)

    def _enter(self, feed: Feed) -> None:
        request = feed.request
        if request.instance_id:
            instance = (request.subscriber, request.instance_id)
            before = self._instances.get(instance)
            if before is not None:
                before.stop(SupersededError(request.subscriber))
            self._instances[instance] = feed
        self._opened += 1
        self._feeds[feed] = OpenSubscription(self._opened, feed, self._clock_ns())
        self._telemetry.subscribers(len(self._feeds))

    def _leave(self, feed: Feed) -> None:
        del self._feeds[feed]
        instance = (feed.request.subscriber, feed.request.instance_id)
        if self._instances.get(instance) is feed:
            del self._instances[instance]
        for feeds in self._interested.values():
            feeds.discard(feed)
        self._telemetry.subscribers(len(self._feeds))

    def publish(self, update: PublishedUpdate) -> None:
        """Tell every subscriber that wants it of an update, which is in the log already."""
        cohort, kind = update.key
        interested = self._interested.get(cohort)
        if interested is None:
            interested = {feed for feed in self._feeds if feed.request.wants_cohort(cohort)}
            self._interested[cohort] = interested
        for feed in interested:
            if feed.request.wants_kind(kind):
                feed.offer(update.key)

    def access_changed(
        self, cohort: str, before: AccessRules, after: AccessRules, log: UpdateLog
    ) -> None:
        """Let a change of who may read a cohort take effect: end who lost it, admit who gained it.

        It must not be interrupted between the change and this.
        """
        self._interested.pop(cohort, None)
        kinds = [key for key in log.latest if key[0] == cohort]
        for feed in self._feeds:
            request = feed.request
            had = before.allow(request.caller, Action.SUBSCRIBE)
            has = after.allow(request.caller, Action.SUBSCRIBE)
            if had == has or not request.matches(cohort):
                continue
            if had:
                feed.stop(UnauthorizedError(f"cohort {cohort!r} may not be read any more"))
                continue
            for key in kinds:
                if request.wants_kind(key[1]):
                    feed.admit(key)

    async def check_callers(self, refusal: Callable[[Principal], FMIError | None]) -> None:
        """End the subscriptions of callers who are not what they were, and let others run in between.

        Args:
            refusal: Says why a caller may not go on; None where it may.
        """
        pause = time.monotonic() + PAUSE_S
        for feed in list(self._feeds):
            error = refusal(feed.request.caller)
            if error is not None:
                feed.stop(error)
            if time.monotonic() > pause:
                await asyncio.sleep(0)
                pause = time.monotonic() + PAUSE_S

    async def give_signs_of_life(self) -> None:
        """Send progress on every subscription at each interval, until cancelled.

        The subscriptions are spread over the interval, so that a thousand of them are not woken at once.
        """
        parts = 20
        turn = 0
        while True:
            await asyncio.sleep(self.config.progress_interval_s / parts)
            for feed in list(self._feeds):
                if id(feed) // 64 % parts == turn:
                    feed.progress()
            turn = (turn + 1) % parts

    def drain(self) -> None:
        """End every subscription with a hint when to connect again, and take no new ones.

        Each gets a time of its own, evenly spread over a window that grows with their number
        (`RouterConfig.reconnects_per_s`), so that they do not all come back at once.
        """
        if self._reconnect_window_s is not None:
            return
        feeds = list(self._feeds)
        window_s = min(len(feeds) / self.config.reconnects_per_s, LONGEST_WINDOW_S)
        self._reconnect_window_s = window_s
        random.shuffle(feeds)
        for place, feed in enumerate(feeds):
            turn = (place + random.random()) / len(feeds)  # noqa: S311 - no secret
            feed.stop(_draining(window_s * turn))


def _draining(delay_s: float) -> ServerDrainingError:
    return ServerDrainingError(retry_after_s=LEAST_RECONNECT_S + delay_s)
