"""The contract of a store: what it keeps, what it promises, how it fails.

A store keeps packets, the updates that were released, cohort specs, the sites' counters and the
encoder dictionaries. It knows neither protobuf nor gRPC: every payload is opaque bytes.

Promises every store makes (`tests/storage/test_store_contract.py` holds all of them to it):

* DURABLE: `append` and every other write return only once the data would survive `kill -9` and a
  power cut. `MemoryStore` is the one exception and says so in the log when it is opened.
* ONCE: `(domain_id, packet_id)` is the key of a packet. Whatever the number of calls, callers and
  restarts, one record is kept under a key.
* Partial success: a record that cannot be kept is answered `rejected`; its neighbours are kept.
* Fenced: an update is written only as the direct successor of the last one, or not at all.
* Bounded: what waits to be written is bounded; past the bound `StoreBusyError` is raised at once.

A store belongs to the event loop that opened it. Cancelling a write gives up the answer, not the write: it
may still be carried out. So may a write that failed with the cause `no_answer`, which only a store at brokers
knows: it was sent, and nothing came back. A packet of it counts once when it is sent again; who published or
spent reads what is there before it goes on.

An embedded store has one process as its only writer. A store at brokers has several, its replicas: each sees
what it wrote itself at once, and what others wrote a little later, or behind `catch_up`. The fences hold
among all of them.

Errors::

    StoreError
    ├── StoreUnavailableError     nothing was written (but see `no_answer`); it may succeed later
    │   ├── StoreBusyError        too much is waiting to be written; try again shortly
    │   └── StoreLockedError      another process has this store open
    ├── StoreCorruptError         the file is not a database of ours, or is damaged
    ├── StoreVersionError         the database was written by a newer version
    ├── RevisionConflictError     the fence: not the direct successor of the last update
    ├── LedgerConflictError       the same of the privacy ledger
    ├── DictionaryConflictError   a dictionary id cannot change its meaning
    └── UnknownPacketError        no such packet
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self

from fmi_server.errors import FMIError, Reason
from fmi_server.storage.records import (
    CONTENT_HASH_BYTES,
    MAX_PAYLOAD_BYTES,
    PACKET_KINDS,
    AppendOutcome,
    AppendStatus,
    Change,
    CohortRecord,
    DictionaryRecord,
    LedgerTotal,
    LostSpan,
    PacketKey,
    PacketKind,
    PacketRecord,
    SiteRecord,
    SpendRecord,
    StoredPacket,
    StoreStats,
    UnavailableReason,
    UpdateRecord,
    record_problem,
)

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from types import TracebackType

    from fmi_server.storage.jetstream_leases import LeaseTable

__all__ = [
    "CONTENT_HASH_BYTES",
    "MAX_PAYLOAD_BYTES",
    "PACKET_KINDS",
    "AppendOutcome",
    "AppendStatus",
    "CohortRecord",
    "DictionaryConflictError",
    "DictionaryRecord",
    "EntryVersionError",
    "LedgerConflictError",
    "PacketKey",
    "PacketKind",
    "PacketRecord",
    "RevisionConflictError",
    "SiteRecord",
    "SpecChangedError",
    "Store",
    "StoreBehindError",
    "StoreBusyError",
    "StoreCorruptError",
    "StoreError",
    "StoreLockedError",
    "StoreStats",
    "StoreStoppedError",
    "StoreUnavailableError",
    "StoreVersionError",
    "StoredPacket",
    "UnavailableReason",
    "UnknownPacketError",
    "UpdateRecord",
    "check_holds",
    "check_spend",
    "record_problem",
]


class StoreError(FMIError):
    """Root of everything a store raises on purpose."""

    @property
    def public_message(self) -> str:
        """Say that it is the store; paths and causes are for the operator, in the log."""
        return "the store cannot do this now; nothing was stored"


class StoreUnavailableError(StoreError):
    """Nothing was written; the store works again once the cause is gone.

    With the cause `no_answer` it is not known whether something was written; see the module.
    """

    reason = Reason.STORE_UNAVAILABLE
    retry_after_s = 2.0

    def __init__(self, cause: UnavailableReason, *, detail: str, path: str = "") -> None:
        self.cause: UnavailableReason = cause
        self.detail = detail
        self.path = path
        where = f" {path}" if path else ""
        super().__init__(f"store{where} unavailable ({cause}): {detail}")

    @property
    def metadata(self) -> Mapping[str, str]:
        """The cause; where the store lies is the operator's business."""
        return {"cause": self.cause}


