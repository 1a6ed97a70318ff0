"""The embedded store: one SQLite database, one writing thread, a few reading ones.

Where things are: `sqlite_schema` opens the database, `sqlite_writer` is the thread and its group
commit, `sqlite_append` puts packets in. This module is the contract on top of them.

Reads go to connections of their own. In WAL mode a reader neither waits for the writer nor holds
it up, and it sees every write that was answered before the read began.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fmi_server.storage.base import (
    Store,
    StoreCorruptError,
    StoreUnavailableError,
    UnknownPacketError,
    check_holds,
)
from fmi_server.storage.records import (
    AppendOutcome,
    CohortRecord,
    DictionaryRecord,
    LedgerTotal,
    LostSpan,
    PacketKey,
    PacketRecord,
    SiteRecord,
    SpendRecord,
    StoredPacket,
    StoreStats,
    UpdateRecord,
)
from fmi_server.storage.sqlite_append import (
    PACKET_COLUMNS,
    find_packet,
    last_packet_sequence,
    stored_packet,
)
from fmi_server.storage.sqlite_backup import copy_database
from fmi_server.storage.sqlite_ledger import append_spend, ledger_totals, lost_spans, spends
from fmi_server.storage.sqlite_live import (
    LIVE,
    count_packets,
    forget_packets,
    forgettable_sequences,
    retired_sequences,
    set_packet_quarantine,
    set_retired,
)
from fmi_server.storage.sqlite_registers import put_cohort, put_dictionary, put_reputations
from fmi_server.storage.sqlite_schema import (
    DatabaseLock,
    connect_reader,
    keeping_log,
    prepare_database,
    set_size_limit,
    translate_error,
)
from fmi_server.storage.sqlite_updates import (
    PART_ROWS,
    UPDATE_COLUMNS,
    next_update_sequence,
    publish_updates,
    trim_oldest,
)
from fmi_server.storage.sqlite_writer import GroupLimits, GroupWriter

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["SqliteStore"]

T = TypeVar("T")

_SITE_COLUMNS = (
    "cohort, domain_id, first_seen_us, last_seen_us, msp_count, pop_count, ccs_count, "
    "quarantined_count, duplicate_count, reused_count, reputation"
)
_READERS = 2
_NO_LIMIT = -1


class SqliteStore(Store):
    """Keep everything in one SQLite file.

    Args:
        path: The database. It is created if missing; its directory must exist. Beside it stand
            `<path>-wal` and `<path>-shm` while it is open, and `<path>.lock`.
        limits: Bounds of the group commit.
        max_bytes: Refuse to grow beyond this size with `StoreUnavailableError` (`disk_full`);
            None for no limit of our own.
        synced: Sync each commit, which DURABLE rests on. False is for a database that is a view of something
            else: a power cut may take its last commits back, and leaves it whole.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        limits: GroupLimits | None = None,
        max_bytes: int | None = None,
        synced: bool = True,
    ) -> None:
        self._path = Path(path).absolute()
        self._synced = synced
        self._limits = limits or GroupLimits()
        self._max_bytes = max_bytes
        self._epoch = ""
        self._damage: str | None = None
        self._lock: DatabaseLock | None = None
        self._writer: GroupWriter | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._reader = threading.local()
        self._reader_connections: list[sqlite3.Connection] = []

    @property
    def path(self) -> Path:
        """Where the database is."""
        return self._path

    @property
    def location(self) -> str:
        """Where the database is."""
        return str(self._path)

    @property
    def history_epoch(self) -> str:
        """Random name of this history."""
        if self._writer is None:
            raise self._closed()
        return self._epoch

    def stats(self) -> StoreStats:
        """Return counters since opening."""
        if self._writer is None:
            return StoreStats()
        stats = self._writer.snapshot()
        return stats if stats.damage else replace(stats, damage=self._damage)

    async def probe(self) -> None:
        """Write something that changes nothing, DURABLE."""
        # SQLite writes the page all the same.
        touch = "UPDATE meta SET value = value WHERE name = 'history_epoch'"
        await self._open_writer().run(lambda connection: connection.execute(touch).rowcount)

    async def catch_up(self) -> None:
        """Return at once: there is no other writer."""
        _ = self._open_writer()

    async def open(self) -> None:
        """Lock, check and open the database, creating or migrating it as needed."""
        if self._writer is not None:
            return
        self._damage = None
        loop = asyncio.get_running_loop()
        connection = await loop.run_in_executor(None, self._prepare)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="fmi-store-reader")
        self._reader = threading.local()
        self._writer = GroupWriter(
            self._path,
            connection,
            loop=loop,
            limits=self._limits,
            max_bytes=self._max_bytes,
            synced=self._synced,
        )

    def _prepare(self) -> sqlite3.Connection:
        lock: DatabaseLock | None = None
        try:
            # Through symlinks, so that two names of one database share one lock.
            self._path = self._path.resolve()
            lock = DatabaseLock(self._path)
            lock.acquire()
            connection, self._epoch = prepare_database(
                self._path, max_bytes=self._max_bytes, synced=self._synced
            )
        except (sqlite3.Error, OSError) as error:
            if lock is not None:
                lock.release()
            raise translate_error(error, self._path) from error
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        self._lock = lock
        return connection

    async def close(self) -> None:
        """Write and answer what was accepted, fold the log into the database, close."""
        writer, readers = self._writer, self._readers
        if writer is None or readers is None:
            return
        self._writer = self._readers = None
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, readers.shutdown)
        for connection in self._reader_connections:
            connection.close()
        self._reader_connections.clear()
        with keeping_log(self._path) as accept:
            if (self._damage or writer.stats.damage) is None:
                accept()
            # Last, so that the writer's is the last connection: closing it folds the log in.
            await writer.stop()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    async def set_max_bytes(self, max_bytes: int | None) -> None:
        """Change the size limit of the database while it is open; None lifts it."""
        writer = self._open_writer()
        self._max_bytes = writer.max_bytes = max_bytes
        await writer.run(lambda connection: set_size_limit(connection, max_bytes))

    async def backup(
        self,
        target: Path | str,
        *,
        finish: Callable[[sqlite3.Connection], None] = lambda _copy: None,
        began_us: int | None = None,
    ) -> None:
        """Write a consistent copy to a new file while the store is in use.

        Args:
            target: The file.
            finish: Changes the copy before it appears under its name.
            began_us: From when on something may be missing in it, Unix microseconds; None for now.

        Raises:
            FileExistsError: `target` exists.
        """
        await self._read(
            lambda connection: copy_database(
                connection, Path(target).absolute(), finish=finish, began_us=began_us
            )
        )

    async def transact(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Carry a change out in a transaction of the writer and return what it returns.

        For who keeps this database as a view of something else. The change may run more than once, each
        time in a fresh transaction; what it raises undoes it.
        """
        return await self._open_writer().run(change)

    async def query(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Carry a query out on a connection that only reads, and return what it returns."""
        return await self._read(query)

    def _closed(self) -> StoreUnavailableError:
        return StoreUnavailableError("closed", detail="open() it before use", path=str(self._path))

    def _open_writer(self) -> GroupWriter:
        if self._writer is None:
            raise self._closed()
        return self._writer

    async def _read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        readers = self._readers
        if readers is None:
            raise self._closed()
        return await asyncio.get_running_loop().run_in_executor(readers, self._query, query)

    def _query(self, query: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection: sqlite3.Connection | None = getattr(self._reader, "connection", None)
            if connection is None:
                connection = self._reader.connection = connect_reader(self._path)
                self._reader_connections.append(connection)
            return query(connection)
        except FileExistsError:
            raise
        except (sqlite3.Error, OSError) as error:
            typed = translate_error(error, self._path)
            if isinstance(typed, StoreCorruptError) and self._damage is None:
                self._damage = typed.detail
            raise typed from error

    # Packets

    async def append(self, records: Sequence[PacketRecord]) -> list[AppendOutcome]:
        """Keep packets, DURABLE and ONCE."""
        writer = self._open_writer()
        if not records:
            return []
        return await writer.append(records)

    async def _packets(self, where: str, parameters: Sequence[object]) -> list[StoredPacket]:
        sql = f"SELECT {PACKET_COLUMNS} FROM packets WHERE {where}"  # noqa: S608 - constants only
        rows = await self._read(lambda connection: connection.execute(sql, parameters).fetchall())
        return [stored_packet(row) for row in rows]

    async def load(
        self, cohort: str | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return packets in sequence order."""
        if cohort is None:
            return await self._packets("sequence > ? ORDER BY sequence LIMIT ?", (after, limit))
        return await self._packets(
            "cohort = ? AND sequence > ? ORDER BY sequence LIMIT ?", (cohort, after, limit)
        )

    async def last_sequence(self) -> int:
        """Return the sequence of the last packet."""
        return await self._read(last_packet_sequence)

    async def live_packets(
        self, cohort: str, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return live packets in sequence order."""
        return await self._packets(LIVE, (cohort, after, limit))

    async def retire(self, sequences: Sequence[int]) -> int:
        """Retire live packets."""

        def change(connection: sqlite3.Connection) -> int:
            return set_retired(connection, sequences, retired=True)

        return await self._open_writer().run(change)

    async def revive(self, cohort: str, *, domain_id: str | None = None) -> int:
        """Make retired packets live again, in small parts."""
        writer = self._open_writer()
        found = await self._read(lambda reader: retired_sequences(reader, cohort, domain_id))
        revived = 0
        for start in range(0, len(found), PART_ROWS):
            change = partial(set_retired, sequences=found[start : start + PART_ROWS])
            revived += await writer.run(partial(change, retired=False))
        return revived

    async def forget(
        self, cohort: str, *, received_before_us: int, emitted_before_us: int, limit: int = 500
    ) -> int:
        """Delete packets that are not live."""

        def change(connection: sqlite3.Connection) -> int:
            sequences = forgettable_sequences(
                connection,
                cohort,
                received_before_us=received_before_us,
                emitted_before_us=emitted_before_us,
                limit=limit,
            )
            return forget_packets(
                connection, cohort, sequences, emitted_before_us=emitted_before_us
            )

        return await self._open_writer().run(change)

    async def forgotten(self) -> dict[str, int]:
        """Return by cohort the highest time of `forget`."""
        rows = await self._read(
            lambda connection: connection.execute(
                "SELECT cohort, emitted_before_us FROM forgotten"
            ).fetchall()
        )
        return dict(rows)

    async def packet_counts(self, cohort: str | None = None) -> dict[str, Counter[str]]:
        """Count the packets that were taken and are not in quarantine."""
        return await self._read(lambda connection: count_packets(connection, cohort))

    async def packet(self, packet: int | PacketKey) -> StoredPacket | None:
        """Return one packet, or None."""
        return await self._read(lambda connection: find_packet(connection, packet))

    async def quarantined(
        self, cohort: str | None = None, *, after: int = 0, limit: int = 1000
    ) -> list[StoredPacket]:
        """Return quarantined packets in sequence order."""
        return await self._packets(
            "quarantined = 1 AND sequence > ? AND (? IS NULL OR cohort = ?) "
            "ORDER BY sequence LIMIT ?",
            (after, cohort, cohort, limit),
        )

    async def set_quarantine(
        self, packet: int | PacketKey, *, quarantined: bool, reason: str = ""
    ) -> bool:
        """Put a packet in quarantine or release it."""

        def change(connection: sqlite3.Connection) -> bool:
            found = find_packet(connection, packet)
            if found is None:
                raise UnknownPacketError(packet=packet)
            return set_packet_quarantine(connection, found, quarantined=quarantined, reason=reason)

        return await self._open_writer().run(change)

    # Updates

    async def publish(
        self, updates: Sequence[UpdateRecord], *, holds: Callable[[], bool] | None = None
    ) -> list[int]:
        """Keep updates, all or none, behind the fence."""
        if updates:
            check_holds(holds, updates[0].cohort)
        return await self._open_writer().run(
            lambda connection: publish_updates(connection, updates)
        )

    async def next_update_sequence(self) -> int:
        """Return the sequence that the next update must carry."""
        return await self._read(next_update_sequence)

    async def _updates(self, where: str, parameters: Sequence[object]) -> list[UpdateRecord]:
        sql = f"SELECT {UPDATE_COLUMNS} FROM updates WHERE {where}"  # noqa: S608 - constants only
        rows = await self._read(lambda connection: connection.execute(sql, parameters).fetchall())
        return [UpdateRecord(*row) for row in rows]

    async def latest_updates(self) -> list[UpdateRecord]:
        """Return the newest update of each cohort and kind."""
        return await self._updates(
            "(cohort, kind, revision) IN "
            "(SELECT cohort, kind, max(revision) FROM updates GROUP BY cohort, kind) "
            "ORDER BY sequence",
            (),
        )

    async def updates(
        self, cohort: str, kind: int, *, after_revision: int = 0, limit: int = 100
    ) -> list[UpdateRecord]:
        """Return updates of one cohort and kind, in revision order."""
        return await self._updates(
            "cohort = ? AND kind = ? AND revision > ? ORDER BY revision LIMIT ?",
            (cohort, kind, after_revision, limit),
        )

    async def updates_since(self, sequence: int, *, limit: int = 100) -> list[UpdateRecord]:
        """Return updates of all cohorts, in sequence order."""
        return await self._updates("sequence > ? ORDER BY sequence LIMIT ?", (sequence, limit))

    async def update(self, cohort: str, kind: int, revision: int) -> UpdateRecord | None:
        """Return one update, or None."""
        found = await self._updates(
            "cohort = ? AND kind = ? AND revision = ?", (cohort, kind, revision)
        )
        return found[0] if found else None

    async def oldest_revision(self, cohort: str, kind: int) -> int | None:
        """Return the oldest revision still held."""

        def query(connection: sqlite3.Connection) -> int | None:
            oldest: int | None = connection.execute(
                "SELECT min(revision) FROM updates WHERE cohort = ? AND kind = ?", (cohort, kind)
            ).fetchone()[0]
            return oldest

        return await self._read(query)

    async def oldest_updates(
        self, keys: Sequence[tuple[str, int]]
    ) -> dict[tuple[str, int], tuple[int, int]]:
        """Return the revision and the sequence of the oldest update still held, by cohort and kind."""

        def query(connection: sqlite3.Connection) -> dict[tuple[str, int], tuple[int, int]]:
            question = (
                "SELECT revision, sequence FROM updates WHERE cohort = ? AND kind = ? "
                "ORDER BY revision LIMIT 1"
            )
            found = {key: connection.execute(question, key).fetchone() for key in keys}
            return {key: row for key, row in found.items() if row is not None}

        return await self._read(query)

    async def trim_updates(self, cohort: str, kind: int, *, keep: int) -> int:
        """Keep only the newest updates of a cohort and kind."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        writer = self._open_writer()
        trimmed = 0
        while True:
            part = await writer.run(partial(trim_oldest, cohort=cohort, kind=kind, keep=keep))
            trimmed += part
            if part < PART_ROWS:
                return trimmed

    # Privacy

    async def spend(self, spend: SpendRecord) -> None:
        """Add an entry to the privacy ledger, DURABLE, behind the fence."""
        await self._open_writer().run(partial(append_spend, spend=spend))

    async def spends(
        self, cohort: str, *, after_number: int = 0, limit: int = 1000
    ) -> list[SpendRecord]:
        """Return entries of a cohort's ledger above a number."""
        return await self._read(partial(spends, cohort=cohort, after=after_number, limit=limit))

    async def ledger_totals(self) -> dict[str, LedgerTotal]:
        """Return what each cohort with a ledger spent."""
        return await self._read(ledger_totals)

    async def lost_spans(self) -> list[LostSpan]:
        """Return the spans of time of which this history may lack what was spent."""
        return await self._read(lost_spans)

    # Cohorts, sites, dictionaries

    async def put_cohort(
        self, name: str, spec: bytes, revision: int, *, holds: Callable[[], bool] | None = None
    ) -> None:
        """Keep a cohort spec in place of the one before."""
        check_holds(holds, name)
        await self._open_writer().run(partial(put_cohort, name=name, spec=spec, revision=revision))

    async def cohorts(self) -> list[CohortRecord]:
        """Return all cohort specs, by name."""
        rows = await self._read(
            lambda connection: connection.execute(
                "SELECT name, spec, revision FROM cohorts ORDER BY name"
            ).fetchall()
        )
        return [CohortRecord(*row) for row in rows]

    async def sites(
        self,
        cohort: str | None = None,
        *,
        after: tuple[str, str] | None = None,
        limit: int | None = None,
    ) -> list[SiteRecord]:
        """Return sites ordered by (cohort, domain_id)."""
        conditions: list[str] = []
        parameters: list[object] = []
        if cohort is not None:
            conditions.append("cohort = ?")
            parameters.append(cohort)
        if after is not None:
            conditions.append("(cohort, domain_id) > (?, ?)")
            parameters += after
        where = "WHERE " + " AND ".join(conditions) if conditions else ""
        sql = f"SELECT {_SITE_COLUMNS} FROM sites {where} ORDER BY cohort, domain_id LIMIT ?"  # noqa: S608 - constants only
        parameters.append(_NO_LIMIT if limit is None else limit)
        rows = await self._read(lambda connection: connection.execute(sql, parameters).fetchall())
        return [SiteRecord(*row) for row in rows]

    async def put_reputations(self, cohort: str, reputations: Mapping[str, float]) -> None:
        """Keep the reputation of sites."""
        pairs = [(domain_id, float(value)) for domain_id, value in reputations.items()]
        for domain_id, value in pairs:
            if not math.isfinite(value):
                raise ValueError(f"the reputation of {domain_id!r} is not finite")
        await self._open_writer().run(lambda connection: put_reputations(connection, cohort, pairs))

    async def put_dictionary(self, dictionary_id: int, data: bytes, created_at_us: int) -> None:
        """Keep an encoder dictionary."""
        await self._open_writer().run(
            partial(
                put_dictionary,
                dictionary_id=dictionary_id,
                data=data,
                created_at_us=created_at_us,
            )
        )

    async def dictionaries(self) -> list[DictionaryRecord]:
        """Return all dictionaries, by id."""
        rows = await self._read(
            lambda connection: connection.execute(
                "SELECT dictionary_id, data, created_at_us FROM dictionaries ORDER BY dictionary_id"
            ).fetchall()
        )
        return [DictionaryRecord(*row) for row in rows]
