"""The feed of LATEST: the newest update of each cohort and kind, and what that left out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import update_pb2
from fmi_server.feed_requests import FeedRequest, Key
from fmi_server.feeds import Feed
from fmi_server.update_log import UpdateLog, UpdateReader

__all__ = ["LatestFeed"]

UNKNOWN: Final = -1
"""Stands for the revision that a subscriber had of a key where the history no longer tells."""


class LatestFeed(Feed):
    """Gives the newest update of each key at the moment it is sent."""

    def __init__(
        self, request: FeedRequest, log: UpdateLog, reader: UpdateReader, *, page_updates: int
    ) -> None:
        super().__init__(request, log, reader, page_updates=page_updates)
        self._planned = 0
        self._admitted: set[Key] = set()

    @property
    def behind(self) -> int:
        """Cohorts and kinds with something that was not given yet."""
        return self._planned + len(self._pending)

    def admit(self, key: Key) -> None:
        """Give the newest update of a key at once; what lies before it is told of as left out.

        Its token says nothing of a key that it was not for.
        """
        self._admitted.add(key)
        self.offer(key)

    async def _start(self) -> AsyncIterator[bytes]:
        """Give the newest update of each key that the subscriber has not had."""
        log = self._log
        answers = await self._answers(log.latest)
        self._position = self.request.resume_after
        await self._remember_given()
        # One moment for all of it: the token of the snapshot's end covers everything up to this head.
        head = log.head
        plan = self._plan(key for key in log.latest if self._wants(key, answers))
        for event in self._carry_out(plan):
            yield event
        self._position = head

    async def _new(self) -> AsyncIterator[bytes]:
        while self._pending:
            keys, self._pending = self._pending, set()
            for key in keys:
                self._given.setdefault(key, 0)  # it came into being after the start
            head = self._log.head
            for event in self._carry_out(self._plan(keys)):
                yield event
            self._position = head
        self._position = self._log.head

    async def _remember_given(self) -> None:
        """Find the revision of each key at its token, so that `lagged` can be exact."""
        position = self.request.oldest_token
        if position is None:
            return
        while position < self._log.head:
            page = await self._page_behind(position)
            if not page:
                return
            answers = await self._answers(update.key for update in page)
            for update in page:
                self._holes |= update.sequence != position + 1
                position = update.sequence
                if update.key in self._given or not self._wants(update.key, answers):
                    continue
                after = self.request.after(update.key)
                if after is not None and update.sequence > after:
                    unknown = await self._given_is_unknown(update)
                    self._given[update.key] = UNKNOWN if unknown else update.revision - 1

    def _plan(self, keys: Iterable[Key]) -> list[tuple[int, int, Key]]:
        """List what is to be given now, by sequence and revision: a plan holds no updates."""
        plan = []
        for key in keys:
            update = self._log.latest[key]
            had = key not in self._admitted and update.sequence <= (self.request.after(key) or 0)
            if had:
                self._given[key] = update.revision
            elif update.revision > self._given.get(key, 0):
                plan.append((update.sequence, update.revision, key))
        return sorted(plan)

    def _carry_out(self, plan: list[tuple[int, int, Key]]) -> Iterator[bytes]:
        """Give what is planned, or tell that it was overtaken meanwhile.

        A token says one sequence for all keys. So what is left out of any key is told of before the first
        update, and what is overtaken before its turn is told of in its turn: whoever goes on behind an
        event has had or been told of everything up to it.
        """
        self._planned = len(plan)
        for _, revision, key in plan:
            given = self._given.get(key)
            if given is not None and revision > given + 1:
                self._given[key] = revision - 1
                yield self._lagged(key, given + 1, revision - 1)
        for sequence, revision, key in plan:
            self._planned -= 1
            self._given[key] = revision
            newest = self._log.latest[key]
            if newest.revision != revision:
                yield self._lagged(key, revision, revision)
                self._position = sequence
                continue
            self._position = sequence
            self.sent += 1
            yield newest.event

    def _lagged(self, key: Key, first: int, last: int) -> bytes:
        cohort, kind = key
        self.conflated += last + 1 - max(first, 1)
        lagged = wire_pb2.Lagged(
            cohort=cohort,
            kind=update_pb2.UpdateKind.ValueType(kind),
            from_revision=first,
            to_revision=last,
        )
        return self._control(lagged=lagged)
