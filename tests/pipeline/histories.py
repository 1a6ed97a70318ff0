"""A history of updates whose reader may forget, and a subscriber that reads as slowly as it likes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import update_pb2
from fmi_server.feed_requests import FeedRequest, Key
from fmi_server.feeds import Feed
from fmi_server.router import open_feed
from fmi_server.update_log import PublishedUpdate, UpdateLog

EPOCH = "epoch-1"
A, B, C = ("care", 1), ("care", 2), ("retail/eu", 1)


class History:
    """Publishes to a log and keeps updates as a store would, trimmed when told to."""

    def __init__(self, recent: int = 4) -> None:
        self.log = UpdateLog(EPOCH)
        self.log.recent = type(self.log.recent)(maxlen=recent)
        self.restores = 0
        self.kept: dict[Key, dict[int, PublishedUpdate]] = {}
        self.feeds: list[Feed] = []
        self.reads = 0

    def publish(self, key: Key, count: int = 1) -> None:
        for _ in range(count):
            latest = self.log.latest.get(key)
            revision = latest.revision + 1 if latest else 1
            cohort, kind = key
            payload = update_pb2.Update(
                cohort=cohort, kind=kind, revision=revision, sequence=self.log.head + 1
            ).SerializeToString()
            update = PublishedUpdate.from_payload(
                key, revision, self.log.head + 1, payload, history_epoch=self.log.history_epoch
            )
            self.kept.setdefault(key, {})[revision] = update
            self.log.add(update)
            for feed in self.feeds:
                if feed.wants(key):
                    feed.offer(key)

    def trim(self, key: Key, keep: int) -> None:
        held = self.kept.get(key, {})
        for revision in sorted(held)[: max(0, len(held) - keep)]:
            del held[revision]

    def forget_memory(self) -> None:
        """Do what a restart does: only the newest of each is in memory."""
        self.log.recent.clear()

    def backup(self) -> tuple[int, list[PublishedUpdate]]:
        """Copy what is kept, as a backup of the store does."""
        return self.log.head, [u for held in self.kept.values() for u in held.values()]

    def restore(self, backup: tuple[int, list[PublishedUpdate]]) -> None:
        """Go back to a backup, as a history of its own."""
        self.restores += 1
        head, updates = backup
        epoch = f"{EPOCH}-restored-{self.restores}"
        self.log = UpdateLog(
            epoch, head, recent=type(self.log.recent)(maxlen=self.log.recent.maxlen)
        )
        self.kept = {}
        for old in sorted(updates, key=lambda update: update.sequence):
            update = PublishedUpdate.from_payload(
                old.key, old.revision, old.sequence, old.payload, history_epoch=epoch
            )
            self.log.latest[old.key] = update
            self.kept.setdefault(old.key, {})[old.revision] = update

    def open(self, page: int = 3, **fields) -> Reader:
        message = wire_pb2.SubscribeRequest(cohorts=fields.pop("cohorts", ["**"]), **fields)
        wanted = FeedRequest.from_message(
            message, history_epoch=self.log.history_epoch, head=self.log.head
        )
        feed = open_feed(wanted, self.log, self, page_updates=page)
        self.feeds.append(feed)
        return Reader(self, feed)

    # What a feed reads from

    async def since(self, sequence: int, limit: int) -> Sequence[PublishedUpdate]:
        self.reads += 1
        await asyncio.sleep(0)
        held = [u for by_revision in self.kept.values() for u in by_revision.values()]
        later = sorted((u for u in held if u.sequence > sequence), key=lambda u: u.sequence)
        return later[:limit]

    async def one(self, key: Key, revision: int) -> PublishedUpdate | None:
        await asyncio.sleep(0)
        return self.kept.get(key, {}).get(revision)

    async def oldest(self, key: Key) -> int:
        return min(self.kept.get(key, {}), default=0)

    async def oldest_places(self, keys: Sequence[Key]) -> Mapping[Key, tuple[int, int]]:
        await asyncio.sleep(0)
        oldest = {key: min(self.kept[key]) for key in keys if self.kept.get(key)}
        return {key: (first, self.kept[key][first].sequence) for key, first in oldest.items()}


class Reader:
    """Reads a feed event by event, as slowly as a test wants."""

    def __init__(self, history: History, feed: Feed) -> None:
        self.feed = feed
        self.token = ""
        self._history = history
        self._events: AsyncIterator[bytes] = feed.events(lambda: 5 * 10**9)

    async def next(self) -> wire_pb2.SubscribeResponse:
        async with asyncio.timeout(60):
            event = wire_pb2.SubscribeResponse.FromString(await anext(self._events))
        self.token = event.resume_token or self.token
        return event

    async def until_end(self) -> list[str]:
        """Read up to the end of the snapshot."""
        return await self._until("snapshot_end")

    async def until_progress(self) -> list[str]:
        """Read everything that is there."""
        self.feed.progress()
        return await self._until("progress")

    async def _until(self, last: str) -> list[str]:
        shown = []
        while True:
            event = await self.next()
            if event.WhichOneof("event") == last:
                return shown
            shown.append(show(event))

    async def close(self) -> None:
        self._history.feeds.remove(self.feed)
        await self._events.aclose()


def show(event: wire_pb2.SubscribeResponse) -> str:
    match event.WhichOneof("event"):
        case "update":
            update = event.update
            return f"{update.cohort}.{update.kind}@{update.revision}"
        case "lagged":
            lagged = event.lagged
            return (
                f"{lagged.cohort}.{lagged.kind} lagged {lagged.from_revision}-{lagged.to_revision}"
            )
        case other:
            return str(other)
