"""Releases: when a cohort's aggregates are published, and how.

A cohort is dirty when something counted changed. It is released when it has a quorum and `min_interval`
has passed since its last release, at the latest `max_interval` after it became dirty. What did not change
is not published.

An update is stored before anybody is told of it, under the next revision of its cohort and kind, so that
a subscriber never sees a revision that a crash could take back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, ParamSpec, TypeVar

from google.protobuf.message import Message

from fmi.v1 import packet_pb2, update_pb2
from fmi_server.aggregator import AggregationResult, FMIAggregator
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRegistry, CohortRules
from fmi_server.errors import CompactedError, FMIError
from fmi_server.feeds import Key, PublishedUpdate, UpdateLog, kind_name
from fmi_server.router import FMIRouter
from fmi_server.storage import Store, StoreError
from fmi_server.storage.records import UpdateRecord
from fmi_server.telemetry import FMITelemetry

__all__ = ["Releaser", "StoredUpdates"]

MAX_UNCOUNTED: Final = 4096
"""Stored packets of a cohort that may wait to be counted; past it whoever emits waits too."""

TRIM_EVERY: Final = 16
"""Revisions between two trims of a history."""

RETRY_S: Final = 2.0
"""Seconds after which a release that failed is tried again."""

_log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


class StoredUpdates:
    """Reads published updates from the store, for subscribers that are behind."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def since(self, sequence: int, limit: int) -> Sequence[PublishedUpdate]:
        """Return up to `limit` updates behind a sequence, in order of sequence."""
        return [self.framed(r) for r in await self._store.updates_since(sequence, limit=limit)]

    async def one(self, key: Key, revision: int) -> PublishedUpdate | None:
        """Return one update, or None where it is not kept."""
        record = await self._store.update(key[0], key[1], revision)
        return None if record is None else self.framed(record)

    async def oldest(self, key: Key) -> int:
        """Return the oldest revision kept; 0 where there is none."""
        return await self._store.oldest_revision(*key) or 0

    async def kept(self, key: Key, revision: int) -> PublishedUpdate:
        """Return an update that was published once.

        Raises:
            CompactedError: It is no longer kept.
        """
        found = await self.one(key, revision)
        if found is None:
            cohort, kind = key
            raise CompactedError(cohort, kind_name(kind), revision, await self.oldest(key))
        return found

    def framed(self, record: UpdateRecord) -> PublishedUpdate:
        """Frame a stored update as an event of a subscription."""
        return PublishedUpdate.from_payload(
            (record.cohort, record.kind),
            record.revision,
            record.sequence,
            record.payload,
            history_epoch=self._store.history_epoch,
        )


