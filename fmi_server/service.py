"""FMIService: the map of the system.

    emit ──► validate ──► store ──► acknowledge
                            │
                            └──► count ──► release ──► store ──► route to subscribers and to the bus

`emit`, `emit_batch` and `emit_envelope` take packets in. A packet is acknowledged when the store has it,
and counted after that (`releases.Releaser`), which computes the aggregates of the cohorts that changed,
stores them as updates, and only then tells subscribers. Everything else reads.

Each call has a caller (`access.Principal`), which is the program itself where none is given. What it may
not do is refused here, and cohorts that it may not see do not exist for it.

The service knows neither gRPC nor a network. It belongs to one event loop and owns its tasks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast

from fmi.plain import DEFAULT_PROFILE_CLASS
from fmi.v1 import cohort_pb2, packet_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.access import TRUSTED, Action, Gate, Principal, View
from fmi_server.aggregation import WarmStartRequest
from fmi_server.aggregator import FMIAggregator
from fmi_server.applied import AppliedBook, Report
from fmi_server.bus import Bus, FederationBusAdapter
from fmi_server.checking import Checking
from fmi_server.cluster import Cluster
from fmi_server.cohorts import CohortRegistry, CohortRules
from fmi_server.compaction import Compactor
from fmi_server.contracts import FMIContractRegistry, PacketStatus
from fmi_server.counted_time import as_counted
from fmi_server.dictionaries import DictionaryShelf
from fmi_server.emission import (
    Answer,
    Candidate,
    Intake,
    kept,
    opening_warnings,
    overtaking_warnings,
    settle,
    size_of,
)
from fmi_server.envelope import ByteBudget, EnvelopeDecoder, EnvelopeLimits
from fmi_server.errors import (
    CohortUnknownError,
    FMIError,
    OverloadedError,
    Reason,
    ServerDrainingError,
    UpdateNotFoundError,
)
from fmi_server.feed_requests import FeedRequest, everything, kind_name
from fmi_server.memory_watch import MemoryWatch
from fmi_server.private_messages import PRIVATE_KINDS, private_warm_start
from fmi_server.quotas import Quotas
from fmi_server.releases import Releaser
from fmi_server.router import AGGREGATOR, FMIRouter
from fmi_server.spec_changes import SpecChanges, stored_spec
from fmi_server.storage import MemoryStore, Store, StoreError
from fmi_server.storage.base import (
    RevisionConflictError,
    SpecChangedError,
    StoreUnavailableError,
)
from fmi_server.storage.records import AppendOutcome
from fmi_server.store_watch import StoreWatch
from fmi_server.telemetry import FMITelemetry
from fmi_server.validator import FMIValidator, Inspection

__all__ = ["FMIService"]

TRIES: Final = 5
"""Tries to release a cohort, or to change its spec, where other servers do so at the same time."""

LEASE_S: Final = 6.0
"""Seconds after which a server that does not answer has lost what it releases alone."""

CLOSE_S: Final = 5.0
"""Seconds for work under way when the service closes: a write that hangs must not hold it."""

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


class FMIService:
    """Takes packets, keeps them, aggregates them per cohort, and routes the results.

    Use it as an async context manager: entering opens the store and brings the state back, leaving drains
    and closes. Every part can be given; what is not is made with its defaults, with a store in memory.

    Args:
        store: Keeps packets and updates.
        registry: The contract.
        cohorts: The cohorts and their rules.
        aggregator: Computes the aggregates.
        router: Routes packets and updates.
        telemetry: Counts.
        limits: What an envelope may hold.
        max_inflight: Emit calls at work at once; past it they are refused with a time to try again.
        bus: A message bus to take packets from and give priors to.
        clock: Unix time in seconds.

    Attributes:
        applied: What subscribers reported of the updates they got.
        closing: Set when the service takes nothing new.
        cluster: What this server is to others that share its store; None where nobody does.
        gate: Decides who may do what.
        memory_watch: Says whether memory is short; it has no limit until it is given one.
        quotas: What each caller may take, and took; nobody has limits until it is given some.
        specs: Puts cohort specs in force; says where one cannot be kept.
        store_watch: Says whether the store takes writes.
    """

    def __init__(
        self,
        *,
        store: Store | None = None,
        registry: FMIContractRegistry | None = None,
        cohorts: CohortRegistry | None = None,
        aggregator: FMIAggregator | None = None,
        router: FMIRouter | None = None,
        telemetry: FMITelemetry | None = None,
        limits: EnvelopeLimits | None = None,
        max_inflight: int = 10_000,
        bus: Bus | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = registry or FMIContractRegistry()
        self.telemetry = telemetry or FMITelemetry()
        self.store = store or MemoryStore()
        # An empty registry is false.
        self.cohorts = CohortRegistry(self.registry) if cohorts is None else cohorts
        self.gate = Gate(self.cohorts.access)
        self.validator = FMIValidator(self.registry, cohorts=self.cohorts, clock=clock)
        self.aggregator = aggregator or FMIAggregator(registry=self.registry, clock=clock)
        self.router = router or FMIRouter(telemetry=self.telemetry)
        self.releaser = Releaser(
            self.store,
            self.cohorts,
            self.aggregator,
            self.router,
            telemetry=self.telemetry,
            clock=clock,
        )
        self.applied = AppliedBook()
        self.store_watch = StoreWatch(self.store, telemetry=self.telemetry)
        self.memory_watch = MemoryWatch(telemetry=self.telemetry)
        self.quotas = Quotas()
        self.cohorts.signals_in_use = self.aggregator.signals_in_use
        self.compactor = Compactor(self.store, self.cohorts, self.releaser, clock=clock)
        self._decoder = EnvelopeDecoder(limits or EnvelopeLimits())
        self._decoding = ByteBudget(self._decoder.limits.max_decoded_bytes)
        intake = Intake(self.registry, self.validator)
        self._checking = Checking(intake, self.validator, self.cohorts, clock=clock)
        self._dictionaries = DictionaryShelf(self.store, self._decoder, clock=clock)
        self.specs = SpecChanges(
            self.store,
            self.cohorts,
            self.releaser,
            compactor=self.compactor,
            router=self.router,
            telemetry=self.telemetry,
        )
        self.cluster: Cluster | None = None
        self._bus = None if bus is None else FederationBusAdapter(bus, self)
        self.lease_s = LEASE_S
        self._clock = clock
        self._max_inflight = max_inflight
        self._inflight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.closing = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._running: list[asyncio.Task[None]] = []

    # Life

    async def __aenter__(self) -> Self:
        await self.store.open()
        try:
            if self.store.shared:
                self.cluster = await self._join()
            await self._load()
        except BaseException:
            await self.store.close()
            raise
        self.router.add_destination(AGGREGATOR, self.releaser.count)
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self._running = [
            self._tasks.create_task(self.releaser.run(), name="release"),
            self._tasks.create_task(self.releaser.sweep(), name="sweep"),
            self._tasks.create_task(self.compactor.run(), name="compaction"),
            self._tasks.create_task(self.store_watch.run(), name="store watch"),
            self._tasks.create_task(self.memory_watch.run(), name="memory watch"),
            self._tasks.create_task(self.router.give_signs_of_life(), name="signs of life"),
        ]
        if self.cluster is not None:
            for name, work in self.cluster.work().items():
                self._running.append(self._tasks.create_task(work, name=name))
        if self._bus is not None:
            self.releaser.publisher.on_update(self._bus.publish)
            self._running.append(self._tasks.create_task(self._bus.run(), name="bus"))
            await asyncio.sleep(0)  # the adapter subscribes before anybody can publish
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self.drain()
            for task in self._running:
                task.cancel()
            if self._tasks is None:
                return
            # An error of the caller's own is not one of the tasks': it must not come out as a group.
            left = (None,) * 3 if isinstance(exc, Exception) else (exc_type, exc, traceback)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._tasks.__aexit__(*left)
        finally:
            await self.store.close()

    async def drain(self) -> None:
        """Take nothing new, end the subscriptions, and wait until every Emit at work is answered."""
        self.closing.set()
        self.router.drain()
        if self.cluster is not None:
            await self.cluster.leave()
        await self._idle.wait()

    async def _join(self) -> Cluster:
        """Become one of the servers that share the store."""
        cluster = Cluster(
            self.store,
            self.cohorts,
            self.releaser,
            compactor=self.compactor,
            dictionaries=self._dictionaries,
            put_in_force=self.specs.put_stored,
            watch=self.store_watch,
            leases=await self.store.leases(ttl_s=self.lease_s),
            telemetry=self.telemetry,
        )
        await cluster.join()
        return cluster

    async def _load(self) -> None:
        for record in await self.store.cohorts():
            if record.name not in self.cohorts:
                self.cohorts.declare(stored_spec(record, self.store.location), force=True)
        await self.compactor.load()
        await self._dictionaries.load()
        await self.releaser.load()
        self.telemetry.cohorts(len(self.cohorts))

    async def settle(self) -> None:
        """See all that any of the servers that share the store was answered before now.

        Raises:
            StoreUnavailableError: That cannot be known now.
            ServerDrainingError: There is a spec among it that cannot be kept here.
        """
        if self.cluster is not None:
            await self.cluster.settle()
            self.specs.require_kept()

    # Packets in

    async def emit(
        self, packet: bytes | packet_pb2.Packet | Mapping[str, Any], *, caller: Principal = TRUSTED
    ) -> Answer:
        """Take one packet; return when it is durable.

        Args:
            packet: Serialised, typed, or plain in any form that the registry takes.
            caller: Who sends it.

        Raises:
            PacketRefusedError: It breaks rules; all of them are told.
            PacketIdReusedError: Its id was used before for other content.
            QuotaExceededError: The caller takes too much.
            OverloadedError: There is too much under way.
            ServerDrainingError: The server is going down.
            StoreUnavailableError: It could not be stored now.
        """
        with self._admitted():
            kind = "unknown"
            try:
                given = packet if isinstance(packet, bytes) else self.registry.coerce(packet)
                if caller.account:
                    self.quotas.admit_packets(caller.account, 1, size_of(given))
                found = await self._checked_anywhere([given], caller, first=None)
                kind = found[0].kind
                candidate = self._open_cohort(kept(found), caller)
                outcome = await self._append(candidate)
                answer = self._settled(candidate, outcome)
                if answer.error is not None:
                    raise answer.error  # noqa: TRY301 - counted below, like every other refusal
            except Exception:
                self.telemetry.packet(kind, "refused")
                raise
            self.telemetry.packet(kind, answer.status, size=len(candidate.record.payload))
            if answer.status == "accepted":
                answer = await self._count(candidate, answer)
            return answer

    async def emit_batch(
        self, items: bytes | Sequence[bytes | packet_pb2.Packet], *, caller: Principal = TRUSTED
    ) -> list[Answer]:
        """Take packets; return an answer for each, in order, when those that were taken are durable.

        Args:
            items: Packets, typed or serialised; or a serialised `PacketBatch`, of which no more are taken at
                the same time than `EnvelopeLimits` says.
            caller: Who sends them.

        Raises:
            EnvelopeMalformedError: It is no `PacketBatch`, or an empty one; nothing was stored.
            EnvelopeTooLargeError: It has too many packets; nothing was stored.
            QuotaExceededError: The caller takes too much; nothing was stored.
            OverloadedError: There is too much under way; nothing was stored.
            ServerDrainingError: The server is going down; nothing was stored.
            StoreUnavailableError: They could not be stored now; nothing was stored.
        """
        with self._admitted():
            if not isinstance(items, bytes):
                if caller.account:
                    size = sum(size_of(item) for item in items)
                    self.quotas.admit_packets(caller.account, len(items), size)
                return await self._emit_items(items, caller)
            self.quotas.admit_packets(caller.account, 0, len(items))
            async with self._decoding.spending(len(items)):
                with self.quotas.charging_refused(caller.account):
                    packets = self._decoder.split(items)
                self.quotas.admit_counted(caller.account, len(packets))
                return await self._emit_items(packets, caller)

    async def emit_envelope(
        self, envelope: wire_pb2.EncodedPackets, *, caller: Principal = TRUSTED
    ) -> list[Answer]:
        """Take the packets of an envelope; see `emit_batch`.

        Raises:
            EnvelopeMalformedError: It cannot be decoded; nothing was stored.
            EnvelopeTooLargeError: It would decode to too much; nothing was stored.
            DictionaryUnknownError: It names a dictionary that is not registered.
            QuotaExceededError: The caller takes too much; nothing was stored.
        """
        with self._admitted():
            sent, size = len(envelope.data), envelope.uncompressed_size
            too_large = size > self._decoder.limits.max_bytes
            self.quotas.admit_packets(caller.account, 0, sent if too_large else max(sent, size))
            with self.quotas.charging_refused(caller.account):
                self._decoder.refuse_too_large(envelope)
            async with self._decoding.spending(size):
                with self.quotas.charging_refused(caller.account):
                    decode = partial(self._decoder.decode, envelope)
                    items = await self._checking.in_turn(decode, of=caller)
                self.quotas.admit_counted(caller.account, len(items))
                return await self._emit_items(items, caller)

    async def _emit_items(
        self, items: Sequence[bytes | packet_pb2.Packet], caller: Principal
    ) -> list[Answer]:
        checked = await self._checked_anywhere(items, caller)
        return await self.uninterrupted(self._keep_batch(checked, caller))

    async def _checked_anywhere(
        self,
        items: Sequence[bytes | packet_pb2.Packet],
        caller: Principal,
        *,
        first: int | None = 0,
    ) -> list[Candidate | Answer]:
        """Check packets, of cohorts that any of the servers knows."""
        known = len(self.cohorts)  # before the first look: more may become known while it lasts
        checked = await self._checking.check(items, caller=caller, first=first)
        if self.cluster is not None and any(map(self._checking.is_strange, checked)):
            await self.settle()
            if len(self.cohorts) != known:
                checked = await self._checking.check(items, caller=caller, first=first)
        if broken := sum(len(item.violations) for item in checked if isinstance(item, Answer)):
            self.quotas.charge(caller.account, broken)
        return checked

    async def _keep_batch(
        self, checked: Sequence[Candidate | Answer], caller: Principal
    ) -> list[Answer]:
        items = [self._opened(item, caller) for item in checked]
        records = [item.record for item in items if isinstance(item, Candidate)]
        try:
            outcomes = iter(await self.store.append(records) if records else ())
        except StoreError as error:
            self._doubt(error, {record.cohort for record in records})
            raise
        answers = []
        counts: Counter[tuple[str, PacketStatus]] = Counter()
        for item in items:
            answer = self._settled(item, next(outcomes)) if isinstance(item, Candidate) else item
            counts[answer.kind, answer.status] += 1
            if isinstance(item, Candidate) and answer.status == "accepted":
                answer = await self._count(item, answer)
            answers.append(answer)
        for (kind, status), count in counts.items():
            self.telemetry.packet(kind, status, count=count)
        return answers

    async def inspect(self, packet: bytes, *, caller: Principal = TRUSTED) -> Inspection:
        """Check a serialised packet as `emit` would, and store nothing.

        Raises:
            QuotaExceededError: The caller takes too much; what is only checked is charged too.
            StoreUnavailableError: Whether another server knows its cohort cannot be known now.
        """
        self.quotas.admit_packets(caller.account, 1, len(packet))
        found = await self._checking.inspect(packet, caller=caller)
        unknown = any(broken.reason == Reason.COHORT_UNKNOWN for broken in found.violations)
        if self.cluster is not None and unknown:
            await self.settle()
            found = await self._checking.inspect(packet, caller=caller)
        self.quotas.charge(caller.account, len(found.violations))
        return found

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        if self.closing.is_set():
            raise ServerDrainingError
        if self._inflight >= self._max_inflight:
            raise OverloadedError("calls at work")
        if self.memory_watch.pressed:
            raise OverloadedError("memory")
        self._inflight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._inflight -= 1
            if not self._inflight:
                self._idle.set()

    async def _append(self, candidate: Candidate) -> AppendOutcome:
        # Not `uninterrupted`, as batches are: a task for each packet would cost as much as its checks.
        try:
            (outcome,) = await self.store.append([candidate.record])
            return outcome
        except StoreError as error:
            self._doubt(error, {candidate.record.cohort})
            raise
        except asyncio.CancelledError:
            # The caller gave up, the store does not: what it keeps counts, at the latest after a restart.
            if self._tasks is not None and not self.closing.is_set():
                self._tasks.create_task(self._count_abandoned(candidate), name="abandoned")
            raise

    def _settled(self, candidate: Candidate, outcome: AppendOutcome) -> Answer:
        answer = settle(candidate, outcome)
        # The places of two packets of one site tell how many came between them.
        return replace(answer, sequence=0) if self.cohorts.any_private else answer

    async def _count(self, candidate: Candidate, answer: Answer) -> Answer:
        """Hand an accepted packet on to be counted; warn where it is overtaken already."""
        warnings: tuple[str, ...] = ()
        if self.cohorts.rules(candidate.record.cohort).privacy is None:
            # In a private cohort it would tell whoever uses the name of a site whether that site is there.
            warnings = overtaking_warnings(candidate.record, self.releaser.newest)
        packet = as_counted(candidate.packet, answer.received_at_us)
        if self.cluster is None:
            await self.router.route(packet, destination=AGGREGATOR)
        else:
            self.cluster.following.wake()  # which counts it from the store
        return replace(answer, warnings=(*answer.warnings, *warnings)) if warnings else answer

    def _doubt(self, error: StoreError, cohorts: Iterable[str]) -> None:
        """Note that packets may have got into the store although their write failed.

        Sent again they would be duplicates, which do not count, so their cohorts are counted anew. Other
        failures than those of the disk itself are rolled back and leave no doubt.
        """
        if isinstance(error, StoreUnavailableError) and error.cause == "io_error":
            for cohort in cohorts:
                self.releaser.doubt(cohort)

    async def _count_abandoned(self, candidate: Candidate) -> None:
        """Count a packet that was stored for a caller who did not wait for the answer."""
        try:
            # Sent again it is answered behind the first write, which is known by the time it carries.
            (outcome,) = await self.store.append([candidate.record])
            ours = outcome.received_at_us == candidate.record.received_at_us
            answer = settle(candidate, outcome)
            if answer.error is None and ours and not outcome.quarantined:
                await self._count(candidate, answer)
        except Exception as error:
            unknown = not isinstance(error, FMIError)
            _log.warning(
                "a packet of a caller who gave up does not count: %s", error, exc_info=unknown
            )

    async def uninterrupted(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Carry work to its end, also where its caller is cancelled meanwhile.

        A client's deadline must not stop a change between the store and what follows in memory.
        """
        if self._tasks is None:
            return await work

        async def finish() -> tuple[_T | None, Exception | None]:
            try:
                return await work, None
            except Exception as error:
                return None, error  # raised below: in a task of the group it would end the service

        result, error = await asyncio.shield(self._tasks.create_task(finish()))
        if error is not None:
            raise error
        return cast("_T", result)

    def _opened(self, item: Candidate | Answer, caller: Principal) -> Candidate | Answer:
        """Open the cohort of a candidate of a batch; it is refused where no more may be opened."""
        if isinstance(item, Candidate):
            try:
                return self._open_cohort(item, caller)
            except CohortUnknownError as error:
                return Answer(item.record.packet_id, item.record.kind, "refused", error=error)
        return item

    def _open_cohort(self, candidate: Candidate, caller: Principal) -> Candidate:
        """Open the cohort of a candidate where there is none yet, and warn of that."""
        name = candidate.record.cohort
        if name in self.cohorts:
            return candidate
        if not self.quotas.may_open(caller.account):
            raise CohortUnknownError(name)
        self.cohorts.open(name)
        self.quotas.opened(caller.account)
        _log.info(
            "cohort %s is opened by the first packet, from %s", name, candidate.record.domain_id
        )
        self.telemetry.cohorts(len(self.cohorts))
        return replace(candidate, warnings=(*candidate.warnings, *opening_warnings(name)))

    # Updates out

    def subscribe(
        self, request: wire_pb2.SubscribeRequest, *, caller: Principal = TRUSTED
    ) -> AsyncIterator[bytes]:
        """Give the events of a subscription as serialised `SubscribeResponse` messages, until it ends.

        Raises:
            DomainIdMismatchError: The caller may not subscribe under that name.
            UnauthorizedError: What allowed the subscription is gone.
            InvalidFilterError: The filter, the start or the resume token is wrong.
            CompactedError: A revision that comes next is no longer kept.
            OverloadedError: There are as many subscriptions as are allowed.
            ServerDrainingError: The server is going down.
            SupersededError: The same subscriber and instance subscribed again.
        """
        if request.subscriber:
            self.gate.require_name(caller, request.subscriber, "subscriber")
        placed = request.resume_token or request.start_revisions or request.HasField("handover")
        if self.cluster is not None and placed:
            return self._subscribe_settled(request, caller)
        return self._subscribe(request, caller)

    async def _subscribe_settled(
        self, request: wire_pb2.SubscribeRequest, caller: Principal
    ) -> AsyncIterator[bytes]:
        # Where the subscriber was may be ahead of what was heard here of another server.
        await self.settle()
        async for event in self._subscribe(request, caller):
            yield event

    def _subscribe(
        self, request: wire_pb2.SubscribeRequest, caller: Principal
    ) -> AsyncIterator[bytes]:
        log = self.releaser.publisher.log
        wanted = FeedRequest.from_message(
            request,
            history_epoch=log.history_epoch,
            head=log.head,
            caller=caller,
            permits=everything if caller.unrestricted else View(self.gate, caller),
        )
        return self.router.subscribe(wanted, log, self.releaser.publisher.updates)

    def report_applied(
        self, subscriber: str, reports: Sequence[Report], *, caller: Principal = TRUSTED
    ) -> int:
        """Keep what became of updates at a subscriber; return how many reports are of this history.

        Raises:
            DomainIdMismatchError: The caller may not report under that name.
            AccessDeniedError: A report is of a cohort that the caller may not read.
            UpdateNotFoundError: A report is of an update that was not released; none was kept.
        """
        log = self.releaser.publisher.log
        self.gate.require_name(caller, subscriber, "subscriber")
        for report in reports:
            error = self.gate.refusal(caller, Action.SUBSCRIBE, report.key[0])
            if isinstance(error, CohortUnknownError):
                # Of a cohort that nobody has, no update was released either.
                if report.history_epoch in ("", log.history_epoch):
                    cohort, kind = report.key
                    raise UpdateNotFoundError(cohort, kind_name(kind), report.revision)
            elif error is not None:
                raise error
        recorded = self.applied.record(subscriber, reports, log, int(self._clock() * 1e9))
        for report in reports:
            self.telemetry.report("applied" if report.failure is None else "failed")
        return recorded

    async def update(
        self, cohort: str, kind: int, revision: int = 0, *, caller: Principal = TRUSTED
    ) -> update_pb2.Update:
        """Read one update; the newest where no revision is given.

        Raises:
            AccessDeniedError: The caller may not read the cohort.
            CohortUnknownError: There is no such cohort.
            UpdateNotFoundError: There is no such update yet.
            CompactedError: The revision is no longer kept.
        """
        self.gate.require(caller, Action.SUBSCRIBE, cohort)
        latest = self.releaser.publisher.log.latest.get((cohort, kind))
        if self.cluster is not None and (latest is None or revision > latest.revision):
            await self.settle()  # another server may have told of it
            latest = self.releaser.publisher.log.latest.get((cohort, kind))
        if latest is None:
            if cohort not in self.cohorts:
                raise CohortUnknownError(cohort)
            private = self.cohorts.rules(cohort).privacy is not None
            never = private and kind not in PRIVATE_KINDS
            raise UpdateNotFoundError(cohort, kind_name(kind), revision, private=never)
        found = latest
        if revision not in (0, latest.revision):
            if revision > latest.revision:
                raise UpdateNotFoundError(cohort, kind_name(kind), revision)
            found = await self.releaser.publisher.updates.kept((cohort, kind), revision)
        return update_pb2.Update.FromString(found.payload)

    async def warm_start(
        self,
        cohort: str,
        *,
        profile_class: str = "",
        regime_tag: str = "",
        concepts: Mapping[str, float] | None = None,
        caller: Principal = TRUSTED,
    ) -> tuple[update_pb2.WarmStartProfile, int]:
        """Find the warm start for a site, and the revision of the prior that it goes with.

        Args:
            cohort: The cohort.
            profile_class: The site's class of learner; empty for the default one.
            regime_tag: The regime that the site works in; empty where it does not know.
            concepts: Scores of the concepts that the site sees, to find the nearest regime.
            caller: Who asks.

        Raises:
            AccessDeniedError: The caller may not read the cohort.
            CohortUnknownError: There is no such cohort.
        """
        self.gate.require(caller, Action.SUBSCRIBE, cohort)
        if cohort not in self.cohorts:
            raise CohortUnknownError(cohort)
        request = WarmStartRequest(
            profile_class or DEFAULT_PROFILE_CLASS, regime_tag, concepts or {}
        )
        found = None
        if self.cohorts.rules(cohort).privacy is None:
            found = await self.uninterrupted(self._find_warm_start(cohort, request))
        if found is None:
            return self._released_warm_start(cohort, request.profile_class)
        latest = self.releaser.publisher.log.latest.get((cohort, update_pb2.UPDATE_KIND_PRIOR))
        return found, latest.revision if latest else 0

    def _released_warm_start(
        self, cohort: str, profile_class: str
    ) -> tuple[update_pb2.WarmStartProfile, int]:
        """Read the warm start of a private cohort off its last release: what is held stays unseen."""
        latest = self.releaser.publisher.log.latest.get((cohort, update_pb2.UPDATE_KIND_PRIOR))
        update = update_pb2.Update.FromString(latest.payload) if latest else update_pb2.Update()
        return private_warm_start(update.prior_update, profile_class), update.revision

    async def _find_warm_start(
        self, cohort: str, request: WarmStartRequest
    ) -> update_pb2.WarmStartProfile | None:
        """Find it in what is held; None where that is private, or may be, when it can be read."""
        async with self.releaser.settled(cohort, expire=True) as state:
            if state.rules.privacy is not None or self.releaser.spec_waits(cohort):
                return None
            return await asyncio.to_thread(self.aggregator.warm_start, state, request)

    async def release(self, cohort: str, *, caller: Principal = TRUSTED) -> list[update_pb2.Update]:
        """Release a cohort now; return what was published, which is nothing where nothing changed.

        Raises:
            AccessDeniedError: The caller may not administer the cohort.
            CohortUnknownError: There is no such cohort.
            ReleaseScheduledError: It is private, and releases at fixed times only.
            PrivacyBudgetExhaustedError: It is private, and releases nothing more.
            StoreError: The updates could not be stored; nothing was published.
        """
        if cohort not in self.cohorts:
            await self.settle()  # it may have come into being at another server
        self.gate.require(caller, Action.ADMIN, cohort)
        if cohort not in self.cohorts:
            raise CohortUnknownError(cohort)
        if self.cluster is None:
            return await self.uninterrupted(self.releaser.release(cohort))
        return await self.uninterrupted(self._release_among_others(cohort))

    async def _release_among_others(self, cohort: str) -> list[update_pb2.Update]:
        """Release a cohort that another server may be releasing at this moment."""
        for _ in range(TRIES):
            await self.settle()
            with contextlib.suppress(RevisionConflictError, SpecChangedError):
                return await self.releaser.release(cohort)
        raise OverloadedError("releases of the cohort at other servers")

    # Rules

    async def put_cohort_spec(
        self,
        spec: cohort_pb2.CohortSpec,
        *,
        force: bool = False,
        dry_run: bool = False,
        caller: Principal = TRUSTED,
    ) -> tuple[CohortRules, bool]:
        """Declare a cohort, or change its spec; return the rules and whether anything changed.

        Raises:
            AccessDeniedError: The caller is no operator.
            SpecInvalidError: The spec breaks rules.
            SpecChangeUnsafeError: The change would break sites, or promises a budget that is overspent
                already, and `force` was not said.
            SettingUnsupportedError: It asks for what this version does not have.
            StoreUnavailableError: What other servers have in force cannot be known now.
            OverloadedError: Other servers change it all the time.
        """
        self.gate.require_operator(caller, "change the specs of cohorts")
        for _ in range(TRIES):
            await self.settle()  # it is checked against what is in force everywhere
            if spec.name in self.cohorts and not self.cohorts.rules(spec.name).declared:
                await self.uninterrupted(
                    self.releaser.reading(spec.name)
                )  # what waits is counted first
            if dry_run:
                return self.specs.check(spec, force=force)
            with contextlib.suppress(SpecChangedError):
                return await self.uninterrupted(self.specs.put(spec, force=force))
        raise OverloadedError("changes of the spec at other servers")

    async def register_dictionary(self, data: bytes, *, caller: Principal = TRUSTED) -> int:
        """Register a compression dictionary; return its id; see `DictionaryShelf.register`.

        Raises:
            AccessDeniedError: The caller is no operator.
        """
        self.gate.require_operator(caller, "register dictionaries")
        return await self.uninterrupted(self._dictionaries.register(data))

    async def dictionary(self, dictionary_id: int = 0) -> tuple[int, bytes]:
        """Read a dictionary; the newest where no id is given; see `DictionaryShelf.read`."""
        return await self._dictionaries.read(dictionary_id)
