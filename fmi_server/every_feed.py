"""The feed of EVERY: each update that is still kept, read from the store where the subscriber is behind."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fmi_server.feed_requests import FeedRequest, Key
from fmi_server.feeds import Feed
from fmi_server.update_log import PublishedUpdate, UpdateLog, UpdateReader

__all__ = ["EveryFeed"]


class EveryFeed(Feed):
    """Gives each update from a position in the log on."""

    def __init__(
        self, request: FeedRequest, log: UpdateLog, reader: UpdateReader, *, page_updates: int
    ) -> None:
        super().__init__(request, log, reader, page_updates=page_updates)
        # Keys that begin with their snapshot, and the revision that was newest at the start.
        self._snapshot: dict[Key, int] = {}

    @property
    def behind(self) -> int:
        """Updates of anybody between the position and the head; 0 where none of them is wanted."""
        if self.live and not self._pending:
            return 0
        return self._log.head - (self._position or 0)

    def admit(self, key: Key) -> None:
        """Give a key from its next update on: what was released before was not for this subscriber."""
        self._given[key] = self._log.newest_revision(key)

    async def _start(self) -> AsyncIterator[bytes]:
        """Give a snapshot, and every update from the start revisions or the token on."""
        request, log = self.request, self._log
        answers = await self._answers(log.latest)
        positions = [await self._place_before(key, first) for key, first in request.start.items()]
        if request.oldest_token is not None:
            positions.append(request.oldest_token)
        # Nothing is waited for from here on, so that every key has its start from one moment.
        snapshot = sorted(
            (update.sequence, update.revision, key)
            for key, update in log.latest.items()
            if key not in request.start and request.after(key) is None and self._wants(key, answers)
        )
        self._snapshot = {key: revision for _, revision, key in snapshot}
        position = min([*positions, log.head])
        self._position = snapshot[0][0] - 1 if snapshot else position
        for sequence, revision, key in snapshot:
            if sequence > position:
                break  # the log gives it in its turn
            update = await self._exactly(key, revision)
            if update is not None:
                self._take(update)
                yield update.event
        async for event in self._from(position):
            yield event

    async def _new(self) -> AsyncIterator[bytes]:
        async for event in self._from(self._position or 0):
            yield event

    async def _place_before(self, key: Key, revision: int) -> int:
        """Return the sequence behind which a start revision stands."""
        if revision > self._newest_revision(key):
            return self._log.head
        first = await self._reader.one(key, revision)
        if first is None:
            raise await self._compacted(key, revision)
        return first.sequence - 1

    async def _exactly(self, key: Key, revision: int) -> PublishedUpdate | None:
        """Return a revision, also where a newer one came meanwhile; None where it is not kept."""
        newest = self._log.latest[key]
        return newest if newest.revision == revision else await self._reader.one(key, revision)

    async def _from(self, position: int) -> AsyncIterator[bytes]:
        """Give every wanted update behind a position, up to the head as it is then."""
        self._position = position
        while position < self._log.head:
            head = self._log.head
            # The store may have more by now, of which nobody was told yet.
            page = [u for u in await self._page_behind(position) if u.sequence <= head]
            if not page:
                return
            if page[-1].sequence != position + len(page):
                await self._refuse_lost(position)
            answers = await self._answers(update.key for update in page)
            for update in page:
                self._holes |= update.sequence != position + 1
                position = update.sequence
                self._pending.discard(update.key)
                if self._wants(update.key, answers) and not self._was_had(update):
                    await self._refuse_gap(update)
                    self._take(update)
                    yield update.event
            self._position = position

    def _take(self, update: PublishedUpdate) -> None:
        self._given[update.key] = update.revision
        self._snapshot.pop(update.key, None)
        self._position = update.sequence
        self.sent += 1

    def _was_had(self, update: PublishedUpdate) -> bool:
        """Say whether an update lies before the start of its key."""
        key = update.key
        if update.sequence <= (self.request.after(key) or 0):
            return True
        return update.revision <= self._given.get(key, self._snapshot.get(key, 1) - 1)

    async def _refuse_lost(self, position: int) -> None:
        """Raise where something wanted behind a position is no longer kept and the subscriber may lack it.

        Before anything of what comes behind it is given: a stream that is cut there goes on from the token of
        another key, and behind that nobody could tell.
        """
        log = self._log
        answers = await self._answers(log.latest)
        behind = [
            key
            for key, newest in log.latest.items()
            if newest.sequence > position
            and key not in self._snapshot
            and self._wants(key, answers)
        ]
        oldest = await self._reader.oldest_places(behind)
        for key in behind:
            revision, sequence = oldest.get(key, (1, 0))
            given, after = self._given.get(key), self.request.after(key)
            if given is None and after is None:
                given = 0  # it came into being after the start
            if given is not None:
                if revision > given + 1:
                    raise await self._compacted(key, given + 1)
            elif revision > 1 and sequence > max(position, after or 0):
                raise await self._compacted(key, revision - 1)

    async def _refuse_gap(self, update: PublishedUpdate) -> None:
        """Raise where updates before this one are no longer kept and the subscriber may lack them."""
        key, revision = update.key, update.revision
        given = self._given.get(key)
        if given is None and self.request.after(key) is None:
            if key in self._snapshot:
                return  # a snapshot begins with whatever is newest
            given = 0  # it came into being after the start
        if given is not None:
            if revision != given + 1:
                raise await self._compacted(key, given + 1)
        elif await self._given_is_unknown(update):
            raise await self._compacted(key, revision - 1)
