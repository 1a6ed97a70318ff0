"""Keeping the log short: when a snapshot is made, what is dropped then, and how a view begins with one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fmi_server.storage.base import StoreCorruptError, StoreError
from fmi_server.storage.jetstream_view import view_position
from fmi_server.storage.sqlite_schema import check_version

if TYPE_CHECKING:
    from fmi_server.storage.jetstream_log import BrokerLog
    from fmi_server.storage.jetstream_snapshots import SnapshotStream
    from fmi_server.storage.sqlite import SqliteStore

__all__ = ["LogShortener", "replace_view"]

_LOG = logging.getLogger(__name__)

_LOOK_EVERY_S = 60.0


class LogShortener:
    """Make snapshots of a view, and drop from the log what is in them.

    Several replicas may do so at the same time: the newest snapshot counts, and a log is never shortened
    beyond the snapshot that is there.
    """

    def __init__(self, log: BrokerLog, snapshots: SnapshotStream, view: SqliteStore) -> None:
        self._log = log
        self._snapshots = snapshots
        self._view = view

    async def run(self) -> None:
        """Shorten the log whenever it has become long, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                if await self._is_long():
                    await self.shorten()
            except (StoreError, OSError) as error:
                _LOG.warning("the log of %s is not shortened now: %s", self._log.location, error)

    async def _is_long(self) -> bool:
        state = await self._log.state()
        view_bytes = self._view.path.stat().st_size
        return state.size > max(self._log.broker.options.snapshot_bytes, view_bytes)

    async def shorten(self) -> int:
        """Save a snapshot and shorten the log; return the last entry that is in it.

        Raises:
            StoreCorruptError: Another log stands there by now, whose snapshots these are.
        """
        if (await self._log.state()).epoch != self._log.epoch:
            raise StoreCorruptError(path=self._log.location, detail="it is another log than before")
        view = self._view.path
        prefix = f".{view.name}-snapshot-"
        # What a process left that was killed here before.
        for left in view.parent.glob(f"{prefix}*"):
            await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=view.parent) as folder:
            copy = Path(folder) / "view.db"
            # The copy is of one moment; it has gone at least as far as the view had before.
            before = await self._view.query(view_position)
            await self._view.backup(copy)
            if await self._snapshots.save(copy, before.sequence):
                await self._snapshots.delete_others()
        newest = await self._snapshots.newest()
        position = newest.position if newest is not None else 0
        await self._log.trim(below=position + 1 - self._log.broker.options.kept_entries)
        return position


async def replace_view(path: Path, snapshots: SnapshotStream) -> None:
    """Put the newest snapshot in the place of a view that is closed.

    Raises:
        SnapshotReplacedError: It was replaced meanwhile; the view is as it was.
        StoreCorruptError: There is no snapshot.
        StoreVersionError: A newer version made it; the view is as it was.
    """
    manifest = await snapshots.newest()
    if manifest is None:
        raise StoreCorruptError(
            path=str(path), detail="the log begins later and there is no snapshot at the brokers"
        )
    fetched = path.with_name(f"{path.name}.snapshot")
    fetched.unlink(missing_ok=True)
    try:
        await snapshots.fetch(manifest, fetched)
        check_version(fetched, f"the snapshot at entry {manifest.position} for {path}")
        # A log beside the old view would be taken for one of the new.
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        fetched.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            fetched.unlink()
