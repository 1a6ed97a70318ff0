"""The store for more than one machine: a log at NATS JetStream brokers, and a view of it at each replica.

Every write is an entry of one log, and the log has one order. Each replica carries the entries out in that
order in an SQLite database of its own, its view, and reads there. So all replicas have the same state, and
what one of them is answered holds for all.

Where things are: `jetstream_commands` says what a write is, `jetstream_log` is where it goes,
`jetstream_view` carries writes out, `jetstream_replica` joins the three, `jetstream_snapshots` keeps the
log short. This module is the contract on top of them. `jetstream_leases` says who may do what alone.

DURABLE is what the brokers make of it. An append is answered after their acknowledgement, and that means:

* one broker (`replicas=1`): it is in the file. Set `sync_interval: always` in its configuration. The
  default is two minutes, and a power cut then loses what was acknowledged in that time; `kill -9` does not.
* three brokers (`replicas=3`): a majority has it. It survives the loss of one of them; with `always` also a
  power cut of all. Without it, brokers that lose power at the same time may lose what was acknowledged.

ONCE does not rest on the brokers' window of de-duplication, which only spares repeats of an entry after a
lost acknowledgement. The view knows every key that the log ever held, until it is forgotten.

A replica, beyond the contract of `Store`: what others wrote is seen once their entry has come here, after
milliseconds. `catch_up` waits for all of it. The fences need no waiting: a write that comes too late is
refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fmi_server.storage.base import (
    Store,
    StoreError,
    StoreUnavailableError,
    check_holds,
    check_spend,
)
from fmi_server.storage.jetstream_broker import BrokerConnection, BrokerOptions
from fmi_server.storage.jetstream_commands import (
    Command,
    Forget,
    Probe,
    Publish,
    PutCohort,
    PutDictionary,
    PutReputations,
    Quarantine,
    Retire,
    Spend,
    Trim,
)
from fmi_server.storage.jetstream_leases import LeaseTable
from fmi_server.storage.jetstream_log import BrokerLog, LogBehindError
from fmi_server.storage.jetstream_names import BrokerAddress, LogNames
from fmi_server.storage.jetstream_replica import Replica
from fmi_server.storage.jetstream_shortening import LogShortener, replace_view
from fmi_server.storage.jetstream_snapshots import SnapshotReplacedError, SnapshotStream
from fmi_server.storage.jetstream_view import ViewPosition, make_store, prepare_view
from fmi_server.storage.records import StoreStats
from fmi_server.storage.sqlite import SqliteStore
from fmi_server.storage.sqlite_live import forgettable_sequences, retired_sequences
from fmi_server.storage.sqlite_updates import PART_ROWS
from fmi_server.storage.sqlite_writer import GroupLimits

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Mapping, Sequence

    from fmi_server.storage.records import (
        AppendOutcome,
        Change,
        CohortRecord,
        DictionaryRecord,
        LedgerTotal,
        LostSpan,
        PacketKey,
        PacketRecord,
        SiteRecord,
        SpendRecord,
        StoredPacket,
        UpdateRecord,
    )

__all__ = ["JetStreamStore"]

_LOG = logging.getLogger(__name__)

_OPEN_PAUSE_S = 0.5

_SNAPSHOT_TRIES = 3
"""How often a view begins with a snapshot, while others make newer ones."""


class JetStreamStore(Store):
    """Keep everything in a log at NATS JetStream brokers; see the module for what that promises.

    Args:
        url: `nats://a,b,c`, or `nats://a,b,c/name` where one cluster serves several federations.
        view: The database that this replica keeps its view in, for itself alone. It is made from the log if
            missing; its directory must exist. Nothing is lost with it.
        options: How the stream is made, and how long is waited for the brokers.
        limits: Bounds of what waits to be written.

    Raises:
        ValueError: The URL is not of that form.
    """

    def __init__(
        self,
        url: str,
        view: Path | str,
        *,
        options: BrokerOptions | None = None,
        limits: GroupLimits | None = None,
    ) -> None:
        self._address = BrokerAddress.parse(url)
        self._names = LogNames(self._address.federation)
        self._options = options or BrokerOptions()
        self._limits = limits or GroupLimits()
        self._view_path = Path(view).absolute()
        self._epoch = ""
        self._listeners: list[Callable[[Change], None]] = []
        self._broker: BrokerConnection | None = None
        self._view = SqliteStore(self._view_path, synced=False)
        self._replica: Replica | None = None
        self._running: asyncio.Task[None] | None = None
        self._shortener: LogShortener | None = None
        self._shortening: asyncio.Task[None] | None = None

    # Lifecycle

    async def open(self) -> None:
        """Connect, make the log if there is none, and bring the view up to it."""
        if self._replica is not None:
            return
        deadline = time.monotonic() + self._options.open_patience_s
        told = False
        while True:
            try:
                await self._open()
            except StoreUnavailableError as error:
                passing = error.cause in ("no_answer", "no_broker", "no_quorum")
                if not passing or time.monotonic() > deadline:
                    raise
                if not told:
                    _LOG.warning("%s; tried again", error)
                told = True
                await asyncio.sleep(_OPEN_PAUSE_S)
            else:
                return

    async def _open(self) -> None:
        broker = BrokerConnection(self._address, self._options)
        log = BrokerLog(broker, self._names)
        try:
            await broker.connect()
            self._epoch = (await log.create(secrets.token_hex(16))).epoch
            snapshots = SnapshotStream(log)
            await snapshots.open()
            position = await self._open_view_of(log, snapshots)
            replica = Replica(
                log,
                self._view,
                self._names,
                position,
                limits=self._limits,
                patience_s=self._options.patience_s,
            )
            self._running = asyncio.create_task(replica.run(), name="store replica")
            await replica.catch_up()
        except BaseException:
            await self._end(broker)
            raise
        self._broker, self._replica = broker, replica
        replica.listeners += self._listeners
        self._shortener = LogShortener(log, snapshots, self._view)
        self._shortening = asyncio.create_task(self._shortener.run(), name="store snapshots")

    async def _open_view_of(self, log: BrokerLog, snapshots: SnapshotStream) -> ViewPosition:
        """Open the view and see that the log goes on behind it; begin with a snapshot where it does not."""
        for _ in range(_SNAPSHOT_TRIES):
            position = await self._open_database()
            try:
                await log.check(position)
            except LogBehindError as behind:
                _LOG.info("%s: %s; it is made from a snapshot", self._view_path, behind)
                await self._view.close()
                try:
                    await replace_view(self._view_path, snapshots)
                except SnapshotReplacedError as error:
                    _LOG.info("%s: %s; the newer one is read", self._view_path, error)
            else:
                return position
        raise StoreUnavailableError(
            "no_stream",
            detail="the log is shortened faster than a snapshot is read; keep more entries in it",
            path=self.location,
        )

    async def _open_database(self) -> ViewPosition:
        self._view = SqliteStore(self._view_path, synced=False)
        await self._view.open()
        prepare = partial(prepare_view, epoch=self._epoch, where=str(self._view_path))
        return await self._view.transact(prepare)

    async def close(self) -> None:
        """Write and answer what was accepted, then close the view and the connection."""
        replica, broker = self._replica, self._broker
        if replica is None or broker is None:
            return
        self._replica = self._broker = None
        await self._cancel(self._shortening)
        await replica.drain()
        await self._end(broker)

    async def _end(self, broker: BrokerConnection) -> None:
        await self._cancel(self._running)
        self._running = self._shortening = None
        await self._view.close()
        await broker.close()

    @staticmethod
    async def _cancel(task: asyncio.Task[None] | None) -> None:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    @property
    def location(self) -> str:
        """Where the brokers are, and which federation's log it is."""
        return self._address.location

    @property
    def shared(self) -> bool:
        """Whether other servers write to it too, which they may."""
        return True

    @property
    def stopped(self) -> StoreError | None:
        """Why the view stands still until the store is opened again; None where it does not."""
        return self._replica.stopped if self._replica is not None else None

    def follow(self, listener: Callable[[Change], None]) -> None:
        """Tell of what other servers write, once it is in the view here."""
        self._listeners.append(listener)
        if self._replica is not None:
            self._replica.listeners.append(listener)

    @property
    def history_epoch(self) -> str:
        """Random name of this history; it is the log's."""
        _ = self._open_replica()
        return self._epoch

    def _open_replica(self) -> Replica:
        if self._replica is None:
            raise StoreUnavailableError("closed", detail="open() it before use", path=self.location)
        return self._replica

    def _open_view(self) -> SqliteStore:
        _ = self._open_replica()
        return self._view

    def stats(self) -> StoreStats:
        """Return counters since opening: of what this replica wrote."""
        return self._replica.stats() if self._replica is not None else StoreStats()

    async def probe(self) -> None:
        """Write an entry that changes nothing, DURABLE."""
        await self._submit(Probe())

    async def catch_up(self) -> None:
        """Wait until this replica sees all that any was answered before now."""
        await self._open_replica().catch_up()

    async def shorten_log(self) -> int:
        """Save a snapshot of the view at the brokers and drop what is in it from the log.

        It happens by itself where the log has become long. Returns the last entry that is in the snapshot.
        """
        _ = self._open_replica()
        assert self._shortener is not None  # noqa: S101 - made where the replica is
        return await self._shortener.shorten()

    async def backup(self, target: Path) -> None:
        """Write all that any replica was answered before now to a new file, a backup for any store.

        Raises:
            FileExistsError: `target` exists.
            StoreUnavailableError: The brokers do not answer, or the disk refused.
        """
        began_us = time.time_ns() // 1000
        await self.catch_up()
        await self._open_view().backup(target, finish=make_store, began_us=began_us)

    async def leases(self, *, ttl_s: float = 10.0) -> LeaseTable:
        """Return the leases of the federation, by the connection of this store.

        Args:
            ttl_s: For how long a lease is good without renewal, where the bucket is not there yet.
        """
        _ = self._open_replica()
        assert self._broker is not None  # noqa: S101 - it is there where the replica is
        table = LeaseTable(self._broker, self._names, ttl_s=ttl_s)
        await table.open()
        return table

    async def _submit(self, command: Command) -> object:
        return await self._open_replica().submit(command, self._names.subject("state"))

    # Packets

    async def append(self, records: Sequence[PacketRecord]) -> list[AppendOutcome]:
        """Keep packets, DURABLE and ONCE."""
        replica = self._open_replica()
        if not records:
            return []
        return await replica.append(records)

    async def load(
        self, cohort: str | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return packets in sequence order."""
        return await self._open_view().load(cohort, after=after, limit=limit)

    async def last_sequence(self) -> int:
        """Return the sequence of the last packet."""
        return await self._open_view().last_sequence()

    async def live_packets(
        self, cohort: str, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return live packets in sequence order."""
        return await self._open_view().live_packets(cohort, after=after, limit=limit)

    async def retire(self, sequences: Sequence[int]) -> int:
        """Retire live packets."""
        _ = self._open_replica()
        return await self._set_retired(sequences, retired=True) if sequences else 0

    async def revive(self, cohort: str, *, domain_id: str | None = None) -> int:
        """Make retired packets live again, in small parts."""
        view = self._open_view()
        found = await view.query(partial(retired_sequences, cohort=cohort, domain_id=domain_id))
        revived = 0
        for start in range(0, len(found), PART_ROWS):
            revived += await self._set_retired(found[start : start + PART_ROWS], retired=False)
        return revived

    async def _set_retired(self, sequences: Sequence[int], *, retired: bool) -> int:
        return cast("int", await self._submit(Retire(sequences, retired)))

    async def forget(
        self, cohort: str, *, received_before_us: int, emitted_before_us: int, limit: int = 500
    ) -> int:
        """Delete packets that are not live."""
        found = await self._open_view().query(
            partial(
                forgettable_sequences,
                cohort=cohort,
                received_before_us=received_before_us,
                emitted_before_us=emitted_before_us,
                limit=limit,
            )
        )
        if not found:
            return 0
        return cast("int", await self._submit(Forget(cohort, found, emitted_before_us)))

    async def forgotten(self) -> dict[str, int]:
        """Return by cohort the highest time of `forget`."""
        return await self._open_view().forgotten()

    async def packet_counts(self, cohort: str | None = None) -> dict[str, Counter[str]]:
        """Count the packets that were taken and are not in quarantine."""
        return await self._open_view().packet_counts(cohort)

    async def packet(self, packet: int | PacketKey) -> StoredPacket | None:
        """Return one packet, or None."""
        return await self._open_view().packet(packet)

    async def quarantined(
        self, cohort: str | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return quarantined packets in sequence order."""
        return await self._open_view().quarantined(cohort, after=after, limit=limit)

    async def set_quarantine(
        self, packet: int | PacketKey, *, quarantined: bool, reason: str = ""
    ) -> bool:
        """Put a packet in quarantine or release it."""
        return cast("bool", await self._submit(Quarantine(packet, quarantined, reason)))

    # Updates

    async def publish(
        self, updates: Sequence[UpdateRecord], *, holds: Callable[[], bool] | None = None
    ) -> list[int]:
        """Keep updates, all or none, behind the fence."""
        replica = self._open_replica()
        if not updates:
            return []
        check = None if holds is None else partial(check_holds, holds, updates[0].cohort)
        subject = self._names.subject("updates")
        return cast("list[int]", await replica.submit_fenced(Publish(updates), subject, check))

    async def next_update_sequence(self) -> int:
        """Return the sequence that the next update must carry."""
        return await self._open_view().next_update_sequence()

    async def latest_updates(self) -> list[UpdateRecord]:
        """Return the newest update of each cohort and kind."""
        return await self._open_view().latest_updates()

    async def updates(
        self, cohort: str, kind: int, *, after_revision: int = 0, limit: int = 100
    ) -> list[UpdateRecord]:
        """Return updates of one cohort and kind, in revision order."""
        return await self._open_view().updates(
            cohort, kind, after_revision=after_revision, limit=limit
        )

    async def updates_since(self, sequence: int, *, limit: int = 100) -> list[UpdateRecord]:
        """Return updates of all cohorts, in sequence order."""
        return await self._open_view().updates_since(sequence, limit=limit)

    async def update(self, cohort: str, kind: int, revision: int) -> UpdateRecord | None:
        """Return one update, or None."""
        return await self._open_view().update(cohort, kind, revision)

    async def oldest_revision(self, cohort: str, kind: int) -> int | None:
        """Return the oldest revision still held."""
        return await self._open_view().oldest_revision(cohort, kind)

    async def oldest_updates(
        self, keys: Sequence[tuple[str, int]]
    ) -> dict[tuple[str, int], tuple[int, int]]:
        """Return the revision and the sequence of the oldest update still held, by cohort and kind."""
        return await self._open_view().oldest_updates(keys)

    async def trim_updates(self, cohort: str, kind: int, *, keep: int) -> int:
        """Keep only the newest updates of a cohort and kind."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        trimmed = 0
        while await self._is_longer(cohort, kind, keep):
            trimmed += cast("int", await self._submit(Trim(cohort, kind, keep)))
        return trimmed

    async def _is_longer(self, cohort: str, kind: int, keep: int) -> bool:
        """Tell whether there is something to trim, so that nothing is written where there is not."""
        oldest = await self._open_view().oldest_revision(cohort, kind)
        if oldest is None:
            return False
        view = self._open_view()
        return bool(await view.updates(cohort, kind, after_revision=oldest + keep - 1, limit=1))

    # Privacy

    async def spend(self, spend: SpendRecord) -> None:
        """Add an entry to the privacy ledger, DURABLE, behind the fence."""
        replica = self._open_replica()
        # What costs nothing is refused before it is written; who comes first is for the log to say.
        check_spend(spend, last_number=spend.number - 1, last_period=None)
        await replica.submit_fenced(Spend(spend), self._names.ledger(spend.cohort))

    async def spends(
        self, cohort: str, *, after_number: int = 0, limit: int = 1000
    ) -> list[SpendRecord]:
        """Return entries of a cohort's ledger above a number."""
        return await self._open_view().spends(cohort, after_number=after_number, limit=limit)

    async def ledger_totals(self) -> dict[str, LedgerTotal]:
        """Return what each cohort with a ledger spent."""
        return await self._open_view().ledger_totals()

    async def lost_spans(self) -> list[LostSpan]:
        """Return the spans of time of which this history may lack what was spent; a backup was restored."""
        return await self._open_view().lost_spans()

    # Cohorts, sites, dictionaries

    async def put_cohort(
        self, name: str, spec: bytes, revision: int, *, holds: Callable[[], bool] | None = None
    ) -> None:
        """Keep a cohort spec in place of the one before."""
        # Under the subject of the updates: what somebody computed by the spec of before follows none of it.
        subject = self._names.subject("updates")
        check = partial(check_holds, holds, name)
        await self._open_replica().submit_fenced(PutCohort(name, spec, revision), subject, check)

    async def cohorts(self) -> list[CohortRecord]:
        """Return all cohort specs, by name."""
        return await self._open_view().cohorts()

    async def sites(
        self,
        cohort: str | None = None,
        *,
        after: tuple[str, str] | None = None,
        limit: int | None = None,
    ) -> list[SiteRecord]:
        """Return sites ordered by (cohort, domain_id)."""
        return await self._open_view().sites(cohort, after=after, limit=limit)

    async def put_reputations(self, cohort: str, reputations: Mapping[str, float]) -> None:
        """Keep the reputation of sites."""
        pairs = [(domain_id, float(value)) for domain_id, value in reputations.items()]
        for domain_id, value in pairs:
            if not math.isfinite(value):
                raise ValueError(f"the reputation of {domain_id!r} is not finite")
        if pairs:
            await self._submit(PutReputations(cohort, pairs))

    async def put_dictionary(self, dictionary_id: int, data: bytes, created_at_us: int) -> None:
        """Keep an encoder dictionary."""
        await self._submit(PutDictionary(dictionary_id, data, created_at_us))

    async def dictionaries(self) -> list[DictionaryRecord]:
        """Return all dictionaries, by id."""
        return await self._open_view().dictionaries()
