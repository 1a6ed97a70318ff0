"""What a process holds, and how quickly it answers, seen from outside.

process.py TARGET COHORT    emits until SIGTERM, and says for each packet when it was due and how long it took
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

import grpc
from server_harness import Client, msp
from server_process import START_S, environment

__all__ = ["Latencies", "Probe", "probing", "resident_bytes"]

EVERY_S = 0.02


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@dataclass
class Latencies:
    """How long answers took, in seconds from when their packet was due."""

    values_s: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.values_s)

    @property
    def p99_s(self) -> float:
        return sorted(self.values_s)[int(len(self.values_s) * 0.99)]

    def __str__(self) -> str:
        return (
            f"{self.median_s * 1e3:.0f} ms, 99 % {self.p99_s * 1e3:.0f} ms ({len(self.values_s)})"
        )


@dataclass
class Probe:
    """A site in a process of its own, so that what it measures is not the load of the test.

    Attributes:
        answers: When each packet was due, by `time.monotonic`, and how long its answer took. Known when
            the probe has ended.
    """

    answers: list[tuple[float, float]] = field(default_factory=list)

    def during(self, spans: Iterable[tuple[float, float]]) -> Latencies:
        """Return what was measured of packets due within the spans."""
        spans = list(spans)
        return Latencies(
            [took for due, took in self.answers if any(a <= due <= b for a, b in spans)]
        )


@contextlib.asynccontextmanager
async def probing(target: str, cohort: str) -> AsyncIterator[Probe]:
    """Emit at even times for as long as the context lasts."""
    probe = Probe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, target, cohort),
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            assert await process.stdout.readline() == b"begun\n"
        yield probe
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(START_S):
            said, _ = await process.communicate()
        probe.answers += [(due, took) for due, took in json.loads(said)]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def emit_until_told(target: str, cohort: str) -> None:
    """Emit one packet after the other at even times; what finds no server is left out."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    answers: list[tuple[float, float]] = []
    options = (("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 100))
    async with Client(target, options) as client:
        await client.emit(msp("probe", cohort))
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        due = time.monotonic()
        while not ended.is_set():
            with contextlib.suppress(grpc.aio.AioRpcError):
                await client.emit(msp("probe", cohort))
                answers.append((due, time.monotonic() - due))
            due = max(due + EVERY_S, time.monotonic())
            await asyncio.sleep(max(0.0, due - time.monotonic()))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    asyncio.run(emit_until_told(*sys.argv[1:]))