class StoreBusyError(StoreUnavailableError):
    """More waits to be written than the bound allows; nothing of this call was taken."""

    reason = Reason.OVERLOADED
    retry_after_s = 0.5

    def __init__(self, *, pending_records: int, pending_bytes: int, path: str = "") -> None:
        self.pending_records = pending_records
        self.pending_bytes = pending_bytes
        super().__init__(
            "busy",
            detail=f"{pending_records} records ({pending_bytes} bytes) wait to be written; "
            "try again shortly",
            path=path,
        )


class StoreBehindError(StoreUnavailableError):
    """This replica lacks entries that are no longer in the log; opened again it begins with a snapshot."""

    def __init__(self, *, detail: str, path: str) -> None:
        super().__init__("no_stream", detail=detail, path=path)


class StoreStoppedError(StoreUnavailableError):
    """This replica stopped for an error that nobody foresaw; opened again it goes on from its view."""

    def __init__(self, *, detail: str, path: str) -> None:
        super().__init__("io_error", detail=detail, path=path)


class StoreLockedError(StoreUnavailableError):
    """Another process, or another store of this one, has the database open."""

    def __init__(self, *, path: str, holder_pid: int | None) -> None:
        self.holder_pid = holder_pid
        holder = f"process {holder_pid}" if holder_pid is not None else "another process"
        super().__init__(
            "locked",
            detail=f"{holder} has it open; stop it or choose another path",
            path=path,
        )


class StoreCorruptError(StoreError):
    """The file is not a database of this server, or it is damaged. It was not touched."""

    reason = Reason.STORE_CORRUPT

    def __init__(self, *, path: str, detail: str) -> None:
        self.path = path
        self.detail = detail
        super().__init__(f"{path} is not a usable FMI database: {detail}")


