"""An outbox in a file: SQLite's write-ahead log, synced with every commit; one process at a time.

A connection of SQLite does not survive a fork, so it is closed before one and opened again when it is
needed; the child lets go of the lock, which it would otherwise keep from the site's next process.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from fmi.v1 import packet_pb2
from fmi_client._fork import check_process
from fmi_client._outbox_store import Item, RefusedPacket, digest, error_of
from fmi_client.errors import (
    ClientClosedError,
    OutboxCorruptError,
    OutboxLockedError,
    OutboxUnavailableError,
)

__all__ = ["FileStore"]

_MAGIC: Final = b"SQLite format 3\x00"
_APPLICATION_ID: Final = 0x464D494F  # "FMIO"
_VERSION: Final = 1

_SCHEMA: Final = (
    """CREATE TABLE packets (
        sequence INTEGER PRIMARY KEY,
        site TEXT NOT NULL,
        packet_id TEXT NOT NULL,
        digest BLOB NOT NULL,
        spooled_at REAL NOT NULL,
        data BLOB NOT NULL
    )""",
    """CREATE TABLE refused (
        place INTEGER PRIMARY KEY AUTOINCREMENT,
        reason TEXT NOT NULL,
        message TEXT NOT NULL,
        refused_at REAL NOT NULL,
        data BLOB NOT NULL
    )""",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_VERSION}",
)


class FileStore:
    """Keeps packets in a file.

    Args:
        path: The file; made where there is none.
        keep_refused: The most refused packets that are kept.

    Raises:
        OutboxLockedError: It is in use.
        OutboxCorruptError: It is damaged, or no outbox. It is left as it is.
        OutboxUnavailableError: It cannot be opened.
    """

    def __init__(self, path: Path, keep_refused: int) -> None:
        self._path = path
        self._keep_refused = keep_refused
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        with self._translated():
            self._unlock = weakref.finalize(self, _unlock, _locked(path), self._pid)
            self._unlock.atexit = False
            try:
                _check_file(path)
                self._items = self._prepare()
                _sync_directory(path.parent)
            except BaseException:
                self._let_go()
                raise
        _open.add(self)

    def load(self) -> list[Item]:
        """Return what waits, in order."""
        return self._items

    def append(self, items: Sequence[tuple[Item, bytes]], *, dropped: Sequence[int]) -> None:
        """Keep packets, and forget those with the sequences `dropped`. Return when they are synced."""
        rows = [
            (item.sequence, item.site, item.packet_id, item.digest, item.spooled_at, data)
            for item, data in items
        ]
        with self._transaction() as connection:
            connection.executemany("DELETE FROM packets WHERE sequence = ?", _rows(dropped))
            # A commit that failed may have happened all the same; its caller was told that it did not.
            connection.execute("DELETE FROM packets WHERE sequence >= ?", (rows[0][0],))
            connection.executemany("INSERT INTO packets VALUES (?, ?, ?, ?, ?, ?)", rows)

    def read(self, items: Sequence[Item]) -> list[bytes]:
        """Return the bytes of packets.

        Raises:
            OutboxCorruptError: They are not what was written.
        """
        first, last = items[0].sequence, items[-1].sequence
        with self._transaction() as connection:
            found = dict(
                connection.execute(
                    "SELECT sequence, data FROM packets WHERE sequence BETWEEN ? AND ?",
                    (first, last),
                )
            )
        for item in items:
            if digest(found.get(item.sequence, b"")) != item.digest:
                raise OutboxCorruptError(self._damage(f"packet {item.packet_id} is not as written"))
        return [found[item.sequence] for item in items]

    def settle(self, sequences: Sequence[int], refused: Sequence[RefusedPacket]) -> None:
        """Forget packets, and keep what was refused of them beside, the newest only."""
        rows = [
            (
                r.error.reason,
                r.error.message,
                r.refused_at.timestamp(),
                r.packet.SerializeToString(),
            )
            for r in refused
        ]
        with self._transaction() as connection:
            connection.executemany("DELETE FROM packets WHERE sequence = ?", _rows(sequences))
            if not rows:
                return
            connection.executemany(
                "INSERT INTO refused (reason, message, refused_at, data) VALUES (?, ?, ?, ?)", rows
            )
            connection.execute(
                "DELETE FROM refused WHERE place NOT IN "
                "(SELECT place FROM refused ORDER BY place DESC LIMIT ?)",
                (self._keep_refused,),
            )

    def refused(self) -> list[RefusedPacket]:
        """Return what was refused, oldest first, also by earlier processes."""
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT reason, message, refused_at, data FROM refused ORDER BY place"
            ).fetchall()
        try:
            return [
                RefusedPacket(
                    packet_pb2.Packet.FromString(data),
                    error_of(reason, message),
                    dt.datetime.fromtimestamp(at, dt.UTC),
                )
                for reason, message, at, data in rows
            ]
        except DecodeError as error:
            raise OutboxCorruptError(self._damage(f"a refused packet: {error}")) from error

    def close(self) -> None:
        """Give the file back. Closing twice does nothing; neither does it in a forked child."""
        if self._closed or os.getpid() != self._pid:
            return
        with self._turn:
            self._closed = True
            self._let_go()

    def before_fork(self) -> None:
        """Close the connection, and keep every other thread from opening it again."""
        self._turn.acquire()
        self._disconnect()

    def after_fork(self) -> None:
        """Let the threads go on: in the parent, or in a child, where none can."""
        if os.getpid() != self._pid:
            self._unlock()
        self._turn.release()

    @property
    def closed(self) -> bool:
        """Whether the file was given back."""
        return self._closed

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        check_process(self._pid, "the outbox")
        with self._turn, self._translated():
            if self._closed:
                raise ClientClosedError(f"outbox {self._path} is closed; open it again")
            if self._connection is None:
                self._connection = _connect(self._path)
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # After a failed write or sync the pages in memory may not be those of the file.
                self._disconnect()
                raise

    def _prepare(self) -> list[Item]:
        self._connection = connection = _connect(self._path)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            raise OutboxCorruptError(
                f"outbox {self._path} was written by a newer version of this SDK; upgrade it"
            )
        if version == 0:
            connection.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute("COMMIT")
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise OutboxCorruptError(self._damage(found))
        rows = connection.execute(
            "SELECT sequence, site, packet_id, digest, spooled_at, data FROM packets "
            "ORDER BY sequence"
        )
        items = []
        for sequence, site, packet_id, written, spooled_at, data in rows:
            if digest(data) != written:
                raise OutboxCorruptError(self._damage(f"packet {packet_id} is not as written"))
            items.append(Item(sequence, site, packet_id, written, len(data), spooled_at))
        return items

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()  # rolls back what is under way

    def _let_go(self) -> None:
        self._disconnect()
        self._unlock()

    def _damage(self, detail: str) -> str:
        return (
            f"outbox {self._path} is damaged ({detail}); it is left as it is: move it away, with "
            f"{self._path.name}-wal, and start with a new one"
        )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise OutboxCorruptError(self._damage(str(error))) from error
            raise OutboxUnavailableError(f"outbox {self._path}: {error}") from error
        except OSError as error:
            raise OutboxUnavailableError(f"outbox {self._path}: {error.strerror}") from error


def _rows(sequences: Sequence[int]) -> list[tuple[int]]:
    return [(sequence,) for sequence in sequences]


def _connect(path: Path) -> sqlite3.Connection:
    # SQLite would let everybody read the site's packets. A failure it meets too, and tells of.
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    # The store's turn sees to it that threads never share it.
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA journal_size_limit = 16777216")
    except BaseException:
        connection.close()
        raise
    if mode != "wal":  # a file system without shared memory, as some network ones are
        connection.close()
        raise OutboxUnavailableError(
            f"outbox {path}: its file system has no write-ahead log; use a local disk"
        )
    return connection


def _check_file(path: Path) -> None:
    """Tell a new or an old outbox from another file, before anything is written to it."""
    if not path.exists():
        return
    if not path.is_file():
        raise OutboxCorruptError(f"{path} is not a regular file, so it is no outbox")
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start not in (b"", _MAGIC):
        raise OutboxCorruptError(
            f"{path} is no outbox, or its beginning is damaged; it is left as is"
        )
    if not start:
        return  # the process that made it ended before its first commit
    with contextlib.closing(
        sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    ) as file:
        identity = file.execute("PRAGMA application_id").fetchone()[0]
        objects = file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if identity != _APPLICATION_ID and (identity or objects):
        raise OutboxCorruptError(f"{path} is another program's database; it is left as it is")


def _locked(path: Path) -> int:
    # A file of its own, because closing any descriptor of the database would drop SQLite's locks.
    lock = path.with_name(path.name + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace")
        os.close(descriptor)
        raise OutboxLockedError(
            f"outbox {path} is in use by process {holder or 'unknown'}; one at a time may send from it",
            metadata={"pid": holder},
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(descriptor: int, pid: int) -> None:
    if os.getpid() == pid:  # a child has a copy, and must leave the parent its lock
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_open: weakref.WeakSet[FileStore] = weakref.WeakSet()


class _Forking:
    """The stores that were halted for a fork."""

    halted: tuple[FileStore, ...] = ()


def _before_fork() -> None:
    halted = tuple(store for store in _open if not store.closed)
    for store in halted:
        store.before_fork()
    _Forking.halted = halted


def _after_fork() -> None:
    for store in _Forking.halted:
        store.after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
