"""A server that answers before it writes, started by a test to show that the test would notice."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from fmi_server import app
from fmi_server.config import ServerSettings
from fmi_server.storage import SqliteStore
from fmi_server.storage.records import AppendOutcome, PacketRecord

WRITES_LATE_S = 0.2


class EarlyStore(SqliteStore):
    """Acknowledges packets as stored, and stores them a fifth of a second later."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._late: set[asyncio.Task[object]] = set()

    async def append(self, records: Sequence[PacketRecord]) -> list[AppendOutcome]:
        task = asyncio.create_task(self._write(records))
        self._late.add(task)
        task.add_done_callback(self._late.discard)
        return [AppendOutcome("stored", 0, r.received_at_us, False, "") for r in records]

    async def _write(self, records: Sequence[PacketRecord]) -> None:
        await asyncio.sleep(WRITES_LATE_S)
        await super().append(records)

    async def close(self) -> None:
        await asyncio.gather(*self._late)
        await super().close()


def early_store(settings: ServerSettings) -> EarlyStore:
    """Make the store in the place of the one that the application makes."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return EarlyStore(settings.data_dir / app.STORE_FILE)


if __name__ == "__main__":
    from fmi_server.cli import main

    setattr(app, "_store", early_store)  # noqa: B010 - the seam is private
    sys.argv[0] = "fmi-server"
    main()
