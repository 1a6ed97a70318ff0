"""Following the updates of cohorts."""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

import grpc

from fmi.v1 import interchange_service_pb2, update_pb2
from fmi_client._calls import Caller
from fmi_client._translation import error_from_rpc
from fmi_client.errors import (
    AccessDeniedError,
    CompactedError,
    ConfigurationError,
    ConnectionFailedError,
    FMIError,
    ProtocolError,
)
from fmi_client.kinds import KindLike, update_kind
from fmi_client.outages import OnState, OutageMonitor
from fmi_client.retry import Backoff

__all__ = ["SILENCE_S", "OnCompacted", "OnUpdate", "Subscription", "SubscriptionStatistics"]

SILENCE_S: Final = 65.0
"""Seconds without an event after which the stream counts as dead.

The server gives a sign of life every 15 to 30 s, so that two of them were missed.
"""

OnUpdate: TypeAlias = Callable[[update_pb2.Update], Awaitable[None] | None]
OnCompacted: TypeAlias = Literal["raise", "snapshot"]

_SubscribeCall: TypeAlias = grpc.aio.UnaryStreamCall[
    interchange_service_pb2.SubscribeRequest, interchange_service_pb2.SubscribeResponse
]


@dataclass(frozen=True, slots=True)
class SubscriptionStatistics:
    """What a subscription has seen.

    Attributes:
        updates: Updates given to the consumer.
        reconnects: Streams opened after the first.
        duplicates: Updates dropped because they were not newer than one given before.
        conflated: Times that the server left out updates because the consumer was slow or away.
        lagged_revisions: Revisions left out in all of these.
    """

    updates: int = 0
    reconnects: int = 0
    duplicates: int = 0
    conflated: int = 0
    lagged_revisions: int = 0


