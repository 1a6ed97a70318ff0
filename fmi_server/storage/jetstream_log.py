"""The log of a federation at the brokers: one stream, which takes writes in one order and gives them back.

What is written here is what the guarantees rest on:

* A write is answered once the brokers have acknowledged it. What that is worth is set at the brokers: see
  `jetstream`.
* A write is sent again under the same id until it is acknowledged or the time for it is over, which is
  shorter than the brokers' window of de-duplication. Nothing is buffered for a broker that is not there:
  the client would send it whenever the connection comes back, long after its writer has given up.
* Entries come from a consumer of our own making. It begins behind the last entry taken, and is made anew
  when one is missing, when the heartbeat fails, and after each reconnect. (The client's ordered consumer
  does not notice missed heartbeats.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from fmi_server.storage.base import StoreCorruptError, StoreUnavailableError
from fmi_server.storage.jetstream_errors import (
    STREAM_EXISTS,
    WRONG_LAST_SEQUENCE,
    broker_error,
    import_nats,
    is_refusal,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from nats.aio.client import Client
    from nats.js import JetStreamContext

    from fmi_server.storage.jetstream_names import BrokerAddress, LogNames
    from fmi_server.storage.jetstream_view import ViewPosition

__all__ = [
    "BrokerLog",
    "FenceError",
    "LogBehindError",
    "LogOptions",
    "LogState",
    "entry_identity",
    "uncancelled",
]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_EPOCH_KEY = "fmi_history_epoch"
_PART_HEADER = "Fmi-Part"
_MESSAGE_ID = "Nats-Msg-Id"
_EXPECTED_LAST = "Nats-Expected-Last-Subject-Sequence"
_HEADER_ROOM = 1024
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5


@dataclass(frozen=True, slots=True)
class LogOptions:
    """How the stream is made, and how long is waited for the brokers.

    The first three count where the stream is made, by whoever comes first; later they are the operator's, at
    the brokers.

    Attributes:
        replicas: Brokers that keep the stream: 1, 3 or 5. With 3 it survives the loss of one.
        max_bytes: Refuse what would make it larger, with `StoreUnavailableError` (`disk_full`); None for no
            limit.
        duplicate_window_s: For how long the brokers know the id of a write; above `patience_s`.
        connect_timeout_s: For how long to try to connect when the store is opened.
        ack_timeout_s: After so long without an acknowledgement a write is sent again.
        patience_s: After so long without one the writer is told `no_answer`.
        heartbeat_s: How often a broker says that the log is quiet; twice as long without is a lost consumer.
    """

    replicas: int = 1
    max_bytes: int | None = None
    duplicate_window_s: float = 120.0
    connect_timeout_s: float = 5.0
    ack_timeout_s: float = 2.0
    patience_s: float = 15.0
    heartbeat_s: float = 2.0

    def __post_init__(self) -> None:
        if self.patience_s >= self.duplicate_window_s:
            raise ValueError("patience_s must be below duplicate_window_s")


@dataclass(frozen=True, slots=True)
class LogState:
    """What the log holds: its epoch, and the first and last entry. An empty one has first = last + 1."""

    epoch: str
    first: int
    last: int
    bytes: int


class FenceError(Exception):
    """The subject was written to since; nothing was written."""


class LogBehindError(Exception):
    """Entries that the view needs are no longer in the log, but in a snapshot."""

    def __init__(self, *, wanted: int, first: int) -> None:
        super().__init__(f"entry {wanted} is wanted, the log begins at {first}")


class BrokerLog:
    """Write to the log and follow it."""

    def __init__(self, address: BrokerAddress, names: LogNames, options: LogOptions) -> None:
        self._address = address
        self._names = names
        self.options = options
        self.location = address.location
        self._client: Client | None = None
        self.on_reconnect: Callable[[], None] | None = None
        self._lost_at: float | None = None
        self.epoch = ""

    @property
    def stream(self) -> str:
        """The stream that it is."""
        return self._names.stream

    # The connection

    async def connect(self) -> None:
        """Connect to one of the brokers.

        Raises:
            StoreUnavailableError: None of them answers, or it refuses us.
        """
        nats = import_nats()
        last: list[Exception] = []

        async def note(error: Exception) -> None:
            last[:] = [error]
            _LOG.debug("the broker's client: %r", error)

        client = nats.NATS()
        try:
            async with asyncio.timeout(self.options.connect_timeout_s):
                await client.connect(
                    list(self._address.servers),
                    name=f"fmi-server {self._names.federation}",
                    error_cb=note,
                    disconnected_cb=self._disconnected,
                    reconnected_cb=self._reconnected,
                    connect_timeout=max(1, round(self.options.connect_timeout_s / 2)),
                    reconnect_time_wait=0.1,
                    max_reconnect_attempts=-1,
                    ping_interval=10,
                    max_outstanding_pings=2,
                    pending_size=0,
                )
        except BaseException as error:
            with contextlib.suppress(Exception):
                await client.close()
            if not isinstance(error, Exception):
                raise
            cause = last[0] if last else error
            found = broker_error(cause, self.location)
            if found.cause == "no_answer":
                found = StoreUnavailableError(
                    "no_broker", detail="none of them answers", path=self.location
                )
            raise found from error
        self._client = client

    async def close(self) -> None:
        """Disconnect; closing twice is no error."""
        client, self._client = self._client, None
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
            raise StoreUnavailableError("closed", detail="open() it before use", path=self.location)
        return self._client

    @property
    def jetstream(self) -> JetStreamContext:
        """The same, for what JetStream manages."""
        return self.client.jetstream(timeout=self.options.ack_timeout_s)

    @property
    def largest_entry(self) -> int:
        """Bytes of data that one entry takes."""
        payload: int = self.client.max_payload
        return payload - _HEADER_ROOM

    # The stream

    async def create(self, epoch: str) -> LogState:
        """Make the stream if there is none; return its state.

        Args:
            epoch: Of a history that would begin now.
        """
        nats = import_nats()
        api, options = nats.js.api, self.options
        config = api.StreamConfig(
            name=self.stream,
            description="The log of an FMI federation. Only its servers write to it.",
            subjects=[self._names.all_subjects],
            storage=api.StorageType.FILE,
            retention=api.RetentionPolicy.LIMITS,
            discard=api.DiscardPolicy.NEW,
            max_bytes=options.max_bytes if options.max_bytes is not None else -1,
            num_replicas=options.replicas,
            duplicate_window=options.duplicate_window_s,
            allow_direct=False,
            metadata={_EPOCH_KEY: epoch},
        )
        try:
            await uncancelled(self.jetstream.add_stream(config))
        except Exception as error:
            code = getattr(error, "err_code", None)
            if code != STREAM_EXISTS:
                raise broker_error(error, self.location) from error
        state = await self.state()
        self.epoch = state.epoch
        return state

    async def state(self) -> LogState:
        """Return what the log holds, as the leader knows it."""
        info = await self._ask(lambda: self.jetstream.stream_info(self.stream))
        metadata: Mapping[str, str] = info.config.metadata or {}
        epoch = metadata.get(_EPOCH_KEY)
        if epoch is None:
            raise StoreCorruptError(
                path=self.location, detail=f"the stream {self._names.stream} is not one of ours"
            )
        return LogState(epoch, info.state.first_seq, info.state.last_seq, info.state.bytes)

    async def check(self, position: ViewPosition) -> None:
        """See that the log is the one that a view was made of, and goes on behind it.

        Raises:
            LogBehindError: The next entry is no longer in the log.
            StoreCorruptError: It is another log, or has lost or changed what the view has.
        """
        state, sequence = await self.state(), position.sequence
        if state.epoch != self.epoch:
            raise StoreCorruptError(path=self.location, detail="it is another log than before")
        if sequence + 1 < state.first:
            raise LogBehindError(wanted=sequence + 1, first=state.first)
        held = state.first <= sequence <= state.last
        found = await self.command_id_at(sequence) if held and sequence else None
        if sequence > state.last or (found is not None and found != position.command_id):
            raise StoreCorruptError(
                path=self.location,
                detail=f"it has {state.last} entries and not the {sequence} that this replica has seen: "
                "the brokers lost what they had acknowledged, or were set back",
            )

    async def last_of(self, subject: str) -> int:
        """Return the last entry under a subject that is in the log, 0 for none, as the leader has it."""
        nats = import_nats()
        try:
            found = await self._ask(lambda: self.jetstream.get_last_msg(self.stream, subject))
        except nats.js.errors.NotFoundError:
            return 0
        return int(found.seq or 0)

    async def command_id_at(self, sequence: int) -> str | None:
        """Return the id of the command of an entry, as the leader has it; None where there is none."""
        nats = import_nats()
        try:
            found = await self._ask(lambda: self.jetstream.get_msg(self.stream, seq=sequence))
        except nats.js.errors.NotFoundError:
            return None
        return entry_identity(found.headers or {})[0]

    async def trim(self, *, below: int) -> None:
        """Drop the entries below one; they are in a snapshot."""
        # Some versions take "below 1" for "all".
        if below <= 1:
            return
        try:
            await uncancelled(self.jetstream.purge_stream(self.stream, seq=below))
        except Exception as error:
            raise broker_error(error, self.location) from error

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T:
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

    # Writing

    async def write(
        self, subject: str, command_id: str, data: bytes, *, expected_last: int | None = None
    ) -> int:
        """Write a command, in as many entries as it needs; return the place of the last one.

        Args:
            subject: What it stands under.
            command_id: Names the command for ever.
            data: Its bytes.
            expected_last: The last entry that may stand under the subject; None for any.

        Raises:
            FenceError: Another one stands there.
            StoreUnavailableError: Nothing was written; with the cause `no_answer` it is not known.
        """
        size = self.largest_entry
        parts = max(1, -(-len(data) // size))
        deadline = time.monotonic() + self.options.patience_s
        for number in range(1, parts):
            headers = {_MESSAGE_ID: f"{command_id}-{number}", _PART_HEADER: f"{number}/{parts}"}
            piece = data[(number - 1) * size : number * size]
            await self._send(self._names.subject("parts"), piece, headers, deadline)
        headers = {_MESSAGE_ID: command_id}
        if parts > 1:
            headers[_PART_HEADER] = f"{parts}/{parts}"
            data = data[(parts - 1) * size :]
        if expected_last is not None:
            headers[_EXPECTED_LAST] = str(expected_last)
        return await self._send(subject, data, headers, deadline)

    async def _send(
        self, subject: str, data: bytes, headers: dict[str, str], deadline: float
    ) -> int:
        """Send until it is acknowledged, refused, or the time is over."""
        pause = _FIRST_PAUSE_S
        in_doubt: Exception | None = None
        while True:
            timeout = min(self.options.ack_timeout_s, max(0.05, deadline - time.monotonic()))
            try:
                ack = await uncancelled(
                    self.jetstream.publish(
                        subject, data, timeout=timeout, stream=self.stream, headers=headers
                    )
                )
                return int(ack.seq)
            except StoreUnavailableError:
                raise
            except Exception as error:
                if getattr(error, "err_code", None) in WRONG_LAST_SEQUENCE:
                    raise FenceError from error
                if is_refusal(error):
                    raise broker_error(error, self.location) from error
                found = broker_error(error, self.location)
                if found.cause == "no_answer":
                    in_doubt = found
                if self._is_over(deadline, pause):
                    raise in_doubt or found from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


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


def entry_identity(headers: Mapping[str, str]) -> tuple[str, int, int]:
    """Return whose entry it is: the id of the command, the number of the part, and how many there are."""
    command_id = headers.get(_MESSAGE_ID, "")
    part, parts = 1, 1
    if _PART_HEADER in headers:
        part, parts = map(int, headers[_PART_HEADER].split("/"))
        if part < parts:
            command_id = command_id.rpartition("-")[0]
    return command_id, part, parts