@dataclass(slots=True)
class _Cohort:
    """What is to be done for a cohort.

    Lock order: `lock` of a cohort first, then the lock of publishing.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    uncounted: list[packet_pb2.Packet] = field(default_factory=list)
    dirty_since: float | None = None
    new_sites: set[str] = field(default_factory=set)
    quorate: bool = False
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
        self._router = router
        self._telemetry = telemetry
        self._clock = clock
        self._work: defaultdict[str, _Cohort] = defaultdict(_Cohort)
        self._wake = asyncio.Event()
        self._publishing = asyncio.Lock()
        self._hashes: dict[Key, bytes] = {}
        self._saved_reputations: dict[str, dict[str, float]] = {}
        self._listeners: list[Callable[[update_pb2.Update], None]] = []
        self.log = UpdateLog("")
        self.updates = StoredUpdates(store)

    async def load(self) -> None:
        """Bring back what was published, and count every stored packet that still counts."""
        self.log = UpdateLog(self._store.history_epoch)
        for record in await self._store.latest_updates():
            published = self.updates.framed(record)
            self.log.latest[published.key] = published
            self._hashes[published.key] = record.content_hash
            work = self._work[record.cohort]
            work.released_at = max(work.released_at or 0.0, record.published_at_us / 1e6)
            work.computed_at = work.released_at
        self.log.head = await self._store.next_update_sequence() - 1
        for site in await self._store.sites():
            if site.reputation is not None:
                saved = self._saved_reputations.setdefault(site.cohort, {})
                saved[site.domain_id] = site.reputation
        await self._replay(None)

    def on_update(self, listener: Callable[[update_pb2.Update], None]) -> None:
        """Call a function with every update that is published."""
        self._listeners.append(listener)

    async def count(self, packet: packet_pb2.Packet) -> None:
        """Take a packet that is stored, to be counted by the next release of its cohort.

        Waits where too many are waiting already.
        """
        name = packet.header.cohort
        work = self._work[name]
        work.uncounted.append(packet)
        if work.dirty_since is None:
            work.dirty_since = self._clock()
            self._wake.set()
        if not work.quorate:
            self._look_for_quorum(name, work, packet.header.domain_id)
        if len(work.uncounted) >= MAX_UNCOUNTED:
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
        while True:
            due = self._due()
            now = self._clock()
            ripe = [name for name, at in due.items() if at <= now]
            for name in ripe:
                await self._release_safely(name)
            if not ripe:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(due.values()) - now if due else None):
                        await self._wake.wait()

    async def release(self, cohort: str) -> list[update_pb2.Update]:
        """Release a cohort now; return what was published, which is nothing where nothing changed.

        Raises:
            CohortUnknownError: There is no such cohort.
            StoreError: The updates could not be stored; nothing was published.
        """
        rules = self._cohorts.rules(cohort)
        work = self._work[cohort]
        started = time.perf_counter()
        async with work.lock:
            await self._count_waiting(cohort, work)
            since, work.dirty_since = work.dirty_since, None
            state = self._state(rules)
            try:
                now = self._clock()
                result = await _in_thread(self._aggregator.result, state, now=now)
                updates = await self._publish(rules, result)
                await self._save_reputations(state)
            except BaseException:
                if not self.dirty(cohort):
                    work.dirty_since = since
                self._telemetry.release("failed", time.perf_counter() - started)
                raise
            work.computed_at = now
            if updates:
                work.released_at = now
        outcome = "published" if updates else "unchanged"
        self._telemetry.release(outcome, time.perf_counter() - started)
        return updates

    async def rebuild(self, cohort: str) -> None:
        """Count all packets of a cohort anew: its rules or its quarantine changed."""
        work = self._work[cohort]
        async with work.lock:
            work.uncounted.clear()  # they are stored, so the replay counts them
            rules = self._cohorts.rules(cohort)
            state = CohortState(rules, reputations=self._saved_reputations.get(cohort))
            self._aggregator.replace(state)
            await self._replay(cohort)
            work.quorate = state.quorum
        work.dirty_since = self._clock()
        self._wake.set()

    async def reading(self, cohort: str) -> tuple[CohortState, asyncio.Lock]:
        """Return the state of a cohort, everything stored counted, and the lock to read it under."""
        rules = self._cohorts.rules(cohort)
        work = self._work[cohort]
        async with work.lock:
            await self._count_waiting(cohort, work)
        return self._state(rules), work.lock

    def _state(self, rules: CohortRules) -> CohortState:
        reputations = self._saved_reputations.get(rules.name)
        return self._aggregator.state(rules, reputations=reputations)

    async def _count_waiting(self, name: str, work: _Cohort) -> None:
        waiting, work.uncounted = work.uncounted, []
        if not waiting:
            return
        state = self._state(self._cohorts.rules(name))
        if len(waiting) < 64:
            state.count_all(waiting)
        else:
            await _in_thread(state.count_all, waiting)
        work.new_sites.clear()
        work.quorate = state.quorum
        for reason, count in state.ignored.items():
            self._telemetry.ignored(reason, count)
        state.ignored.clear()

    def _due(self) -> dict[str, float]:
        due: dict[str, float] = {}
        for name, work in self._work.items():
            if work.dirty_since is None:
                continue
            rules = self._cohorts.rules(name)
            earliest = max(work.retry_at, work.computed_at + rules.min_interval_s)
            latest = work.dirty_since + rules.max_interval_s
            due[name] = earliest if work.quorate else max(earliest, latest)
        return due

    def _look_for_quorum(self, name: str, work: _Cohort, domain_id: str) -> None:
        rules = self._cohorts.rules(name)
        state = self._state(rules)
        if state.site(domain_id) is None:
            work.new_sites.add(domain_id)
        if state.sites + len(work.new_sites) >= state.min_sites:
            work.quorate = True
            self._wake.set()

    async def _release_safely(self, name: str) -> None:
        try:
            await self.release(name)
        except FMIError as error:
            _log.warning("release of cohort %s failed and will be tried again: %s", name, error)
        except Exception:
            # One cohort's fault must not keep the others from being released.
            _log.exception("release of cohort %s failed and will be tried again", name)
        else:
            return
        self._work[name].retry_at = self._clock() + RETRY_S

    async def _publish(
        self, rules: CohortRules, result: AggregationResult
    ) -> list[update_pb2.Update]:
        async with self._publishing:
            released_at_ns = int(self._clock() * 1e9)
            updates: list[update_pb2.Update] = []
            records: list[UpdateRecord] = []
            for kind, body in _bodies(result):
                key = (rules.name, int(kind))
                digest = _content_hash(body)
                latest = self.log.latest.get(key)
                if self._hashes.get(key) == digest or (latest is None and _says_nothing(body)):
                    continue
                revision = latest.revision + 1 if latest else 1
                update = _framed_update(rules.name, kind, revision, body)
                update.sequence = self.log.head + len(records) + 1
                update.history_epoch = self.log.history_epoch
                update.released_at.FromNanoseconds(released_at_ns)
                updates.append(update)
                records.append(
                    UpdateRecord(
                        sequence=update.sequence,
                        cohort=rules.name,
                        kind=int(kind),
                        revision=revision,
                        published_at_us=released_at_ns // 1000,
                        content_hash=digest,
                        payload=update.SerializeToString(),
                    )
                )
            if not records:
                return []
            await self._store.publish(records)
            for record, update in zip(records, updates, strict=True):
                published = self.updates.framed(record)
                self._hashes[published.key] = record.content_hash
                self.log.add(published)
                self._router.publish(published)
                self._telemetry.update(kind_name(record.kind))
                self._tell(update)
        for record in records:
            if record.revision % TRIM_EVERY == 0:
                await self._store.trim_updates(record.cohort, record.kind, keep=rules.updates_kept)
        return updates

    def _tell(self, update: update_pb2.Update) -> None:
        for listener in self._listeners:
            try:
                listener(update)
            except Exception:
                _log.exception("a listener failed on %s", update.cohort)

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

    async def _replay(self, cohort: str | None) -> None:
        """Count the stored packets of a cohort, or of all, that are not past their time."""
        now_us = self._clock() * 1e6
        unknown: set[str] = set()
        after = 0
        while page := await self._store.load(cohort, after=after):
            after = page[-1].sequence
            packets: defaultdict[str, list[packet_pb2.Packet]] = defaultdict(list)
            for stored in page:
                record = stored.record
                try:
                    rules = self._cohorts.open(record.cohort)
                except FMIError:
                    unknown.add(record.cohort)
                    continue
                ttl_s = max(rules.site_ttl_s, rules.policy_window_s)
                if not record.quarantined and record.emitted_at_us >= now_us - ttl_s * 1e6:
                    packets[record.cohort].append(packet_pb2.Packet.FromString(record.payload))
            for name, found in packets.items():
                state = self._state(self._cohorts.rules(name))
                await _in_thread(state.replay, found)
                work = self._work[name]
                work.quorate = state.quorum
                if work.dirty_since is None:
                    work.dirty_since = self._clock()
        for name in sorted(unknown):
            _log.warning(
                "cohort %s has packets but is not declared; they are kept, not counted", name
            )


async def _in_thread(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Work in a thread. A caller that is cancelled waits for it all the same: it holds the lock for it."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise


def _bodies(result: AggregationResult) -> Iterator[tuple[update_pb2.UpdateKind.ValueType, Message]]:
    yield update_pb2.UPDATE_KIND_PRIOR, result.prior_update
    yield update_pb2.UPDATE_KIND_WARM_START, result.warm_starts
    yield update_pb2.UPDATE_KIND_POLICY_HINT, result.policy_hint
    yield update_pb2.UPDATE_KIND_CAUSAL_CONSENSUS, result.causal_consensus


def _framed_update(
    cohort: str, kind: update_pb2.UpdateKind.ValueType, revision: int, body: Message
) -> update_pb2.Update:
    update = update_pb2.Update(cohort=cohort, kind=kind, revision=revision)
    match body:
        case update_pb2.MetaPriorUpdate():
            update.prior_update.CopyFrom(body)
            update.prior_update.rev = revision
        case update_pb2.WarmStartSet():
            update.warm_start.CopyFrom(body)
        case update_pb2.MetaPolicyHint():
            update.policy_hint.CopyFrom(body)
        case update_pb2.CausalConsensus():
            update.causal_consensus.CopyFrom(body)
    return update


def _says_nothing(body: Message) -> bool:
    """Say whether a first update would be empty: then there is nothing to publish."""
    match body:
        case update_pb2.MetaPriorUpdate():
            return not body.estimates
        case update_pb2.WarmStartSet():
            return not any(profile.init for profile in body.profiles)
        case update_pb2.MetaPolicyHint():
            return not body.hint_id and not body.lineage.sites
        case update_pb2.CausalConsensus():
            return not body.edges and not body.unpooled
    return False


def _content_hash(body: Message) -> bytes:
    """Hash what a consumer acts on. Lineage is left out: it moves with every packet."""
    content = type(body)()
    content.CopyFrom(body)
    match content:
        case update_pb2.WarmStartSet():
            for profile in content.profiles:
                profile.ClearField("lineage")
        case (
            update_pb2.MetaPriorUpdate()
            | update_pb2.MetaPolicyHint()
            | update_pb2.CausalConsensus()
        ):
            content.ClearField("lineage")
    return hashlib.blake2b(content.SerializeToString(deterministic=True), digest_size=16).digest()
