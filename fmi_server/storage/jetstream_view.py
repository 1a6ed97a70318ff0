"""The view of a replica: the log carried out, entry by entry, in an SQLite database of its own.

What an entry changes and how far the view has come are one transaction. So each entry is carried out once,
whatever is delivered twice, killed or restarted, and every replica comes to the same state in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmi_server.storage.base import (
    StoreCorruptError,
    StoreError,
    StoreUnavailableError,
    UnknownPacketError,
)
from fmi_server.storage.jetstream_commands import (
    Append,
    Command,
    Forget,
    Probe,
    Publish,
    PutCohort,
    PutDictionary,
    PutReputations,
    Quarantine,
    Retire,
    Spend,
    Trim,
    decode_command,
)
from fmi_server.storage.sqlite_append import append_packets, find_packet, last_packet_sequence
from fmi_server.storage.sqlite_ledger import append_spend
from fmi_server.storage.sqlite_live import forget_packets, set_packet_quarantine, set_retired
from fmi_server.storage.sqlite_registers import put_cohort, put_dictionary, put_reputations
from fmi_server.storage.sqlite_updates import publish_updates, trim_oldest

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

__all__ = [
    "CarriedOut",
    "LogEntry",
    "ViewPosition",
    "apply_entries",
    "make_store",
    "make_view",
    "prepare_view",
    "view_position",
]

_ABANDONED_AFTER = 100_000
"""Entries of the log behind which the parts of a command that never became whole are dropped."""

_TABLES = (
    """CREATE TABLE IF NOT EXISTS log_position (
        only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
        sequence INTEGER NOT NULL,
        command_id TEXT NOT NULL
    ) STRICT""",
    """CREATE TABLE IF NOT EXISTS log_parts (
        command_id TEXT NOT NULL,
        number INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (command_id, number)
    ) STRICT""",
    "CREATE INDEX IF NOT EXISTS log_parts_by_age ON log_parts (sequence)",
)

_DROP_TABLES = ("DROP TABLE IF EXISTS log_position", "DROP TABLE IF EXISTS log_parts")


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of the log.

    Attributes:
        sequence: Its place; without gaps.
        subject: What it was written under.
        command_id: Of the command that it is, or is a part of.
        part: Its number among the parts of the command, from 1.
        parts: How many parts the command has; it is carried out with the last.
        data: The bytes of the command, or the part of them.
        command: The same, read, where that was not needed; None otherwise.
    """

    sequence: int
    subject: str
    command_id: str
    part: int
    parts: int
    data: bytes
    command: Command | None = None


@dataclass(frozen=True, slots=True)
class ViewPosition:
    """How far a view has come: the last entry that is in it; 0 and no id where none is."""

    sequence: int
    command_id: str


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """What became of an entry.

    Attributes:
        command: The command; None where the entry is a part of one, or that cannot be put together.
        answer: What it answered, or the error that it was refused with.
    """

    command: Command | None
    answer: object

    @property
    def refused(self) -> bool:
        """Whether it changed nothing."""
        return isinstance(self.answer, BaseException)


def view_position(connection: sqlite3.Connection) -> ViewPosition:
    """Return how far a view has come."""
    row = connection.execute("SELECT sequence, command_id FROM log_position").fetchone()
    return ViewPosition(*row)


def prepare_view(connection: sqlite3.Connection, *, epoch: str, where: str) -> ViewPosition:
    """Make a new database the view of a log, or check that it is one, inside the open transaction.

    Args:
        connection: To the database.
        epoch: The history epoch of the log.
        where: The path of the database, for the error.

    Raises:
        StoreCorruptError: It is the database of a server, or the view of another log.
    """
    known = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'log_position'").fetchone()
    if known is None:
        for table in ("packets", "updates", "cohorts", "privacy_ledger", "dictionaries"):
            query = f"SELECT 1 FROM {table} LIMIT 1"  # noqa: S608 - constants only
            if connection.execute(query).fetchone():
                raise StoreCorruptError(
                    path=where,
                    detail="it is a store of its own and no view of a log; choose another path",
                )
        connection.execute(
            "UPDATE meta SET value = ? WHERE name = 'history_epoch'",
            (epoch,),
        )
        make_view(connection)
    (found,) = connection.execute("SELECT value FROM meta WHERE name = 'history_epoch'").fetchone()
    if found != epoch:
        raise StoreCorruptError(
            path=where,
            detail="it is the view of another log; move it away, and a new one is made from the log",
        )
    return view_position(connection)


