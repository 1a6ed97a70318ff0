"""Copy a database while it is in use, and bring a copy back as a new history."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sqlite3
from pathlib import Path

from fmi_server.storage.sqlite_schema import prepare_database, sync_directory, translate_error

__all__ = ["copy_database", "restore_backup"]


def copy_database(connection: sqlite3.Connection, target: Path) -> None:
    """Write a consistent copy to a new file; it appears under its name only when it is whole.

    Raises:
        FileExistsError: `target` exists; it was not touched.
    """
    partial = _partial(target)
    try:
        with contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as copy:
            connection.backup(copy)
            # One file, without a log beside it.
            copy.execute("PRAGMA journal_mode = DELETE")
        _put_in_place(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def restore_backup(backup: Path, path: Path) -> str:
    """Make a new database from a backup, and return its new history epoch.

    The epoch changes because revisions published after the backup are gone: a subscriber that
    holds a resume token of the old history must take a snapshot again.

    Raises:
        FileExistsError: `path` exists; move it away first.
        StoreCorruptError: The backup is not a database of this server.
        StoreVersionError: The backup is from a newer version.
        StoreUnavailableError: The disk refused.
    """
    partial = _partial(path)
    try:
        shutil.copyfile(backup, partial)
        connection, _ = prepare_database(partial, max_bytes=None)
        epoch = secrets.token_hex(16)
        with contextlib.closing(connection):
            connection.execute("UPDATE meta SET value = ? WHERE name = 'history_epoch'", (epoch,))
        _put_in_place(partial, path)
    except FileExistsError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise translate_error(error, path) from error
    finally:
        partial.unlink(missing_ok=True)
    return epoch


def _partial(target: Path) -> Path:
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another name or move it away")
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")


def _put_in_place(partial: Path, target: Path) -> None:
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    # A link, unlike a renaming, never replaces a file that came into being meanwhile.
    os.link(partial, target)
    partial.unlink()
    sync_directory(target.parent)
