"""kill -9 of sites and of the server: what `emit` returned for is counted, once, in order.

Two sites, one with each client, emit through outboxes in files while a real server runs. They and the
server are killed at random moments and started again. In the end each site sends what is left, and what
it wrote down is held against the server's store:

* DURABLE: every packet for which `emit` returned is in the store.
* ONCE: no packet is in the store twice, under whatever id.
* ORDERED: the packets of a site are in the store in the order in which it emitted them.

FMI_SIGKILL_ROUNDS sets the number of rounds; 8 where it is not set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from guarantees import Broken, Store
from rig import Rig
from server_harness import eventually
from server_process import COMMAND, environment

from fmi.v1 import packet_pb2

ROUNDS = int(os.environ.get("FMI_SIGKILL_ROUNDS", "8"))
HERE = Path(__file__).parent
SOUND = (sys.executable, str(HERE / "outbox_site.py"))
KINDS = {"site-async": "async", "site-blocking": "blocking"}
END_S = 150.0
CAMPAIGNS = 5


class Site:
    """A site, and its lives."""

    def __init__(self, rig: Rig, folder: Path, name: str, command: Sequence[str]) -> None:
        self._rig = rig
        self._folder = folder
        self.name = name
        self.log = folder / f"{name}.log"
        self._command = command
        self._lives = 0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def noted(self) -> list[int]:
        """The numbers of the packets for which `emit` returned."""
        notes = self._folder / f"{self.name}.notes"
        return [int(line) for line in notes.read_text().split()] if notes.exists() else []

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                self._rig.target,
                str(self._folder),
                self.name,
                str(self._lives),
                KINDS[self.name],
                env=environment(),
                stdout=log,
                stderr=log,
            )
        self._lives += 1

    async def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        assert await self._process.wait() == -signal.SIGKILL, self.log.read_text()

    async def end(self) -> None:
        """Let it send what is left, and end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(END_S):
            assert await self._process.wait() == 0, self.log.read_text()

    async def abandon(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def delivered(data_dir: Path) -> Counter[str]:
    """Count the packets of each site that the server has stored so far."""
    path = data_dir / "fmi.sqlite3"
    if not path.exists():
        return Counter()
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            return Counter(dict(connection.execute("SELECT domain_id, msp_count FROM sites")))
        except sqlite3.OperationalError:
            return Counter()  # it is being made


async def torment(
    folder: Path, *, rounds: int, seed: int, command: Sequence[str]
) -> tuple[dict[str, list[int]], Store]:
    """Run the load, kill sites and server, bring all to an end; return what was noted and is stored."""
    (folder / "data").mkdir()
    rig = Rig(folder / "data", seed, COMMAND)
    sites = [Site(rig, folder, name, command) for name in KINDS]
    try:
        await asyncio.gather(rig.start(), *(site.start() for site in sites))
        for number in range(rounds):
            goals = [(site, len(site.noted) + rig.chance.randint(20, 200)) for site in sites]
            await eventually(lambda goals=goals: all(len(s.noted) >= goal for s, goal in goals))
            # Emitting goes on without a server: wait until each site delivers, or a kill hits no delivery.
            had = delivered(rig.data_dir)
            await eventually(
                lambda had=had: all(delivered(rig.data_dir)[s.name] > had[s.name] for s in sites)
            )
            await asyncio.sleep(rig.chance.random() * 0.05)
            # Now the sites, now the server, now all of them.
            if number % 3 != 1:
                await asyncio.gather(*(site.kill() for site in sites))
            if number % 3 != 0:
                await rig.kill()
                await asyncio.sleep(rig.chance.random())
                await rig.start()
            if number % 3 != 1:
                await asyncio.gather(*(site.start() for site in sites))
        for site in sites:
            goal = len(site.noted) + 10
            await eventually(lambda site=site, goal=goal: len(site.noted) >= goal)
        await asyncio.gather(*(site.end() for site in sites))
        await rig.end()
    finally:
        await asyncio.gather(*(site.abandon() for site in sites))
        await rig.abandon()
    for site in sites:
        assert "Traceback" not in site.log.read_text(), site.log.read_text()
    return {site.name: site.noted for site in sites}, rig.store()


def broken(noted: Mapping[str, Sequence[int]], store: Store) -> list[Broken]:
    """Return every way in which the store is not what the sites were told."""
    stored: dict[str, list[int]] = {site: [] for site in noted}
    for _, site, _, payload in store.packets:
        packet = packet_pb2.Packet.FromString(payload)
        stored[site].append(int(packet.msp.controller["number"]))
    return [
        finding
        for site, numbers in noted.items()
        for finding in _broken_site(site, numbers, stored[site])
    ]


def _broken_site(site: str, noted: Sequence[int], stored: Sequence[int]) -> Iterator[Broken]:
    lost = sorted(set(noted) - set(stored))
    if lost:
        yield Broken("DURABLE", f"{site}: {len(lost)} of {len(noted)} are gone, first {lost[0]}")
    twice = sorted(number for number, count in Counter(stored).items() if count > 1)
    if twice:
        yield Broken("ONCE", f"{site}: {len(twice)} are stored again, first {twice[0]}")
    first_seen = list(dict.fromkeys(stored))
    if first_seen != sorted(first_seen):
        yield Broken("ORDERED", f"{site}: {len(first_seen)} packets are not in order")


@pytest.mark.timeout(400 + 15 * ROUNDS)
async def test_kill_9_of_sites_and_server_loses_repeats_and_swaps_nothing(tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to run it again
    noted, store = await torment(tmp_path, rounds=ROUNDS, seed=seed, command=SOUND)
    assert broken(noted, store) == []
    assert all(len(numbers) > 20 * ROUNDS for numbers in noted.values())


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "guarantee"),
    [
        ("returns early", "DURABLE"),
        ("forgets early", "DURABLE"),
        ("makes new ids", "ONCE"),
        ("newest first", "ORDERED"),
    ],
)
async def test_an_outbox_with_a_fault_is_caught(tmp_path, fault, guarantee):
    command = (sys.executable, str(HERE / "faulty_outbox_site.py"), fault)
    found = set()
    for campaign in range(CAMPAIGNS):  # a kill may fall beside the fault, but not every time
        folder = tmp_path / str(campaign)
        folder.mkdir()
        noted, store = await torment(folder, rounds=3, seed=campaign, command=command)
        found = {finding.guarantee for finding in broken(noted, store)}
        if guarantee in found:
            break
    assert guarantee in found
