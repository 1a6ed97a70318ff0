"""Which packets count: retired when they cannot count any more, revived, forgotten; quarantine.

A packet is live, retired or in quarantine, one of the three. Only the live ones have to be read to bring
a cohort's state back.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from fmi_server.storage.records import PACKET_KINDS, StoredPacket
from fmi_server.storage.sqlite_append import chunk_sizes

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

__all__ = [
    "count_packets",
    "forget_packets",
    "forgettable_sequences",
    "retired_sequences",
    "set_packet_quarantine",
    "set_retired",
]

LIVE = "cohort = ? AND retired = 0 AND quarantined = 0 AND sequence > ? ORDER BY sequence LIMIT ?"
"""The condition of `Store.live_packets`, answered by an index that holds nothing else."""


def set_retired(connection: sqlite3.Connection, sequences: Sequence[int], *, retired: bool) -> int:
    """Retire live packets, or revive retired ones, inside the open transaction; return how many changed."""
    changed = 0
    start = 0
    for size in chunk_sizes(len(sequences)):
        changed += connection.execute(
            f"UPDATE packets SET retired = ? WHERE sequence IN ({', '.join('?' * size)}) "  # noqa: S608 - constants only
            "AND retired <> ? AND quarantined = 0",
            (retired, *sequences[start : start + size], retired),
        ).rowcount
        start += size
    return changed


def retired_sequences(
    connection: sqlite3.Connection, cohort: str, domain_id: str | None
) -> list[int]:
    """Return the sequences of a cohort's retired packets, or of those of one of its sites."""
    rows = connection.execute(
        "SELECT sequence FROM packets "
        "WHERE cohort = ?1 AND retired = 1 AND (?2 IS NULL OR domain_id = ?2)",
        (cohort, domain_id),
    )
    return sorted(sequence for (sequence,) in rows)


def forgettable_sequences(
    connection: sqlite3.Connection,
    cohort: str,
    *,
    received_before_us: int,
    emitted_before_us: int,
    limit: int,
) -> list[int]:
    """Return the sequences of up to `limit` packets that `Store.forget` may delete."""
    # The last packet stays: the next sequence is counted from it.
    old = (
        "SELECT sequence FROM packets "
        "WHERE cohort = ?1 AND received_at_us < ?2 AND emitted_at_us < ?3 "
        "AND sequence < (SELECT max(sequence) FROM packets)"
    )
    rows = connection.execute(
        f"{old} AND retired = 1 UNION ALL {old} AND quarantined = 1 LIMIT ?4",
        (cohort, received_before_us, emitted_before_us, limit),
    )
    return [sequence for (sequence,) in rows]


def forget_packets(
    connection: sqlite3.Connection,
    cohort: str,
    sequences: Sequence[int],
    *,
    emitted_before_us: int,
) -> int:
    """Delete those of a cohort's packets that are not live, inside the open transaction; return how many."""
    gone = 0
    start = 0
    for size in chunk_sizes(len(sequences)):
        gone += _forget_part(connection, cohort, sequences[start : start + size])
        start += size
    if gone:
        connection.execute(
            "INSERT INTO forgotten (cohort, emitted_before_us) VALUES (?, ?) ON CONFLICT (cohort) "
            "DO UPDATE SET emitted_before_us = max(emitted_before_us, excluded.emitted_before_us)",
            (cohort, emitted_before_us),
        )
    return gone


def _forget_part(connection: sqlite3.Connection, cohort: str, sequences: Sequence[int]) -> int:
    chosen = (
        f"sequence IN ({', '.join('?' * len(sequences))}) AND cohort = ? "  # noqa: S608 - constants only
        "AND (retired = 1 OR quarantined = 1) AND sequence < (SELECT max(sequence) FROM packets)"
    )
    held = connection.execute(
        f"SELECT domain_id, kind FROM packets WHERE {chosen} AND quarantined = 1",  # noqa: S608 - constants only
        (*sequences, cohort),
    )
    for (domain_id, kind), count in Counter(held.fetchall()).items():
        column = f"{PACKET_KINDS[kind]}_count"
        connection.execute(
            f"UPDATE sites SET {column} = {column} - ?1, quarantined_count = quarantined_count - ?1 "  # noqa: S608 - constants only
            "WHERE cohort = ?2 AND domain_id = ?3",
            (count, cohort, domain_id),
        )
    return connection.execute(
        f"DELETE FROM packets WHERE {chosen}",  # noqa: S608 - constants only
        (*sequences, cohort),
    ).rowcount


def count_packets(connection: sqlite3.Connection, cohort: str | None) -> dict[str, Counter[str]]:
    """Count packets as `Store.packet_counts` says, from the sites' counters."""
    counts: dict[str, Counter[str]] = {}
    for name, *taken in connection.execute(
        "SELECT cohort, sum(msp_count), sum(pop_count), sum(ccs_count) FROM sites "
        "WHERE ?1 IS NULL OR cohort = ?1 GROUP BY cohort",
        (cohort,),
    ):
        counts[name] = Counter(dict(zip(PACKET_KINDS, taken, strict=True)))
    for name, kind, held in connection.execute(
        "SELECT cohort, kind, count(*) FROM packets "
        "WHERE quarantined = 1 AND (?1 IS NULL OR cohort = ?1) GROUP BY cohort, kind",
        (cohort,),
    ):
        counts[name][PACKET_KINDS[kind]] -= held
    return {name: +count for name, count in counts.items()}


def set_packet_quarantine(
    connection: sqlite3.Connection, found: StoredPacket, *, quarantined: bool, reason: str
) -> bool:
    """Change a packet's quarantine and its site's counter inside the open transaction.

    A packet that is released is live, whatever it was before.
    """
    record = found.record
    connection.execute(
        "UPDATE packets SET quarantined = ?, quarantine_reason = ?, retired = 0 WHERE sequence = ?",
        (quarantined, reason if quarantined else "", found.sequence),
    )
    if record.quarantined == quarantined:
        return False
    connection.execute(
        "UPDATE sites SET quarantined_count = quarantined_count + ? "
        "WHERE cohort = ? AND domain_id = ?",
        (1 if quarantined else -1, record.cohort, record.domain_id),
    )
    return True
