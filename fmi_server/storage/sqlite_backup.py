"""Copy a database while it is in use, and bring a copy back as a new history."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fmi_server.storage.base import StoreCorruptError, StoreVersionError
from fmi_server.storage.sqlite_inspect import check_integrity, open_for_inspection
from fmi_server.storage.sqlite_ledger import note_backup, note_restore
from fmi_server.storage.sqlite_schema import (
    DatabaseLock,
    has_log,
    make_private,
    prepare_database,
    sync_directory,
    translate_error,
)

__all__ = [
    "RestoredDatabase",
    "backup_database",
    "copy_database",
    "refuse_existing",
    "restore_backup",
]

_BESIDE = ("-wal", "-shm")
"""What SQLite keeps beside a database. A log that is left beside another would be taken for its own."""


@dataclass(frozen=True, slots=True)
class RestoredDatabase:
    """What a restore did.

    Attributes:
        history_epoch: The name of the new history.
        set_aside: Where the database that was replaced is now; None where there was none.
    """

    history_epoch: str
    set_aside: Path | None


def backup_database(path: Path, target: Path) -> int:
    """Write a consistent copy of a database to a new file, also while a server uses it; return its bytes.

    A database of an older version can be copied before a new server changes it.

    Raises:
        FileExistsError: `target` exists; it was not touched.
        StoreCorruptError: There is no database of this server at `path`, or it is damaged.
        StoreVersionError: It is from a newer version.
        StoreUnavailableError: The disk refused.
    """
    with contextlib.closing(open_for_inspection(path)) as connection:
        try:
            # It tells of a folder that is not there, as SQLite does not.
            sync_directory(target.parent)
            copy_database(connection, target)
        except FileExistsError:
            raise
        except sqlite3.Error as error:
            # Damage is of what is read, all else of what is written.
            damaged = isinstance(translate_error(error, path), StoreCorruptError)
            raise translate_error(error, path if damaged else target) from error
        except OSError as error:
            raise translate_error(error, target) from error
    return target.stat().st_size


def copy_database(
    connection: sqlite3.Connection,
    target: Path,
    *,
    finish: Callable[[sqlite3.Connection], None] = lambda _copy: None,
    began_us: int | None = None,
) -> None:
    """Write a consistent copy to a new file; it appears under its name only when it is whole.

    Args:
        connection: To the database.
        target: The file.
        finish: Changes the copy before it appears.
        began_us: From when on something may be missing in it, Unix microseconds; None for now.

    Raises:
        FileExistsError: `target` exists; it was not touched.
    """
    refuse_existing(target)
    partial = _partial(target)
    make_private(partial)
    # Before the first page: what is spent while a large database is copied is not in the copy.
    began_us = _now_us() if began_us is None else began_us
    try:
        with contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as copy:
            connection.backup(copy)
            # One file, without a log beside it.
            copy.execute("PRAGMA journal_mode = DELETE")
            finish(copy)
            note_backup(copy, began_us)
        _sync(partial)
        _link(partial, target)
    finally:
        _remove(partial)


def refuse_existing(path: Path) -> None:
    """Refuse to write over a file.

    Raises:
        FileExistsError: It exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name or move it away")


def restore_backup(backup: Path, path: Path, *, replace: bool = False) -> RestoredDatabase:
    """Make a new database from a backup, with a history of its own.

    The epoch changes because revisions published after the backup are gone: a subscriber that
    holds a resume token of the old history must take a snapshot again.

    The backup is checked whole before anything is changed. A database that is replaced is set aside and
    not deleted. Whoever crashes has either database under the name; only where the one to be replaced is
    damaged, there may be none until the restore is done again.

    Args:
        backup: A file that `backup_database` or `SqliteStore.backup` wrote.
        path: Where the database shall be.
        replace: Set aside a database that is there.

    Raises:
        FileExistsError: `path` exists and `replace` was not said.
        StoreCorruptError: The backup is not a database of this server, is damaged, or is a live
            database and not a backup.
        StoreLockedError: A server has the database at `path` open.
        StoreVersionError: The backup is from a newer version.
        StoreUnavailableError: The disk refused.
    """
    if not replace:
        refuse_existing(path)
    partial = _partial(path)
    try:
        epoch = _prepare_copy(backup, partial)
        lock = DatabaseLock(path)
        lock.acquire()
        try:
            if not replace:
                refuse_existing(path)
            return RestoredDatabase(epoch, _put_in_place(partial, path))
        finally:
            lock.release()
    except FileExistsError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise translate_error(error, path) from error
    finally:
        _remove(partial)


def _prepare_copy(backup: Path, partial: Path) -> str:
    """Copy a backup, check all of it, and give the copy a history of its own; return its name."""
    _refuse_unreadable(backup)
    if has_log(backup):
        raise StoreCorruptError(
            path=str(backup),
            detail=f"{backup.name}-wal beside it says that it is a live database; back it up, and restore "
            "that",
        )
    make_private(partial)
    shutil.copyfile(backup, partial)
    if not partial.stat().st_size:
        raise StoreCorruptError(path=str(backup), detail="it is empty")
    try:
        connection, _ = prepare_database(partial, max_bytes=None)
        with contextlib.closing(connection):
            check_integrity(connection, backup)
            epoch = secrets.token_hex(16)
            connection.execute("UPDATE meta SET value = ? WHERE name = 'history_epoch'", (epoch,))
            note_restore(connection, _now_us())
    except StoreCorruptError as error:
        raise StoreCorruptError(path=str(backup), detail=error.detail) from error
    except StoreVersionError as error:
        raise StoreVersionError(
            path=str(backup), found=error.found, supported=error.supported
        ) from error
    except sqlite3.DatabaseError as error:
        raise translate_error(error, backup) from error
    _sync(partial)
    return epoch


def _now_us() -> int:
    return time.time_ns() // 1000


def _refuse_unreadable(backup: Path) -> None:
    try:
        with backup.open("rb"):
            pass
    except OSError as error:
        raise translate_error(error, backup) from error


def _put_in_place(partial: Path, path: Path) -> Path | None:
    """Put a database under its name, and set aside what is there. The lock is held."""
    aside = _aside(path)
    if not path.exists():
        _move_log(path, aside)
        _link(partial, path)
        return None
    if _fold_log(path):
        os.link(path, aside)
        partial.replace(path)
        sync_directory(path.parent)
    else:
        path.rename(aside)
        _move_log(path, aside)
        _link(partial, path)
    return aside


def _fold_log(path: Path) -> bool:
    """Write the log of a closed database into it; return whether nothing is left beside it."""
    if not path.stat().st_size:
        return False  # SQLite would delete the log
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.Error:
        return False
    return not any(path.with_name(path.name + ending).exists() for ending in _BESIDE)


def _move_log(path: Path, aside: Path) -> None:
    for ending in _BESIDE:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))


def _aside(path: Path) -> Path:
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    return path.with_name(f"{path.name}.replaced-{at}")


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(partial: Path, target: Path) -> None:
    """Give a whole file its name. A link, unlike a renaming, never replaces what is there."""
    os.link(partial, target)
    partial.unlink()
    sync_directory(target.parent)


def _remove(partial: Path) -> None:
    for ending in ("", *_BESIDE, "-journal"):
        partial.with_name(partial.name + ending).unlink(missing_ok=True)