class Subscription:
    """An asynchronous iterator of updates that survives broken connections.

    Per cohort and kind the revisions that it gives rise strictly, across reconnects too; in a history
    that changed (a server restored from a backup) they begin anew. After a break it goes on behind the
    last event given, and where the server still holds the broken stream, that one ends. Until its first
    event, attempts are bounded by the client's `RetryPolicy`; later it tries for as long as it is open. An
    outage is told to the log, at WARNING when it begins and at INFO when a stream has lived for some seconds
    again, and to `on_state`. One consumer at a time.

    Made by `AsyncFMIClient.subscribe`; use it as an asynchronous context manager, or call `aclose`.
    """

    def __init__(
        self,
        caller: Caller,
        request: interchange_service_pb2.SubscribeRequest,
        *,
        on_update: OnUpdate | None = None,
        on_state: OnState | None = None,
        on_compacted: OnCompacted = "raise",
        silence_s: float = SILENCE_S,
    ) -> None:
        caller.check_open()
        self._caller = caller
        self._request = request
        self._next_filter: interchange_service_pb2.SubscribeRequest | None = None
        if request.subscriber:
            # Kept across reconnects, so that a stream that broke unseen ends when the next one opens.
            request.instance_id = secrets.token_urlsafe(16)
        self._on_compacted = on_compacted
        self._silence_s = silence_s
        self._backoff = Backoff(caller.retry)
        self._outages = OutageMonitor(caller.target, on_state, self._backoff.progressed)
        self._open_at = 0.0
        self._call: _SubscribeCall | None = None
        self._opened = 0
        self._shown: tuple[tuple[str, str], ...] = ()
        # One read that outlives a cancelled `__anext__`: cancelling it would end the stream.
        self._read: asyncio.Task[interchange_service_pb2.SubscribeResponse] | None = None
        self._read_since = 0.0
        self._given: dict[tuple[str, int], tuple[str, int]] = {}
        self._updates = self._duplicates = self._conflated = self._lagged_revisions = 0
        self._consuming = False
        self._closing = asyncio.Event()
        self._driver = (
            asyncio.create_task(self._drive(on_update), name="fmi-subscription")
            if on_update is not None
            else None
        )
        self._unreported = self._driver

    @property
    def resume_token(self) -> str:
        """Give it to `subscribe` to go on behind the last event given; empty before the first.

        While a change of the filter is under way (`changing`), it is the last one under the filter from
        before, with which it goes together.
        """
        if self._request.HasField("handover"):
            return self._request.handover.resume_token
        return self._request.resume_token

    @property
    def changing(self) -> bool:
        """Whether a change of the filter is under way: its snapshot was not given to the end yet."""
        return self._next_filter is not None or self._request.HasField("handover")

    @property
    def statistics(self) -> SubscriptionStatistics:
        """What it has seen up to now."""
        return SubscriptionStatistics(
            updates=self._updates,
            reconnects=max(0, self._opened - 1),
            duplicates=self._duplicates,
            conflated=self._conflated,
            lagged_revisions=self._lagged_revisions,
        )

    @property
    def closed(self) -> bool:
        """Whether it was closed, or ended with an error."""
        return self._closing.is_set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> update_pb2.Update:
        """Wait for the next update.

        Raises:
            StopAsyncIteration: The subscription was closed.
            CompactedError: What it should go on from is no longer kept, and `on_compacted` is "raise".
            FMIError: The server refuses the subscription, or cannot be reached at first.
        """
        while True:
            event = await self._next_event()
            if event is None:
                raise StopAsyncIteration
            if event.WhichOneof("event") == "update":
                return event.update

    async def events(self) -> AsyncIterator[interchange_service_pb2.SubscribeResponse]:
        """Iterate over all events: updates, `snapshot_end`, `progress` and `lagged`.

        Raises:
            FMIError: As the iteration over updates.
        """
        while (event := await self._next_event()) is not None:
            yield event

    async def wait(self) -> None:
        """Wait until the callback form ends, and raise what ended it.

        Raises:
            ConfigurationError: It was made without `on_update`.
            FMIError: As the iteration over updates.
            Exception: Whatever the callback raised.
        """
        if self._driver is None:
            raise ConfigurationError("wait() is for a subscription with on_update")
        await asyncio.wait({self._driver})
        self._unreported = None
        if not self._driver.cancelled():
            self._driver.result()

    async def change(
        self, cohorts: str | Iterable[str], kinds: KindLike | Iterable[KindLike] = ()
    ) -> None:
        """Follow other cohorts or kinds from here on, in a new stream.

        What the old filter covered too goes on without a gap or a repeat. What it left out begins with a
        snapshot. While an earlier change is under way this one waits, in place of one that waited already.

        Args:
            cohorts: Names or patterns, as in `AsyncFMIClient.subscribe`; they replace the ones from before.
            kinds: Kinds of update, likewise. Empty means all.

        Raises:
            InvalidFilterError: A kind is not known. A pattern that the server refuses comes out of the
                iteration, as at the start.
            ConfigurationError: The subscription was closed.
        """
        if self.closed:
            raise ConfigurationError("the subscription is closed; open a new one")
        if isinstance(kinds, str | int):
            kinds = (kinds,)
        self._next_filter = interchange_service_pb2.SubscribeRequest(
            cohorts=[cohorts] if isinstance(cohorts, str) else list(cohorts),
            kinds=[update_kind(kind) for kind in kinds],
        )
        await self._change_if_possible()

    async def _change_if_possible(self) -> None:
        """Put the filter that waits into the request and open a new stream, unless something is half done.

        A handover says what was received under one other filter, not under two. Start revisions go with
        their filter, and are done with at the first token.
        """
        request, wanted = self._request, self._next_filter
        if wanted is None or request.HasField("handover"):
            return
        if request.start_revisions and not request.resume_token:
            return
        self._next_filter = None
        if request.resume_token:
            request.handover.cohorts.extend(request.cohorts)
            request.handover.kinds.extend(request.kinds)
            request.handover.resume_token = request.resume_token
            request.resume_token = ""
        request.cohorts[:] = wanted.cohorts
        request.kinds[:] = wanted.kinds
        await self._drop_call()

    async def aclose(self) -> None:
        """End the subscription. Raises what its callback raised. Closing twice does nothing."""
        self._closing.set()
        await self._drop_call()
        driver, self._unreported = self._unreported, None
        if driver is None or driver is asyncio.current_task():  # closed from its own callback
            return
        driver.cancel()
        await asyncio.wait({driver})
        if not driver.cancelled():
            driver.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _drive(self, on_update: OnUpdate) -> None:
        try:
            async for update in self:
                outcome = on_update(update)
                if inspect.isawaitable(outcome):
                    await outcome
        finally:
            self._closing.set()
            await self._drop_call()

    async def _next_event(self) -> interchange_service_pb2.SubscribeResponse | None:
        if self._consuming:
            raise ConfigurationError("a subscription has one consumer at a time")
        self._consuming = True
        try:
            while not self.closed:
                try:
                    event = await self._receive()
                except FMIError as error:
                    await self._drop_call()
                    if not self.closed:
                        self._recover(error)
                    continue
                if event is None:
                    continue
                wanted = self._takes(event)
                await self._change_if_possible()
                if wanted:
                    return event
            return None
        finally:
            self._consuming = False

    async def _receive(self) -> interchange_service_pb2.SubscribeResponse | None:
        """Wait for an event; None where the subscription was closed meanwhile."""
        loop = asyncio.get_running_loop()
        if self._call is None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._open_at):
                    await self._closing.wait()
            if self.closed:
                return None
            subscribe = self._caller.stubs().interchange.Subscribe
            self._shown = self._caller.metadata
            self._call = subscribe(self._request, metadata=self._shown)
            self._opened += 1
        if self._read is None:
            self._read = loop.create_task(
                _read(self._call, self._caller.target), name="fmi-subscription-read"
            )
            self._read_since = loop.time()
        read = self._read
        patience_s = self._read_since + self._silence_s - loop.time()
        await asyncio.wait({read}, timeout=max(0.0, patience_s))
        if self._read is not read:  # it was closed or changed from elsewhere, and the read is gone
            return None
        if not read.done():
            raise ConnectionFailedError(
                f"no event from {self._caller.target} for {self._silence_s:g} s"
            )
        self._read = None
        if read.cancelled():
            self._caller.check_open()
            raise ConnectionFailedError(f"{self._caller.target}: the stream was cancelled")
        return read.result()

    def _takes(self, event: interchange_service_pb2.SubscribeResponse) -> bool:
        """Note where the stream is; say whether the consumer shall have the event."""
        self._backoff.endless = True
        self._outages.arrived()
        kind = event.WhichOneof("event")
        if kind == "update" and self._request.start_revisions:
            self._note_start(event.update.history_epoch)
        if event.resume_token:
            self._request.resume_token = event.resume_token
            del self._request.start_revisions[:]
        if kind == "snapshot_end":
            self._request.ClearField("handover")
        if kind == "update":
            update = event.update
            key = (update.cohort, update.kind)
            epoch, revision = self._given.get(key, (update.history_epoch, 0))
            if update.history_epoch == epoch and update.revision <= revision:
                self._duplicates += 1
                return False
            self._given[key] = (update.history_epoch, update.revision)
            self._updates += 1
        elif kind == "lagged":
            self._conflated += 1
            first = max(1, event.lagged.from_revision)  # 0: the server cannot tell any more
            self._lagged_revisions += event.lagged.to_revision - first + 1
        return kind is not None  # events that a newer server has

    def _note_start(self, epoch: str) -> None:
        """Count what lies before the start revisions as given.

        A token says one place for all. Of one cohort that place may lie before the start of another, whose
        revisions from before its start come again where the stream goes on from there.
        """
        for start in self._request.start_revisions:
            if start.history_epoch in ("", epoch):
                had = (epoch, start.revision - 1)
                self._given.setdefault((start.cohort, start.kind), had)

    def _recover(self, error: FMIError) -> None:
        """Prepare the next attempt, or end the subscription with `error`."""
        restarts = (
            isinstance(error, CompactedError)
            and self._on_compacted == "snapshot"
            and bool(self.resume_token or self._request.start_revisions)
        )
        if restarts:
            self._request.ClearField("handover")
            self._request.resume_token = ""
            del self._request.start_revisions[:]
            error = ConnectionFailedError(error.message)  # the next attempt is another request
        elif isinstance(error, AccessDeniedError) and self._caller.metadata != self._shown:
            # The token was rotated while the stream was open; the next attempt shows the new one.
            error = ConnectionFailedError(error.message)
        try:
            delay_s = self._backoff.delay_s(error)
        except FMIError:
            self._closing.set()
            raise
        if not restarts:  # then the server is there
            self._outages.failed(error)
        self._open_at = asyncio.get_running_loop().time() + delay_s

    async def _drop_call(self) -> None:
        self._outages.dropped()
        call, self._call = self._call, None
        read, self._read = self._read, None
        if call is not None:
            call.cancel()
        if read is not None:
            read.cancel()
            await asyncio.wait({read})
            if not read.cancelled():
                read.exception()  # seen: what it says is of a stream that is gone


async def _read(call: _SubscribeCall, target: str) -> interchange_service_pb2.SubscribeResponse:
    try:
        event = await call.read()
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure, target) from None
    if isinstance(event, interchange_service_pb2.SubscribeResponse):
        return event
    if event is grpc.aio.EOF:
        raise ConnectionFailedError(f"{target}: the server ended the stream")
    raise ProtocolError(f"{target}: an event cannot be read")
