"""A real server process that is killed again and again, and the clients' common notebook."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from guarantees import History, Store
from ports import lasting_port
from server_harness import rows
from server_process import START_S, environment

__all__ = ["COHORT", "QUICK_RECONNECT", "SHORT", "Rig"]

COHORT = "care"
"""A cohort that keeps every update."""

SHORT = "short"
"""A cohort that keeps a few updates of each kind only."""

QUICK_RECONNECT = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 200),
)
"""The one in the middle is how long a connection may take to be made, and no pause."""


class Rig:
    """The server process, on one port and one folder through all its lives.

    Args:
        data_dir: Where the server keeps its data.
        seed: Of everything that is left to chance.
        commands: How the server is started; each start takes one of them.

    Attributes:
        target: Where the server listens.
        history: What clients wrote down.
        up: Set while the server listens.
        stopping: Set when clients shall come to an end.
        kills: How often the process was killed.
        ends: How often it ended in good order.
        answered: Set at each answer to a packet.
        sent: Set at each packet that is sent.
    """

    def __init__(self, data_dir: Path, seed: int, *commands: Sequence[str]) -> None:
        self.target = f"127.0.0.1:{lasting_port()}"
        self.data_dir = data_dir
        self.log = data_dir.with_name("server.log")
        self.history = History()
        self.chance = random.Random(seed)
        self.up = asyncio.Event()
        self.stopping = asyncio.Event()
        self.answered = asyncio.Event()
        self.sent = asyncio.Event()
        self.kills = 0
        self.ends = 0
        self._commands = commands
        self._process: asyncio.subprocess.Process | None = None

    def somewhere(self) -> str:
        """Return where a client connects next."""
        return self.target

    async def start(self, *, kill_after_s: float | None = None) -> bool:
        """Start the server and wait until it listens, or kill it while it starts."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.chance.choice(self._commands),
                "--listen",
                self.target,
                "--data-dir",
                str(self.data_dir),
                env=environment(),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_S if kill_after_s is None else kill_after_s):
                line = await self._process.stdout.readline()
        if kill_after_s is not None:
            await self.kill()
            return False
        assert line.startswith(b"listening on "), self.log.read_text()
        self.up.set()
        return True

    def tell(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        assert self._process is not None
        self.up.clear()
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
        ended = await self._process.wait()
        # It may have ended in good order in between, where it was told to.
        assert ended in (-signal.SIGKILL, 0), self.log.read_text()
        self.kills += ended != 0
        self.ends += ended == 0

    async def end(self) -> None:
        """Let the server end in good order."""
        self.up.clear()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(START_S):
                assert await self._process.wait() == 0, self.log.read_text()
            self.ends += 1

    async def abandon(self) -> None:
        """Leave no process behind, whatever happened."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def store(self) -> Store:
        """Read the store's file, which must be whole."""
        file = self.data_dir / "fmi.sqlite3"
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as found:
            assert found.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return Store.from_rows(rows(self.data_dir, "packets", "updates", "sites"))
