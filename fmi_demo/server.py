"""The demo's server: the real `fmi-server serve`, in a process of its own, over SQLite."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from fmi_demo.errors import DemoError

__all__ = ["DemoServer"]

_READY: Final = "listening on "
_START_S: Final = 30.0
_STOP_S: Final = 20.0
_TAIL: Final = 2000


class DemoServer:
    """A server on a free port of the loopback interface, for the time of a `with` block.

    Args:
        data_dir: Where its store is.
        cohorts: Folder of cohort files.
        log: File that its log goes to.
        flags: Further flags of the server.
    """

    def __init__(
        self, *, data_dir: Path, cohorts: Path, log: Path, flags: Sequence[str] = ()
    ) -> None:
        self._data_dir = data_dir
        self._cohorts = cohorts
        self._flags = flags
        self._killed = False
        self.log = log
        self._process: asyncio.subprocess.Process | None = None
        self.target = ""

    async def __aenter__(self) -> Self:
        """Start it and wait until it listens.

        Raises:
            DemoError: It did not.
        """
        with self.log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "fmi_server", "serve"),
                *("--listen", "127.0.0.1:0"),
                *("--data-dir", str(self._data_dir)),
                *("--cohorts", str(self._cohorts)),
                *self._flags,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for the demo, which stops the server in order
            )
        try:
            async with asyncio.timeout(_START_S):
                self.target = await self._listening()
        except TimeoutError:
            await self._stop()
            raise DemoError(f"the server was not ready in {_START_S:g} s{self._tail()}") from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop it in good order.

        Raises:
            DemoError: It did not end in time, or not with exit code 0.
        """
        code = await self._stop()
        if code != 0 and error is None and not self._killed:
            raise DemoError(f"the server ended with exit code {code}{self._tail()}")

    def kill(self) -> None:
        """Kill it as `kill -9` does.

        Raises:
            DemoError: It had ended by itself.
        """
        if self._process is None or self._process.returncode is not None:
            raise DemoError(f"the server ended by itself{self._tail()}")
        self._killed = True
        self._process.kill()

    async def _listening(self) -> str:
        process = self._process
        if process is None or process.stdout is None:
            raise DemoError("the server was not started")
        while line := (await process.stdout.readline()).decode():
            if line.startswith(_READY):
                return line.removeprefix(_READY).split()[0]
        code = await process.wait()
        raise DemoError(f"the server ended with exit code {code}{self._tail()}")

    async def _stop(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.communicate()
        return process.returncode

    def _tail(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        return f"; the end of {self.log}:\n{text[-_TAIL:]}" if text else f"; see {self.log}"
