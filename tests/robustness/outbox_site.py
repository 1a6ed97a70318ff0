"""A site that emits through an outbox in a file as fast as it can, until it is told to end or killed.

It writes down the number of each packet when `emit` has returned for it, and no earlier. Numbers rise over
all lives of the site. SIGTERM ends it in good order: everything sent, or exit code 1.

    outbox_site.py TARGET FOLDER SITE LIFE (async|blocking)
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fmi_client import (
    AsyncFMIClient,
    FileOutbox,
    FMIClient,
    OutboxFullError,
    RetryPolicy,
    outbox,
)
from fmi_client._outbox_file import FileStore
from fmi_client.outbox import RefusedPacket

COHORT = "care"
LIFE = 1_000_000
"""More packets than a site emits in a life."""

FLUSH_S = 120.0
QUICK = RetryPolicy(initial_s=0.02, max_s=0.2)


class Notebook:
    """Survives the process: each line is handed to the system before the next packet."""

    def __init__(self, folder: Path, site: str) -> None:
        self._descriptor = os.open(
            folder / f"{site}.notes", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600
        )

    def returned(self, numbers: list[int]) -> None:
        os.write(self._descriptor, "".join(f"{number}\n" for number in numbers).encode())


class SlowToForget(FileStore):
    """Takes its time between the server's answer and forgetting, so that a kill finds it there."""

    def settle(self, sequences: Sequence[int], refused: Sequence[RefusedPacket]) -> None:
        time.sleep(0.02)
        super().settle(sequences, refused)


def batches(life: int) -> Iterator[list[int]]:
    """Now one packet, now many, with numbers that rise."""
    chance = random.Random()
    first = life * LIFE + 1
    for _ in itertools.count():
        size = chance.choice([1, 1, 1, 1, chance.randint(2, 60)])
        yield list(range(first, first + size))
        first += size


def plain(number: int) -> dict[str, object]:
    return {"type": "msp", "controller": {"number": number}}


def run_blocking(target: str, folder: Path, site: str, life: int) -> bool:
    notebook, ending = Notebook(folder, site), []
    signal.signal(signal.SIGTERM, lambda *_: ending.append(True))
    spool = FileOutbox(folder / f"{site}.outbox")
    with FMIClient(
        target, domain_id=site, cohort=COHORT, retry=QUICK, timeout_s=2.0, outbox=spool
    ) as client:
        for numbers in batches(life):
            if ending:
                break
            try:
                if len(numbers) == 1:
                    client.emit(plain(numbers[0]))
                else:
                    client.emit_many(map(plain, numbers))
            except OutboxFullError:
                client.flush(0.1)
                continue
            notebook.returned(numbers)
        return client.flush(FLUSH_S)


async def run_async(target: str, folder: Path, site: str, life: int) -> bool:
    notebook, ending = Notebook(folder, site), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    spool = FileOutbox(folder / f"{site}.outbox")
    async with AsyncFMIClient(
        target, domain_id=site, cohort=COHORT, retry=QUICK, timeout_s=2.0, outbox=spool
    ) as client:
        for numbers in batches(life):
            if ending.is_set():
                break
            try:
                if len(numbers) == 1:
                    await client.emit(plain(numbers[0]))
                else:
                    await client.emit_many(map(plain, numbers))
            except OutboxFullError:
                await client.flush(0.1)
                continue
            notebook.returned(numbers)
        return await client.flush(FLUSH_S)


def main() -> None:
    target, folder, site, life, kind = sys.argv[1:]
    if kind == "async":
        done = asyncio.run(run_async(target, Path(folder), site, int(life)))
    else:
        done = run_blocking(target, Path(folder), site, int(life))
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    outbox.FileStore = SlowToForget
    main()
