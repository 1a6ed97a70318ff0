"""Look into a database without changing it, also while a server uses it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmi_server.storage.base import StoreCorruptError, StoreUnavailableError
from fmi_server.storage.records import PACKET_KINDS, content_hash
from fmi_server.storage.sqlite_schema import (
    DatabaseLock,
    check_identity,
    read_only_address,
    translate_error,
)

__all__ = [
    "CohortContents",
    "DatabaseContents",
    "PacketsHeld",
    "UpdateRange",
    "check_integrity",
    "check_packets",
    "inspect_database",
    "open_for_inspection",
]

_PROBLEMS_TOLD = 5


@dataclass(frozen=True, slots=True)
class UpdateRange:
    """The updates of one kind that a cohort has.

    Attributes:
        kind: Number of the kind.
        oldest: The oldest revision held.
        newest: The newest revision.
        published_at_us: When the newest was published, Unix microseconds.
    """

    kind: int
    oldest: int
    newest: int
    published_at_us: int


@dataclass(frozen=True, slots=True)
class PacketsHeld:
    """The packets of one type that a cohort has.

    Attributes:
        live: Those that count or may count.
        retired: Those that are only known, so that a repeat is answered.
        quarantined: Those in quarantine.
    """

    live: int
    retired: int
    quarantined: int


@dataclass(slots=True)
class CohortContents:
    """What a database holds of one cohort.

    Attributes:
        declared: Whether its spec is kept.
        sites: Sites that sent something.
        packets: Packets held, by type.
        oldest_us: When the oldest packet held was received, Unix microseconds; None without any.
        newest_us: When the newest was.
        updates: Its updates, by kind.
    """

    declared: bool = False
    sites: int = 0
    packets: dict[str, PacketsHeld] = field(default_factory=dict)
    oldest_us: int | None = None
    newest_us: int | None = None
    updates: list[UpdateRange] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DatabaseContents:
    """What a database holds.

    Attributes:
        path: Where it is.
        size_bytes: Bytes on disk, those of its log included.
        schema_version: Its schema.
        history_epoch: The name of its history.
        update_sequence: The sequence of the last update.
        dictionaries: Compression dictionaries.
        server_pid: The process that has it open; None where none does.
        cohorts: What it holds by cohort, in order of name.
    """

    path: Path
    size_bytes: int
    schema_version: int
    history_epoch: str
    update_sequence: int
    dictionaries: int
    server_pid: int | None
    cohorts: dict[str, CohortContents]


def open_for_inspection(path: Path) -> sqlite3.Connection:
    """Connect for reading only, to a database of any version up to this one.

    Raises:
        StoreCorruptError: It is no database of this server.
        StoreVersionError: It is from a newer version.
        StoreUnavailableError: There is none, or it cannot be read.
    """
    try:
        if not path.exists():
            raise StoreUnavailableError("no_directory", detail="there is no store", path=str(path))
        check_identity(path)
        connection = sqlite3.connect(
            read_only_address(path), uri=True, timeout=5.0, isolation_level=None
        )
        try:
            connection.execute("PRAGMA query_only = ON")
            _refuse_empty(connection, path)
        except BaseException:
            connection.close()
            raise
    except (sqlite3.Error, OSError) as error:
        raise translate_error(error, path) from error
    return connection


def _refuse_empty(connection: sqlite3.Connection, path: Path) -> None:
    if int(connection.execute("PRAGMA user_version").fetchone()[0]) == 0:
        raise StoreUnavailableError("unsupported", detail="there is nothing in it", path=str(path))


def check_integrity(connection: sqlite3.Connection, path: Path) -> None:
    """Read every page and index entry, and compare them. It takes as long as reading the file.

    Raises:
        StoreCorruptError: Something is damaged.
    """
    try:
        found = [row[0] for row in connection.execute(f"PRAGMA integrity_check({_PROBLEMS_TOLD})")]
    except sqlite3.DatabaseError as error:
        raise translate_error(error, path) from error
    if found != ["ok"]:
        problems = "; ".join(line for text in found for line in str(text).splitlines())
        raise StoreCorruptError(path=str(path), detail=problems[:500])


def check_packets(connection: sqlite3.Connection, path: Path) -> int:
    """Compare every packet with the hash it was stored with; return how many there are.

    Raises:
        StoreCorruptError: One is not as it was stored.
    """
    checked = 0
    try:
        rows = connection.execute("SELECT sequence, content_hash, payload FROM packets")
        for sequence, stored, payload in rows:
            if content_hash(payload) != stored:
                raise StoreCorruptError(
                    path=str(path),
                    detail=f"packet {sequence} is not as it was stored; restore a backup",
                )
            checked += 1
    except sqlite3.DatabaseError as error:
        raise translate_error(error, path) from error
    return checked


def inspect_database(connection: sqlite3.Connection, path: Path) -> DatabaseContents:
    """Count what a database holds, as of one moment.

    Raises:
        StoreCorruptError: It is damaged.
    """
    connection.execute("BEGIN")
    try:
        schema_version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        return DatabaseContents(
            path=path,
            size_bytes=_size_bytes(path),
            schema_version=schema_version,
            history_epoch=_one(connection, "SELECT value FROM meta WHERE name = 'history_epoch'"),
            update_sequence=_one(connection, "SELECT max(sequence) FROM updates") or 0,
            dictionaries=_one(connection, "SELECT count(*) FROM dictionaries") or 0,
            server_pid=DatabaseLock(path).holder(),
            cohorts=_cohorts(connection, schema_version),
        )
    except sqlite3.DatabaseError as error:
        raise translate_error(error, path) from error
    finally:
        connection.execute("ROLLBACK")


def _cohorts(connection: sqlite3.Connection, schema_version: int) -> dict[str, CohortContents]:
    cohorts: defaultdict[str, CohortContents] = defaultdict(CohortContents)
    for (name,) in connection.execute("SELECT name FROM cohorts"):
        cohorts[name].declared = True
    for name, sites in connection.execute("SELECT cohort, count(*) FROM sites GROUP BY cohort"):
        cohorts[name].sites = sites
    # Before schema 2 no packet was retired.
    retired_column = "sum(retired)" if schema_version >= 2 else "0"
    rows = connection.execute(
        f"SELECT cohort, kind, count(*), {retired_column}, sum(quarantined), min(received_at_us), "  # noqa: S608 - constants only
        "max(received_at_us) FROM packets GROUP BY cohort, kind"
    )
    for name, kind, held, retired, quarantined, oldest_us, newest_us in rows:
        contents = cohorts[name]
        contents.packets[PACKET_KINDS[kind]] = PacketsHeld(
            held - retired - quarantined, retired, quarantined
        )
        contents.oldest_us = min(oldest_us, contents.oldest_us or oldest_us)
        contents.newest_us = max(newest_us, contents.newest_us or newest_us)
    # Of a single max() or min() SQLite takes the other columns from the row that has it.
    rows = connection.execute(
        "SELECT cohort, kind, (SELECT min(revision) FROM updates AS o WHERE o.cohort = u.cohort "
        "AND o.kind = u.kind), max(revision), published_at_us FROM updates AS u "
        "GROUP BY cohort, kind ORDER BY cohort, kind"
    )
    for name, kind, oldest, newest, published_at_us in rows:
        cohorts[name].updates.append(UpdateRange(kind, oldest, newest, published_at_us))
    return dict(sorted(cohorts.items()))


def _one(connection: sqlite3.Connection, query: str) -> Any:
    row = connection.execute(query).fetchone()
    return None if row is None else row[0]


def _size_bytes(path: Path) -> int:
    size = 0
    for name in (path.name, f"{path.name}-wal"):
        with contextlib.suppress(FileNotFoundError):
            size += path.with_name(name).stat().st_size
    return size
