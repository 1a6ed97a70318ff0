"""What becomes of a packet that is emitted: from inspection to answer."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from google.protobuf.message import DecodeError

from fmi.plain import DEFAULT_COHORT
from fmi.v1 import packet_pb2
from fmi_server.access import TRUSTED, Principal
from fmi_server.contracts import FMIContractRegistry, PacketStatus
from fmi_server.counted_time import NewestSignals, counted_at_us
from fmi_server.errors import (
    FMIError,
    PacketIdReusedError,
    PacketRefusedError,
    Violation,
)
from fmi_server.storage.records import AppendOutcome, PacketRecord, content_hash
from fmi_server.validator import FMIValidator

__all__ = [
    "Answer",
    "Candidate",
    "Intake",
    "kept",
    "opening_warnings",
    "overtaking_warnings",
    "settle",
    "size_of",
    "slices",
]

SLICE_PACKETS: Final = 128
"""Packets that are checked in one turn, which takes some 8 ms where they keep the rules."""

SLICE_BYTES: Final = 128 * 1024
"""Bytes after which a turn ends too."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A packet that keeps the rules, ready to be stored."""

    packet: packet_pb2.Packet
    record: PacketRecord
    warnings: tuple[str, ...]

    @property
    def kind(self) -> str:
        """`msp`, `pop` or `ccs`."""
        return self.record.kind


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one packet.

    Attributes:
        packet_id: Its id; empty where it could not be read.
        kind: `msp`, `pop` or `ccs`; `unknown` where it could not be read.
        status: What became of it.
        sequence: Its place among all packets; 0 where it was refused.
        received_at_us: When it was first taken, Unix microseconds; 0 where it was refused.
        warnings: What the site should look at although it was taken.
        quarantine_reason: Why it is in quarantine; empty where it is not.
        error: Why it was refused; None where it was not.
    """

    packet_id: str
    kind: str
    status: PacketStatus
    sequence: int = 0
    received_at_us: int = 0
    warnings: tuple[str, ...] = ()
    quarantine_reason: str = ""
    error: FMIError | None = None

    @property
    def violations(self) -> Sequence[Violation]:
        """The rules that it breaks."""
        return () if self.error is None else self.error.violations

    @property
    def plain(self) -> bool:
        """Whether there is nothing to say but that it was accepted."""
        return self.status == "accepted" and not self.warnings


class Intake:
    """Inspects packets, and makes records of those that keep the rules. May be shared by threads.

    Args:
        registry: Translates plain packets.
        validator: Checks packets.
    """

    def __init__(self, registry: FMIContractRegistry, validator: FMIValidator) -> None:
        self._registry = registry
        self._validator = validator

    def inspect(
        self,
        packet: packet_pb2.Packet,
        *,
        received_at_us: int,
        caller: Principal = TRUSTED,
        at_once: bool = False,
    ) -> Candidate:
        """Check a packet and make its record.

        Raises:
            PacketRefusedError: It breaks rules.
            LongToTellError: It does, and they were to be told at once.
        """
        # Deterministic, so that the same packet sent in another way has the same hash.
        payload = packet.SerializeToString(deterministic=True)
        inspection = self._validator.inspect(
            packet, size=len(payload), caller=caller, at_once=at_once
        )
        if inspection.violations:
            raise PacketRefusedError(inspection.violations)
        header = packet.header
        emitted_at = header.emitted_at
        record = PacketRecord(
            domain_id=header.domain_id,
            packet_id=header.packet_id,
            cohort=header.cohort,
            # The contract's rules hold, so there is a body.
            kind=packet.WhichOneof("body") or "msp",
            content_hash=content_hash(payload),
            received_at_us=received_at_us,
            emitted_at_us=emitted_at.seconds * 1_000_000 + emitted_at.nanos // 1_000,
            quarantined=bool(inspection.quarantine_reason),
            quarantine_reason=inspection.quarantine_reason,
            payload=payload,
        )
        # What was parsed keeps the memory of all that was parsed with it: of its batch, and of what a later
        # field took the place of. A packet may wait long to be counted, so it gets memory of its own.
        own = packet_pb2.Packet.FromString(payload)
        return Candidate(own, record, inspection.warnings)

    def parsed(self, data: bytes, path: str = "packet") -> packet_pb2.Packet:
        """Parse a packet, unless it is larger than every cohort takes: parsed it may take fifty times that.

        Args:
            data: It, serialised.
            path: Where it stands, for what is told of it.

        Raises:
            PacketRefusedError: It is too large, or no packet.
        """
        if (too_large := self._validator.size_violation(len(data))) is not None:
            raise PacketRefusedError([too_large])
        try:
            return packet_pb2.Packet.FromString(data)
        except DecodeError:
            malformed = Violation(path, "fmi.packet.malformed", "cannot be parsed as a Packet")
            raise PacketRefusedError([malformed]) from None

    def inspect_many(
        self,
        items: Sequence[bytes | packet_pb2.Packet],
        *,
        received_at_us: int,
        caller: Principal = TRUSTED,
        first: int | None = 0,
        at_once: bool = False,
        within_s: float = math.inf,
    ) -> list[Candidate | Answer]:
        """Check packets one by one: a candidate for each that keeps the rules, else its answer.

        Args:
            items: Packets, typed or serialised.
            received_at_us: When they came, Unix microseconds.
            caller: Who sends them.
            first: The place of the first of them in their batch, for what is told of it; None where there
                is no batch.
            at_once: Whether nothing that takes long may be done.
            within_s: Seconds after which the rest is left for another time.

        Raises:
            LongToTellError: One breaks rules of the contract, and they were to be told at once.
        """
        found: list[Candidate | Answer] = []
        end = time.perf_counter() + within_s
        for index, item in enumerate(items, first or 0):
            path = "packet" if first is None else f"packets[{index}]"
            found.append(self._inspect_item(item, path, received_at_us, caller, at_once=at_once))
            if time.perf_counter() > end:
                break
        return found

    def _inspect_item(
        self,
        item: bytes | packet_pb2.Packet,
        path: str,
        received_at_us: int,
        caller: Principal,
        *,
        at_once: bool,
    ) -> Candidate | Answer:
        try:
            packet = self.parsed(item, path) if isinstance(item, bytes) else item
        except PacketRefusedError as refusal:
            return Answer("", "unknown", "refused", error=_alone(refusal))
        try:
            return self.inspect(
                packet, received_at_us=received_at_us, caller=caller, at_once=at_once
            )
        except PacketRefusedError as refusal:
            return Answer(
                packet.header.packet_id[:64],
                packet.WhichOneof("body") or "unknown",
                "refused",
                error=_alone(refusal),
            )


def _alone(error: PacketRefusedError) -> PacketRefusedError:
    """Return an error without where it came from, which would keep the packet until its batch is answered."""
    error.__context__ = None
    return error.with_traceback(None)


def kept(items: list[Candidate | Answer]) -> Candidate:
    """Take the only packet of a list out of it, or raise why it was refused.

    Raises:
        FMIError: It was.
    """
    item = items.pop()
    if isinstance(item, Candidate):
        return item
    error = item.error
    del item
    try:
        raise error or ValueError("an answer without an error is none of a packet that was refused")
    finally:
        del error  # it has this frame: nothing that is refused shall wait for the garbage collector


def size_of(packet: bytes | packet_pb2.Packet) -> int:
    """Return the bytes of a packet on the wire."""
    return len(packet) if isinstance(packet, bytes) else packet.ByteSize()


def slices(
    items: Sequence[bytes | packet_pb2.Packet],
) -> Sequence[Sequence[bytes | packet_pb2.Packet]]:
    """Divide the packets of a batch into turns: whoever checks one after the other lets others in between."""
    cuts, size = [0], 0
    for place, item in enumerate(items):
        if place - cuts[-1] == SLICE_PACKETS or size > SLICE_BYTES:
            cuts.append(place)
            size = 0
        size += size_of(item)
    return [items[start:end] for start, end in pairwise((*cuts, len(items)))]


def opening_warnings(cohort: str) -> tuple[str, ...]:
    """Say that a packet opens a cohort that did not exist, which a mistyped name does as well.

    There is nothing to say of the default cohort: its name is what stands where none was given.
    """
    if cohort == DEFAULT_COHORT:
        return ()
    return (f"header.cohort: opens cohort '{cohort}' with its first packet; is the name mistyped?",)


def overtaking_warnings(record: PacketRecord, newest: NewestSignals) -> tuple[str, ...]:
    """Note signals that count, and say where newer ones of the same site overtake them.

    A clock that fell back would otherwise silence its site without a word.
    """
    if record.kind != "msp":
        return ()
    counted_us = counted_at_us(record.emitted_at_us, record.received_at_us)
    behind_us = newest.note(record.cohort, record.domain_id, counted_us)
    if not behind_us:
        return ()
    text = (
        f"header.emitted_at: is {behind_us / 1e6:.0f} s before that of signals of this site that count "
        "already, and does not replace them; was the clock set back?"
    )
    return (text,)


def settle(candidate: Candidate, outcome: AppendOutcome) -> Answer:
    """Say what became of a packet that was given to the store."""
    record = candidate.record
    error: FMIError | None = None
    status: PacketStatus
    if outcome.status == "stored":
        status = "quarantined" if outcome.quarantined else "accepted"
    elif outcome.status == "duplicate":
        status = "duplicate"
    else:
        status = "refused"
        if outcome.status == "reused":
            error = PacketIdReusedError(record.domain_id, record.packet_id)
        else:
            error = PacketRefusedError(
                [Violation("packet", "fmi.packet.storable", outcome.problem)]
            )
        return Answer(record.packet_id, record.kind, status, error=error)
    return Answer(
        packet_id=record.packet_id,
        kind=record.kind,
        status=status,
        sequence=outcome.sequence,
        received_at_us=outcome.received_at_us,
        warnings=candidate.warnings,
        quarantine_reason=outcome.quarantine_reason if outcome.quarantined else "",
    )
