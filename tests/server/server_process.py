"""`fmi-server serve` as a process of its own, as an operator starts it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sysconfig
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_S = 60.0

LOCAL = ("--listen", "127.0.0.1:0")

COMMAND = (str(Path(sysconfig.get_path("scripts")) / "fmi-server"), "serve")


def environment(**variables: str) -> dict[str, str]:
    """The environment without any setting of the server, but for those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FMI_")}
    return {**kept, **variables}


@dataclass
class Ended:
    """A process that ended."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that it said on standard error, past its log."""
        (line,) = [text for text in self.err.splitlines() if text.startswith("fmi-server: ")]
        assert "Traceback" not in self.err, self.err
        return line.removeprefix("fmi-server: ")


def assert_refused(ended: Ended, *words: str) -> None:
    """It stops with exit code 2 and one line that has the words; nothing ever listened."""
    assert ended.code == 2, ended
    assert ended.out == ""
    for word in words:
        assert word in ended.line, ended.line


@dataclass
class ServerProcess:
    """A server that listens."""

    process: asyncio.subprocess.Process
    target: str
    err: list[str]
    reading: asyncio.Future[None]

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ended(self) -> int:
        """Wait until it ended and all that it said is in `err`; return its exit code."""
        code = await self.process.wait()
        await asyncio.shield(self.reading)
        return code


async def run(*flags: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Ended:
    """Run the server until it ends by itself."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *flags,
        env=environment(**(env or {})),
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(START_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


@contextlib.asynccontextmanager
async def started(
    *flags: str,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] = COMMAND,
    cwd: Path | None = None,
) -> AsyncIterator[ServerProcess]:
    """Start a server and wait until it listens; it is killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *command,
        *flags,
        env=environment(**(env or {})),
        cwd=cwd,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    lines: list[str] = []

    async def read_errors(stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            lines.append(line.decode())

    reading = asyncio.ensure_future(read_errors(process.stderr))
    try:
        async with asyncio.timeout(START_S):
            first = (await process.stdout.readline()).decode()
        assert first.startswith("listening on "), (first, lines)
        target = first.removeprefix("listening on ").strip()
        yield ServerProcess(process, target, lines, reading)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()
        await reading
