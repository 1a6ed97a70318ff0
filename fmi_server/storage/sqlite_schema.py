"""The SQLite database of a store: its tables, its versions, and how it is opened safely.

Opening checks what can be checked in bounded time, because a million packets must open in seconds
and `PRAGMA quick_check` reads every page: the magic bytes, the application id, the schema version
and the names of all tables and indexes. SQLite itself refuses a file that is shorter than its
header says. Damage deep inside a page shows when that page is read, as `StoreCorruptError`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import sqlite3
from typing import TYPE_CHECKING

from fmi_server.storage.base import (
    StoreCorruptError,
    StoreError,
    StoreLockedError,
    StoreUnavailableError,
    StoreVersionError,
    UnavailableReason,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = [
    "APPLICATION_ID",
    "SCHEMA_VERSION",
    "DatabaseLock",
    "check_identity",
    "check_version",
    "connect_reader",
    "connect_writer",
    "has_log",
    "keeping_log",
    "make_private",
    "prepare_database",
    "read_only_address",
    "set_size_limit",
    "sync_directory",
    "translate_error",
]

APPLICATION_ID = 0x464D4931
"""`FMI1` in the header of the file; `file(1)` shows it."""

_MAGIC = b"SQLite format 3\x00"
_USER_VERSION = slice(60, 64)
"""Where the header of a database has what `PRAGMA user_version` says."""

_OLDEST_SQLITE = (3, 37, 0)
"""The first with STRICT tables."""

_PAGE_BYTES = 8192
"""Half the writes per 420-byte packet of the default 4096, at no cost for single commits."""

_WRITER_CACHE_BYTES = 16 * 2**20
_READER_CACHE_BYTES = 2 * 2**20
"""Pages that a reader keeps. It drops all of them when it reads again and something was written meanwhile,
so that more would serve a single query only, and stay in memory between two."""

# The unique key leads with packet_id: these are UUIDv7, so new keys share a few index pages. Led
# by domain_id the key would dirty one page per site and group, and cost three times the time.
_VERSION_1 = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    """CREATE TABLE packets (
        sequence INTEGER PRIMARY KEY,
        domain_id TEXT NOT NULL,
        packet_id TEXT NOT NULL,
        cohort TEXT NOT NULL,
        kind INTEGER NOT NULL,
        content_hash BLOB NOT NULL CHECK (length(content_hash) = 16),
        received_at_us INTEGER NOT NULL,
        emitted_at_us INTEGER NOT NULL,
        quarantined INTEGER NOT NULL CHECK (quarantined IN (0, 1)),
        quarantine_reason TEXT NOT NULL,
        payload BLOB NOT NULL
    ) STRICT""",
    "CREATE UNIQUE INDEX packets_by_key ON packets (packet_id, domain_id)",
    "CREATE INDEX packets_by_cohort ON packets (cohort, sequence)",
    """CREATE INDEX packets_in_window ON packets (received_at_us)
        WHERE kind > 0 AND quarantined = 0""",
    "CREATE INDEX packets_in_quarantine ON packets (sequence) WHERE quarantined = 1",
    """CREATE TABLE sites (
        cohort TEXT NOT NULL,
        domain_id TEXT NOT NULL,
        first_seen_us INTEGER NOT NULL,
        last_seen_us INTEGER NOT NULL,
        msp_count INTEGER NOT NULL,
        pop_count INTEGER NOT NULL,
        ccs_count INTEGER NOT NULL,
        quarantined_count INTEGER NOT NULL,
        duplicate_count INTEGER NOT NULL,
        reused_count INTEGER NOT NULL,
        newest_msp INTEGER,
        newest_emitted_us INTEGER,
        reputation REAL,
        PRIMARY KEY (cohort, domain_id)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE updates (
        sequence INTEGER PRIMARY KEY,
        cohort TEXT NOT NULL,
        kind INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        published_at_us INTEGER NOT NULL,
        content_hash BLOB NOT NULL,
        payload BLOB NOT NULL
    ) STRICT""",
    "CREATE UNIQUE INDEX updates_by_revision ON updates (cohort, kind, revision)",
    """CREATE TABLE cohorts (
        name TEXT PRIMARY KEY, spec BLOB NOT NULL, revision INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE dictionaries (
        dictionary_id INTEGER PRIMARY KEY, data BLOB NOT NULL, created_at_us INTEGER NOT NULL
    ) STRICT""",
)

# A packet is live, retired or in quarantine, one of the three. Who starts reads the live ones, so
# they have an index that holds nothing else; who forgets reads the others in the order of receipt.
# forgotten: packets of a cohort emitted before that may be gone, so a repeat of one is unknown.
_VERSION_2 = (
    "ALTER TABLE packets ADD COLUMN retired INTEGER NOT NULL DEFAULT 0 CHECK (retired IN (0, 1))",
    "DROP INDEX packets_by_cohort",
    "DROP INDEX packets_in_window",
    """CREATE INDEX packets_live ON packets (cohort, sequence)
        WHERE retired = 0 AND quarantined = 0""",
    "CREATE INDEX packets_retired ON packets (cohort, received_at_us) WHERE retired = 1",
    """CREATE INDEX packets_quarantined ON packets (cohort, kind, received_at_us)
        WHERE quarantined = 1""",
    "ALTER TABLE sites DROP COLUMN newest_msp",
    "ALTER TABLE sites DROP COLUMN newest_emitted_us",
    """CREATE TABLE forgotten (
        cohort TEXT PRIMARY KEY, emitted_before_us INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
)

# Who spends privacy cannot take it back, so that nobody, not this code either, may change an entry.
_VERSION_3 = (
    """CREATE TABLE privacy_ledger (
        cohort TEXT NOT NULL,
        number INTEGER NOT NULL CHECK (number > 0),
        period INTEGER NOT NULL,
        spent_at_us INTEGER NOT NULL,
        rho REAL NOT NULL CHECK (rho >= 0),
        history_epoch TEXT NOT NULL,
        PRIMARY KEY (cohort, number)
    ) STRICT, WITHOUT ROWID""",
    # A replacement is an insertion, and would take away what is there without a deletion.
    """CREATE TRIGGER privacy_ledger_in_order BEFORE INSERT ON privacy_ledger
        WHEN NEW.number <> (
            SELECT coalesce(max(number), 0) + 1 FROM privacy_ledger WHERE cohort = NEW.cohort
        ) OR NEW.period <= (
            SELECT coalesce(max(period), NEW.period - 1) FROM privacy_ledger WHERE cohort = NEW.cohort
        )
        BEGIN SELECT raise(ABORT, 'the privacy ledger is append-only'); END""",
    """CREATE TRIGGER privacy_ledger_unchanged BEFORE UPDATE ON privacy_ledger
        BEGIN SELECT raise(ABORT, 'the privacy ledger is append-only'); END""",
    """CREATE TRIGGER privacy_ledger_kept BEFORE DELETE ON privacy_ledger
        BEGIN SELECT raise(ABORT, 'the privacy ledger is append-only'); END""",
)

_MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1, _VERSION_2, _VERSION_3)
"""Statements that lead from version i to i + 1. Released entries never change."""

SCHEMA_VERSION = len(_MIGRATIONS)

_CREATES = re.compile(r"CREATE (UNIQUE )?[A-Z]+ (?P<name>\w+)")
_DROPS = re.compile(r"DROP [A-Z]+ (?P<name>\w+)")


class DatabaseLock:
    """Hold a database for one process, by `flock` on `<database>.lock`.

    A file of its own, because closing any descriptor of the database itself would drop SQLite's
    POSIX locks on it. The lock goes with the process, however it ends; the file stays.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self._descriptor = -1

    def acquire(self) -> None:
        """Take the lock or raise `StoreLockedError` with the holder's process id."""
        path = self._database.with_name(self._database.name + ".lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0)
            os.close(descriptor)
            raise StoreLockedError(
                path=str(self._database),
                holder_pid=int(holder) if holder.isdigit() else None,
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def holder(self) -> int | None:
        """Return the process that holds the lock; None where none does. Nothing is created."""
        path = self._database.with_name(self._database.name + ".lock")
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            # Shared, so that two who ask at the same time do not see each other.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0)
            return int(holder) if holder.isdigit() else None
        finally:
            os.close(descriptor)
        return None

    def release(self) -> None:
        """Give the lock back; releasing twice is no error."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def translate_error(error: sqlite3.Error | OSError, path: Path) -> StoreError:
    """Return the typed error for one of SQLite's or the operating system's."""
    where = str(path)
    if isinstance(error, OSError):
        reason: UnavailableReason = "io_error"
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            reason = "read_only"
        elif isinstance(error, FileNotFoundError | NotADirectoryError):
            reason = "no_directory"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "disk_full"
        return StoreUnavailableError(reason, detail=error.strerror or str(error), path=where)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreCorruptError(path=where, detail=str(error))
    reasons: dict[int, UnavailableReason] = {
        sqlite3.SQLITE_FULL: "disk_full",
        sqlite3.SQLITE_READONLY: "read_only",
        sqlite3.SQLITE_CANTOPEN: "read_only",
        sqlite3.SQLITE_PERM: "read_only",
        sqlite3.SQLITE_BUSY: "locked",
        sqlite3.SQLITE_LOCKED: "locked",
    }
    return StoreUnavailableError(reasons.get(code, "io_error"), detail=str(error), path=where)


def sync_directory(directory: Path) -> None:
    """Make a file's creation or renaming in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private(path: Path) -> None:
    """Make an empty file that nobody but its owner may read, where there is none.

    SQLite would let everybody read it, and what it keeps beside a database has the rights of that.
    """
    # A failure SQLite meets too, and tells of with its reason.
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _connect(path: Path) -> sqlite3.Connection:
    # Threads take turns, never share: the writer's connection stays with its thread, and close()
    # closes the readers' after their threads are gone.
    return sqlite3.connect(
        path, timeout=5.0, isolation_level=None, check_same_thread=False, cached_statements=256
    )


def _limit_cache(connection: sqlite3.Connection, size: int) -> None:
    """Bound the pages that a connection keeps, in bytes.

    Behind the page size: SQLite turns the bytes into a number of pages at once, and goes on with that number.
    """
    connection.execute(f"PRAGMA cache_size = -{size // 1024}")


def connect_writer(path: Path, *, max_bytes: int | None, synced: bool = True) -> sqlite3.Connection:
    """Connect for writing: write-ahead log, each commit synced, `max_bytes` as the size limit.

    Where it is not synced, a power cut may take the last commits back. It leaves the database whole.
    """
    make_private(path)
    connection = _connect(path)
    try:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        _enable_wal(connection, path)
        _limit_cache(connection, _WRITER_CACHE_BYTES)
        connection.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
        connection.execute("PRAGMA wal_autocheckpoint = 2000")
        connection.execute("PRAGMA journal_size_limit = 67108864")
        set_size_limit(connection, max_bytes)
    except BaseException:
        connection.close()
        raise
    return connection


def _enable_wal(connection: sqlite3.Connection, path: Path) -> None:
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if mode != "wal":  # a file system without shared memory, as some network ones are
        raise StoreUnavailableError(
            "unsupported", detail=f"journal mode is {mode}, WAL is needed", path=str(path)
        )


def set_size_limit(connection: sqlite3.Connection, max_bytes: int | None) -> None:
    """Let the database grow to `max_bytes`, or without limit for None."""
    page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
    pages = 4_294_967_294 if max_bytes is None else max(1, max_bytes // page_bytes)
    connection.execute(f"PRAGMA max_page_count = {pages}")


def connect_reader(path: Path) -> sqlite3.Connection:
    """Connect for reading only."""
    connection = _connect(path)
    _limit_cache(connection, _READER_CACHE_BYTES)
    connection.execute("PRAGMA query_only = ON")
    return connection


def prepare_database(
    path: Path, *, max_bytes: int | None, synced: bool = True
) -> tuple[sqlite3.Connection, str]:
    """Create, migrate or check the database; return the writer's connection and the epoch.

    A file that is not ours is left as it is: its first bytes are read before SQLite sees it.

    Raises:
        StoreCorruptError: Not a database, another program's, or parts are missing.
        StoreVersionError: From a newer version.
        StoreUnavailableError: The directory cannot be written, or SQLite is too old.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StoreUnavailableError(
            "unsupported",
            detail=f"SQLite is {sqlite3.sqlite_version}, 3.37.0 or newer is needed",
            path=str(path),
        )
    check_identity(path)
    with keeping_log(path) as accept:
        connection = connect_writer(path, max_bytes=max_bytes, synced=synced)
        try:
            _migrate(connection)
            _check_schema(connection, path)
            epoch = _history_epoch(connection, path)
            sync_directory(path.parent)
        except BaseException:
            connection.close()
            raise
        accept()
    return connection, epoch


@contextlib.contextmanager
def keeping_log(path: Path) -> Iterator[Callable[[], None]]:
    """Keep the log beside a database that is refused or damaged; call what is yielded where it is neither.

    The last connection that closes folds the log in and deletes it, unless it may only read.
    """
    if not has_log(path):
        yield lambda: None
        return
    with contextlib.ExitStack() as kept:
        reader = sqlite3.connect(read_only_address(path), uri=True)
        kept.callback(reader.close)
        reader.execute("PRAGMA user_version").fetchone()  # it opens nothing before
        yield kept.close


def read_only_address(path: Path) -> str:
    """Return the URI to open a database with that is not to be changed.

    A database with a write-ahead log needs a file beside it even to be read. Where none can be made, as on
    a disk that is read-only, it is read without, which is right as long as it has no log.
    """
    address = path.absolute().as_uri() + "?mode=ro"
    writable = os.access(path.parent, os.W_OK)
    return address if has_log(path) or writable else f"{address}&immutable=1"


def has_log(path: Path) -> bool:
    """Tell whether a write-ahead log with something in it stands beside a database."""
    log = path.with_name(f"{path.name}-wal")
    return log.exists() and log.stat().st_size > 0


def check_identity(path: Path) -> None:
    """Tell a new or an FMI database from anything else, before anything is written to it.

    Raises:
        StoreCorruptError: Not a database, or another program's.
        StoreVersionError: From a newer version.
    """
    _check_magic(path)
    if has_log(path) and not (path.exists() and path.stat().st_size):
        # SQLite would delete the log, which may hold all that was acknowledged.
        raise StoreCorruptError(
            path=str(path),
            detail=f"it is {'empty' if path.exists() else 'missing'}, but its log {path.name}-wal is there; "
            "restore a backup, which keeps the log, or move the log away to start anew",
        )
    if not _is_ours(path):
        raise StoreCorruptError(path=str(path), detail="it belongs to another program")


def check_version(path: Path, where: str) -> None:
    """Check the version of a database that nobody has open and that has no log.

    Off its header: SQLite would make files beside it to read as much.

    Args:
        path: The database.
        where: What it is, for the error.

    Raises:
        StoreVersionError: From a newer version.
    """
    with path.open("rb") as file:
        header = file.read(_USER_VERSION.stop)
    found = int.from_bytes(header[_USER_VERSION], "big")
    if found > SCHEMA_VERSION:
        raise StoreVersionError(path=where, found=found, supported=SCHEMA_VERSION)


def _history_epoch(connection: sqlite3.Connection, path: Path) -> str:
    row = connection.execute("SELECT value FROM meta WHERE name = 'history_epoch'").fetchone()
    if row is None:
        raise StoreCorruptError(path=str(path), detail="the history epoch is missing")
    return str(row[0])


def _check_magic(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not path.is_file() and path.exists():
            raise StoreCorruptError(path=str(path), detail="it is not a regular file")
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
        if start not in (b"", _MAGIC):
            raise StoreCorruptError(path=str(path), detail="it is not an SQLite database")


def _is_ours(path: Path) -> bool:
    """Tell a new or an FMI database from another program's, before anything is written to it."""
    if not path.exists() or path.stat().st_size == 0:
        return True
    with contextlib.closing(sqlite3.connect(read_only_address(path), uri=True)) as connection:
        identity = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        objects = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if version > SCHEMA_VERSION and identity == APPLICATION_ID:
        raise StoreVersionError(path=str(path), found=version, supported=SCHEMA_VERSION)
    # Nothing in it: the process ended between creating the file and the first transaction.
    return bool(identity == APPLICATION_ID or (identity == 0 and version == 0 and objects == 0))


def _migrate(connection: sqlite3.Connection) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    while version < SCHEMA_VERSION:
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in _MIGRATIONS[version]:
                connection.execute(statement)
            if version == 0:
                connection.execute(
                    "INSERT INTO meta (name, value) VALUES ('history_epoch', ?)",
                    (secrets.token_hex(16),),
                )
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            version += 1
            connection.execute(f"PRAGMA user_version = {version}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    present = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
    expected: set[str] = set()
    for statement in (statement for migration in _MIGRATIONS for statement in migration):
        if made := _CREATES.match(statement):
            expected.add(made["name"])
        elif gone := _DROPS.match(statement):
            expected.discard(gone["name"])
    if missing := sorted(expected - present):
        raise StoreCorruptError(path=str(path), detail="missing in it: " + ", ".join(missing))
