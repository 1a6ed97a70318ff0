"""What an outbox keeps, and the store that forgets it with the process."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from fmi.v1 import packet_pb2
from fmi_client._translation import REASON_CLASSES, reason_name
from fmi_client.errors import FMIError

__all__ = ["DIGEST_BYTES", "Item", "MemoryStore", "RefusedPacket", "Store", "digest", "error_of"]

DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Item:
    """A packet that waits, without its bytes.

    Attributes:
        sequence: Its place in the outbox; rising.
        site: The packet's `domain_id`.
        packet_id: The packet's id.
        digest: Of its bytes; see `digest`.
        size: Its bytes.
        spooled_at: When it was taken, Unix time in seconds.
    """

    sequence: int
    site: str
    packet_id: str
    digest: bytes
    size: int
    spooled_at: float

    @property
    def key(self) -> tuple[str, str]:
        """What the server knows the packet by."""
        return self.site, self.packet_id


@dataclass(frozen=True, slots=True)
class RefusedPacket:
    """A packet that the server refused for good.

    Attributes:
        packet: The packet.
        error: Why it was refused.
        refused_at: When the answer came, in UTC.
    """

    packet: packet_pb2.Packet
    error: FMIError
    refused_at: dt.datetime


class Store(Protocol):
    """Keeps packets in their order. Every method is one step: it happens as a whole or not at all."""

    def load(self) -> list[Item]:
        """Return what waits, in order."""
        ...

    def append(self, items: Sequence[tuple[Item, bytes]], *, dropped: Sequence[int]) -> None:
        """Keep packets, and forget those with the sequences `dropped`. Return when that is safe."""
        ...

    def read(self, items: Sequence[Item]) -> list[bytes]:
        """Return the bytes of packets."""
        ...

    def settle(self, sequences: Sequence[int], refused: Sequence[RefusedPacket]) -> None:
        """Forget packets, and keep what was refused of them beside, the newest only."""
        ...

    def refused(self) -> list[RefusedPacket]:
        """Return what was refused, oldest first."""
        ...

    def close(self) -> None:
        """Let go of what the store holds. Closing twice does nothing."""
        ...


class MemoryStore:
    """Keeps packets as long as the process lives.

    Args:
        keep_refused: The most refused packets that are kept.
    """

    def __init__(self, keep_refused: int) -> None:
        self._data: dict[int, bytes] = {}
        self._refused: list[RefusedPacket] = []
        self._keep_refused = keep_refused

    def load(self) -> list[Item]:
        """Return nothing: no earlier process left anything."""
        return []

    def append(self, items: Sequence[tuple[Item, bytes]], *, dropped: Sequence[int]) -> None:
        """Keep packets, and forget those with the sequences `dropped`."""
        for sequence in dropped:
            self._data.pop(sequence, None)
        self._data.update((item.sequence, data) for item, data in items)

    def read(self, items: Sequence[Item]) -> list[bytes]:
        """Return the bytes of packets."""
        return [self._data[item.sequence] for item in items]

    def settle(self, sequences: Sequence[int], refused: Sequence[RefusedPacket]) -> None:
        """Forget packets, and keep what was refused of them beside, the newest only."""
        for sequence in sequences:
            self._data.pop(sequence, None)
        kept = [*self._refused, *refused]
        self._refused = kept[max(0, len(kept) - self._keep_refused) :]

    def refused(self) -> list[RefusedPacket]:
        """Return what was refused, oldest first."""
        return list(self._refused)

    def close(self) -> None:
        """Do nothing: refused packets can still be looked at."""


def digest(data: bytes) -> bytes:
    """Return what tells one packet's bytes from others, and damage from what was written."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def error_of(reason: str, message: str) -> FMIError:
    """Build the error of a reason's name, as it was before it was written down."""
    kinds = {reason_name(value): kind for value, kind in REASON_CLASSES.items()}
    return kinds.get(reason, FMIError)(message, reason=reason)
