"""The writes of a store as values, and as the bytes that stand in the log.

A command says what to do and holds all that it needs: no clock, no chance, nothing that two replicas could
see differently. Carried out in the order of the log it gives every replica the same state and the same
answer.

The bytes: one for the format, four for the length of the head, the head as JSON, then the blobs that it tells
the sizes of. What is released never changes; what is new gets a new kind, or a new format.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from fmi_server.storage.base import EntryVersionError, StoreCorruptError
from fmi_server.storage.records import (
    CONTENT_HASH_BYTES,
    PACKET_KINDS,
    Change,
    PacketKey,
    PacketRecord,
    SpendRecord,
    UpdateRecord,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Append",
    "Command",
    "Forget",
    "Probe",
    "Publish",
    "PutCohort",
    "PutDictionary",
    "PutReputations",
    "Quarantine",
    "Retire",
    "Spend",
    "Trim",
    "change_of",
    "decode_command",
    "encode_command",
]

_FORMAT = 1
_SHOWN = 40
"""Characters of an unknown kind that are told."""

_PREFIX = struct.Struct(">BI")
_KIND_NUMBERS = {kind: number for number, kind in enumerate(PACKET_KINDS)}


@dataclass(frozen=True, slots=True)
class Append:
    """Keep packets; answers with their outcomes."""

    records: Sequence[PacketRecord]


@dataclass(frozen=True, slots=True)
class Retire:
    """Retire packets, or revive them; answers with how many changed."""

    sequences: Sequence[int]
    retired: bool


@dataclass(frozen=True, slots=True)
class Forget:
    """Delete those of these packets that are not live; answers with how many.

    They are named one by one, because "any so many of them" is not the same ones everywhere.
    """

    cohort: str
    sequences: Sequence[int]
    emitted_before_us: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Put a packet in quarantine or release it; answers whether that changed anything."""

    packet: int | PacketKey
    quarantined: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Publish:
    """Keep updates behind the fence; answers with their sequences."""

    updates: Sequence[UpdateRecord]


@dataclass(frozen=True, slots=True)
class Trim:
    """Delete a part of the oldest updates; answers with how many."""

    cohort: str
    kind: int
    keep: int


@dataclass(frozen=True, slots=True)
class Spend:
    """Add an entry to the privacy ledger behind its fence."""

    spend: SpendRecord


