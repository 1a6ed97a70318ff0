"""The updates that were published: as events that all subscriptions share, in memory and beyond it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import update_pb2
from fmi_server.feed_requests import Key

__all__ = ["PublishedUpdate", "UpdateLog", "UpdateReader", "resume_token"]

_LENGTH_DELIMITED: Final = 2
_UPDATE_TAG: Final = bytes(
    [wire_pb2.SubscribeResponse.UPDATE_FIELD_NUMBER << 3 | _LENGTH_DELIMITED]
)


@dataclass(frozen=True, slots=True)
class PublishedUpdate:
    """An update, serialised once however many subscribers there are.

    Attributes:
        key: Its cohort and kind.
        revision: Its revision.
        sequence: Its place among all updates.
        event: The serialised `SubscribeResponse` that carries it.
        size: Bytes of the serialised `Update`, which are the last of `event`.
    """

    key: Key
    revision: int
    sequence: int
    event: bytes
    size: int

    @classmethod
    def from_payload(
        cls, key: Key, revision: int, sequence: int, payload: bytes, *, history_epoch: str
    ) -> PublishedUpdate:
        """Frame a serialised update as an event of a history, without decoding it.

        The history goes behind the update: of a field that stands twice the last one counts (protobuf's
        encoding guide), and what was stored before a backup was restored names the history of that time.
        """
        payload += update_pb2.Update(history_epoch=history_epoch).SerializeToString()
        head = wire_pb2.SubscribeResponse(resume_token=resume_token(history_epoch, sequence))
        event = head.SerializeToString() + _UPDATE_TAG + _varint(len(payload)) + payload
        return cls(key, revision, sequence, event, len(payload))

    @property
    def payload(self) -> bytes:
        """The serialised `Update`."""
        return self.event[len(self.event) - self.size :]


class UpdateReader(Protocol):
    """Reads published updates that are no longer in memory."""

    async def since(self, sequence: int, limit: int) -> Sequence[PublishedUpdate]:
        """Return up to `limit` updates behind a sequence, in order of sequence."""

    async def one(self, key: Key, revision: int) -> PublishedUpdate | None:
        """Return one update, or None where it is not kept."""

    async def oldest(self, key: Key) -> int:
        """Return the oldest revision kept; 0 where there is none."""

    async def oldest_places(self, keys: Sequence[Key]) -> Mapping[Key, tuple[int, int]]:
        """Return the revision and the sequence of the oldest update kept, by key."""


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
        """Add the next update.

        Where other servers publish too, some before it may be trimmed already: older ones are then read from
        the store.
        """
        if update.sequence != self.head + 1:
            self.recent.clear()
        self.head = update.sequence
        self.latest[update.key] = update
        self.recent.append(update)

    def newest_revision(self, key: Key) -> int:
        """Return the newest revision of a key; 0 where there is none."""
        latest = self.latest.get(key)
        return latest.revision if latest else 0

    def since(self, sequence: int, limit: int) -> Sequence[PublishedUpdate] | None:
        """Return up to `limit` updates behind a sequence, or None where the next is not in memory."""
        if sequence >= self.head:
            return []
        if not self.recent or self.recent[0].sequence > sequence + 1:
            return None
        skip = sequence + 1 - self.recent[0].sequence
        return list(islice(self.recent, skip, skip + limit))


def resume_token(history_epoch: str, sequence: int) -> str:
    """Write a position in a history as a resume token."""
    return f"{history_epoch}:{sequence}"


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
