"""The privacy ledger in the database: entries are added, and never changed or taken away.

Beside it the database knows what it may lack of it: a backup notes when it was taken, and a restore that
whatever happened from then on is lost.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from fmi_server.storage.base import check_spend
from fmi_server.storage.records import LedgerTotal, LostSpan, SpendRecord

if TYPE_CHECKING:
    import sqlite3

__all__ = [
    "append_spend",
    "ledger_totals",
    "lost_spans",
    "note_backup",
    "note_restore",
    "spends",
]

_CLOCKS_DIFFER_US: Final = 60_000_000
"""By how much the clocks of two machines may differ, of which neither is wrong."""

_NO_END_US: Final = 2**62

_COLUMNS = "cohort, number, period, spent_at_us, rho, history_epoch"


def append_spend(connection: sqlite3.Connection, spend: SpendRecord) -> None:
    """Add an entry behind the fence."""
    number, period = connection.execute(
        "SELECT coalesce(max(number), 0), max(period) FROM privacy_ledger WHERE cohort = ?",
        (spend.cohort,),
    ).fetchone()
    check_spend(spend, last_number=number, last_period=period)
    connection.execute(
        f"INSERT INTO privacy_ledger ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: S608 - constants only
        (
            spend.cohort,
            spend.number,
            spend.period,
            spend.spent_at_us,
            spend.rho,
            spend.history_epoch,
        ),
    )


def spends(
    connection: sqlite3.Connection, cohort: str, after: int, limit: int
) -> list[SpendRecord]:
    """Return entries of a cohort above a number."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM privacy_ledger WHERE cohort = ? AND number > ? "  # noqa: S608 - constants only
        "ORDER BY number LIMIT ?",
        (cohort, after, limit),
    )
    return [SpendRecord(*row) for row in rows]


def ledger_totals(connection: sqlite3.Connection) -> dict[str, LedgerTotal]:
    """Return what each cohort spent, and its last entry."""
    rows = connection.execute(
        "SELECT cohort, sum(rho > 0), total(rho), max(number), period, history_epoch "
        "FROM privacy_ledger GROUP BY cohort"
    )
    # Of a single max() SQLite takes the other columns from the row that has it.
    return {cohort: LedgerTotal(*rest) for cohort, *rest in rows}


def note_backup(copy: sqlite3.Connection, began_us: int) -> None:
    """Note in a backup when taking it began: what came later may be missing."""
    _put(copy, "backed_up_at_us", str(began_us))


def note_restore(connection: sqlite3.Connection, now_us: int) -> None:
    """Note in a restored backup what it lacks: what happened since it was taken, until now.

    Where now is before that, nobody knows when that ended.
    """
    taken = _get(connection, "backed_up_at_us")
    # A file that was copied by other means is as new as the newest thing in it, at least.
    from_us = _newest_us(connection) if taken is None else int(taken)
    until_us = now_us
    if now_us < from_us:
        near = from_us - now_us <= _CLOCKS_DIFFER_US
        until_us = from_us + _CLOCKS_DIFFER_US if near else _NO_END_US
    spans = [*lost_spans(connection), LostSpan(from_us, until_us)]
    _put(connection, "lost_spans", json.dumps([[span.from_us, span.until_us] for span in spans]))


def lost_spans(connection: sqlite3.Connection) -> list[LostSpan]:
    """Return the spans of time of which this history may lack what was spent."""
    found = _get(connection, "lost_spans")
    return [] if found is None else [LostSpan(*span) for span in json.loads(found)]


def _newest_us(connection: sqlite3.Connection) -> int:
    found = connection.execute(
        "SELECT max((SELECT coalesce(max(received_at_us), 0) FROM packets), "
        "(SELECT coalesce(max(published_at_us), 0) FROM updates), "
        "(SELECT coalesce(max(spent_at_us), 0) FROM privacy_ledger))"
    ).fetchone()
    return int(found[0])


def _get(connection: sqlite3.Connection, name: str) -> str | None:
    found = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if found is None else str(found[0])


def _put(connection: sqlite3.Connection, name: str, value: str) -> None:
    connection.execute(
        "INSERT INTO meta (name, value) VALUES (?, ?) "
        "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        (name, value),
    )
