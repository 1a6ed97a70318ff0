"""Publication: updates stored, and then told of.

An update is stored before anybody is told of it, under the next revision of its cohort and kind, so that
a subscriber never sees a revision that a crash could take back.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from google.protobuf.message import Message

from fmi.v1 import update_pb2
from fmi_server.aggregator import AggregationResult
from fmi_server.cohorts import CohortRules
from fmi_server.errors import CompactedError
from fmi_server.feed_requests import Key, kind_name
from fmi_server.router import FMIRouter
from fmi_server.storage import Store
from fmi_server.storage.base import RevisionConflictError
from fmi_server.storage.records import UpdateRecord
from fmi_server.telemetry import FMITelemetry
from fmi_server.update_log import PublishedUpdate, UpdateLog

__all__ = ["Publisher", "StoredUpdates"]

TRIM_EVERY: Final = 16
"""Revisions between two trims of a history."""

_log = logging.getLogger(__name__)


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

    async def oldest_places(self, keys: Sequence[Key]) -> Mapping[Key, tuple[int, int]]:
        """Return the revision and the sequence of the oldest update kept, by key."""
        return await self._store.oldest_updates(keys)

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


class Publisher:
    """Stores what changed as updates, and tells subscribers and listeners.

    Args:
        store: Keeps the updates; it is the fence.
        router: Tells subscribers.
        telemetry: Counts updates.
        clock: Unix time in seconds.

    Attributes:
        log: The updates in memory.
        updates: Reads those that are not.
    """

    def __init__(
        self,
        store: Store,
        router: FMIRouter,
        *,
        telemetry: FMITelemetry,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._router = router
        self._telemetry = telemetry
        self._clock = clock
        self._lock = asyncio.Lock()
        self._unsure = False
        self._hashes: dict[Key, bytes] = {}
        self._listeners: list[Callable[[update_pb2.Update], None]] = []
        self.log = UpdateLog("")
        self.updates = StoredUpdates(store)

    def on_update(self, listener: Callable[[update_pb2.Update], None]) -> None:
        """Call a function with every update that is published."""
        self._listeners.append(listener)

    async def load(self) -> dict[str, float]:
        """Bring back the newest updates; return when each cohort last published, Unix seconds."""
        self.log = UpdateLog(self._store.history_epoch)
        published_at: dict[str, float] = {}
        for record in await self._latest():
            published = self.updates.framed(record)
            self.log.latest[published.key] = published
            self._hashes[published.key] = record.content_hash
            at = record.published_at_us / 1e6
            published_at[record.cohort] = max(at, published_at.get(record.cohort, at))
        return published_at

    async def _latest(self) -> list[UpdateRecord]:
        """Read the newest updates, and the place of the last of them, while other servers may publish."""
        while True:
            self.log.head = await self._store.next_update_sequence() - 1
            found = await self._store.latest_updates()
            if await self._store.next_update_sequence() - 1 == self.log.head:
                return found

    async def publish(
        self,
        rules: CohortRules,
        result: AggregationResult,
        *,
        at: float | None = None,
        holds: Callable[[], bool] | None = None,
    ) -> list[update_pb2.Update]:
        """Publish what changed in a cohort; return it.

        Args:
            rules: The cohort's rules.
            result: Its aggregates.
            at: The time that the updates carry, Unix seconds; now where it is not given.
            holds: Says whether the aggregates go with the specs that are known; see `Store.publish`.

        Raises:
            RevisionConflictError: Another server published of the same cohort meanwhile.
            SpecChangedError: `holds` says no.
            StoreError: It could not be stored; nobody was told of anything.
        """
        at = self._clock() if at is None else at
        async with self._lock:
            updates, records = await self._publish(rules, result, at, holds)
        for record in records:
            if record.revision % TRIM_EVERY == 0:
                await self._store.trim_updates(record.cohort, record.kind, keep=rules.updates_kept)
        return updates

    async def _publish(
        self,
        rules: CohortRules,
        result: AggregationResult,
        at: float,
        holds: Callable[[], bool] | None,
    ) -> tuple[list[update_pb2.Update], list[UpdateRecord]]:
        if self._unsure:
            await self._catch_up()
        while True:
            updates, records = self._changes(rules, result, at)
            if not records:
                return [], []
            # Until the store says so, nobody knows whether a write that fails got in.
            self._unsure = True
            try:
                await self._store.publish(records, holds=holds)
            except RevisionConflictError:
                told = await self._catch_up() if self._store.shared else {}
                # All cohorts share one sequence: where another one came first, the next place is free.
                if not told or rules.name in told:
                    raise
                continue
            self._unsure = False
            for record, update in zip(records, updates, strict=True):
                self._tell(record, update)
            return updates, records

    async def catch_up(self) -> dict[str, float]:
        """Tell of updates that are in the store and were not told of.

        Returns:
            By cohort, when the last of them was published, Unix seconds.
        """
        async with self._lock:
            return await self._catch_up()

    async def _catch_up(self) -> dict[str, float]:
        told: dict[str, float] = {}
        while page := await self._store.updates_since(self.log.head):
            for record in page:
                update = update_pb2.Update.FromString(self.updates.framed(record).payload)
                self._tell(record, update)
                told[record.cohort] = record.published_at_us / 1e6
        self._unsure = False
        return told

    def _changes(
        self, rules: CohortRules, result: AggregationResult, at: float
    ) -> tuple[list[update_pb2.Update], list[UpdateRecord]]:
        released_at_ns = int(at * 1e9)
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
            # Not part of what is stored: a backup that is restored goes on in another history.
            update.history_epoch = self.log.history_epoch
        return updates, records

    def _tell(self, record: UpdateRecord, update: update_pb2.Update) -> None:
        published = self.updates.framed(record)
        self._hashes[published.key] = record.content_hash
        self.log.add(published)
        self._router.publish(published)
        self._telemetry.update(kind_name(record.kind))
        for listener in self._listeners:
            try:
                listener(update)
            except Exception:
                _log.exception("a listener failed on %s", update.cohort)


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
