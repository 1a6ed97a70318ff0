"""Releases: when a cohort's aggregates are published, and how.

A cohort is dirty when something counted changed. It is released when it has a quorum and `min_interval`
has passed since its last release, at the latest `max_interval` after it became dirty. What did not change
is not published. Private cohorts are released by the clock alone (`private_releases`).

`publication` stores the updates and tells the subscribers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from fmi.v1 import packet_pb2, update_pb2
from fmi_server.aggregator import FMIAggregator
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRegistry, CohortRules
from fmi_server.counted_time import NewestSignals, counted_at_us
from fmi_server.errors import FMIError
from fmi_server.private_releases import PrivateReleases
from fmi_server.publication import Publisher
from fmi_server.router import FMIRouter
from fmi_server.storage import Store, StoreError
from fmi_server.storage.base import (
    LedgerConflictError,
    RevisionConflictError,
    SpecChangedError,
)
from fmi_server.storage.records import PacketRecord
from fmi_server.stored_packets import parsed
from fmi_server.telemetry import FMITelemetry
from fmi_server.threads import in_thread

__all__ = ["Releaser"]

MAX_UNCOUNTED_BYTES: Final = 2 * 2**20
"""Bytes of stored packets of a cohort that may wait to be counted; past it whoever emits waits too. In memory
a parsed packet takes about ten times its size."""

MAX_ALL_UNCOUNTED_BYTES: Final = 16 * 2**20
"""The same for all cohorts together."""

MAX_RELEASING: Final = 4
"""Cohorts that are released at the same time, so that a slow one delays itself and not the others."""

SWEEP_S: Final = 10.0
"""Seconds between two looks for values that are past their time."""

LONGEST_WAIT_S: Final = 60.0
"""Seconds without a look at the clock, which somebody may set."""

COUNT_LOOKS: Final = 20
"""Looks for a moment in which no packet comes while those that were taken are counted. A look takes about a
millisecond; where there is no such moment the count may be short of what came meanwhile."""

RETRY_S: Final = 2.0
"""Seconds after which a release that failed is tried again."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Cohort:
    """What is to be done for a cohort.

    Lock order: `lock` of a cohort first, then the lock of publishing.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    uncounted: list[tuple[int, packet_pb2.Packet]] = field(default_factory=list)
    counted_to: int = 0  # places in the store, of packets whose place is known
    uncounted_bytes: int = 0
    dirty_since: float | None = None
    new_sites: set[str] = field(default_factory=set)
    quorate: bool = False
    stale: bool = False  # the state must be counted anew from the store
    computed_at: float = float("-inf")
    released_at: float | None = None
    retry_at: float = float("-inf")


class Releaser:
    """Counts stored packets, and releases what changed.

    Args:
        store: Keeps packets and updates.
        cohorts: The cohorts and their rules.
        aggregator: Has the resident state of each cohort.
        router: Tells subscribers.
        telemetry: Counts releases.
        clock: Unix time in seconds.

    Attributes:
        newest: As of when the newest signals of each site count.
        publisher: Stores and tells of updates.
        private: Releases private cohorts.
        arrivals: Packets taken to be counted, by cohort, since somebody last looked.
        owns: Says whether this server releases a cohort; of several that share a store one does.
        spec_waits: Says whether another server changed the spec of a cohort, which is not in force here yet.
    """

    def __init__(
        self,
        store: Store,
        cohorts: CohortRegistry,
        aggregator: FMIAggregator,
        router: FMIRouter,
        *,
        telemetry: FMITelemetry,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._cohorts = cohorts
        self._aggregator = aggregator
        self._telemetry = telemetry
        self._clock = clock
        self._work: defaultdict[str, _Cohort] = defaultdict(_Cohort)
        self._wake = asyncio.Event()
        self._releasing: set[str] = set()
        self._uncounted_bytes = 0
        self._saved_reputations: dict[str, dict[str, float]] = {}
        self.newest = NewestSignals()
        self._saved_counts: dict[str, Counter[str]] = {}
        self.arrivals: Counter[str] = Counter()
        self.owns: Callable[[str], bool] = lambda _: True
        self.spec_waits: Callable[[str], bool] = lambda _: False
        self.publisher = Publisher(store, router, telemetry=telemetry, clock=clock)
        self.private = PrivateReleases(store, aggregator, self.publisher, clock=clock)

    async def load(self) -> None:
        """Bring back what was published, and count the live packets; the others are not read.

        Raises:
            StoreCorruptError: A packet is not as it was stored.
        """
        for cohort, published_at in (await self.publisher.load()).items():
            work = self._work[cohort]
            work.released_at = work.computed_at = published_at
        await self.private.load()
        for rules in self._cohorts:
            if rules.privacy is not None:
                self._work[rules.name]  # it is released whether sites sent something or not
        known: set[str] = set()
        for site in await self._store.sites():
            known.add(site.cohort)
            if site.reputation is not None:
                saved = self._saved_reputations.setdefault(site.cohort, {})
                saved[site.domain_id] = site.reputation
        self._saved_counts = await self._store.packet_counts()
        for name in sorted(known):
            await self._bring_back(name)

    async def _bring_back(self, name: str) -> None:
        try:
            rules = self._cohorts.open(name)
        except FMIError:
            _log.warning(
                "cohort %s has packets but is not declared; they are kept, not counted", name
            )
            return
        state = self._state(rules)
        work = self._work[name]
        work.counted_to = await self._replay(state)
        work.quorate = state.quorum
        self._mark_dirty(work)

    async def count(self, packet: packet_pb2.Packet, *, sequence: int = 0) -> None:
        """Take a packet that is stored, to be counted by the next release of its cohort.

        Waits where too many are waiting already.

        Args:
            packet: The packet.
            sequence: Its place in the store, where packets are taken in that order: what was counted from the
                store meanwhile is not counted again. 0 where they are not.
        """
        name = packet.header.cohort
        work = self._work[name]
        if sequence and sequence <= work.counted_to:
            return
        size = packet.ByteSize()
        work.uncounted.append((sequence, packet))
        work.uncounted_bytes += size
        self._uncounted_bytes += size
        self.arrivals[name] += 1
        if work.dirty_since is None:
            self._mark_dirty(work)
        if not work.quorate:
            self._look_for_quorum(name, work, packet.header.domain_id)
        if (
            work.uncounted_bytes >= MAX_UNCOUNTED_BYTES
            or self._uncounted_bytes >= MAX_ALL_UNCOUNTED_BYTES
        ):
            async with work.lock:
                await self._count_waiting(name, work)

    def dirty(self, cohort: str) -> bool:
        """Say whether something counted changed since a cohort's last release."""
        return cohort in self._work and self._work[cohort].dirty_since is not None

    def released_at(self, cohort: str) -> float | None:
        """Return when a cohort last published, Unix seconds; None where it never did."""
        return self._work[cohort].released_at if cohort in self._work else None

    async def run(self) -> None:
        """Release cohorts as they become due, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wake.clear()
                due = {name: at for name, at in self._due().items() if name not in self._releasing}
                now = self._clock()
                ripe = sorted((at, name) for name, at in due.items() if at <= now)
                for _, name in ripe[: MAX_RELEASING - len(self._releasing)]:
                    self._releasing.add(name)
                    tasks.create_task(self._release_safely(name), name=f"release of {name}")
                    del due[name]
                waiting = due and len(self._releasing) < MAX_RELEASING
                pause_s = min(LONGEST_WAIT_S, min(due.values()) - now) if waiting else None
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._wake.wait()

    async def sweep(self) -> None:
        """Let values past their time go in cohorts that nobody emits to, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            for name in [rules.name for rules in self._cohorts]:
                try:
                    await self._expire(name)
                except Exception:
                    _log.exception(
                        "values of cohort %s that are past their time could not go", name
                    )

    async def _expire(self, name: str) -> None:
        if name not in self._work:
            return
        work = self._work[name]
        async with work.lock:
            await self._drop_expired(name, work)

    async def _drop_expired(self, name: str, work: _Cohort) -> None:
        state = self._state(self._cohorts.rules(name))
        if await in_thread(state.expire, self._clock()):
            self._mark_dirty(work)

    def _mark_dirty(self, work: _Cohort) -> None:
        if work.dirty_since is None:
            work.dirty_since = self._clock()
        self._wake.set()

    async def release(self, cohort: str) -> list[update_pb2.Update]:
        """Release a cohort now; return what was published, which is nothing where nothing changed.

        Raises:
            CohortUnknownError: There is no such cohort.
            ReleaseScheduledError: It is private, and releases at fixed times only.
            PrivacyBudgetExhaustedError: It is private, and releases nothing more.
            StoreError: The updates could not be stored; nothing was published.
        """
        rules = self._cohorts.rules(cohort)
        if rules.privacy is not None:
            raise self.private.refusal(rules)
        return await self._release(cohort)

    async def _release(self, cohort: str) -> list[update_pb2.Update]:
        work = self._work[cohort]
        started = time.perf_counter()
        async with work.lock:
            await self._count_waiting(cohort, work)
            since, work.dirty_since = work.dirty_since, None
            state = self._state(self._cohorts.rules(cohort))
            # Those that the state was counted by: others may be in force since, and draw at another price.
            rules = state.rules
            try:
                if rules.privacy is None:
                    updates = await self._publish_news(rules, state)
                else:
                    updates = await self.private.release(rules, state, self._holds(rules))
            except BaseException as error:
                if not self.dirty(cohort):
                    work.dirty_since = since
                if isinstance(error, Exception):  # who is told to stop did not fail
                    self._telemetry.release(
                        "overtaken" if self._is_overtaken(error) else "failed",
                        time.perf_counter() - started,
                    )
                raise
            work.computed_at = self._clock()
            if updates:
                work.released_at = work.computed_at
        self._telemetry.release(
            "published" if updates else "unchanged", time.perf_counter() - started
        )
        return updates

    async def _publish_news(
        self, rules: CohortRules, state: CohortState
    ) -> list[update_pb2.Update]:
        result = await in_thread(self._aggregator.result, state, now=self._clock())
        updates = await self.publisher.publish(rules, result, holds=self._holds(rules))
        await self._save_reputations(state)
        return updates

    def _holds(self, rules: CohortRules) -> Callable[[], bool] | None:
        """Return what says whether aggregates by some rules may be told: others may promise more by now."""
        if not self._store.shared:
            return None  # who puts a spec waits for the lock of its cohort
        name, schema_hash = rules.name, rules.schema_hash
        return lambda: (
            not self.spec_waits(name) and self._cohorts.rules(name).schema_hash == schema_hash
        )

    async def rebuild(self, cohort: str) -> None:
        """Count the live packets of a cohort anew: its rules or its quarantine changed.

        What was retired under other rules is revived before (`compaction.Compactor.suspended`).

        Raises:
            StoreError: The packets cannot be read now. The state is as it was; the next release tries again.
        """
        work = self._work[cohort]
        work.stale = True
        async with work.lock:
            await self._rebuild(cohort, work)
        self._mark_dirty(work)

    async def _rebuild(self, cohort: str, work: _Cohort) -> None:
        rules = self._cohorts.rules(cohort)
        try:
            counts, known_to = await self._taken(cohort)
            waiting = len(work.uncounted)  # they are stored, so the replay counts them
            reputations = self._saved_reputations.get(cohort)
            state = CohortState(rules, reputations=reputations, packets=counts)
            work.counted_to = await self._replay(state, known_to=known_to)
        except BaseException:
            self._mark_dirty(work)
            raise
        known = (sequence for sequence, _ in work.uncounted[waiting:])
        waiting += sum(1 for _ in takewhile(lambda at: 0 < at <= work.counted_to, known))
        self._take_uncounted(work, waiting)
        self._aggregator.replace(state)
        work.stale = False
        work.quorate = state.quorum

    async def _taken(self, cohort: str) -> tuple[Counter[str] | None, int | None]:
        """Count the packets of a cohort that were taken; return up to which place in the store they are.

        Where this server alone writes it is told of each packet that comes behind them; the place is None.
        """
        if not self._store.shared:
            return (await self._store.packet_counts(cohort)).get(cohort), None
        counts: Counter[str] | None = None
        last = await self._store.last_sequence()
        for _ in range(COUNT_LOOKS):
            before = last
            counts = (await self._store.packet_counts(cohort)).get(cohort)
            last = await self._store.last_sequence()
            if last == before:
                break
        return counts, last

    def _take_uncounted(self, work: _Cohort, most: int | None = None) -> list[packet_pb2.Packet]:
        """Take the packets that wait, or the first so many of them, and their bytes off the bounds."""
        if most is None or most == len(work.uncounted):
            size = work.uncounted_bytes
            work.new_sites.clear()
        else:
            size = sum(packet.ByteSize() for _, packet in work.uncounted[:most])
        taken = [packet for _, packet in work.uncounted[:most]]
        del work.uncounted[:most]
        work.uncounted_bytes -= size
        self._uncounted_bytes -= size
        return taken

    def take_over(self, cohort: str) -> None:
        """Go on where another server was with the releases of a cohort."""
        self.private.doubt(cohort)
        self._mark_dirty(self._work[cohort])

    async def released_elsewhere(self, cohort: str, at: float) -> None:
        """Note that another server published of a cohort, at a time in Unix seconds."""
        work = self._work[cohort]
        work.released_at = at
        # `min_interval` counts from there, by a clock that may be ahead of ours.
        work.computed_at = max(work.computed_at, min(at, self._clock()))
        if cohort not in self._cohorts:
            return
        async with work.lock:
            await self._count_waiting(cohort, work)
            self._state(self._cohorts.rules(cohort)).judged_elsewhere()
        if not self.owns(cohort):
            work.dirty_since = None

    async def take_reputations(self, cohort: str, reputations: Mapping[str, float]) -> None:
        """Take the reputations of sites that another server came to."""
        saved = self._saved_reputations.setdefault(cohort, {})
        saved.update(reputations)
        if cohort in self._cohorts:
            async with self._work[cohort].lock:
                self._state(self._cohorts.rules(cohort)).take_reputations(dict(saved))

    def doubt(self, cohort: str) -> None:
        """Count a cohort anew before its next release: a write failed, and nobody knows what got in."""
        work = self._work[cohort]
        work.stale = True
        self._mark_dirty(work)

    async def reading(self, cohort: str) -> tuple[CohortState, asyncio.Lock]:
        """Return the state of a cohort, everything stored counted, and the lock to read it under."""
        work = self._work[cohort]
        async with work.lock:
            await self._count_waiting(cohort, work)
            await self._drop_expired(cohort, work)
        return self._state(self._cohorts.rules(cohort)), work.lock

    @contextlib.asynccontextmanager
    async def settled(self, cohort: str, *, expire: bool = False) -> AsyncIterator[CohortState]:
        """Hold the state of a cohort, everything that waited counted; nothing changes it meanwhile.

        Args:
            cohort: The cohort.
            expire: Whether what is past its time goes first.
        """
        work = self._work[cohort]
        async with work.lock:
            await self._count_waiting(cohort, work)
            if expire:
                await self._drop_expired(cohort, work)
            yield self._state(self._cohorts.rules(cohort))

    def _state(self, rules: CohortRules) -> CohortState:
        return self._aggregator.state(
            rules,
            reputations=self._saved_reputations.get(rules.name),
            packets=self._saved_counts.get(rules.name),
        )

    async def _count_waiting(self, name: str, work: _Cohort) -> None:
        if work.stale:
            await self._rebuild(name, work)
        waiting = self._take_uncounted(work)
        if not waiting:
            return
        state = self._state(self._cohorts.rules(name))
        if len(waiting) < 64:
            state.count_all(waiting)
        else:
            await in_thread(state.count_all, waiting)
        work.quorate = state.quorum
        for reason, count in state.ignored.items():
            self._telemetry.ignored(reason, count)
        state.ignored.clear()

    def _due(self) -> dict[str, float]:
        due: dict[str, float] = {}
        ends: list[float | None] = []
        for name, work in self._work.items():
            if not self.owns(name):
                continue
            rules = self._private_rules(name)
            if rules is not None:
                # Nothing that a site sends may move the release of a private cohort.
                at = self.private.due(rules)
                ends.append(self.private.ends_at(rules))
                if at is not None:
                    due[name] = max(at, work.retry_at)
                continue
            if work.dirty_since is None:
                continue
            rules = self._cohorts.rules(name)
            earliest = max(work.retry_at, work.computed_at + rules.min_interval_s)
            latest = work.dirty_since + rules.max_interval_s
            due[name] = earliest if work.quorate else max(earliest, latest)
        paid = [end for end in ends if end is not None]
        self._telemetry.budgets(
            releasing=len(paid),
            exhausted=len(ends) - len(paid),
            first_end=min(paid, default=math.inf),
        )
        return due

    def _private_rules(self, name: str) -> CohortRules | None:
        """Return the rules of a cohort that is private, or None."""
        rules = self._cohorts.rules(name) if name in self._cohorts else None
        return None if rules is None or rules.privacy is None else rules

    def _look_for_quorum(self, name: str, work: _Cohort, domain_id: str) -> None:
        rules = self._cohorts.rules(name)
        state = self._state(rules)
        if state.site(domain_id) is None:
            work.new_sites.add(domain_id)
        if state.sites + len(work.new_sites) >= state.min_sites:
            work.quorate = True
            self._wake.set()

    def _is_overtaken(self, error: Exception) -> bool:
        """Say whether another server released the cohort meanwhile, or another spec is in force."""
        by_another = isinstance(error, RevisionConflictError | LedgerConflictError)
        return isinstance(error, SpecChangedError) or (by_another and self._store.shared)

    async def _release_safely(self, name: str) -> None:
        try:
            await self._release(name)
        except (RevisionConflictError, LedgerConflictError) as error:
            if not self._store.shared:
                raise
            _log.info("cohort %s was released by another server meanwhile: %s", name, error)
            self.take_over(name)
            self._work[name].retry_at = self._clock() + RETRY_S
        except SpecChangedError as error:
            _log.info("what was computed of cohort %s is not told: %s", name, error)
            self._work[name].retry_at = self._clock() + RETRY_S
        except Exception as error:
            # One cohort's fault must not keep the others from being released.
            unknown = not isinstance(error, FMIError)
            _log.warning(
                "release of cohort %s failed and will be tried again: %s",
                name,
                error,
                exc_info=unknown,
            )
            self._work[name].retry_at = self._clock() + RETRY_S
        finally:
            self._releasing.discard(name)
            self._wake.set()

    async def _save_reputations(self, state: CohortState) -> None:
        saved = self._saved_reputations.setdefault(state.rules.name, {})
        moved = {
            name: value for name, value in state.reputations().items() if saved.get(name) != value
        }
        if not moved:
            return
        try:
            await self._store.put_reputations(state.rules.name, moved)
        except StoreError as error:
            # What was published is out. The next release saves them too.
            _log.warning("reputations of %s were not saved: %s", state.rules.name, error)
        else:
            saved.update(moved)

    async def _replay(self, state: CohortState, *, known_to: int | None = None) -> int:
        """Count the live packets of a cohort that are not past their time; return the last one's place.

        Args:
            state: Of the cohort.
            known_to: The place in the store behind which packets are news; None where none is.
        """
        last = 0
        rules = state.rules
        since_us = (self._clock() - max(rules.site_ttl_s, rules.policy_window_s)) * 1e6
        async for page in self._store.live_pages(rules.name):
            counting = [stored for stored in page if stored.record.emitted_at_us >= since_us]
            packets = parsed(counting, self._store.location)
            for stored in counting:
                self.note_newest(stored.record)
            news = 0 if known_to is None else sum(one.sequence > known_to for one in counting)
            known = len(packets) - news
            await in_thread(state.replay, packets[:known])
            if news:
                await in_thread(state.count_all, packets[known:])
            last = page[-1].sequence
        return last

    def note_newest(self, record: PacketRecord) -> None:
        """Note as of when the signals of a stored packet count."""
        # Sites of private cohorts are not warned, so that no warning tells who is there.
        if record.kind == "msp" and self._private_rules(record.cohort) is None:
            counted_us = counted_at_us(record.emitted_at_us, record.received_at_us)
            self.newest.note(record.cohort, record.domain_id, counted_us)
