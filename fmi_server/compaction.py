"""Compaction: packets that cannot count any more are retired, and forgotten when they are old.

What counts is in the resident state, so that is what decides (`CohortState.overtaken`). A retired packet is
still known: a repeat is answered as before. It is forgotten only where a repeat would be refused as stale,
so that ONCE holds without it.

Lock order: the lock of compaction of a cohort first, then the cohort's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRegistry
from fmi_server.errors import FMIError
from fmi_server.releases import Releaser
from fmi_server.storage import Store
from fmi_server.storage.records import StoredPacket
from fmi_server.stored_packets import parsed
from fmi_server.threads import in_thread

__all__ = ["Compacted", "Compactor"]

LEAST_ARRIVALS: Final = 10_000
"""Packets of a cohort after which it is compacted, where it has no more live ones: a pass reads all of
these, so that what a packet costs does not grow with their number."""

LOOK_S: Final = 5.0
"""Seconds between two looks for cohorts that had many packets."""

FIRST_SWEEP_S: Final = 60.0
"""Seconds after the start until all cohorts are compacted: a server that is started often must do it too."""

SWEEP_S: Final = 3600.0
"""Seconds between two compactions of all cohorts."""

SLICE_S: Final = 0.01
"""Seconds of computing in one slice of a pass, as nearly as the last slice foretells. While it computes,
everybody else in the process waits for the interpreter at each turn."""

LARGEST_SLICE: Final = 256
"""Packets in one slice; they are parsed, judged and retired together, in one small transaction."""

FIRST_SLICE: Final = 8
"""Packets in the first slice of a pass, of which nothing is known yet."""

FORGET_SLICE: Final = 100
"""Packets that one transaction forgets."""

STALE_MARGIN_S: Final = 3600.0
"""Seconds that a packet is kept past the time from which a repeat is refused: a clock may be set back, and
a packet that was checked may wait to be stored."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did to a cohort, in packets."""

    live: int
    retired: int
    forgotten: int


class Compactor:
    """Retires and forgets packets, beside everything else.

    Args:
        store: Keeps the packets.
        cohorts: The cohorts and their rules; it is told what was forgotten.
        releaser: Has the resident states.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        store: Store,
        cohorts: CohortRegistry,
        releaser: Releaser,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._cohorts = cohorts
        self._releaser = releaser
        self._clock = clock
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._live: dict[str, int] = {}

    async def load(self) -> None:
        """Bring back what was forgotten, before packets are taken."""
        for cohort, before_us in (await self._store.forgotten()).items():
            self._cohorts.forgotten_before[cohort] = before_us / 1e6

    def compacted(self, cohort: str) -> bool:
        """Say whether this server compacted a cohort since it started."""
        return cohort in self._live

    async def run(self) -> None:
        """Compact cohorts that had many packets, and now and then all, until cancelled."""
        loop = asyncio.get_running_loop()
        sweep_at = loop.time() + FIRST_SWEEP_S
        while True:
            await asyncio.sleep(LOOK_S)
            names = self._due()
            if loop.time() >= sweep_at:
                sweep_at = loop.time() + SWEEP_S
                names = [rules.name for rules in self._cohorts]
            for name in filter(self._releaser.owns, names):
                await self._compact_safely(name)

    def _due(self) -> list[str]:
        arrivals = self._releaser.arrivals
        return [
            name
            for name, count in arrivals.items()
            if count >= max(LEAST_ARRIVALS, self._live.get(name, 0))
        ]

    async def _compact_safely(self, name: str) -> None:
        try:
            done = await self.compact(name)
        except Exception as error:
            # One cohort's fault must not keep the others from being compacted.
            known = isinstance(error, FMIError)
            _log.warning(
                "cohort %s was not compacted, which is tried again: %s",
                name,
                error,
                exc_info=not known,
            )
        else:
            if done.retired or done.forgotten:
                _log.info("cohort %s was compacted: %s", name, done)

    async def compact(self, cohort: str) -> Compacted:
        """Retire the packets of a cohort that cannot count any more, and forget those that are old.

        Raises:
            CohortUnknownError: There is no such cohort.
            StoreError: The store refused; what was done until then stays done.
        """
        self._releaser.arrivals.pop(cohort, None)
        # What comes in meanwhile is for the next pass: this one would not end under load.
        last = await self._store.last_sequence()
        live = retired = 0
        size = FIRST_SLICE
        async for page in self._store.live_pages(cohort):
            start = 0
            while start < len(page):
                part = page[start : start + size]
                start += size
                gone, computed_s = await self._retire(cohort, part)
                # Whoever emits has the other half. To wait for locks and the disk is rest by itself.
                await asyncio.sleep(computed_s)
                live += len(part) - gone
                retired += gone
                size = _next_size(len(part), computed_s)
            if page[-1].sequence >= last:
                break
        self._live[cohort] = live
        return Compacted(live, retired, await self._forget(cohort))

    @contextlib.asynccontextmanager
    async def suspended(self, cohort: str, *, domain_id: str | None = None) -> AsyncIterator[None]:
        """Hold compaction of a cohort while its rules, or what is in quarantine, change.

        What was retired, of the cohort or of one site, is live again before: under other rules it may
        count. Whoever crashes in between has more live packets than it needs, and nothing else.

        Raises:
            StoreError: The store refused; nothing may be changed.
        """
        async with self._locks[cohort]:
            await self._store.revive(cohort, domain_id=domain_id)
            yield

    async def _retire(self, cohort: str, part: Sequence[StoredPacket]) -> tuple[int, float]:
        """Retire packets that are overtaken; return how many, and the seconds of computing that took."""
        async with self._locks[cohort], self._releaser.settled(cohort) as state:
            now = self._clock()
            overtaken, computed_s = await in_thread(
                _overtaken, state, part, self._store.location, now
            )
            return await self._store.retire(overtaken) if overtaken else 0, computed_s

    async def _forget(self, cohort: str) -> int:
        forgotten = 0
        while True:
            async with self._pausing(), self._locks[cohort]:
                rules = self._cohorts.rules(cohort)
                now = self._clock()
                stale_s = rules.ingest.max_age_s + rules.ingest.max_clock_skew_s + STALE_MARGIN_S
                before_us = int((now - stale_s) * 1e6)
                gone = await self._store.forget(
                    cohort,
                    received_before_us=int((now - rules.packets_kept_s) * 1e6),
                    emitted_before_us=before_us,
                    limit=FORGET_SLICE,
                )
                if not gone:
                    return forgotten
                known = self._cohorts.forgotten_before
                known[cohort] = max(before_us / 1e6, known.get(cohort, before_us / 1e6))
                forgotten += gone

    @contextlib.asynccontextmanager
    async def _pausing(self) -> AsyncIterator[None]:
        """Rest for as long as was worked, so that whoever emits has the other half."""
        clock = asyncio.get_running_loop().time
        started = clock()
        yield
        await asyncio.sleep(clock() - started)


def _overtaken(
    state: CohortState, part: Sequence[StoredPacket], location: str, now: float
) -> tuple[list[int], float]:
    started = time.thread_time()  # without what others had the interpreter for
    gone = state.overtaken(parsed(part, location), now)
    found = [stored.sequence for stored, overtaken in zip(part, gone, strict=True) if overtaken]
    return found, time.thread_time() - started


def _next_size(packets: int, computed_s: float) -> int:
    """Return how many packets the next slice has, where so many took so long."""
    fitting = packets * SLICE_S / max(computed_s, 1e-6)
    return max(1, min(LARGEST_SLICE, 2 * packets, int(fitting)))
