"""`fmi` as a process of its own, which hears Ctrl-C even where the tests themselves do not."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

# A process of a background job begins with SIGINT ignored, and so do those that it starts.
_MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from fmi_client.cli import main
main()
"""


@asynccontextmanager
async def fmi_process(
    *args: str, stdin: int | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start `fmi`; it is killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _MAIN),
        *args,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
