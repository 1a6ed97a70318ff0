"""Two servers on one store, of which one dies or stands still in the middle of private releases.

What both drew, all of it, was paid for; no period has two releases; and none is told after a later one.
FMI_PRIVATE_ROUNDS sets the number of rounds; 8 where it is not set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "storage"))

from broker import Broker
from ports import lasting_port
from server_harness import Client, eventually, msp
from server_process import START_S, environment

from fmi.v1 import update_pb2

SCRIPT = str(Path(__file__).with_name("private_server.py"))
ROUNDS = int(os.environ.get("FMI_PRIVATE_ROUNDS", "8"))
LEASE_S = 2.0
SITES = 100
COHORT = """
name: care
signals:
  - {name: tau, section: controller, lower: 0, upper: 1}
release: {max_interval: 0.2s}
retention: {updates: 100000}
privacy: {dp_noise_sigma: 5, dp_delta: 1e-6, dp_epochs: 100000}
"""
PLACES = (
    "before the spend",
    "after the spend",
    "before the publication",
    "after the publication",
)


class Server:
    """One of the two, on one port and folder through all its lives."""

    def __init__(self, folder: Path, name: str, broker: Broker) -> None:
        self.folder = folder
        self.data_dir = folder / name
        self.target = f"127.0.0.1:{lasting_port()}"
        self._broker = broker
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, place: str = "anywhere", *flags: str) -> None:
        """Start it, to die at a place of the first release that it makes; wait until it listens, or died."""
        with (self.folder / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, SCRIPT, place, str(self.folder / "witness"), *flags, "serve"),
                *("--listen", self.target, "--data-dir", str(self.data_dir)),
                *("--store", self._broker.url(), "--lease-s", str(LEASE_S)),
                *("--cohorts", str(self.folder / "cohorts")),
                env=environment(),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        async with asyncio.timeout(START_S):
            line = await self.process.stdout.readline()
        assert line.startswith(b"listening on ") or place != "anywhere", self.told()

    async def died(self, within_s: float) -> bool:
        """Say whether it kills itself in time."""
        assert self.process is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                assert await self.process.wait() == -signal.SIGKILL, self.told()
            return True
        return False

    def tell(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def told(self) -> str:
        return (self.folder / "log").read_text()


class Pair:
    """Both servers, their broker, and what was drawn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = Broker(folder / "broker")
        self.servers = [Server(folder, name, self.broker) for name in ("a", "b")]
        (folder / "cohorts").mkdir()
        (folder / "cohorts" / "care.yaml").write_text(COHORT)

    @property
    def drawn(self) -> int:
        """How often noise was drawn, by whomever."""
        witness = self.folder / "witness"
        return witness.stat().st_size if witness.exists() else 0

    async def draws_more(self) -> None:
        """Wait until somebody releases."""
        before = self.drawn
        await eventually(lambda: self.drawn > before, START_S)

    async def count(self) -> tuple[int, list[int], list[int]]:
        """Stop both, and count: draws, periods paid for, and periods of what was told, in its order.

        A third server finds out, which knows nothing but what the broker has.
        """
        for server in self.servers:
            await server.kill()
        drawn = self.drawn
        reader = Server(self.folder, "reader", self.broker)
        await reader.start()
        await reader.kill()
        with contextlib.closing(sqlite3.connect(reader.data_dir / "view.sqlite3")) as view:
            paid = view.execute("SELECT period FROM privacy_ledger WHERE rho > 0 ORDER BY number")
            told = view.execute("SELECT payload FROM updates WHERE kind = 1 ORDER BY revision")
            periods = [period for (period,) in paid]
            updates = [update_pb2.Update.FromString(payload) for (payload,) in told]
        return drawn, periods, [update.released_at.ToMicroseconds() for update in updates]


@contextlib.asynccontextmanager
async def pair(folder: Path):
    found = Pair(folder)
    async with found.broker:
        try:
            yield found
        finally:
            for server in found.servers:
                await server.kill()


async def suffer(rig: Pair, chance: random.Random, trouble: str) -> None:
    """Let one of the two suffer, and both be there again afterwards."""
    victim, other = chance.sample(rig.servers, 2)
    match trouble:
        case "killed":
            await asyncio.sleep(chance.uniform(0.0, 0.5))
            await victim.kill()
            await victim.start()
        case "stands still":
            # Anywhere, and so now and then between what it paid and what it tells.
            await asyncio.sleep(chance.uniform(0.0, 0.5))
            victim.tell(signal.SIGSTOP)
            await asyncio.sleep(chance.uniform(0.0, 2.5 * LEASE_S))
            victim.tell(signal.SIGCONT)
        case place:
            await victim.kill()
            await victim.start(place)
            other.tell(signal.SIGSTOP)  # so that the cohort is the victim's
            died = await victim.died(START_S)
            other.tell(signal.SIGCONT)
            assert died, victim.told()
            await victim.start()
    await rig.draws_more()


@pytest.mark.timeout(300 + 60 * ROUNDS)
async def test_whoever_dies_or_stands_still_each_draw_was_paid_for_and_each_period_told_once(
    tmp_path,
):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to run it again
    chance = random.Random(seed)
    async with pair(tmp_path) as rig:
        for server in rig.servers:
            await server.start()
        async with Client(rig.servers[0].target) as client:
            for number in range(SITES):
                await client.emit(msp(f"s{number}", "care", controller={"tau": 0.5}))
        await rig.draws_more()
        troubles = ["killed", "stands still", "stands still", *PLACES]
        for number in range(ROUNDS):
            await suffer(rig, chance, troubles[number % len(troubles)])
        drawn, paid, told = await rig.count()
        print(f"{drawn} drawn, {len(paid)} paid for, {len(told)} told")  # noqa: T201
        log = rig.servers[0].told()
    assert "Traceback" not in log, log
    assert len(told) <= drawn <= len(paid)
    assert len(told) > ROUNDS
    assert told == sorted(set(told)), "each period at most once, and none after a later one"
    assert set(told) <= set(paid)
    assert paid == sorted(set(paid))


@pytest.mark.timeout(300)
async def test_servers_that_pay_late_are_noticed(tmp_path):
    """The same count finds out a server that draws before its entry is at the broker."""
    async with pair(tmp_path) as rig:
        victim = rig.servers[0]
        for _ in range(20):  # late by half a second, which a slow machine may take between the two
            await victim.start("before the publication", "--fault")
            assert await victim.died(START_S)
            drawn, paid, _ = await rig.count()
            if len(paid) < drawn:
                break
        assert len(paid) < drawn
