"""A backup of a log, which is the database of an embedded store; and a new log that begins with one.

So a backup of either kind of store can become a store of either kind.

A log that begins with a backup has no entry of what is in it. The backup stands beside it as a snapshot at
entry 1, and the log begins at entry 2: every view begins with the snapshot. The log is made last. Until then
there is none, and whatever fails before that leaves nothing that anybody looks at. Of two restores at the
same time, or a restore and a server that starts, the log is whose was made first; the other one is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fmi_server.storage.base import StoreCorruptError
from fmi_server.storage.jetstream import JetStreamStore
from fmi_server.storage.jetstream_broker import BrokerConnection, BrokerOptions
from fmi_server.storage.jetstream_log import BrokerLog
from fmi_server.storage.jetstream_names import BrokerAddress, LogNames
from fmi_server.storage.jetstream_snapshots import SnapshotStream
from fmi_server.storage.jetstream_view import make_view
from fmi_server.storage.sqlite_backup import refuse_existing, restore_backup
from fmi_server.storage.sqlite_schema import sync_directory, translate_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["backup_log", "restore_log"]

BACKUP_ENTRY: Final = 1
"""The place in the log that a backup takes."""


async def backup_log(url: str, target: Path, *, options: BrokerOptions | None = None) -> int:
    """Write all that a log holds to a new file; return its bytes.

    All that any server was answered before this began is in it. No server is needed for it, and none is held
    up. Beside the target there must be room for as much again.

    Args:
        url: As of `JetStreamStore`.
        target: The file. It appears when it is whole and on disk.
        options: How long is waited for the brokers.

    Raises:
        FileExistsError: `target` exists; it was not touched.
        StoreCorruptError: There is no log of this federation.
        StoreUnavailableError: The brokers do not answer, or the disk refused.
    """
    refuse_existing(target)
    try:
        sync_directory(target.parent)  # before the brokers are asked for all of it
    except OSError as error:
        raise translate_error(error, target) from error
    options = options or BrokerOptions()
    async with _log(url, options) as log:
        if not await log.exists():
            raise StoreCorruptError(path=log.location, detail="there is no log of this federation")
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        async with JetStreamStore(url, Path(folder) / "view.sqlite3", options=options) as store:
            await store.backup(target)
    return (await asyncio.to_thread(target.stat)).st_size


async def restore_log(
    backup: Path, url: str, workspace: Path, *, options: BrokerOptions | None = None
) -> str:
    """Make a new log that begins with a backup, as a new history; return the history's name.

    The backup is checked whole first. There must be no log of this federation: brokers cannot set one aside.

    Args:
        backup: A file that `backup_log`, `backup_database` or `SqliteStore.backup` wrote.
        url: As of `JetStreamStore`.
        workspace: A folder with room for a copy of the backup, for as long as it takes.
        options: How the log is made, and how long is waited for the brokers.

    Raises:
        FileExistsError: There is a log of this federation; it was not touched.
        StoreCorruptError: The backup is none, or is damaged.
        StoreVersionError: The backup is from a newer version.
        StoreUnavailableError: The brokers do not answer, or the disk refused.
    """
    async with _log(url, options or BrokerOptions()) as log:
        if await log.exists():
            raise _exists(log)
        with tempfile.TemporaryDirectory(prefix=".restore-", dir=workspace) as folder:
            file = Path(folder) / "view.sqlite3"
            restored = await asyncio.to_thread(restore_backup, backup, file)
            await asyncio.to_thread(_make_view, file)
            log.epoch = restored.history_epoch
            snapshots = SnapshotStream(log)
            await snapshots.open()
            await snapshots.save(file, BACKUP_ENTRY)
        made = await log.create(restored.history_epoch, first=BACKUP_ENTRY + 1)
        if made.epoch != restored.history_epoch:
            raise _exists(log)  # a server has made it meanwhile
        return made.epoch


@contextlib.asynccontextmanager
async def _log(url: str, options: BrokerOptions) -> AsyncIterator[BrokerLog]:
    address = BrokerAddress.parse(url)
    broker = BrokerConnection(address, options)
    await broker.connect()
    try:
        yield BrokerLog(broker, LogNames(address.federation))
    finally:
        await broker.close()


def _make_view(file: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
            make_view(connection, sequence=BACKUP_ENTRY)
            # One file, without a log beside it.
            connection.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        raise translate_error(error, file) from error


def _exists(log: BrokerLog) -> FileExistsError:
    return FileExistsError(
        f"{log.location} has a log; choose another name of the federation, as in nats://host/name, or delete "
        f"the streams {log.names.stream} and {log.names.snapshots} at the brokers"
    )
