"""A real server for tests: grpc.aio on a free loopback port, with a real store."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fmi_server.app import RunningServer, running
from fmi_server.config import ServerSettings
from fmi_server.storage import Store

__all__ = ["running_server"]


@contextlib.asynccontextmanager
async def running_server(
    data_dir: Path | None = None, *, store: Store | None = None, **settings: Any
) -> AsyncIterator[RunningServer]:
    """Run a server on a free port of 127.0.0.1 for as long as the context lasts.

    Args:
        data_dir: Where its SQLite store lives; without it, it keeps everything in memory.
        store: A store of the test's own.
        settings: Further settings by name; see `ServerSettings`.
    """
    chosen: dict[str, Any] = {"listen": "127.0.0.1:0", "drain_s": 1.0, **settings}
    if data_dir is None:
        chosen["store"] = "memory"
    else:
        chosen["data_dir"] = data_dir
    async with running(ServerSettings(**chosen), store=store) as server:
        yield server