def make_view(connection: sqlite3.Connection, *, sequence: int = 0) -> None:
    """Make a database a view that has come to an entry."""
    for statement in (*_DROP_TABLES, *_TABLES):
        connection.execute(statement)
    connection.execute(
        "INSERT INTO log_position (only_row, sequence, command_id) VALUES (1, ?, '')", (sequence,)
    )


def make_store(connection: sqlite3.Connection) -> None:
    """Make a view a database like that of an embedded store."""
    for statement in _DROP_TABLES:
        connection.execute(statement)


def apply_entries(
    connection: sqlite3.Connection, entries: Sequence[LogEntry], *, where: str
) -> list[CarriedOut]:
    """Carry entries out inside the open transaction; return what became of each.

    Args:
        connection: To the view.
        entries: In the order of the log, from the one behind the view's position on.
        where: Names the log, for errors.

    Raises:
        StoreCorruptError: An entry is no command, or not the next one.
        EntryVersionError: A newer version wrote an entry; nothing was carried out.
    """
    position = view_position(connection)
    if entries and entries[0].sequence != position.sequence + 1:
        raise StoreCorruptError(
            path=where,
            detail=f"entry {entries[0].sequence} does not follow entry {position.sequence}",
        )
    done = [_apply(connection, entry, where) for entry in entries]
    if entries:
        last = entries[-1]
        connection.execute(
            "UPDATE log_position SET sequence = ?, command_id = ?", (last.sequence, last.command_id)
        )
    return done


def _apply(connection: sqlite3.Connection, entry: LogEntry, where: str) -> CarriedOut:
    if entry.part < entry.parts:
        _keep_part(connection, entry)
        return CarriedOut(None, None)
    command, data = entry.command, entry.data
    if entry.parts > 1:
        parts = _take_parts(connection, entry.command_id)
        if len(parts) != entry.parts - 1:
            detail = f"of a write in {entry.parts} parts, {len(parts) + 1} were still there"
            return CarriedOut(None, StoreUnavailableError("io_error", detail=detail, path=where))
        data = b"".join((*parts, data))
    if command is None:
        command = decode_command(data, where=f"{where} entry {entry.sequence}")
    return CarriedOut(command, _carry_out(connection, command))


def _keep_part(connection: sqlite3.Connection, entry: LogEntry) -> None:
    # By the place in the log and not by the clock, so that all replicas drop the same.
    connection.execute(
        "DELETE FROM log_parts WHERE sequence < ?", (entry.sequence - _ABANDONED_AFTER,)
    )
    connection.execute(
        "INSERT OR REPLACE INTO log_parts VALUES (?, ?, ?, ?)",
        (entry.command_id, entry.part, entry.sequence, entry.data),
    )


def _take_parts(connection: sqlite3.Connection, command_id: str) -> list[bytes]:
    rows = connection.execute(
        "SELECT data FROM log_parts WHERE command_id = ? ORDER BY number", (command_id,)
    ).fetchall()
    connection.execute("DELETE FROM log_parts WHERE command_id = ?", (command_id,))
    return [data for (data,) in rows]


def _carry_out(connection: sqlite3.Connection, command: Command) -> object:
    """Carry one command out so that its refusal undoes only itself."""
    connection.execute("SAVEPOINT command")
    answer: object
    try:
        answer = _dispatch(connection, command)
    except (StoreError, ValueError) as refusal:
        connection.execute("ROLLBACK TO command")
        answer = refusal
    connection.execute("RELEASE command")
    return answer


def _dispatch(connection: sqlite3.Connection, command: Command) -> object:  # noqa: C901, PLR0911 - one case for each kind
    match command:
        case Append(records):
            first = last_packet_sequence(connection) + 1
            return append_packets(connection, records, first_sequence=first, screen=False)
        case Retire(sequences, retired):
            return set_retired(connection, sequences, retired=retired)
        case Forget(cohort, sequences, emitted_before_us):
            return forget_packets(
                connection, cohort, sequences, emitted_before_us=emitted_before_us
            )
        case Quarantine(packet, quarantined, reason):
            found = find_packet(connection, packet)
            if found is None:
                raise UnknownPacketError(packet=packet)
            return set_packet_quarantine(connection, found, quarantined=quarantined, reason=reason)
        case Publish(updates):
            return publish_updates(connection, updates)
        case Trim(cohort, kind, keep):
            return trim_oldest(connection, cohort=cohort, kind=kind, keep=keep)
        case Spend(spend):
            append_spend(connection, spend)
        case PutCohort(name, spec, revision):
            put_cohort(connection, name, spec, revision)
        case PutReputations(cohort, reputations):
            put_reputations(connection, cohort, reputations)
        case PutDictionary(dictionary_id, data, created_at_us):
            put_dictionary(connection, dictionary_id, data, created_at_us)
        case Probe():
            pass
    return None
