"""A server under a steady load for a long time: memory, file descriptors and latency must stay flat.

A real `fmi-server serve` with SQLite on disk runs as a process of its own. 100 sites emit to 4 cohorts, one
packet in five alone and the rest in batches of 40; 20 subscribers stay, two a second come and go, and one
never reads. Every few seconds the process is looked at from outside.

    make soak                   or: python -m benchmarks.soak --minutes 5 --rate 200
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.soak.load import Load
from benchmarks.soak.readings import Reader, Reading
from benchmarks.soak.report import draw_chart, table

MOST_FAULTS_SHOWN = 10


@dataclass(frozen=True)
class Options:
    """How long, how much, and where to."""

    minutes: float
    rate: float
    every_s: float
    seed: int
    output: Path


@contextlib.contextmanager
def server(data_dir: Path) -> Iterator[tuple[int, str]]:
    """Run a server as a process; yield its id and where it listens."""
    command = [sys.executable, "-m", "fmi_server", "serve", "--listen", "127.0.0.1:0"]
    command += ["--data-dir", str(data_dir), "--log-level", "warning"]
    # What is set for this run is no setting of the server.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FMI_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise SystemExit("the server did not start")
            yield process.pid, line.removeprefix("listening on ").strip()
        finally:
            process.terminate()


async def soak(options: Options, data_dir: Path) -> tuple[list[Reading], list[str], int]:
    """Run the load; return the readings, what went wrong, and how many subscriptions came and went."""
    readings: list[Reading] = []
    with server(data_dir) as (pid, target):
        load = Load(target, per_s=options.rate, seed=options.seed)
        reader = Reader(pid, data_dir)
        running = asyncio.create_task(load.run())
        try:
            while not readings or readings[-1].at_s < options.minutes * 60:
                done, _ = await asyncio.wait([running], timeout=options.every_s)
                if done:
                    break
                readings.append(reader.read(load.tally))
                if len(readings) % 12 == 0:
                    tell(readings[-1], len(load.tally.faults))
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
    return readings, load.tally.faults, load.tally.visits


def tell(reading: Reading, faults: int) -> None:
    """Say how it goes."""
    print(
        f"{reading.at_s / 60:6.1f} min  {reading.rss_mb:6.1f} MB  {reading.descriptors:3.0f} descriptors  "
        f"Emit {reading.p50_ms:.1f} ms, 99 % {reading.p99_ms:.1f} ms  {reading.packets_per_s:.0f} packets/s  "
        f"{faults} faults",
        flush=True,
    )


def main() -> None:
    """Soak, print the table, and write the readings and the chart."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=200.0, help="packets a second")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two readings")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("build/soak"))
    found = parser.parse_args()
    options = Options(found.minutes, found.rate, found.every, found.seed, found.output)
    with tempfile.TemporaryDirectory() as data_dir:
        readings, faults, visits = asyncio.run(soak(options, Path(data_dir)))
    options.output.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps([dataclasses.asdict(reading) for reading in readings], indent=1)
    (options.output / "readings.json").write_text(numbers + "\n", encoding="utf-8")
    minutes = readings[-1].at_s / 60
    title = f"{options.rate:.0f} packets/s for {minutes:.0f} minutes"
    draw_chart(readings, title, options.output / "soak.png")
    print(
        f"\n{title}; {visits:,} subscriptions came and went; {os.cpu_count()} cores, "
        f"Python {platform.python_version()}\n\n{table(readings)}\n\n{len(faults)} faults"
    )
    for fault in faults[:MOST_FAULTS_SHOWN]:
        print(f"  {fault}")
    print(f"wrote readings.json and soak.png to {options.output}")
    if faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
