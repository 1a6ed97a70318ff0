"""Feeds: what one subscriber has had, what it may have next, and in which order.

A feed holds no queue of updates. It holds a position, and takes what comes behind it from the log that
all feeds share (`UpdateLog`), so that a slow subscriber costs no more memory than a quick one (BOUNDED).

* LATEST: a set of cohorts and kinds that have something new. Of each the newest update is taken at the
  moment it is sent; what it overtook is told of as `lagged`.
* EVERY: the log from the position on, from memory where it is there and else from the store.

Both give updates in order of their sequence. So one number, the sequence of the last event, says what a
subscriber has had of every cohort and kind, and is its resume token.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import update_pb2
from fmi_server.errors import CompactedError, FMIError, InvalidFilterError
from fmi_server.feed_requests import FeedRequest, Key, kind_name

__all__ = [
    "Feed",
    "FeedRequest",
    "Key",
    "PublishedUpdate",
    "UpdateLog",
    "UpdateReader",
    "kind_name",
]

UNKNOWN: Final = -1
"""Stands for the revision that a subscriber had of a key where the history no longer tells."""


@dataclass(frozen=True, slots=True)
class PublishedUpdate:
    """An update, serialised once however many subscribers there are.

    Attributes:
        key: Its cohort and kind.
        revision: Its revision.
        sequence: Its place among all updates.
        payload: The serialised `Update`.
        event: The serialised `SubscribeResponse` that carries it.
    """

    key: Key
    revision: int
    sequence: int
    payload: bytes
    event: bytes

    @classmethod
    def from_payload(
        cls, key: Key, revision: int, sequence: int, payload: bytes, *, history_epoch: str
    ) -> PublishedUpdate:
        """Frame a serialised update as an event."""
        token = resume_token(history_epoch, sequence)
        event = wire_pb2.SubscribeResponse(resume_token=token)
        event.update.ParseFromString(payload)
        return cls(key, revision, sequence, payload, event.SerializeToString())


class UpdateReader(Protocol):
    """Reads published updates that are no longer in memory."""

    async def since(self, sequence: int, limit: int) -> Sequence[PublishedUpdate]:
        """Return up to `limit` updates behind a sequence, in order of sequence."""

    async def one(self, key: Key, revision: int) -> PublishedUpdate | None:
        """Return one update, or None where it is not kept."""

    async def oldest(self, key: Key) -> int:
        """Return the oldest revision kept; 0 where there is none."""


@dataclass(slots=True)
class UpdateLog:
    """The published updates that are in memory: the newest of each key, and the most recent of all.

    Attributes:
        history_epoch: Names the history that sequences and revisions count in.
        head: The sequence of the last update.
        latest: The newest update of each cohort and kind.
        recent: The most recent updates, oldest first, without gaps up to `head`.
    """

    history_epoch: str
    head: int = 0
    latest: dict[Key, PublishedUpdate] = field(default_factory=dict)
    recent: deque[PublishedUpdate] = field(default_factory=lambda: deque(maxlen=1024))

    def add(self, update: PublishedUpdate) -> None:
        """Add the next update."""
        self.head = update.sequence
        self.latest[update.key] = update
        self.recent.append(update)

    def since(self, sequence: int) -> list[PublishedUpdate] | None:
        """Return what is behind a sequence, or None where not all of it is in memory."""
        if sequence >= self.head:
            return []
        if not self.recent or self.recent[0].sequence > sequence + 1:
            return None
        skip = sequence + 1 - self.recent[0].sequence
        return [self.recent[index] for index in range(skip, len(self.recent))]


class Feed:
    """The events of one subscription, as serialised `SubscribeResponse` messages.

    `events` is read by one task. `offer` and `stop` are called from the same event loop.

    Attributes:
        conflated: Updates left out so far.
    """

    def __init__(
        self, request: FeedRequest, log: UpdateLog, reader: UpdateReader, *, page_updates: int
    ) -> None:
        self._request = request
        self._log = log
        self._reader = reader
        self._page = page_updates
        self._given: dict[Key, int] = {}
        self._pending: set[Key] = set()
        self._wake = asyncio.Event()
        self._progress_due = False
        self._end: FMIError | None = None
        self._position: int | None = None  # there is none until the start is given
        self._holes = False
        self._sent = 0
        self.conflated = 0

    @property
    def request(self) -> FeedRequest:
        """What the subscriber asked for."""
        return self._request

    def wants(self, key: Key) -> bool:
        """Say whether updates of a cohort and kind belong to the feed."""
        return key in self._given or self._request.wants(key)

    def _wants(self, key: Key, answers: Mapping[str, bool]) -> bool:
        cohort, kind = key
        answer = answers.get(cohort)
        if answer is None:  # it came into being while the others were matched
            return self.wants(key)
        return answer and self._request.wants_kind(kind)

    def offer(self, key: Key) -> None:
        """Tell the feed that there is a new update of a key that it wants."""
        self._pending.add(key)
        self._wake.set()

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
        start = self._every_start() if self._request.every else self._latest_start()
        async for event in start:
            yield event
            if self._end is not None:
                raise self._end
        end = wire_pb2.SnapshotEnd(
            updates=self._sent,
            history_epoch=self._log.history_epoch,
            history_changed=self._request.history_changed,
        )
        yield self._control(self._position, snapshot_end=end)
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._end is not None:
                raise self._end
            live = self._every_live() if self._request.every else self._latest_live()
            async for event in live:
                yield event
                if self._end is not None:
                    raise self._end
            if self._progress_due:
                self._progress_due = False
                progress = wire_pb2.Progress()
                progress.server_time.FromNanoseconds(now_ns())
                yield self._control(self._position, progress=progress)

    async def _latest_start(self) -> AsyncIterator[bytes]:
        """Give the newest update of each key that the subscriber has not had."""
        log, request = self._log, self._request
        for key, revision in request.start.items():
            latest = log.latest.get(key)
            newest = latest.revision if latest else 0
            if revision > newest + 1:
                raise _ahead(key, revision, newest)
            self._given[key] = revision - 1
        answers = await request.answers(cohort for cohort, _ in log.latest)
        missed_after = request.resume_after
        if missed_after is not None:
            self._position = missed_after
            await self._remember_given(missed_after)
        # From here to the head nothing is waited for: the token of the snapshot's end covers all of it.
        keys = [key for key in log.latest if self._wants(key, answers)]
        head = log.head
        for event in self._newest(keys, missed_after or 0):
            yield event
        self._position = head

    async def _remember_given(self, sequence: int) -> None:
        """Find the revision of each key at a sequence, so that `lagged` can be exact."""
        position = sequence
        while position < self._log.head:
            page = await self._page_behind(position)
            if not page:
                return
            answers = await self._request.answers(update.key[0] for update in page)
            for update in page:
                self._holes |= update.sequence != position + 1
                position = update.sequence
                if update.key not in self._given and self._wants(update.key, answers):
                    unknown = await self._given_is_unknown(update)
                    self._given[update.key] = UNKNOWN if unknown else update.revision - 1

    async def _page_behind(self, sequence: int) -> Sequence[PublishedUpdate]:
        """Return updates behind a sequence: from memory where all are there, else a page of the store's."""
        page = self._log.since(sequence)
        return await self._reader.since(sequence, self._page) if page is None else page

    async def _latest_live(self) -> AsyncIterator[bytes]:
        while self._pending:
            keys, self._pending = self._pending, set()
            for key in keys:
                self._given.setdefault(key, 0)  # it came into being after the start
            for event in self._newest(keys, 0):
                yield event
        self._position = self._log.head

    def _newest(self, keys: Collection[Key], after: int) -> list[bytes]:
        """Give the newest update of each key, and before them what each of them overtook.

        A token says one sequence for all keys. So what is left out of any key is told of before the first
        update: whoever goes on behind that update has had or been told of everything up to it.
        """
        updates = sorted((self._log.latest[key] for key in keys), key=lambda u: u.sequence)
        lagged: list[bytes] = []
        events: list[bytes] = []
        told_up_to = self._position
        for update in updates:
            if update.sequence <= after:
                self._given[update.key] = update.revision
            given = self._given.get(update.key)
            if given is not None and update.revision <= given:
                continue
            if given is not None and update.revision > given + 1:
                lagged.append(self._lagged(update, given, told_up_to))
            self._given[update.key] = update.revision
            self._position = update.sequence
            self._sent += 1
            events.append(update.event)
        return lagged + events

    def _lagged(self, update: PublishedUpdate, given: int, position: int | None) -> bytes:
        self.conflated += update.revision - max(given, 0) - 1
        cohort, kind = update.key
        lagged = wire_pb2.Lagged(
            cohort=cohort,
            kind=update_pb2.UpdateKind.ValueType(kind),
            from_revision=given + 1,
            to_revision=update.revision - 1,
        )
        return self._control(position, lagged=lagged)

    async def _every_start(self) -> AsyncIterator[bytes]:
        """Give every update from the start revisions or the token on, and a snapshot of the rest."""
        request, log = self._request, self._log
        if request.resume_after is not None:
            self._position = request.resume_after
            async for event in self._every_from(request.resume_after):
                yield event
            return
        answers = await request.answers(cohort for cohort, _ in log.latest)
        floor: dict[Key, int] = {}
        positions = []
        for key, revision in request.start.items():
            latest = log.latest.get(key)
            newest = latest.revision if latest else 0
            if revision > newest + 1:
                raise _ahead(key, revision, newest)
            floor[key] = revision
            self._given[key] = revision - 1
            if revision <= newest:
                first = await self._reader.one(key, revision)
                if first is None:
                    raise await self._compacted(key, revision)
                positions.append(first.sequence - 1)
        # Nothing is waited for from here on, so that every key has its floor from one moment.
        positions.append(log.head)
        for key, update in log.latest.items():
            if key not in floor and self._wants(key, answers):
                floor[key] = update.revision
                positions.append(update.sequence - 1)
        self._position = min(positions)
        async for event in self._every_from(self._position, floor):
            yield event

    async def _every_live(self) -> AsyncIterator[bytes]:
        async for event in self._every_from(self._position or 0):
            yield event

    async def _every_from(
        self, position: int, floor: Mapping[Key, int] | None = None
    ) -> AsyncIterator[bytes]:
        """Give every wanted update behind a position, up to the head as it is then."""
        while position < self._log.head:
            page = await self._page_behind(position)
            if not page:
                return
            answers = await self._request.answers(update.key[0] for update in page)
            for update in page:
                self._holes |= update.sequence != position + 1
                position = update.sequence
                self._pending.discard(update.key)
                if not self._wants(update.key, answers):
                    continue
                if floor is not None and update.revision < floor.get(update.key, 0):
                    continue
                await self._refuse_gap(update, floor)
                self._given[update.key] = update.revision
                self._position = position
                self._sent += 1
                yield update.event
            self._position = position

    async def _refuse_gap(
        self, update: PublishedUpdate, floor: Collection[Key] | None = None
    ) -> None:
        """Raise where updates before this one are no longer kept and the subscriber may lack them."""
        key, revision = update.key, update.revision
        given = self._given.get(key)
        if given is None and self._request.resume_after is None:
            if floor is not None and key in floor:
                return  # a snapshot begins with whatever is newest
            given = 0  # it came into being after the start
        if given is not None:
            if revision != given + 1:
                raise await self._compacted(key, given + 1)
        elif await self._given_is_unknown(update):
            raise await self._compacted(key, revision - 1)

    async def _given_is_unknown(self, update: PublishedUpdate) -> bool:
        """Say whether nobody can tell what the subscriber had before the first update behind its token.

        The token says a sequence, not a revision. If the revision before is not kept, it may have been on
        either side of the token.
        """
        if not self._holes or update.revision == 1:
            return False
        return await self._reader.one(update.key, update.revision - 1) is None

    async def _compacted(self, key: Key, revision: int) -> CompactedError:
        cohort, kind = key
        oldest = await self._reader.oldest(key)
        return CompactedError(cohort, kind_name(kind), revision, oldest)

    def _control(
        self,
        position: int | None,
        *,
        snapshot_end: wire_pb2.SnapshotEnd | None = None,
        progress: wire_pb2.Progress | None = None,
        lagged: wire_pb2.Lagged | None = None,
    ) -> bytes:
        token = "" if position is None else resume_token(self._log.history_epoch, position)
        return wire_pb2.SubscribeResponse(
            resume_token=token,
            snapshot_end=snapshot_end,
            progress=progress,
            lagged=lagged,
        ).SerializeToString()


class _Clock(Protocol):
    def __call__(self) -> int: ...


def resume_token(history_epoch: str, sequence: int) -> str:
    """Write a position in a history as a resume token."""
    return f"{history_epoch}:{sequence}"


def _ahead(key: Key, revision: int, newest: int) -> InvalidFilterError:
    cohort, kind = key
    return InvalidFilterError(
        "start_revisions",
        f"revision {revision} of {kind_name(kind)} in cohort {cohort!r} is ahead of the history, whose "
        f"newest is {newest}",
    )
