"""Watches how much memory the process holds, and says when that is too much.

The bounds of the parts (per site, cohort, subscriber and call) do not add up to a bound of the process:
there may be as many of each as peers care to make. So the sum is watched. Past the limit nothing new is
taken, which is a refusal with a time to try again, and what can be let go of is let go of: a server that
grows on is killed by the system, and all that it serves with it.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fmi_server.telemetry import FMITelemetry

__all__ = ["MemoryWatch", "default_limit", "resident_bytes"]

LOOK_S: Final = 0.05
"""Seconds between two looks, of some 20 us. What peers can send meanwhile goes past the limit."""

TRIM_S: Final = 1.0
"""Seconds between two attempts to give memory back, while there is too much or much has come."""

MUCH_BYTES: Final = 64 * 2**20
"""What is held past the least since the last attempt, after which the next one is made."""

ENOUGH: Final = 0.95
"""The share of the limit below which all is well again, so that the state does not change with each call."""

OF_THE_MACHINE: Final = 0.8
"""The share of the memory of the machine or the container that is taken, where no limit is set."""

_CGROUP_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

_log = logging.getLogger(__name__)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    with open("/proc/self/statm", "rb", buffering=0) as statm:  # noqa: PTH123 - pathlib takes thrice as long
        return int(statm.read(100).split()[1]) * _PAGE_BYTES


def default_limit() -> int:
    """Return the limit where none is set: a share of what the container or the machine has."""
    found = [os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES]
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():  # else it is `max`
            found.append(int(text))
    return int(min(found) * OF_THE_MACHINE)


class MemoryWatch:
    """Says whether the process holds more memory than it may.

    Args:
        telemetry: Shows it.
        limit_bytes: The most that it may hold; 0 for no limit.
        read: Reads the resident memory.

    Attributes:
        limit_bytes: The limit; it may be changed.
        pressed: Whether there is too much, so that nothing new should be taken.
    """

    def __init__(
        self,
        *,
        telemetry: FMITelemetry,
        limit_bytes: int = 0,
        read: Callable[[], int] = resident_bytes,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.pressed = False
        self._telemetry = telemetry
        self._read = read
        self._relief: list[Callable[[], int]] = []

    def on_pressure(self, relief: Callable[[], int]) -> None:
        """Call at each look while there is too much; it lets go of calls and returns how many."""
        self._relief.append(relief)

    async def run(self) -> None:
        """Look again and again, and give back what is free, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._look(), name="looks at memory")
            tasks.create_task(self._give_back(), name="memory given back")

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            held = self._read()
            self._telemetry.memory(held, pressed=self.pressed)
            if not self.limit_bytes:
                continue
            self._judge(held)
            if not self.pressed:
                continue
            let_go = sum(relief() for relief in self._relief)
            if let_go:
                _log.warning("%d calls whose message had not arrived are ended for memory", let_go)

    async def _give_back(self) -> None:
        least = self._read()
        while True:
            await asyncio.sleep(TRIM_S)
            held = self._read()
            least = min(least, held)
            if self.pressed or held > least + MUCH_BYTES:
                await asyncio.to_thread(_trim)  # beside the looks, which do not wait for it
                least = self._read()

    def _judge(self, held: int) -> None:
        if not self.pressed and held > self.limit_bytes:
            self.pressed = True
            _log.error(
                "%d MiB of memory are held, more than max_memory_bytes (%d MiB): new calls are refused as "
                "OVERLOADED until it is less",
                held >> 20,
                self.limit_bytes >> 20,
            )
        elif self.pressed and held < self.limit_bytes * ENOUGH:
            self.pressed = False
            _log.info("%d MiB of memory are held: calls are taken again", held >> 20)


def _trim() -> None:
    """Give freed memory back to the system, where the C library can.

    Without it, what a wave of calls took would count as held for hours, although it is free.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