@dataclass(frozen=True, slots=True)
class PutCohort:
    """Keep a cohort spec."""

    name: str
    spec: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class PutReputations:
    """Keep the reputations of a cohort's sites."""

    cohort: str
    reputations: Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class PutDictionary:
    """Keep an encoder dictionary."""

    dictionary_id: int
    data: bytes
    created_at_us: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Change nothing."""


Command = (
    Append
    | Retire
    | Forget
    | Quarantine
    | Publish
    | Trim
    | Spend
    | PutCohort
    | PutReputations
    | PutDictionary
    | Probe
)


def change_of(command: Command) -> Change | None:  # noqa: PLR0911 - one case for each kind
    """Return what servers other than the one that wrote it have to know of a command; None for nothing."""
    match command:
        case Append():
            return Change("packets")
        case Publish():
            return Change("updates")
        case Spend():
            return Change("spend")
        case PutCohort(name):
            return Change("cohort", cohort=name)
        case Quarantine(packet):
            return Change("quarantine", packet=packet)
        case PutReputations(cohort, reputations):
            return Change("reputations", cohort=cohort, reputations=tuple(reputations))
        case PutDictionary():
            return Change("dictionary")
        case Forget():
            return Change("forgotten")
        case _:
            return None


def encode_command(command: Command) -> bytes:
    """Return a command as it stands in the log.

    Raises:
        ValueError: A text in it is not valid Unicode.
    """
    head, blobs = _take_apart(command)
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join((_PREFIX.pack(_FORMAT, len(text)), text, *blobs))


# Any: the heads are JSON, each kind has a form of its own.
def _take_apart(command: Command) -> tuple[list[Any], Sequence[bytes]]:  # noqa: PLR0911 - one for each kind
    match command:
        case Append(records):
            numbers = _KIND_NUMBERS
            rows = [
                (
                    r.domain_id,
                    r.packet_id,
                    r.cohort,
                    numbers[r.kind],
                    r.received_at_us,
                    r.emitted_at_us,
                    int(r.quarantined),
                    r.quarantine_reason,
                    len(r.payload),
                )
                for r in records
            ]
            blobs = [r.content_hash for r in records]
            blobs += [r.payload for r in records]
            return ["append", rows], blobs
        case Retire(sequences, retired):
            return ["retire", list(sequences), retired], ()
        case Forget(cohort, sequences, emitted_before_us):
            return ["forget", cohort, list(sequences), emitted_before_us], ()
        case Quarantine(packet, quarantined, reason):
            key = [packet.domain_id, packet.packet_id] if isinstance(packet, PacketKey) else packet
            return ["quarantine", key, quarantined, reason], ()
        case Publish(updates):
            lines = [
                (
                    u.sequence,
                    u.cohort,
                    u.kind,
                    u.revision,
                    u.published_at_us,
                    len(u.content_hash),
                    len(u.payload),
                )
                for u in updates
            ]
            return ["publish", lines], [b for u in updates for b in (u.content_hash, u.payload)]
        case Trim(cohort, kind, keep):
            return ["trim", cohort, kind, keep], ()
        case Spend(s):
            entry = (s.cohort, s.number, s.period, s.spent_at_us, s.rho, s.history_epoch)
            return ["spend", *entry], ()
        case PutCohort(name, spec, revision):
            return ["cohort", name, revision, len(spec)], [spec]
        case PutReputations(cohort, reputations):
            return ["reputations", cohort, list(reputations)], ()
        case PutDictionary(dictionary_id, data, created_at_us):
            return ["dictionary", dictionary_id, created_at_us, len(data)], [data]
        case Probe():
            return ["probe"], ()


class _UnknownKindError(Exception):
    """There is no such kind of write in this version."""


def decode_command(data: bytes, *, where: str) -> Command:
    """Read a command from the log.

    Args:
        data: The bytes.
        where: Names the log and the place, for the error.

    Raises:
        EntryVersionError: A newer version wrote it.
        StoreCorruptError: It is no command.
    """
    found = 0
    try:
        found, length = _PREFIX.unpack_from(data)
        if found > _FORMAT:
            raise EntryVersionError(path=where, found=found, supported=_FORMAT)
        start = _PREFIX.size + length
        kind, *head = json.loads(data[_PREFIX.size : start])
        if not isinstance(kind, str):
            raise TypeError("it has no kind")  # noqa: TRY301 - told below, like all that is no command
        return _put_together(kind, head, data, start)
    except _UnknownKindError as error:
        kind = str(error)[:_SHOWN]
        raise EntryVersionError(path=where, found=found, supported=_FORMAT, kind=kind) from None
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise StoreCorruptError(path=where, detail=f"no command of ours: {error}") from error


# Any: as above.
def _put_together(kind: str, head: list[Any], data: bytes, start: int) -> Command:  # noqa: PLR0911
    match kind:
        case "append":
            return Append(_records(head[0], data, start))
        case "retire":
            return Retire(*head)
        case "forget":
            return Forget(*head)
        case "quarantine":
            key, quarantined, reason = head
            return Quarantine(
                PacketKey(*key) if isinstance(key, list) else key, quarantined, reason
            )
        case "publish":
            return Publish(_updates(head[0], data, start))
        case "trim":
            return Trim(*head)
        case "spend":
            return Spend(SpendRecord(*head))
        case "cohort":
            return PutCohort(head[0], _blob(data, start, head[2]), head[1])
        case "reputations":
            return PutReputations(head[0], [(domain_id, value) for domain_id, value in head[1]])
        case "dictionary":
            return PutDictionary(head[0], _blob(data, start, head[2]), head[1])
        case "probe":
            return Probe()
        case _:
            raise _UnknownKindError(kind)


def _blob(data: bytes, start: int, size: int) -> bytes:
    if start + size != len(data):
        raise ValueError("it is cut off")
    return data[start:]


# Any: as above.
def _records(rows: list[list[Any]], data: bytes, start: int) -> list[PacketRecord]:
    payloads = start + CONTENT_HASH_BYTES * len(rows)
    ends = list(accumulate((row[8] for row in rows), initial=payloads))
    if ends[-1] != len(data):
        raise ValueError("it is cut off")
    for row in rows:
        if row[3] not in range(len(PACKET_KINDS)):
            raise _UnknownKindError(f"append of packets of kind {row[3]}")
    return [
        PacketRecord(
            domain_id=row[0],
            packet_id=row[1],
            cohort=row[2],
            kind=PACKET_KINDS[row[3]],
            content_hash=data[place : place + CONTENT_HASH_BYTES],
            received_at_us=row[4],
            emitted_at_us=row[5],
            quarantined=bool(row[6]),
            quarantine_reason=row[7],
            payload=data[begin:end],
        )
        for row, place, (begin, end) in zip(
            rows, range(start, payloads, CONTENT_HASH_BYTES), pairwise(ends), strict=True
        )
    ]


# Any: as above.
def _updates(lines: list[list[Any]], data: bytes, start: int) -> list[UpdateRecord]:
    updates = []
    for *fields, hash_size, size in lines:
        middle, end = start + hash_size, start + hash_size + size
        sequence, cohort, kind, revision, published_at_us = fields
        updates.append(
            UpdateRecord(
                sequence,
                cohort,
                kind,
                revision,
                published_at_us,
                content_hash=data[start:middle],
                payload=data[middle:end],
            )
        )
        start = end
    if start != len(data):
        raise ValueError("it is cut off")
    return updates
