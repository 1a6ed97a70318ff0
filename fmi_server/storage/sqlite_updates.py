"""The released updates in the database: added behind the fence, trimmed from the oldest on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmi_server.storage.base import RevisionConflictError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from fmi_server.storage.records import UpdateRecord

__all__ = [
    "PART_ROWS",
    "UPDATE_COLUMNS",
    "next_update_sequence",
    "publish_updates",
    "trim_oldest",
]

UPDATE_COLUMNS = "sequence, cohort, kind, revision, published_at_us, content_hash, payload"

PART_ROWS = 100
"""Packets that one transaction revives, or updates that it trims: group commits do not wait long for it."""


def next_update_sequence(connection: sqlite3.Connection) -> int:
    """Return the sequence that the next update must carry."""
    return int(connection.execute("SELECT max(sequence) FROM updates").fetchone()[0] or 0) + 1


def publish_updates(connection: sqlite3.Connection, updates: Sequence[UpdateRecord]) -> list[int]:
    """Add updates behind the fence, inside the open transaction; the caller undoes what a refusal leaves."""
    sequence = next_update_sequence(connection)
    for update in updates:
        last = connection.execute(
            "SELECT max(revision) FROM updates WHERE cohort = ? AND kind = ?",
            (update.cohort, update.kind),
        ).fetchone()[0]
        expected = (last or 0) + 1
        if update.revision != expected or update.sequence != sequence:
            raise RevisionConflictError(
                cohort=update.cohort,
                kind=update.kind,
                revision=update.revision,
                expected_revision=expected,
                sequence=update.sequence,
                expected_sequence=sequence,
            )
        connection.execute(
            f"INSERT INTO updates ({UPDATE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - constants only
            (
                update.sequence,
                update.cohort,
                update.kind,
                update.revision,
                update.published_at_us,
                update.content_hash,
                update.payload,
            ),
        )
        sequence += 1
    return [update.sequence for update in updates]


def trim_oldest(connection: sqlite3.Connection, *, cohort: str, kind: int, keep: int) -> int:
    """Delete the oldest updates that are not to be kept, a part of them; return how many."""
    return connection.execute(
        "DELETE FROM updates WHERE sequence IN (SELECT sequence FROM updates WHERE cohort = ?1 AND kind = ?2 "
        "AND revision <= (SELECT max(revision) FROM updates WHERE cohort = ?1 AND kind = ?2) - ?3 "
        "ORDER BY revision LIMIT ?4)",
        (cohort, kind, keep, PART_ROWS),
    ).rowcount
