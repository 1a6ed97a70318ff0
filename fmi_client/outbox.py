"""The outbox: packets wait in it, in order, until the server has answered for them.

    client = FMIClient(target, domain_id="site_001", outbox=FileOutbox("site_001.outbox"))
    client.emit_msp(controller={"tau": 0.9})  # returns when the packet is on the site's disk

`Outbox` keeps packets in memory: they outlive an outage of the server. `FileOutbox` keeps them in a file:
they outlive the site's process as well.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from fmi.v1 import packet_pb2
from fmi_client._arguments import check_path, check_whole
from fmi_client._fork import check_process
from fmi_client._outbox_file import FileStore
from fmi_client._outbox_store import Item, MemoryStore, RefusedPacket, Store, digest
from fmi_client.errors import (
    ConfigurationError,
    FMIError,
    OutboxFullError,
    PacketIdReusedError,
    PacketTooLargeError,
)
from fmi_client.receipts import EmitStatus, Receipt

__all__ = [
    "KEEP_REFUSED",
    "MAX_BYTES",
    "MAX_PACKETS",
    "FileOutbox",
    "OnRefused",
    "Outbox",
    "OutboxStatistics",
    "RefusedPacket",
    "WhenFull",
]

MAX_PACKETS: Final = 10_000
MAX_BYTES: Final = 64 * 1024 * 1024
KEEP_REFUSED: Final = 100

WhenFull: TypeAlias = Literal["refuse", "drop_oldest"]
OnRefused: TypeAlias = Callable[[packet_pb2.Packet, FMIError], None]

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OutboxStatistics:
    """What became of packets since the outbox was opened. Each taken packet is settled once.

    Attributes:
        spooled: Packets taken.
        sent: Packets that the server answered for: accepted, duplicate or quarantined.
        duplicates: Those of them that the server had already, from an attempt without an answer.
        quarantined: Those of them that do not count until an operator says so.
        refused: Packets that the server refused for good.
        dropped: Packets given up because newer ones needed their room. One that was under way may have
            reached the server all the same.
        retried: Attempts, each with one packet or a batch, that failed and were followed by another.
        waiting: Packets in the outbox now, those of earlier processes included.
        bytes: Their bytes.
        oldest_age_s: Seconds since the first of them was taken; 0 where none waits.
    """

    spooled: int = 0
    sent: int = 0
    duplicates: int = 0
    quarantined: int = 0
    refused: int = 0
    dropped: int = 0
    retried: int = 0
    waiting: int = 0
    bytes: int = 0
    oldest_age_s: float = 0.0


class Outbox:
    """A bounded outbox in memory, for one client at a time.

    Args:
        max_packets: The most packets that wait.
        max_bytes: The most bytes that they have in all.
        when_full: ``refuse`` raises `OutboxFullError` for a packet that does not fit; ``drop_oldest``
            gives up the packets that have waited longest, counts them, and tells the log once an outage.
        on_refused: Called with each packet that the server refuses for good, and why. It runs in the
            client's event loop, so it must not block or use the client; what it raises goes to the log.
        keep_refused: The most of these packets that `refused` keeps, the newest.

    Raises:
        ConfigurationError: A bound is below 1, the policy is not known, or an argument is of a wrong type.
    """

    blocks = False
    """Whether its steps wait for a disk, and so do not belong into an event loop."""

    def __init__(
        self,
        *,
        max_packets: int = MAX_PACKETS,
        max_bytes: int = MAX_BYTES,
        when_full: WhenFull = "refuse",
        on_refused: OnRefused | None = None,
        keep_refused: int = KEEP_REFUSED,
    ) -> None:
        check_whole("Outbox: max_packets", max_packets)
        check_whole("Outbox: max_bytes", max_bytes)
        check_whole("Outbox: keep_refused", keep_refused)
        if not (on_refused is None or callable(on_refused)):
            raise ConfigurationError("Outbox: on_refused must be a function or None")
        if max_packets < 1 or max_bytes < 1 or keep_refused < 1:
            raise ConfigurationError("Outbox: max_packets, max_bytes, keep_refused: at least 1")
        if when_full not in ("refuse", "drop_oldest"):
            raise ConfigurationError("Outbox: when_full must be 'refuse' or 'drop_oldest'")
        self._max_packets = max_packets
        self._max_bytes = max_bytes
        self._when_full = when_full
        self._on_refused = on_refused
        self._pid = os.getpid()
        self._owned = False
        # Held over a whole step, its disk included; the other only while the index changes.
        self._turn = threading.Lock()
        self._index_lock = threading.Lock()
        self._store = self._open_store(keep_refused)
        self._waiting = {item.sequence: item for item in self._store.load()}
        self._sequences = {item.key: item.sequence for item in self._waiting.values()}
        self._bytes = sum(item.size for item in self._waiting.values())
        self._next_sequence = max(self._waiting, default=0) + 1
        self._spooled = self._sent = self._duplicates = self._quarantined = 0
        self._refused = self._dropped = self._retried = 0
        self._dropped_in_outage = 0

    def __len__(self) -> int:
        """Return the number of packets that wait."""
        return len(self._waiting)

    @property
    def statistics(self) -> OutboxStatistics:
        """What became of packets up to now."""
        with self._index_lock:
            oldest = next(iter(self._waiting.values()), None)
            return OutboxStatistics(
                spooled=self._spooled,
                sent=self._sent,
                duplicates=self._duplicates,
                quarantined=self._quarantined,
                refused=self._refused,
                dropped=self._dropped,
                retried=self._retried,
                waiting=len(self._waiting),
                bytes=self._bytes,
                oldest_age_s=max(0.0, time.time() - oldest.spooled_at) if oldest else 0.0,
            )

    @property
    def refused(self) -> tuple[RefusedPacket, ...]:
        """The newest packets that the server refused for good, oldest first.

        Raises:
            OutboxError: They cannot be read.
            ClientClosedError: The outbox is a file, and closed.
        """
        return tuple(self._store.refused())

    def close(self) -> None:
        """Let go of what it holds; its client does so. Closing twice does nothing."""
        self._store.close()

    def _open_store(self, keep_refused: int) -> Store:
        return MemoryStore(keep_refused)

    # What follows is for the client's sender.

    def acquire(self) -> None:
        """Give the outbox to a client; it stays its own.

        Raises:
            ConfigurationError: Another client has it.
            ForkedError: It was made in another process.
        """
        check_process(self._pid, "the outbox")
        if self._owned:
            raise ConfigurationError("an outbox belongs to one client; make another one")
        self._owned = True

    def put(self, packets: Sequence[packet_pb2.Packet]) -> list[Receipt]:
        """Take packets, all or none; return when they are as safe as the store makes them.

        A packet that waits already is not taken again.

        Raises:
            OutboxFullError: They do not fit, and `when_full` is "refuse".
            PacketTooLargeError: One is larger than the whole outbox.
            PacketIdReusedError: One has the id of another packet that waits.
            OutboxError: The file cannot take them.
            ForkedError: It was made in another process.
        """
        check_process(self._pid, "the outbox")
        with self._turn:
            entries = self._new_entries(packets)
            dropped = self._room_for(entries)
            if entries:
                self._store.append(entries, dropped=[item.sequence for item in dropped])
            with self._index_lock:
                self._forget(dropped)
                self._next_sequence += len(entries)
                for item, _ in entries:
                    self._waiting[item.sequence] = item
                    self._sequences[item.key] = item.sequence
                    self._bytes += item.size
                self._spooled += len(entries)
                self._dropped += len(dropped)
            self._tell_dropped(len(dropped))
        return [Receipt(packet.header.packet_id, EmitStatus.SPOOLED) for packet in packets]

    def head(self, max_packets: int, max_bytes: int) -> list[tuple[Item, bytes]]:
        """Return the packets that are to be sent next: at least one, if any waits."""
        check_process(self._pid, "the outbox")
        items: list[Item] = []
        with self._turn:
            size = 0
            for item in self._waiting.values():
                size += item.size
                if items and (len(items) >= max_packets or size > max_bytes):
                    break
                items.append(item)
            return list(zip(items, self._store.read(items), strict=True)) if items else []

    def settle(
        self, answered: Sequence[tuple[Item, Receipt]], refused: Sequence[RefusedPacket]
    ) -> None:
        """Forget packets that the server answered for; `refused` are those that it refused."""
        with self._turn:
            self._store.settle([item.sequence for item, _ in answered], refused)
            with self._index_lock:
                settled = [pair for pair in answered if pair[0].sequence in self._waiting]
                self._forget([item for item, _ in settled])
                statuses = [receipt.status for _, receipt in settled]
                self._refused += statuses.count(EmitStatus.REFUSED)
                self._sent += len(statuses) - statuses.count(EmitStatus.REFUSED)
                self._duplicates += statuses.count(EmitStatus.DUPLICATE)
                self._quarantined += statuses.count(EmitStatus.QUARANTINED)
        if self._dropped_in_outage:
            _log.warning("outbox: %d packets were dropped until now", self._dropped_in_outage)
            self._dropped_in_outage = 0

    def tell_refused(self, refused: RefusedPacket) -> None:
        """Tell the log and the callback of a packet that was refused."""
        header = refused.packet.header
        _log.error(
            "outbox: packet %s of %s was refused: %s",
            header.packet_id,
            header.domain_id,
            refused.error,
        )
        if self._on_refused is None:
            return
        try:
            self._on_refused(refused.packet, refused.error)
        except Exception:
            _log.exception("on_refused failed")

    def note_retry(self) -> None:
        """Count an attempt that failed and is followed by another."""
        with self._index_lock:
            self._retried += 1

    def _new_entries(self, packets: Sequence[packet_pb2.Packet]) -> list[tuple[Item, bytes]]:
        entries: list[tuple[Item, bytes]] = []
        taken: dict[tuple[str, str], bytes] = {}
        now = time.time()
        for packet in packets:
            # Deterministic, so that a packet is told from another one with its id.
            data = packet.SerializeToString(deterministic=True)
            header = packet.header
            item = Item(
                self._next_sequence + len(entries),
                header.domain_id,
                header.packet_id,
                digest(data),
                len(data),
                now,
            )
            known = taken.get(item.key)
            if known is None and item.key in self._sequences:
                known = self._waiting[self._sequences[item.key]].digest
            if known is None:
                taken[item.key] = item.digest
                entries.append((item, data))
            elif known != item.digest:
                raise PacketIdReusedError(
                    f"packet {item.packet_id} waits in the outbox with other content",
                    reason="PACKET_ID_REUSED",
                )
        return entries

    def _room_for(self, entries: Sequence[tuple[Item, bytes]]) -> list[Item]:
        """Return the packets that must go so that `entries` fit."""
        size = sum(item.size for item, _ in entries)
        if size > self._max_bytes or len(entries) > self._max_packets:
            raise PacketTooLargeError(
                f"{len(entries)} packets of {size} bytes are more than the whole outbox takes: "
                f"{self._max_packets} packets, {self._max_bytes} bytes",
                reason="PACKET_TOO_LARGE",
            )
        packets_over = len(self._waiting) + len(entries) - self._max_packets
        bytes_over = self._bytes + size - self._max_bytes
        if packets_over <= 0 and bytes_over <= 0:
            return []
        if self._when_full == "refuse":
            raise OutboxFullError(
                f"the outbox is full: {len(self._waiting)} packets of at most {self._max_packets}, "
                f"{self._bytes} bytes of at most {self._max_bytes} wait for the server"
            )
        dropped = []
        for item in self._waiting.values():
            if packets_over <= 0 and bytes_over <= 0:
                break
            dropped.append(item)
            packets_over -= 1
            bytes_over -= item.size
        return dropped

    def _forget(self, items: Sequence[Item]) -> None:
        for item in items:
            del self._waiting[item.sequence]
            del self._sequences[item.key]
            self._bytes -= item.size

    def _tell_dropped(self, packets: int) -> None:
        if packets and not self._dropped_in_outage:
            _log.warning("outbox: full; the packets that have waited longest are dropped")
        self._dropped_in_outage += packets


class FileOutbox(Outbox):
    """A bounded outbox in a file, for one process at a time.

    A packet is on the disk when `emit` returns, and leaves it when the server has answered; a process
    that dies in between sends it again under the same id, so that it counts once. The file is an SQLite
    database with a write-ahead log beside it; it must be on a local disk.

    Args:
        path: The file; made where there is none, and kept.
        max_packets: As `Outbox`.
        max_bytes: As `Outbox`. The file is somewhat larger.
        when_full: As `Outbox`.
        on_refused: As `Outbox`.
        keep_refused: As `Outbox`; they are kept in the file.

    Raises:
        OutboxLockedError: Another process has it open, or this one has already.
        OutboxCorruptError: The file is damaged, or no outbox. It is left as it is.
        OutboxUnavailableError: The file cannot be opened.
    """

    blocks = True

    def __init__(
        self,
        path: str | Path,
        *,
        max_packets: int = MAX_PACKETS,
        max_bytes: int = MAX_BYTES,
        when_full: WhenFull = "refuse",
        on_refused: OnRefused | None = None,
        keep_refused: int = KEEP_REFUSED,
    ) -> None:
        check_path("FileOutbox: path", path)
        self.path = Path(path)
        super().__init__(
            max_packets=max_packets,
            max_bytes=max_bytes,
            when_full=when_full,
            on_refused=on_refused,
            keep_refused=keep_refused,
        )

    def _open_store(self, keep_refused: int) -> Store:
        return FileStore(self.path, keep_refused)
