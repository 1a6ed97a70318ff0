"""The small registers in the database: cohort specs, dictionaries, the sites' reputations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmi_server.storage.base import DictionaryConflictError
from fmi_server.storage.sqlite_append import chunk_sizes, placeholders

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

__all__ = ["put_cohort", "put_dictionary", "put_reputations"]


def put_cohort(connection: sqlite3.Connection, name: str, spec: bytes, revision: int) -> None:
    """Keep a cohort spec in place of the one before."""
    connection.execute(
        "INSERT INTO cohorts (name, spec, revision) VALUES (?, ?, ?) ON CONFLICT (name) "
        "DO UPDATE SET spec = excluded.spec, revision = excluded.revision",
        (name, spec, revision),
    )


def put_dictionary(
    connection: sqlite3.Connection, dictionary_id: int, data: bytes, created_at_us: int
) -> None:
    """Keep an encoder dictionary, or raise `DictionaryConflictError`."""
    inserted = connection.execute(
        "INSERT INTO dictionaries (dictionary_id, data, created_at_us) VALUES (?, ?, ?) "
        "ON CONFLICT DO NOTHING",
        (dictionary_id, data, created_at_us),
    ).rowcount
    if not inserted:
        (held,) = connection.execute(
            "SELECT data FROM dictionaries WHERE dictionary_id = ?", (dictionary_id,)
        ).fetchone()
        if held != data:
            raise DictionaryConflictError(dictionary_id=dictionary_id)


def put_reputations(
    connection: sqlite3.Connection, cohort: str, pairs: Sequence[tuple[str, float]]
) -> None:
    """Keep the reputation of sites, by `domain_id`; those never seen are passed over."""
    start = 0
    for size in chunk_sizes(len(pairs)):
        values = [value for pair in pairs[start : start + size] for value in pair]
        connection.execute(
            f"WITH given (domain_id, reputation) AS (VALUES {placeholders(2, size)}) "  # noqa: S608 - constants only
            "UPDATE sites SET reputation = given.reputation FROM given "
            "WHERE sites.cohort = ? AND sites.domain_id = given.domain_id",
            (*values, cohort),
        )
        start += size
