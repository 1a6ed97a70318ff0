"""Following the log: a consumer of our own making, which begins behind the last entry that was taken.

It is made anew when an entry is missing, when the heartbeat fails, and after each reconnect. (The client's
ordered consumer does not notice missed heartbeats, and it does not know a domain.) Before each begin it is
seen that the log is still the one that the view was made of: brokers that were set back have other entries
under the same numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from fmi_server.storage.base import StoreCorruptError, StoreUnavailableError
from fmi_server.storage.jetstream_broker import uncancelled
from fmi_server.storage.jetstream_errors import broker_error, import_nats
from fmi_server.storage.jetstream_log import entry_identity
from fmi_server.storage.jetstream_view import LogEntry, ViewPosition

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from nats.aio.msg import Msg

    from fmi_server.storage.jetstream_log import BrokerLog
    from fmi_server.storage.records import UnavailableReason

__all__ = ["LogFeed"]

_LOG = logging.getLogger(__name__)

_BATCH_ENTRIES = 64
_BATCH_BYTES = 2 * 2**20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5


class _FeedLostError(Exception):
    """The consumer has to be made anew."""


class LogFeed:
    """Give the entries of a log, in order.

    Attributes:
        fault: Why the log cannot be read now; None while it is.
    """

    def __init__(self, log: BrokerLog) -> None:
        self._log = log
        self._broker = log.broker
        self._messages: asyncio.Queue[Msg | None] | None = None
        self.fault: UnavailableReason | None = None
        self._failing_since: float | None = None
        log.broker.on_reconnect = self._reconnected

    def _reconnected(self) -> None:
        if self._messages is not None:
            self._messages.put_nowait(None)

    async def follow(self, position: ViewPosition) -> AsyncGenerator[list[LogEntry], None]:
        """Yield the entries behind a position, in order and without gaps, for ever.

        What is yielded counts as taken when the next is asked for.

        Raises:
            LogBehindError: The next entry is no longer in the log.
            StoreCorruptError: The log ends before the position, or an entry is missing in it.
        """
        pause = _FIRST_PAUSE_S
        while True:
            try:
                async with contextlib.aclosing(self._consume(position)) as batches:
                    async for batch in batches:
                        yield batch
                        position = _behind(batch)
                        pause = _FIRST_PAUSE_S
            except _FeedLostError as error:
                _LOG.info("the log is read anew behind entry %d: %s", position.sequence, error)
            except StoreUnavailableError as error:
                if error.cause == "closed":
                    raise
                _LOG.info("the log cannot be read now: %s", error)
                self._note_loss(error.cause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _note_loss(self, cause: UnavailableReason) -> None:
        # While the brokers choose a leader one try fails, and the next does not.
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        elif now - self._failing_since > self._broker.options.heartbeat_s:
            self.fault = cause

    async def _consume(self, position: ViewPosition) -> AsyncGenerator[list[LogEntry], None]:
        """Yield from one consumer until it is lost."""
        await self._log.check(position)
        feed: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._messages = feed

        async def deliver(message: Msg) -> None:
            feed.put_nowait(message)

        client = self._broker.client
        inbox = client.new_inbox()
        # Bounded by the flow control of the consumer, which waits for our answers.
        subscription = await client.subscribe(
            inbox, cb=deliver, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        name: str | None = None
        start = position
        try:
            name = await self._add_consumer(inbox, position.sequence + 1)
            self.fault = self._failing_since = None
            async with contextlib.aclosing(self._batches(feed)) as batches:
                async for batch in batches:
                    self._check_order(batch, position.sequence, fresh=position is start)
                    yield batch
                    position = _behind(batch)
        finally:
            self._messages = None
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()
                if name is not None and client.is_connected:
                    await self._broker.jetstream.delete_consumer(self._log.names.stream, name)

    def _check_order(self, batch: list[LogEntry], position: int, *, fresh: bool) -> None:
        for expected, entry in enumerate(batch, position + 1):
            if entry.sequence != expected:
                if fresh and entry is batch[0]:
                    detail = f"entry {expected} is missing in the log"
                    raise StoreCorruptError(path=self._log.location, detail=detail)
                raise _FeedLostError(f"entry {entry.sequence} came in place of {expected}")

    async def _add_consumer(self, inbox: str, start: int) -> str:
        api = import_nats().js.api
        config = api.ConsumerConfig(
            deliver_subject=inbox,
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=start,
            ack_policy=api.AckPolicy.NONE,
            max_deliver=1,
            flow_control=True,
            idle_heartbeat=self._broker.options.heartbeat_s,
            inactive_threshold=30.0,
            mem_storage=True,
            num_replicas=1,
        )
        try:
            info = await uncancelled(
                self._broker.jetstream.add_consumer(self._log.names.stream, config)
            )
        except Exception as error:
            raise broker_error(error, self._log.location) from error
        return str(info.name)

    async def _batches(
        self, feed: asyncio.Queue[Msg | None]
    ) -> AsyncGenerator[list[LogEntry], None]:
        """Yield what has come, a batch at a time.

        Raises:
            _FeedLostError: The heartbeat failed, an entry is missing, or the connection was another.
        """
        delivered = 0
        while True:
            batch: list[LogEntry] = []
            size = 0
            message = await self._next(feed)
            while True:
                if message is None:
                    if batch:
                        yield batch
                    raise _FeedLostError("the connection is another one")
                headers: Mapping[str, str] = message.headers or {}
                if headers.get("Status") is None:
                    entry, number = _entry(message, headers)
                    if number != delivered + 1:
                        raise _FeedLostError(f"delivery {number} came behind {delivered}")
                    delivered = number
                    batch.append(entry)
                    size += len(entry.data)
                elif batch:
                    # All that came before is taken first; what the broker asks is answered behind it.
                    yield batch
                    batch, size = [], 0
                if headers.get("Status") is not None:
                    await self._answer(message, headers, delivered)
                if feed.empty() or len(batch) >= _BATCH_ENTRIES or size >= _BATCH_BYTES:
                    break
                message = feed.get_nowait()
            if batch:
                yield batch

    async def _next(self, feed: asyncio.Queue[Msg | None]) -> Msg | None:
        try:
            async with asyncio.timeout(2 * self._broker.options.heartbeat_s):
                return await feed.get()
        except TimeoutError:
            raise _FeedLostError("the broker is silent") from None

    async def _answer(self, message: Msg, headers: Mapping[str, str], delivered: int) -> None:
        """Answer flow control; see in a heartbeat whether the last deliveries were lost."""
        reply = message.reply or headers.get("Nats-Consumer-Stalled")
        if reply:
            with contextlib.suppress(Exception):  # then it stalls, and is made anew
                await self._broker.client.publish(reply)
        if int(headers.get("Nats-Last-Consumer", delivered)) > delivered:
            raise _FeedLostError("the last deliveries are missing")


# Any: what the client gives is not typed.
def _entry(message: Any, headers: Mapping[str, str]) -> tuple[LogEntry, int]:
    """Return an entry, and its number among the deliveries of the consumer."""
    numbers = message.metadata.sequence
    command_id, part, parts = entry_identity(headers)
    entry = LogEntry(numbers.stream, message.subject, command_id, part, parts, message.data)
    return entry, numbers.consumer


def _behind(batch: list[LogEntry]) -> ViewPosition:
    return ViewPosition(batch[-1].sequence, batch[-1].command_id)
