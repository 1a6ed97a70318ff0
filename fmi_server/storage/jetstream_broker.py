"""The connection to the brokers: how it is asked, and how something is sent so that it is there once.

* What is sent is sent again under the same id until it is acknowledged or the time for it is over, which is
  shorter than the brokers' window of de-duplication.
* Nothing is buffered for a broker that is not there: the client would send it whenever the connection comes
  back, long after its writer has given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from fmi_server.storage.base import StoreUnavailableError
from fmi_server.storage.jetstream_errors import (
    STREAM_EXISTS,
    WRONG_LAST_SEQUENCE,
    broker_error,
    import_nats,
    is_refusal,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from typing import Any

    from nats.aio.client import Client
    from nats.js import JetStreamContext
    from nats.js.api import RawStreamMsg, StreamConfig, StreamInfo

    from fmi_server.storage.jetstream_names import BrokerAddress

__all__ = ["BrokerConnection", "BrokerOptions", "FenceError", "uncancelled"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_MESSAGE_ID = "Nats-Msg-Id"
_EXPECTED_LAST = "Nats-Expected-Last-Subject-Sequence"
_HEADER_ROOM = 1024
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """How the stream is made, and how long is waited for the brokers.

    The first three count where the stream is made, by whoever comes first; later they are the operator's, at
    the brokers.

    Attributes:
        replicas: Brokers that keep the stream: 1, 3 or 5. With 3 it survives the loss of one.
        max_bytes: Refuse what would make it larger, with `StoreUnavailableError` (`disk_full`); None for no
            limit.
        duplicate_window_s: For how long the brokers know the id of a write; above `patience_s`.
        snapshot_bytes: Of the log, above which a replica makes a snapshot and drops what is in it; also
            above the size of the view, so that no more than twice the writes go there.
        kept_entries: Entries that the log keeps all the same, for replicas that lag.
        connect_timeout_s: For how long to try to connect when the store is opened.
        open_patience_s: For how long opening is tried again where brokers do not answer: they may be choosing
            a leader.
        ack_timeout_s: After so long without an acknowledgement a write is sent again.
        patience_s: After so long without one the writer is told `no_answer`.
        heartbeat_s: How often a broker says that the log is quiet; twice as long without is a lost consumer.
        tls: How to tell that a broker is the right one, and who this is; None for the system's certificates
            where the URL says `tls://`.
        login: User and password; None for none, or for what stands in the URL.
    """

    replicas: int = 1
    max_bytes: int | None = None
    duplicate_window_s: float = 120.0
    snapshot_bytes: int = 256 * 1024 * 1024
    kept_entries: int = 1000
    connect_timeout_s: float = 5.0
    open_patience_s: float = 0.0
    ack_timeout_s: float = 2.0
    patience_s: float = 15.0
    heartbeat_s: float = 2.0
    tls: ssl.SSLContext | None = None
    login: tuple[str, str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.patience_s >= self.duplicate_window_s:
            raise ValueError("patience_s must be below duplicate_window_s")


class FenceError(Exception):
    """The subject was written to since; nothing was written."""


class BrokerConnection:
    """Ask brokers and send to them.

    Args:
        address: Where they are.
        options: How long is waited for them.
    """

    def __init__(self, address: BrokerAddress, options: BrokerOptions) -> None:
        self._address = address
        self.options = options
        self.location = address.location
        self.on_reconnect: Callable[[], None] | None = None
        self._client: Client | None = None
        self._jetstream: JetStreamContext | None = None
        self._lost_at: float | None = None

    async def connect(self) -> None:
        """Connect to one of the brokers.

        Raises:
            StoreUnavailableError: None of them answers, or it refuses us.
        """
        nats = import_nats()
        told: dict[bool, Exception] = {}

        async def note(error: Exception) -> None:
            # A refusal counts for more than the end of the connection that comes with it.
            told[broker_error(error, self.location).cause == "denied"] = error
            _LOG.debug("the broker's client: %r", error)

        client = nats.NATS()
        user, password = self.options.login or (None, None)
        try:
            await _within(
                self.options.connect_timeout_s,
                client.connect(
                    list(self._address.servers),
                    name=f"fmi-server {self._address.federation}",
                    error_cb=note,
                    disconnected_cb=self._disconnected,
                    reconnected_cb=self._reconnected,
                    connect_timeout=max(1, round(self.options.connect_timeout_s / 2)),
                    reconnect_time_wait=0.1,
                    max_reconnect_attempts=-1,
                    ping_interval=10,
                    max_outstanding_pings=2,
                    pending_size=0,
                    tls=self.options.tls,
                    user=user,
                    password=password,
                ),
            )
        except BaseException as error:
            with contextlib.suppress(Exception):
                await client.close()
            if not isinstance(error, Exception):
                raise
            found = broker_error(told.get(True) or told.get(False) or error, self.location)
            if found.cause == "no_answer" or isinstance(found.__cause__, ConnectionError):
                # What the last one said is of one of them.
                found = StoreUnavailableError(
                    "no_broker", detail="none of them answers", path=self.location
                )
            raise found from error
        self._client = client
        self._jetstream = client.jetstream(timeout=self.options.ack_timeout_s)

    async def close(self) -> None:
        """Disconnect; closing twice is no error."""
        client, self._client, self._jetstream = self._client, None, None
        if client is not None:
            await client.close()

    async def _disconnected(self) -> None:
        if self._client is not None:
            self._lost_at = time.monotonic()
            _LOG.warning("the connection to the broker of %s is lost", self.location)

    async def _reconnected(self) -> None:
        self._lost_at = None
        _LOG.info("connected again to a broker of %s", self.location)
        if self.on_reconnect is not None:
            self.on_reconnect()

    @property
    def client(self) -> Client:
        """The connection.

        Raises:
            StoreUnavailableError: There is none.
        """
        if self._client is None:
            raise self._closed()
        return self._client

    def _closed(self) -> StoreUnavailableError:
        return StoreUnavailableError("closed", detail="open() it before use", path=self.location)

    @property
    def jetstream(self) -> JetStreamContext:
        """The same, for what JetStream manages."""
        if self._jetstream is None:
            raise self._closed()
        return self._jetstream

    @property
    def largest_message(self) -> int:
        """Bytes of data that one message takes."""
        payload: int = self.client.max_payload
        return payload - _HEADER_ROOM

    # Asking

    async def ensure_stream(self, config: StreamConfig) -> StreamInfo:
        """Make a stream if there is none of its name; one that is there is left as it is. Return which it is.

        Raises:
            StoreUnavailableError: It cannot be made, or that is not answered.
        """
        name = str(config.name)
        try:
            # To make it twice changes nothing.
            await self.ask(lambda: self.jetstream.add_stream(config))
        except StoreUnavailableError as error:
            if getattr(error.__cause__, "err_code", None) != STREAM_EXISTS:
                raise
        found = await self.stream_info(name)
        kept = found.config.num_replicas or 1
        if kept < self.options.replicas:
            _LOG.warning(
                "%s: the brokers keep fewer copies of the stream %s than asked for, %d and not %d: that was "
                "set when it was made, and is theirs to change (nats stream edit %s --replicas %d)",
                self.location,
                name,
                kept,
                self.options.replicas,
                name,
                self.options.replicas,
            )
        return found

    async def stream_info(self, stream: str, *, subjects: str | None = None) -> StreamInfo:
        """Return what the leader of a stream knows of it; with the subjects that match, where asked for."""
        return await self.ask(lambda: self.jetstream.stream_info(stream, subjects))

    async def message(self, stream: str, sequence: int) -> RawStreamMsg | None:
        """Return the message at a place, as the leader has it."""
        return await self._find(lambda: self.jetstream.get_msg(stream, seq=sequence))

    async def last_message(self, stream: str, subject: str) -> RawStreamMsg | None:
        """Return the last message under a subject, as the leader has it."""
        return await self._find(lambda: self.jetstream.get_last_msg(stream, subject))

    async def _find(self, question: Callable[[], Awaitable[RawStreamMsg]]) -> RawStreamMsg | None:
        nats = import_nats()
        try:
            return await self.ask(question)
        except nats.js.errors.NotFoundError:
            return None

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Ask what changes nothing, until it is answered or the time is over.

        Raises:
            NotFoundError: The client's: what is asked for is not there, but its stream is.
            StoreUnavailableError: It is not answered.
        """
        nats = import_nats()
        deadline = time.monotonic() + self.options.patience_s
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return await uncancelled(question())
            except StoreUnavailableError:
                raise
            except Exception as error:
                found = broker_error(error, self.location)
                missing = isinstance(error, nats.js.errors.NotFoundError)
                if missing and found.cause != "no_stream":
                    raise
                if is_refusal(error) or self._is_over(deadline, pause):
                    raise found from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _is_over(self, deadline: float, pause: float) -> bool:
        """Tell whether to give up: the time is over, or the brokers have been away for as long already."""
        now = time.monotonic()
        away = self._lost_at is not None and now - self._lost_at > self.options.patience_s
        return away or now + pause >= deadline

    # Sending

    async def send(
        self,
        stream: str,
        subject: str,
        data: bytes,
        *,
        message_id: str,
        expected_last: int | None = None,
        headers: Mapping[str, str] | None = None,
        deadline: float | None = None,
    ) -> int:
        """Send a message until it is acknowledged, refused, or the time is over; return its place.

        Args:
            stream: Which it is for.
            subject: What it stands under.
            data: What it holds.
            message_id: Under which the brokers know a repeat.
            expected_last: The last message that may stand under the subject; None for any.
            headers: More of them.
            deadline: By the monotonic clock; None for `patience_s` from now.

        Raises:
            FenceError: Another message stands there.
            StoreUnavailableError: Nothing was written; with the cause `no_answer` it is not known.
        """
        heads = {**(headers or {}), _MESSAGE_ID: message_id}
        if expected_last is not None:
            heads[_EXPECTED_LAST] = str(expected_last)
        if deadline is None:
            deadline = time.monotonic() + self.options.patience_s
        pause = _FIRST_PAUSE_S
        in_doubt: Exception | None = None
        while True:
            timeout = min(self.options.ack_timeout_s, max(0.05, deadline - time.monotonic()))
            try:
                ack = await uncancelled(
                    self.jetstream.publish(
                        subject, data, timeout=timeout, stream=stream, headers=heads
                    )
                )
                return int(ack.seq)
            except StoreUnavailableError:
                raise
            except Exception as error:
                if getattr(error, "err_code", None) in WRONG_LAST_SEQUENCE:
                    place = await self._place_of(stream, subject, message_id)
                    if place is None:
                        raise FenceError from error
                    return place
                found = broker_error(error, self.location)
                if is_refusal(error):
                    raise in_doubt or found from error
                if found.cause == "no_answer":
                    in_doubt = found
                if self._is_over(deadline, pause):
                    raise in_doubt or found from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _place_of(self, stream: str, subject: str, message_id: str) -> int | None:
        """Return the place of the last message under a subject if it is this one; None otherwise.

        The brokers compare what is expected before they look for a repeat: what is sent again because its
        acknowledgement was lost is refused on account of itself.
        """
        found = await self.last_message(stream, subject)
        if found is None or (found.headers or {}).get(_MESSAGE_ID) != message_id:
            return None
        return int(found.seq or 0)


async def _within(limit_s: float, connecting: Coroutine[Any, Any, None]) -> None:
    """Let the client connect for some seconds and no longer.

    It may overhear that it is cancelled, as `uncancelled` says, and would then try again for ever: it is
    cancelled until it has ended.

    Raises:
        TimeoutError: It did not connect in time.
    """
    task = asyncio.ensure_future(connecting)
    try:
        async with asyncio.timeout(limit_s):
            await asyncio.shield(task)
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_FIRST_PAUSE_S)


async def uncancelled(request: Awaitable[T]) -> T:
    """Wait for a request of the client, and be cancelled where the client has overheard it.

    It waits with `asyncio.wait_for`, which before Python 3.12 drops a cancellation that comes together with
    the answer.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        return await request
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
