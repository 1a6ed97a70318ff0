"""What a process holds, and how quickly it answers, seen from outside."""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from server_harness import Client, msp

__all__ = ["Latencies", "resident_bytes"]


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


class Latencies:
    """How long one Emit takes, again and again at even times.

    Attributes:
        values_s: Seconds from when each was due to its answer.
    """

    def __init__(self, client: Client, cohort: str, *, every_s: float = 0.02) -> None:
        self._client = client
        self._cohort = cohort
        self._every_s = every_s
        self.values_s: list[float] = []

    async def during(self, over: Callable[[], bool]) -> Latencies:
        """Emit until a condition is true."""
        due = time.monotonic()
        while not over():
            await self._client.emit(msp("other", self._cohort))
            self.values_s.append(time.monotonic() - due)
            due = max(due + self._every_s, time.monotonic())
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        return self

    async def count(self, number: int) -> Latencies:
        """Emit so many times."""
        return await self.during(lambda: len(self.values_s) >= number)

    @property
    def median_s(self) -> float:
        return statistics.median(self.values_s)

    @property
    def p99_s(self) -> float:
        return sorted(self.values_s)[int(len(self.values_s) * 0.99)]

    def __str__(self) -> str:
        return (
            f"{self.median_s * 1e3:.1f} ms, 99 % {self.p99_s * 1e3:.1f} ms ({len(self.values_s)})"
        )
