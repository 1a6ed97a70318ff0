"""How packets enter the database: one multi-row insert per group, and one upsert per site.

Rows go in with `INSERT ... VALUES (...), (...)` rather than `executemany`: the sqlite3 module gives
the interpreter lock away at every step, and a step per row would let a busy event loop delay each
row by a whole switch interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fmi_server.storage.records import (
    PACKET_KINDS,
    AppendOutcome,
    AppendStatus,
    PacketKey,
    PacketRecord,
    StoredPacket,
    record_problem,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence

__all__ = [
    "PACKET_COLUMNS",
    "append_packets",
    "chunk_sizes",
    "find_packet",
    "last_packet_sequence",
    "placeholders",
    "stored_packet",
]

PACKET_COLUMNS = (
    "sequence, domain_id, packet_id, cohort, kind, content_hash, received_at_us, emitted_at_us, "
    "quarantined, quarantine_reason, payload"
)
_KIND_NUMBERS = {kind: number for number, kind in enumerate(PACKET_KINDS)}
_LARGEST_CHUNK = 256
"""Rows per statement: 11 columns x 256 stay far below SQLite's limit of 32,766 parameters."""

PacketRow = tuple[int, str, str, str, int, bytes, int, int, int, str, bytes]


@dataclass(slots=True)
class _SiteDelta:
    """What one group changes in the counters of one site."""

    first_seen_us: int
    last_seen_us: int
    kinds: list[int]
    quarantined: int = 0
    duplicates: int = 0
    reused: int = 0


def chunk_sizes(count: int) -> Iterator[int]:
    """Split a count into powers of two, so that few statements are prepared and all are cached."""
    while count >= _LARGEST_CHUNK:
        yield _LARGEST_CHUNK
        count -= _LARGEST_CHUNK
    size = _LARGEST_CHUNK // 2
    while count:
        if count >= size:
            yield size
            count -= size
        size //= 2


def placeholders(columns: int, rows: int) -> str:
    """Return `(?, ?), (?, ?)` for so many rows of so many columns."""
    return ", ".join(["(" + ", ".join("?" * columns) + ")"] * rows)


@cache
def _insert_packets(rows: int) -> str:
    return (
        f"INSERT INTO packets ({PACKET_COLUMNS}) VALUES {placeholders(11, rows)} "  # noqa: S608 - constants only
        "ON CONFLICT (packet_id, domain_id) DO NOTHING"
    )


@cache
def _upsert_sites(rows: int) -> str:
    return f"""INSERT INTO sites (
            cohort, domain_id, first_seen_us, last_seen_us, msp_count, pop_count, ccs_count,
            quarantined_count, duplicate_count, reused_count
        ) VALUES {placeholders(10, rows)}
        ON CONFLICT (cohort, domain_id) DO UPDATE SET
            first_seen_us = min(first_seen_us, excluded.first_seen_us),
            last_seen_us = max(last_seen_us, excluded.last_seen_us),
            msp_count = msp_count + excluded.msp_count,
            pop_count = pop_count + excluded.pop_count,
            ccs_count = ccs_count + excluded.ccs_count,
            quarantined_count = quarantined_count + excluded.quarantined_count,
            duplicate_count = duplicate_count + excluded.duplicate_count,
            reused_count = reused_count + excluded.reused_count"""  # noqa: S608 - constants only


def last_packet_sequence(connection: sqlite3.Connection) -> int:
    """Return the highest packet sequence, 0 for none."""
    return int(connection.execute("SELECT max(sequence) FROM packets").fetchone()[0] or 0)


def stored_packet(row: PacketRow) -> StoredPacket:
    """Return the packet that a row of `PACKET_COLUMNS` holds."""
    return StoredPacket(
        row[0],
        PacketRecord(
            domain_id=row[1],
            packet_id=row[2],
            cohort=row[3],
            kind=PACKET_KINDS[row[4]],
            content_hash=row[5],
            received_at_us=row[6],
            emitted_at_us=row[7],
            quarantined=bool(row[8]),
            quarantine_reason=row[9],
            payload=row[10],
        ),
    )