class StoreVersionError(StoreError):
    """The database was written by a newer version of the server. It was not touched.

    Callers may try again: others of several servers go on, and this one does once it is upgraded.
    """

    reason = Reason.STORE_UNAVAILABLE
    retry_after_s = 2.0

    def __init__(self, *, path: str, found: int, supported: int, told: str = "") -> None:
        self.path = path
        self.found = found
        self.supported = supported
        super().__init__(
            told
            or f"{path} has schema version {found}, this server knows versions up to {supported}; "
            "upgrade the server or restore an older backup"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """The cause, as of other reasons to try again."""
        return {"cause": "unsupported"}


class EntryVersionError(StoreVersionError):
    """An entry of the log was written by a newer version of the server. The view goes as far as to it.

    Args:
        path: Names the log and the entry.
        found: The format of the entry.
        supported: The newest format that is known.
        kind: Of what it writes, where the format is known and that is not.
    """

    def __init__(self, *, path: str, found: int, supported: int, kind: str = "") -> None:
        self.kind = kind
        what = f"{kind!r}, which" if kind else f"of format {found}, and"
        known = (
            "is no write that this server knows" if kind else f"it knows formats up to {supported}"
        )
        super().__init__(
            path=path,
            found=found,
            supported=supported,
            told=f"{path} is {what} {known}; a newer version wrote it, so upgrade the server",
        )


class RevisionConflictError(StoreError):
    """An update is not the direct successor of the last one; nothing of the call was written."""

    def __init__(
        self,
        *,
        cohort: str,
        kind: int,
        revision: int,
        expected_revision: int,
        sequence: int,
        expected_sequence: int,
    ) -> None:
        self.cohort = cohort
        self.kind = kind
        self.revision = revision
        self.expected_revision = expected_revision
        self.sequence = sequence
        self.expected_sequence = expected_sequence
        super().__init__(
            f"cohort {cohort!r} kind {kind}: revision {revision} at sequence {sequence} refused, "
            f"expected revision {expected_revision} at sequence {expected_sequence}"
        )


class SpecChangedError(StoreError):
    """Specs changed since what was to be written was made by them; nothing was written."""

    def __init__(self, *, cohort: str) -> None:
        self.cohort = cohort
        super().__init__(f"the spec of cohort {cohort!r} was changed by another server meanwhile")


def check_holds(holds: Callable[[], bool] | None, cohort: str) -> None:
    """Refuse what no longer holds.

    Raises:
        SpecChangedError: It does not.
    """
    if holds is not None and not holds():
        raise SpecChangedError(cohort=cohort)


class LedgerConflictError(StoreError):
    """An entry of the privacy ledger does not follow the last one; nothing was written."""

    def __init__(self, spend: SpendRecord, *, last_number: int, last_period: int | None) -> None:
        self.spend = spend
        self.last_number = last_number
        self.last_period = last_period
        last = (
            "there is none yet" if last_period is None else f"the last is of period {last_period}"
        )
        super().__init__(
            f"cohort {spend.cohort!r}: ledger entry {spend.number} of period {spend.period} refused, "
            f"expected entry {last_number + 1}; {last}"
        )


def check_spend(spend: SpendRecord, *, last_number: int, last_period: int | None) -> None:
    """Hold the fence of the privacy ledger.

    Args:
        spend: The entry to be added.
        last_number: Of the last entry of its cohort; 0 where there is none.
        last_period: The same; None where there is none.

    Raises:
        LedgerConflictError: The entry does not follow the last one.
        ValueError: Its cost is negative, or no number.
    """
    if not 0.0 <= spend.rho < math.inf:
        raise ValueError(f"the cost of a release must be at least 0 and finite, not {spend.rho}")
    follows = last_period is None or spend.period > last_period
    if spend.number != last_number + 1 or not follows:
        raise LedgerConflictError(spend, last_number=last_number, last_period=last_period)


class DictionaryConflictError(StoreError):
    """The dictionary id is taken by other data."""

    reason = Reason.SPEC_CHANGE_UNSAFE

    def __init__(self, *, dictionary_id: int) -> None:
        self.dictionary_id = dictionary_id
        super().__init__(f"dictionary {dictionary_id} exists with other data; choose a new id")

    @property
    def public_message(self) -> str:
        """The whole message; it has nothing of the server's own."""
        return str(self)


class UnknownPacketError(StoreError):
    """No packet is kept under this position or key."""

    reason = Reason.NOT_FOUND

    def __init__(self, *, packet: int | PacketKey) -> None:
        self.packet = packet
        super().__init__(f"no packet {packet!r} in the store")

    @property
    def public_message(self) -> str:
        """The whole message; it has nothing of the server's own."""
        return str(self)


class Store(ABC):
    """Keep packets, updates, cohorts, sites and dictionaries. See the module for the promises.

    Every method may raise `StoreUnavailableError` (also when the store is not open) and
    `StoreCorruptError`.
    """

    @abstractmethod
    async def open(self) -> None:
        """Open the store, creating it if there is none.

        Raises:
            StoreLockedError: It is open elsewhere.
            StoreCorruptError: What is there is not a store; it was not touched.
            StoreVersionError: It was written by a newer version; it was not touched.
        """

    @abstractmethod
    async def close(self) -> None:
        """Write what was accepted, answer it, then close. Closing twice is no error."""

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def location(self) -> str:
        """Where the store is, for messages to the operator."""
        return "the store"

    @property
    def durable(self) -> bool:
        """Whether what is kept outlives the process."""
        return True

    @property
    def shared(self) -> bool:
        """Whether other servers write to it too."""
        return False

    @property
    def stopped(self) -> StoreError | None:
        """Why nothing that is written comes here any more until it is opened again; None where it does."""
        return None

    def follow(self, listener: Callable[[Change], None]) -> None:
        """Tell of what other servers write, once it is seen here, in the order in which it was written.

        Args:
            listener: Is called on the event loop, and must not wait.
        """
        del listener  # nobody else writes to a store of one server alone

    async def leases(self, *, ttl_s: float) -> LeaseTable:
        """Return the leases of the servers that share it.

        Args:
            ttl_s: For how long a lease is good without renewal, where nobody said so before.

        Raises:
            StoreUnavailableError: Nobody shares it, or the brokers do not answer.
        """
        raise StoreUnavailableError(
            "unsupported",
            detail=f"no leases of {ttl_s:g} s: it is of one server",
            path=self.location,
        )

    @property
    @abstractmethod
    def history_epoch(self) -> str:
        """Random name of this history: made with the store, changed when a backup is restored."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Return counters since opening; costs nothing and needs no disk."""

    @abstractmethod
    async def probe(self) -> None:
        """Write something that changes nothing, DURABLE, to find out whether the store takes writes."""

    @abstractmethod
    async def catch_up(self) -> None:
        """Wait until reads here see every write that anyone was answered before now.

        A store with a single writer sees its own writes at once, and returns at once.
        """

    # Packets

    @abstractmethod
    async def append(self, records: Sequence[PacketRecord]) -> list[AppendOutcome]:
        """Keep packets, DURABLE and ONCE, and answer each in the order given.

        Sequences rise in the order of the records and across calls; numbers may be left out.
        Among equal keys in one call the first is kept. The counters of the sites are part of the
        same transaction.

        Raises:
            StoreBusyError: The bound on waiting records is reached; nothing was taken.
            StoreUnavailableError: The commit failed; nothing of the call was kept.
        """

    @abstractmethod
    async def load(
        self, cohort: str | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return up to `limit` packets with a sequence above `after`, in sequence order.

        Quarantined packets are included. Fewer than `limit` means that there are no more.
        """

    @abstractmethod
    async def last_sequence(self) -> int:
        """Return the sequence of the last packet, 0 where there is none."""

    @abstractmethod
    async def live_packets(
        self, cohort: str, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return up to `limit` live packets of a cohort above `after`, in sequence order.

        Live is what is neither retired nor in quarantine. What is not live is not read.
        """

    async def live_pages(
        self, cohort: str, *, page: int = 1000
    ) -> AsyncIterator[list[StoredPacket]]:
        """Yield all live packets of a cohort in pages, in sequence order."""
        after = 0
        while found := await self.live_packets(cohort, after=after, limit=page):
            yield found
            if len(found) < page:
                return
            after = found[-1].sequence

    @abstractmethod
    async def retire(self, sequences: Sequence[int]) -> int:
        """Retire live packets, which cannot count any more; return how many were live.

        They are still known: a repeat is answered as before.
        """

    @abstractmethod
    async def revive(self, cohort: str, *, domain_id: str | None = None) -> int:
        """Make the retired packets of a cohort live again, or those of one site; return how many.

        It is done in small parts, so that others who write do not wait. Interrupted, some are live
        again, and the same call revives the others.
        """

    @abstractmethod
    async def forget(
        self, cohort: str, *, received_before_us: int, emitted_before_us: int, limit: int = 500
    ) -> int:
        """Delete up to `limit` packets that are not live; return how many.

        Those that were received *and* emitted before the given times, Unix microseconds. A repeat of one
        would be taken for new, so who calls refuses what was emitted before; `forgotten` remembers it.
        """

    @abstractmethod
    async def forgotten(self) -> dict[str, int]:
        """Return by cohort the highest `emitted_before_us` with which packets were deleted."""

    @abstractmethod
    async def packet_counts(self, cohort: str | None = None) -> dict[str, Counter[str]]:
        """Count the packets that were taken and are not in quarantine, forgotten ones included.

        By cohort and kind, from the sites' counters: it costs what the sites cost.
        """

    @abstractmethod
    async def packet(self, packet: int | PacketKey) -> StoredPacket | None:
        """Return one packet by its sequence or its key, or None."""

    @abstractmethod
    async def quarantined(
        self, cohort: str | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return up to `limit` quarantined packets above `after`, in sequence order."""

    @abstractmethod
    async def set_quarantine(
        self, packet: int | PacketKey, *, quarantined: bool, reason: str = ""
    ) -> bool:
        """Put a packet in quarantine or release it; return whether that changed anything.

        The reason is kept while the packet is in quarantine and dropped on release. A packet that is
        released is live.

        Raises:
            UnknownPacketError: There is no such packet.
        """

    # Updates

    @abstractmethod
    async def publish(
        self, updates: Sequence[UpdateRecord], *, holds: Callable[[], bool] | None = None
    ) -> list[int]:
        """Keep updates, all or none, DURABLE; return their sequences.

        The fence: each `sequence` must be the last one plus 1, 2, ... and each `revision` the last
        one of its cohort and kind plus one (1 for the first).

        Args:
            updates: They.
            holds: Says whether they go with the specs that were told of (`follow`). No spec that another
                server put comes between that and the updates; None where it does not matter.

        Raises:
            RevisionConflictError: The fence does not hold; nothing was written.
            SpecChangedError: `holds` says no; nothing was written.
        """

    @abstractmethod
    async def next_update_sequence(self) -> int:
        """Return the sequence that the next update must carry."""

    @abstractmethod
    async def latest_updates(self) -> list[UpdateRecord]:
        """Return the newest update of each cohort and kind, in sequence order."""

    @abstractmethod
    async def updates(
        self, cohort: str, kind: int, *, after_revision: int = 0, limit: int = 100
    ) -> list[UpdateRecord]:
        """Return up to `limit` updates of one cohort and kind, in revision order."""

    @abstractmethod
    async def updates_since(self, sequence: int, *, limit: int = 100) -> list[UpdateRecord]:
        """Return up to `limit` updates of all cohorts above `sequence`, in sequence order."""

    @abstractmethod
    async def update(self, cohort: str, kind: int, revision: int) -> UpdateRecord | None:
        """Return one update, or None when it never was or is no longer held."""

    @abstractmethod
    async def oldest_revision(self, cohort: str, kind: int) -> int | None:
        """Return the oldest revision still held, or None when there is none."""

    @abstractmethod
    async def oldest_updates(
        self, keys: Sequence[tuple[str, int]]
    ) -> dict[tuple[str, int], tuple[int, int]]:
        """Return the revision and the sequence of the oldest update still held, by cohort and kind.

        Keys that have none are left out.
        """

    @abstractmethod
    async def trim_updates(self, cohort: str, kind: int, *, keep: int) -> int:
        """Keep only the newest `keep` updates of a cohort and kind; return how many went.

        The oldest go first, in small parts, so that others who write do not wait. Interrupted, more are kept.

        Raises:
            ValueError: `keep` is below 1; the newest update is never dropped.
        """

    # Privacy

    @abstractmethod
    async def spend(self, spend: SpendRecord) -> None:
        """Add an entry to the privacy ledger, DURABLE. Nothing ever changes or removes one.

        The fence: the number must be the last one of the cohort plus one (1 for the first) and the period
        above the last one, so that of two who would spend for one period one is refused.

        Raises:
            LedgerConflictError: The fence does not hold; nothing was written.
            ValueError: The cost is negative, or not finite.
        """

    @abstractmethod
    async def spends(
        self, cohort: str, *, after_number: int = 0, limit: int = 1000
    ) -> list[SpendRecord]:
        """Return up to `limit` entries of a cohort's ledger above a number, in their order."""

    @abstractmethod
    async def ledger_totals(self) -> dict[str, LedgerTotal]:
        """Return what each cohort with a ledger spent."""

    @abstractmethod
    async def lost_spans(self) -> list[LostSpan]:
        """Return the spans of time of which this history may lack what was spent; a backup was restored."""

    # Cohorts, sites, dictionaries

    @abstractmethod
    async def put_cohort(
        self,
        name: str,
        spec: bytes,
        revision: int,
        *,
        holds: Callable[[], bool] | None = None,
    ) -> None:
        """Keep a cohort spec in place of the one before.

        Args:
            name: The cohort.
            spec: Its spec.
            revision: The spec's.
            holds: As of `publish`.

        Raises:
            SpecChangedError: `holds` says no; nothing was written.
        """

    @abstractmethod
    async def cohorts(self) -> list[CohortRecord]:
        """Return all cohort specs, by name."""

    @abstractmethod
    async def sites(
        self,
        cohort: str | None = None,
        *,
        after: tuple[str, str] | None = None,
        limit: int | None = None,
    ) -> list[SiteRecord]:
        """Return sites ordered by (cohort, domain_id) in code point order.

        Args:
            cohort: Only this cohort.
            after: Only sites above this (cohort, domain_id); for paging.
            limit: At most this many; None for all.
        """

    @abstractmethod
    async def put_reputations(self, cohort: str, reputations: Mapping[str, float]) -> None:
        """Keep the reputation of sites by `domain_id`; sites never seen are passed over.

        Raises:
            ValueError: A reputation is not finite; nothing was written.
        """

    @abstractmethod
    async def put_dictionary(self, dictionary_id: int, data: bytes, created_at_us: int) -> None:
        """Keep an encoder dictionary. Putting the same again is no error.

        Raises:
            DictionaryConflictError: The id is taken by other data.
        """

    @abstractmethod
    async def dictionaries(self) -> list[DictionaryRecord]:
        """Return all dictionaries, by id."""
