"""The privacy ledger in the database: entries are added, and never changed or taken away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmi_server.storage.base import check_spend
from fmi_server.storage.records import LedgerTotal, SpendRecord

if TYPE_CHECKING:
    import sqlite3

__all__ = ["append_spend", "ledger_totals", "spends"]

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
