"""The log of a federation at the brokers: one stream, which takes writes in one order and gives them back.

Its entries have numbers without gaps. The oldest go once they are in a snapshot; nothing else ever goes.
What an acknowledged entry is worth is set at the brokers: see `jetstream`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmi_server.storage.base import StoreCorruptError, StoreUnavailableError
from fmi_server.storage.jetstream_broker import uncancelled
from fmi_server.storage.jetstream_errors import broker_error, import_nats

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nats.js.api import StreamInfo

    from fmi_server.storage.jetstream_broker import BrokerConnection
    from fmi_server.storage.jetstream_names import LogNames
    from fmi_server.storage.jetstream_view import ViewPosition

__all__ = ["BrokerLog", "LogBehindError", "LogState", "entry_identity"]

_EPOCH_KEY = "fmi_history_epoch"
_PART_HEADER = "Fmi-Part"


@dataclass(frozen=True, slots=True)
class LogState:
    """What the log holds.

    Attributes:
        epoch: The name of the history.
        first: The oldest entry that is there; above `last` where none is.
        last: The newest entry there ever was.
        size: Bytes of all that is there.
    """

    epoch: str
    first: int
    last: int
    size: int


class LogBehindError(Exception):
    """Entries that the view needs are no longer in the log, but in a snapshot."""

    def __init__(self, *, wanted: int, first: int) -> None:
        super().__init__(f"entry {wanted} is wanted, the log begins at {first}")


class BrokerLog:
    """Write to the log, and see how it stands."""

    def __init__(self, broker: BrokerConnection, names: LogNames) -> None:
        self.broker = broker
        self.names = names
        self.location = broker.location
        self.epoch = ""

    async def exists(self) -> bool:
        """Say whether there is a log, or a stream of its name."""
        try:
            await self.state()
        except StoreUnavailableError as error:
            if error.cause != "no_stream":
                raise
            return False
        except StoreCorruptError:
            pass
        return True

    async def create(self, epoch: str, *, first: int = 1) -> LogState:
        """Make the stream if there is none; return its state.

        Args:
            epoch: Of a history that would begin now.
            first: Its first entry then; what is before is in a snapshot that is there already.
        """
        api, options = import_nats().js.api, self.broker.options
        made = await self.broker.ensure_stream(
            api.StreamConfig(
                name=self.names.stream,
                description="The log of an FMI federation. Only its servers write to it.",
                subjects=[self.names.all_subjects],
                storage=api.StorageType.FILE,
                retention=api.RetentionPolicy.LIMITS,
                discard=api.DiscardPolicy.NEW,
                max_bytes=options.max_bytes if options.max_bytes is not None else -1,
                num_replicas=options.replicas,
                duplicate_window=options.duplicate_window_s,
                allow_direct=False,
                first_seq=first if first > 1 else None,
                metadata={_EPOCH_KEY: epoch},
            )
        )
        state = self._state(made)
        self.epoch = state.epoch
        return state

    async def state(self) -> LogState:
        """Return what the log holds, as the leader knows it."""
        return self._state(await self.broker.stream_info(self.names.stream))

    def _state(self, info: StreamInfo) -> LogState:
        metadata: Mapping[str, str] = info.config.metadata or {}
        epoch = metadata.get(_EPOCH_KEY)
        if epoch is None:
            raise StoreCorruptError(
                path=self.location, detail=f"the stream {self.names.stream} is not one of ours"
            )
        held = info.state
        return LogState(epoch, held.first_seq, held.last_seq, held.bytes)

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
        same = True
        if sequence and state.first <= sequence <= state.last:
            found = await self.broker.message(self.names.stream, sequence)
            same = found is None or entry_identity(found.headers or {})[0] == position.command_id
        if sequence > state.last or not same:
            raise StoreCorruptError(
                path=self.location,
                detail=f"it has {state.last} entries and not the {sequence} that this replica has seen: "
                "the brokers lost what they had acknowledged, or were set back",
            )

    async def last_of(self, subject: str) -> int:
        """Return the last entry under a subject that is in the log, 0 for none, as the leader has it."""
        found = await self.broker.last_message(self.names.stream, subject)
        return int(found.seq or 0) if found is not None else 0

    async def trim(self, *, below: int) -> None:
        """Drop the entries below one; they are in a snapshot."""
        # Some versions of the broker take "below 1" for "all".
        if below <= 1:
            return
        jetstream = self.broker.jetstream
        try:
            await uncancelled(jetstream.purge_stream(self.names.stream, seq=below))
        except Exception as error:
            raise broker_error(error, self.location) from error

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
        broker, stream = self.broker, self.names.stream
        size = broker.largest_message
        parts = max(1, -(-len(data) // size))
        deadline = time.monotonic() + broker.options.patience_s
        for number in range(1, parts):
            await broker.send(
                stream,
                self.names.subject("parts"),
                data[(number - 1) * size : number * size],
                message_id=f"{command_id}-{number}",
                headers={_PART_HEADER: f"{number}/{parts}"},
                deadline=deadline,
            )
        return await broker.send(
            stream,
            subject,
            data if parts == 1 else data[(parts - 1) * size :],
            message_id=command_id,
            expected_last=expected_last,
            headers={_PART_HEADER: f"{parts}/{parts}"} if parts > 1 else None,
            deadline=deadline,
        )


def entry_identity(headers: Mapping[str, str]) -> tuple[str, int, int]:
    """Return whose entry it is: the id of the command, the number of the part, and how many there are."""
    command_id = headers.get("Nats-Msg-Id", "")
    part, parts = 1, 1
    if _PART_HEADER in headers:
        part, parts = map(int, headers[_PART_HEADER].split("/"))
        if part < parts:
            command_id = command_id.rpartition("-")[0]
    return command_id, part, parts
