"""What is read of a server process at intervals, and how fast it grows."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.soak.load import Tally

__all__ = ["MEASURES", "Measure", "Reader", "Reading", "middle", "slope_per_hour"]

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Reading:
    """One look at a server; rates and latencies are of the interval before it.

    Attributes:
        at_s: Seconds since the start.
        rss_mb: Resident memory, millions of bytes.
        descriptors: Open file descriptors.
        threads: Threads.
        cpu: Share of one core that was used.
        store_mb: Size of the files of the store, millions of bytes.
        packets_per_s: Packets that were acknowledged.
        updates_per_s: Updates that subscribers got.
        p50_ms: Median latency of a single Emit, from when it was due.
        p99_ms: The same, 99th percentile.
    """

    at_s: float
    rss_mb: float
    descriptors: float
    threads: float
    cpu: float
    store_mb: float
    packets_per_s: float
    updates_per_s: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Measure:
    """A field of a reading, and how it is shown."""

    field: str
    title: str
    unit: str
    digits: int = 1


MEASURES = (
    Measure("rss_mb", "resident memory", "MB"),
    Measure("descriptors", "file descriptors", "", 0),
    Measure("threads", "threads", "", 0),
    Measure("cpu", "CPU", "cores", 2),
    Measure("p50_ms", "Emit, median", "ms"),
    Measure("p99_ms", "Emit, 99th percentile", "ms"),
    Measure("packets_per_s", "packets", "/s"),
    Measure("updates_per_s", "updates to subscribers", "/s"),
    Measure("store_mb", "store on disk", "MB"),
)


class Reader:
    """Reads a server process again and again.

    Args:
        pid: The process.
        data_dir: Where its store is.
    """

    def __init__(self, pid: int, data_dir: Path) -> None:
        self._process = Path("/proc") / str(pid)
        self._data_dir = data_dir
        self._begun = self._last = time.monotonic()
        self._cpu_s = self._cpu()

    def read(self, tally: Tally) -> Reading:
        """Look at the process, and begin a new interval."""
        now, cpu_s = time.monotonic(), self._cpu()
        took = now - self._last
        status = (self._process / "status").read_text(encoding="ascii")
        numbers = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, flags=re.MULTILINE))
        latencies = np.array(tally.latencies_s or [np.nan]) * 1e3
        reading = Reading(
            at_s=now - self._begun,
            rss_mb=int(numbers["VmRSS"]) * 1024 / 1e6,
            descriptors=len(list((self._process / "fd").iterdir())),
            threads=int(numbers["Threads"]),
            cpu=(cpu_s - self._cpu_s) / took,
            store_mb=sum(file.stat().st_size for file in self._data_dir.iterdir()) / 1e6,
            packets_per_s=tally.packets / took,
            updates_per_s=tally.updates / took,
            p50_ms=float(np.quantile(latencies, 0.5)),
            p99_ms=float(np.quantile(latencies, 0.99)),
        )
        self._last, self._cpu_s = now, cpu_s
        tally.latencies_s.clear()
        tally.packets = tally.updates = 0
        return reading

    def _cpu(self) -> float:
        # Behind the name of the program, which may hold blanks, utime and stime are fields 14 and 15.
        fields = (self._process / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def slope_per_hour(at_s: Sequence[float], values: Sequence[float]) -> float:
    """Return how much a value grows in an hour, by the median of the slopes of all pairs.

    One reading that stands out does not move it (Theil 1950, Sen 1968).
    """
    x, y = np.asarray(at_s) / 3600.0, np.asarray(values)
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 2:
        return float("nan")
    first, second = np.triu_indices(len(x), k=1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def middle(values: Sequence[float]) -> float:
    """Return the median of what is known."""
    known = [value for value in values if np.isfinite(value)]
    return statistics.median(known) if known else float("nan")
