"""Feeds: what one subscriber has had, what it may have next, and in which order.

A feed holds no queue of updates. It holds a position, and takes what comes behind it from the log that
all feeds share (`UpdateLog`), so that a slow subscriber costs no more memory than a quick one (BOUNDED).

* `LatestFeed`: a set of cohorts and kinds that have something new. Of each the newest update is taken at
  the moment it is sent; what it overtook is told of as `lagged`.
* `EveryFeed`: the log from the position on, from memory where it is there and else from the store.

Both give updates in order of their sequence. So one number, the sequence of the last event, says what a
subscriber has had of every cohort and kind, and is its resume token.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Final, Protocol

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.errors import CompactedError, FMIError, InvalidFilterError
from fmi_server.feed_requests import FeedRequest, Key, kind_name
from fmi_server.update_log import PublishedUpdate, UpdateLog, UpdateReader, resume_token

__all__ = ["PAGE_BYTES", "Feed"]

PAGE_BYTES: Final = 256 * 1024
"""Bytes of updates that a subscriber who is behind may hold until they are sent; one update always fits."""


class Feed(ABC):
    """The events of one subscription, as serialised `SubscribeResponse` messages.

    `events` is read by one task. `offer`, `progress` and `stop` are called from the same event loop.

    Args:
        request: What is wanted.
        log: The updates in memory.
        reader: Reads those that are not.
        page_updates: The most updates taken at once.

    Attributes:
        request: What the subscriber asked for.
        conflated: Updates left out so far.
        sent: Updates given so far.
        live: Whether the snapshot, or what was missed, was given.
    """

    def __init__(
        self, request: FeedRequest, log: UpdateLog, reader: UpdateReader, *, page_updates: int
    ) -> None:
        self.request = request
        self.conflated = 0
        self.sent = 0
        self.live = False
        self._log = log
        self._reader = reader
        self._most = page_updates
        self._page = min(8, page_updates)
        self._given: dict[Key, int] = {}
        self._pending: set[Key] = set()
        self._wake = asyncio.Event()
        self._progress_due = False
        self._end: FMIError | None = None
        self._position: int | None = None  # there is none until the start is given
        self._holes = False

    @property
    @abstractmethod
    def behind(self) -> int:
        """Updates not given yet; see `fmi.v1.SubscriberStatus.behind`."""

    @abstractmethod
    def _start(self) -> AsyncIterator[bytes]:
        """Give the snapshot or what was missed."""

    @abstractmethod
    def _new(self) -> AsyncIterator[bytes]:
        """Give what was published since."""

    def wants(self, key: Key) -> bool:
        """Say whether updates of a cohort and kind belong to the feed."""
        if key in self._given:
            return self.request.permits(key[0])
        return self.request.wants(key)

    def offer(self, key: Key) -> None:
        """Tell the feed that there is a new update of a key that it wants."""
        self._pending.add(key)
        self._wake.set()

    @abstractmethod
    def admit(self, key: Key) -> None:
        """Tell the feed that from now on it may give a key that it wants, of which there are updates."""

    def progress(self) -> None:
        """Ask for a sign of life, to be sent behind all data."""
        self._progress_due = True
        self._wake.set()

    def stop(self, reason: FMIError) -> None:
        """End the feed: its reader gets `reason`."""
        self._end = reason
        self._wake.set()

    async def events(self, now_ns: _Clock) -> AsyncIterator[bytes]:
        """Give the snapshot or what was missed, its end, and then what comes.

        Args:
            now_ns: Unix time in nanoseconds, for signs of life.

        Raises:
            CompactedError: A revision asked for, or one that would come next, is no longer kept.
            InvalidFilterError: A start revision is ahead of the history.
            FMIError: The reason given to `stop`.
        """
        self._check_start()
        async for event in self._start():
            self._check_end()  # it may have been waited for
            yield event
            self._check_end()
        self.live = True
        end = wire_pb2.SnapshotEnd(
            updates=self.sent,
            history_epoch=self._log.history_epoch,
            history_changed=self.request.history_changed,
        )
        yield self._control(snapshot_end=end)
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._check_end()
            async for event in self._new():
                self._check_end()
                yield event
                self._check_end()
            if self._progress_due:
                self._progress_due = False
                progress = wire_pb2.Progress()
                progress.server_time.FromNanoseconds(now_ns())
                yield self._control(progress=progress)

    def _check_end(self) -> None:
        if self._end is not None:
            raise self._end

    def _check_start(self) -> None:
        """Note what the start revisions say was had; refuse those ahead of the history."""
        for key, revision in self.request.start.items():
            newest = self._newest_revision(key)
            if revision > newest + 1:
                raise _ahead(key, revision, newest)
            self._given[key] = revision - 1

    def _newest_revision(self, key: Key) -> int:
        """Return the newest revision of a key, as far as the subscriber may know; 0 where there is none."""
        return self._log.newest_revision(key) if self.request.permits(key[0]) else 0

    async def _answers(self, keys: Iterable[Key]) -> Mapping[str, bool]:
        return await self.request.answers(cohort for cohort, _ in keys)

    def _wants(self, key: Key, answers: Mapping[str, bool]) -> bool:
        cohort, kind = key
        answer = answers.get(cohort)
        if answer is None:  # it came into being while the others were matched
            return self.wants(key)
        return answer and self.request.wants_kind(kind)

    async def _page_behind(self, sequence: int) -> Sequence[PublishedUpdate]:
        """Return updates behind a sequence: from memory where the next is there, else from the store.

        What a slow subscriber holds on to is bounded by bytes too.
        """
        page = self._log.since(sequence, self._page)
        if page is None:
            page = await self._reader.since(sequence, self._page)
        size = fitting = 0
        for update in page:
            size += len(update.event)
            if fitting and size > PAGE_BYTES:
                break
            fitting += 1
        self._page = min(self._most, 2 * fitting) or 1
        return page[:fitting]

    async def _given_is_unknown(self, update: PublishedUpdate) -> bool:
        """Say whether nobody can tell what the subscriber had before the first update behind its token.

        The token says a sequence, not a revision. If the revision before is not kept, it may have been on
        either side of the token.
        """
        if not self._holes or update.revision == 1:
            return False
        return await self._reader.one(update.key, update.revision - 1) is None

    def _control(
        self,
        *,
        snapshot_end: wire_pb2.SnapshotEnd | None = None,
        progress: wire_pb2.Progress | None = None,
        lagged: wire_pb2.Lagged | None = None,
    ) -> bytes:
        position = self._position
        token = "" if position is None else resume_token(self._log.history_epoch, position)
        return wire_pb2.SubscribeResponse(
            resume_token=token,
            snapshot_end=snapshot_end,
            progress=progress,
            lagged=lagged,
        ).SerializeToString()

    async def _compacted(self, key: Key, revision: int) -> CompactedError:
        cohort, kind = key
        oldest = await self._reader.oldest(key)
        return CompactedError(cohort, kind_name(kind), revision, oldest)


class _Clock(Protocol):
    def __call__(self) -> int: ...


def _ahead(key: Key, revision: int, newest: int) -> InvalidFilterError:
    cohort, kind = key
    return InvalidFilterError(
        "start_revisions",
        f"revision {revision} of {kind_name(kind)} in cohort {cohort!r} is ahead of the history, whose "
        f"newest is {newest}",
    )