def append_packets(
    connection: sqlite3.Connection,
    records: Sequence[PacketRecord],
    *,
    first_sequence: int,
    screen: bool,
) -> list[AppendOutcome]:
    """Insert records inside the open transaction and answer each.

    Args:
        connection: In a transaction.
        records: In the order in which they get their sequences.
        first_sequence: Above every sequence in use. Record i gets `first_sequence + i`.
        screen: Answer records that SQLite could not take with `rejected`. Screening costs time,
            so the caller asks for it only after an attempt without has failed.
    """
    if not screen:
        return _append(connection, records, first_sequence)
    problems = [record_problem(record) for record in records]
    sound = [record for record, problem in zip(records, problems, strict=True) if not problem]
    answers = iter(_append(connection, sound, first_sequence))
    return [
        AppendOutcome("rejected", 0, record.received_at_us, False, "", problem)
        if problem
        else next(answers)
        for record, problem in zip(records, problems, strict=True)
    ]


def _append(
    connection: sqlite3.Connection, records: Sequence[PacketRecord], first_sequence: int
) -> list[AppendOutcome]:
    inserted = 0
    start = 0
    numbers = _KIND_NUMBERS
    for size in chunk_sizes(len(records)):
        parameters: list[object] = []
        sequence = first_sequence + start
        for record in records[start : start + size]:
            parameters += (
                sequence,
                record.domain_id,
                record.packet_id,
                record.cohort,
                numbers[record.kind],
                record.content_hash,
                record.received_at_us,
                record.emitted_at_us,
                record.quarantined,
                record.quarantine_reason,
                record.payload,
            )
            sequence += 1
        inserted += connection.execute(_insert_packets(size), parameters).rowcount
        start += size
    if inserted == len(records):
        outcomes = [
            AppendOutcome(
                "stored",
                sequence,
                record.received_at_us,
                record.quarantined,
                record.quarantine_reason,
            )
            for sequence, record in enumerate(records, first_sequence)
        ]
    else:
        kept = {
            sequence
            for (sequence,) in connection.execute(
                "SELECT sequence FROM packets WHERE sequence >= ?", (first_sequence,)
            )
        }
        outcomes = [
            AppendOutcome(
                "stored",
                sequence,
                record.received_at_us,
                record.quarantined,
                record.quarantine_reason,
            )
            if sequence in kept
            else _repeat_outcome(connection, record)
            for sequence, record in enumerate(records, first_sequence)
        ]
    _count_sites(connection, records, outcomes)
    return outcomes


def _repeat_outcome(connection: sqlite3.Connection, record: PacketRecord) -> AppendOutcome:
    sequence, content_hash, received_at_us, quarantined, reason = connection.execute(
        "SELECT sequence, content_hash, received_at_us, quarantined, quarantine_reason "
        "FROM packets WHERE packet_id = ? AND domain_id = ?",
        (record.packet_id, record.domain_id),
    ).fetchone()
    status: AppendStatus = "duplicate" if content_hash == record.content_hash else "reused"
    return AppendOutcome(status, sequence, received_at_us, bool(quarantined), reason)


def _count_sites(
    connection: sqlite3.Connection,
    records: Sequence[PacketRecord],
    outcomes: Sequence[AppendOutcome],
) -> None:
    deltas: dict[tuple[str, str], _SiteDelta] = {}
    for record, outcome in zip(records, outcomes, strict=True):
        key = (record.cohort, record.domain_id)
        received = record.received_at_us
        delta = deltas.get(key)
        if delta is None:
            delta = deltas[key] = _SiteDelta(received, received, [0, 0, 0])
        elif received > delta.last_seen_us:
            delta.last_seen_us = received
        elif received < delta.first_seen_us:
            delta.first_seen_us = received
        if outcome.status == "stored":
            delta.kinds[_KIND_NUMBERS[record.kind]] += 1
            delta.quarantined += record.quarantined
        elif outcome.status == "duplicate":
            delta.duplicates += 1
        else:
            delta.reused += 1
    rows = [
        (
            *key,
            delta.first_seen_us,
            delta.last_seen_us,
            *delta.kinds,
            delta.quarantined,
            delta.duplicates,
            delta.reused,
        )
        for key, delta in deltas.items()
    ]
    start = 0
    for size in chunk_sizes(len(rows)):
        parameters = [value for row in rows[start : start + size] for value in row]
        connection.execute(_upsert_sites(size), parameters)
        start += size


def find_packet(connection: sqlite3.Connection, packet: int | PacketKey) -> StoredPacket | None:
    """Return one packet by sequence or key."""
    if isinstance(packet, PacketKey):
        where = "packet_id = ? AND domain_id = ?"
        values: tuple[object, ...] = (packet.packet_id, packet.domain_id)
    else:
        where, values = "sequence = ?", (packet,)
    sql = f"SELECT {PACKET_COLUMNS} FROM packets WHERE {where}"  # noqa: S608 - constants only
    row = connection.execute(sql, values).fetchone()
    return stored_packet(row) if row is not None else None
