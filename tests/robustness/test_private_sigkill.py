"""kill -9 in the middle of private releases: the ledger never says less than what was drawn.

Each life is a real server on the same store, killed at a place of one of its releases. Whoever kept what the
servers drew, all of it, finds as many entries in the ledger that paid for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from server_harness import eventually
from server_process import LOCAL, environment

SCRIPT = str(Path(__file__).with_name("private_server.py"))
LIVES = 50
LIFE_S = 120.0
COHORT = """
name: care
signals:
  - {name: tau, section: controller, lower: 0, upper: 1}
release: {max_interval: 0.1s}
privacy: {dp_noise_sigma: 5, dp_delta: 1e-6, dp_epochs: 1000}
"""


@dataclass
class Lives:
    """The lives of a server on one store."""

    folder: Path

    def __post_init__(self) -> None:
        cohorts = self.folder / "cohorts"
        cohorts.mkdir()
        (cohorts / "care.yaml").write_text(COHORT)

    async def live(
        self, place: str, *flags: str, draws: int | None = None, more_s: float = 0.0
    ) -> None:
        """Let a server live until it kills itself at a place, or for some draws and seconds more."""
        drawn = self.drawn
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            SCRIPT,
            place,
            str(self.folder / "witness"),
            *flags,
            "serve",
            *LOCAL,
            *("--data-dir", str(self.folder), "--cohorts", str(self.folder / "cohorts")),
            env=environment(),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        ended = asyncio.ensure_future(process.communicate())
        try:
            if draws is not None:
                await eventually(lambda: ended.done() or self.drawn >= drawn + draws, LIFE_S)
                await asyncio.wait({ended}, timeout=more_s)
                process.kill()
            async with asyncio.timeout(LIFE_S):
                _, err = await asyncio.shield(ended)
        finally:
            if process.returncode is None:
                process.kill()
                await ended
        assert process.returncode == -9, err.decode()

    @property
    def drawn(self) -> int:
        witness = self.folder / "witness"
        return witness.stat().st_size if witness.exists() else 0

    def count(self, table: str, which: str) -> int:
        with contextlib.closing(sqlite3.connect(self.folder / "fmi.sqlite3")) as store:
            if not store.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", [table]).fetchone():
                return 0  # it was killed while it made its store
            question = f"SELECT count(*) FROM {table} WHERE {which}"  # noqa: S608 - constants only
            return int(store.execute(question).fetchone()[0])

    @property
    def paid(self) -> int:
        return self.count("privacy_ledger", "rho > 0")

    @property
    def published(self) -> int:
        return self.count("updates", "kind = 1")


@pytest.fixture
def lives(tmp_path) -> Lives:
    return Lives(tmp_path)


@pytest.mark.timeout(60 + 15 * LIVES)
async def test_killed_between_spend_and_release_the_ledger_never_understates(lives):
    for number in range(1, LIVES + 1):
        await lives.live("after the spend")
        assert (lives.drawn, lives.published) == (0, 0)
        assert lives.paid == number, "each life pays for one release and draws none"


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("place", "paid", "drawn", "published"),
    [
        ("before the spend", 0, 0, 0),
        ("before the publication", 1, 1, 0),
        ("after the publication", 1, 1, 1),
    ],
)
async def test_wherever_it_is_killed_each_draw_was_paid_for(lives, place, paid, drawn, published):
    for number in range(1, 5):
        await lives.live(place)
        assert (lives.paid, lives.drawn) == (paid * number, drawn * number)
        # Two draws that say the same are one revision: the noise decides, not the sites.
        assert lives.published <= published * number
        assert bool(lives.published) == bool(published)


@pytest.mark.timeout(400)
async def test_killed_at_any_time_each_draw_was_paid_for(lives):
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - to run it again
    rng = random.Random(seed)
    for number in range(10):
        # Half of them while they start or soon after, the others in the middle of their releases.
        draws, more_s = (0, rng.uniform(0.0, 2.0)) if number % 2 else (3, rng.uniform(0.0, 0.3))
        await lives.live("anywhere", draws=draws, more_s=more_s)
        assert lives.published <= lives.drawn <= lives.paid
    assert lives.drawn > 10, "they lived long enough to release"


@pytest.mark.timeout(300)
async def test_a_ledger_that_is_written_late_is_noticed(lives):
    await lives.live("anywhere", draws=1)
    before = lives.paid - lives.drawn
    assert before >= 0
    for _ in range(
        20
    ):  # it is late by half a second, which a slow machine may take between the two
        await lives.live("before the publication", "--fault")
        if lives.paid < lives.drawn:
            break
    assert lives.paid < lives.drawn
