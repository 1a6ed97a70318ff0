"""How long a server takes to be ready that has many packets stored, beside one that has none, in one run.

Sites send again and again, so most packets are overtaken, and a compaction has retired them, as it does
beside everything else in a server that runs. The store is filled by the server's own pipeline. Then processes
of `fmi-server serve` are started in turn, with an empty store and with a full one, until each says that it
listens, which it does when its state is back.

    make bench-start        or: python -m benchmarks.start --packets 1000000 --sites 10000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import sqlite3
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.memory import held_bytes
from fmi.plain import CURRENT_REVISION, new_packet_id
from fmi.v1 import packet_pb2
from fmi_server.app import STORE_FILE
from fmi_server.service import FMIService
from fmi_server.storage import SqliteStore

SIGNALS = 25
COHORT = "bench"
BATCH = 500
BETWEEN_S = 60.0
"""Between two packets of a site."""


def packets(count: int, sites: int) -> Iterator[packet_pb2.Packet]:
    """Make packets of 25 signals each, all sites in turn; the last ones are as of now."""
    values = np.random.default_rng(1).normal(1.0, 0.1, (1_000, SIGNALS))
    now, turns = time.time(), -(-count // sites)
    for index in range(count):
        turn, site = divmod(index, sites)
        packet = packet_pb2.Packet()
        header = packet.header
        header.packet_id, header.domain_id = new_packet_id(), f"site_{site:06}"
        header.cohort, header.rev = COHORT, CURRENT_REVISION
        header.emitted_at.FromMicroseconds(int((now - (turns - turn) * BETWEEN_S) * 1e6))
        row = values[index % len(values)]
        packet.msp.controller.update({f"control_{i}": float(x) for i, x in enumerate(row)})
        yield packet


async def fill(folder: Path, count: int, sites: int) -> None:
    """Send packets through a service of this process, and compact its store."""
    async with FMIService(store=SqliteStore(folder / STORE_FILE)) as service:
        made = packets(count, sites)
        started = time.perf_counter()
        while batch := list(itertools.islice(made, BATCH)):
            answers = await service.emit_batch(batch)
            refused = [answer for answer in answers if answer.status != "accepted"]
            if refused:
                raise RuntimeError(f"a packet was {refused[0].status}: {refused[0].error}")
        print(f"filled: {count / (time.perf_counter() - started):,.0f} packets/s", flush=True)
        await service.release(COHORT)
        started = time.perf_counter()
        await service.compactor.compact(COHORT)
        print(f"compacted in {time.perf_counter() - started:,.0f} s", flush=True)
    with contextlib.closing(sqlite3.connect(folder / STORE_FILE)) as connection:
        # Not what the pass counted: another one may have run beside it.
        live = "SELECT count(*) FROM packets WHERE retired = 0 AND quarantined = 0"
        print(f"{connection.execute(live).fetchone()[0]:,} packets can still count", flush=True)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[float, int]]:
    """Start a server; give the seconds until it listens, and its process id."""
    command = [str(Path(sysconfig.get_path("scripts")) / "fmi-server"), "serve"]
    flags = ["--data-dir", str(folder), "--listen", "127.0.0.1:0", "--log-level", "error"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FMI_")}
    started = time.perf_counter()
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, env=kept)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError(f"the server did not start: {line!r}")
        yield time.perf_counter() - started, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def main() -> None:
    """Fill a store, and start servers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--packets", type=int, default=1_000_000)
    parser.add_argument("--sites", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        full, empty = Path(made, "full"), Path(made, "empty")
        for folder in (full, empty):
            folder.mkdir()
        asyncio.run(fill(full, options.packets, options.sites))
        times: dict[Path, list[float]] = {empty: [], full: []}
        held: dict[Path, int] = {}
        for _ in range(options.rounds):
            for folder, seconds in times.items():
                with server(folder) as (took, pid):
                    seconds.append(took)
                    held[folder] = held_bytes("VmRSS", pid)
        size = (full / STORE_FILE).stat().st_size
    said = f"{options.packets:,} packets of {options.sites:,} sites, {SIGNALS} signals each"
    print(f"\n{said}; {size / 1e6:,.0f} MB on disk; medians of {options.rounds} starts")
    ratio = statistics.median(f / e for e, f in zip(times[empty], times[full], strict=True))
    for folder, name in ((empty, "an empty store"), (full, "a full one")):
        median = statistics.median(times[folder])
        print(f"  {name:14}  ready after {median:6.2f} s, {held[folder] / 1e6:,.0f} MB resident")
    print(f"  ratio {ratio:.2f}   (target: ready in 3 s with 1,000,000 packets)")


if __name__ == "__main__":
    main()
