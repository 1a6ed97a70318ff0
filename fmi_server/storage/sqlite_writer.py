"""The one thread that writes, and its group commit.

Callers on the event loop put work into a queue. The thread takes all that waits, up to a limit,
carries it out in one transaction, syncs once, and hands all answers back with one call into the
loop. A lone caller waits for one sync; a thousand callers share one.

Only the event loop's thread touches the counters and the futures, only the writer's thread touches
the connection: there is no lock.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fmi_server.storage.base import (
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreUnavailableError,
)
from fmi_server.storage.records import (
    AppendOutcome,
    AppendStatus,
    PacketRecord,
    StoreStats,
    UnavailableReason,
)
from fmi_server.storage.sqlite_append import append_packets, last_packet_sequence
from fmi_server.storage.sqlite_schema import connect_writer, translate_error

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["GroupLimits", "GroupWriter"]

T = TypeVar("T")

# What a single value can provoke, as opposed to the disk or the database.
_VALUE_ERRORS = (
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    ValueError,  # UnicodeEncodeError is one
    OverflowError,
    KeyError,
    TypeError,
)


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """Bounds of the writer.

    Attributes:
        group_records: Records in one transaction, give or take one call.
        pending_records: Records that may wait; beyond it `StoreBusyError`.
        pending_bytes: Payload bytes that may wait; beyond it `StoreBusyError`.
    """

    group_records: int = 4096
    pending_records: int = 65_536
    pending_bytes: int = 64 * 1024 * 1024


class _Append:
    __slots__ = ("future", "payload_bytes", "records")

    def __init__(
        self,
        records: Sequence[PacketRecord],
        payload_bytes: int,
        future: asyncio.Future[list[AppendOutcome]],
    ) -> None:
        self.records = records
        self.payload_bytes = payload_bytes
        self.future = future


class _Operation:
    __slots__ = ("future", "run")

    # Any: each operation has a result type of its own, and a group holds many kinds.
    def __init__(
        self, run: Callable[[sqlite3.Connection], Any], future: asyncio.Future[Any]
    ) -> None:
        self.run = run
        self.future = future


_Work = _Append | _Operation


@dataclass(slots=True)
class _Group:
    """One group on its way back: an answer or an error for each piece of work."""

    work: list[_Work]
    answers: list[object]
    seconds: float
    failed: bool
    records: int = 0
    tally: dict[AppendStatus, int] = field(default_factory=dict)
    stored_bytes: int = 0

    @property
    def fault(self) -> UnavailableReason | None:
        """Why it failed as a whole; None where it did not."""
        first = self.answers[0]
        return first.cause if self.failed and isinstance(first, StoreUnavailableError) else None

    @property
    def damage(self) -> str | None:
        """What it came upon that is damaged."""
        found = (answer for answer in self.answers if isinstance(answer, StoreCorruptError))
        return next((error.detail for error in found), None) if self.failed else None

    def count(self) -> None:
        """Count the outcomes; done on the writer's thread, which has the time."""
        tally = self.tally
        for work, answer in zip(self.work, self.answers, strict=True):
            if isinstance(work, _Append):
                self.records += len(work.records)
                if isinstance(answer, list):
                    for record, outcome in zip(work.records, answer, strict=True):
                        tally[outcome.status] = tally.get(outcome.status, 0) + 1
                        if outcome.status == "stored":
                            self.stored_bytes += len(record.payload)


class GroupWriter:
    """Write to one database from one thread."""

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        *,
        loop: asyncio.AbstractEventLoop,
        limits: GroupLimits,
        max_bytes: int | None,
        synced: bool,
    ) -> None:
        self._path = path
        self._loop = loop
        self._limits = limits
        self.max_bytes = max_bytes
        self._synced = synced
        self.stats = StoreStats()
        self._pending_records = 0
        self._pending_bytes = 0
        self._stopped = False
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._connection: sqlite3.Connection | None = connection
        self._next_sequence: int | None = None
        self._thread = threading.Thread(target=self._run, name="fmi-store-writer", daemon=True)
        self._thread.start()

    # On the event loop

    def append(self, records: Sequence[PacketRecord]) -> asyncio.Future[list[AppendOutcome]]:
        """Queue records; the future ends when they are durable."""
        if self._stopped:
            raise self._closed()
        count = len(records)
        size = len(records[0].payload) if count == 1 else sum(len(r.payload) for r in records)
        pending_records = self._pending_records + count
        pending_bytes = self._pending_bytes + size
        limits = self._limits
        # One call larger than the bound is let in when nothing else waits, or it never could be.
        if self._pending_records and (
            pending_records > limits.pending_records or pending_bytes > limits.pending_bytes
        ):
            raise StoreBusyError(
                pending_records=self._pending_records,
                pending_bytes=self._pending_bytes,
                path=str(self._path),
            )
        self._pending_records = pending_records
        self._pending_bytes = pending_bytes
        future: asyncio.Future[list[AppendOutcome]] = self._loop.create_future()
        self._queue.put(_Append(records, size, future))
        return future

    def run(self, operation: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Queue an operation; the future ends when it is durable.

        The operation may run more than once, each time in a fresh transaction.
        """
        if self._stopped:
            raise self._closed()
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Operation(operation, future))
        return future

    def snapshot(self) -> StoreStats:
        """Return the counters with what waits now."""
        return replace(
            self.stats, pending_records=self._pending_records, pending_bytes=self._pending_bytes
        )

    async def stop(self) -> None:
        """Carry out what is queued, answer it, close the connection and end the thread."""
        if not self._stopped:
            self._stopped = True
            self._queue.put(None)
        await self._loop.run_in_executor(None, self._thread.join)

    def _closed(self) -> StoreUnavailableError:
        return StoreUnavailableError("closed", detail="open() it before use", path=str(self._path))

    def _finish(self, group: _Group) -> None:
        for work, answer in zip(group.work, group.answers, strict=True):
            if isinstance(work, _Append):
                self._pending_records -= len(work.records)
                self._pending_bytes -= work.payload_bytes
            if work.future.done():  # cancelled by its caller
                continue
            if isinstance(answer, BaseException):
                work.future.set_exception(answer)
            else:
                # Any: a group mixes answers; each future was made for the answer of its own work.
                cast("asyncio.Future[Any]", work.future).set_result(answer)
        stats = self.stats
        tally = group.tally.get
        self.stats = StoreStats(
            groups=stats.groups + (not group.failed),
            failed_groups=stats.failed_groups + group.failed,
            records_stored=stats.records_stored + tally("stored", 0),
            payload_bytes_stored=stats.payload_bytes_stored + group.stored_bytes,
            duplicates=stats.duplicates + tally("duplicate", 0),
            reused=stats.reused + tally("reused", 0),
            rejected=stats.rejected + tally("rejected", 0),
            largest_group=max(stats.largest_group, group.records),
            last_group=group.records,
            commit_seconds=stats.commit_seconds + group.seconds,
            fault=group.fault,
            damage=stats.damage or group.damage,
        )

    # On the writer's thread

    def _run(self) -> None:
        running = True
        while running:
            group: list[_Work] = []
            records = 0
            work = self._queue.get()
            while work is not None:
                group.append(work)
                records += len(work.records) if isinstance(work, _Append) else 1
                if records >= self._limits.group_records:
                    break
                try:
                    work = self._queue.get_nowait()
                except queue.Empty:
                    break
            running = work is not None
            if group:
                started = time.perf_counter()
                answers, failed = self._commit(group)
                done = _Group(group, answers, time.perf_counter() - started, failed)
                done.count()
                try:
                    self._loop.call_soon_threadsafe(self._finish, done)
                except RuntimeError:  # the loop is closed: nobody waits any more
                    running = False
        self._disconnect()

    def _commit(self, group: list[_Work]) -> tuple[list[object], bool]:
        """Carry a group out; on failure give each waiter its own typed error."""
        try:
            return self._attempt(group), False
        except Exception as error:
            if isinstance(error, sqlite3.Error | OSError) and not isinstance(error, _VALUE_ERRORS):
                self._roll_back(reconnect=True)
                return [self._caused(error) for _ in group], True
            self._roll_back(reconnect=False)
            if len(group) == 1:
                return [error], True
            # Something no check foresaw, in one of them: find out which.
            parts = [self._commit([work]) for work in group]
            return [answers[0] for answers, _ in parts], all(failed for _, failed in parts)

    def _attempt(self, group: list[_Work]) -> list[object]:
        try:
            return self._transaction(group, screen=False)
        except _VALUE_ERRORS:
            self._roll_back(reconnect=False)
            return self._transaction(group, screen=True)

    def _transaction(self, group: list[_Work], *, screen: bool) -> list[object]:
        connection = self._connection
        if connection is None:
            connection = self._connection = connect_writer(
                self._path, max_bytes=self.max_bytes, synced=self._synced
            )
        next_sequence = self._next_sequence
        if next_sequence is None:
            next_sequence = last_packet_sequence(connection) + 1
        connection.execute("BEGIN IMMEDIATE")
        answers: list[object] = []
        run: list[_Append] = []
        for work in (*group, None):
            if isinstance(work, _Append):
                run.append(work)
                continue
            if run:
                records = (
                    run[0].records
                    if len(run) == 1
                    else [record for item in run for record in item.records]
                )
                outcomes = append_packets(
                    connection, records, first_sequence=next_sequence, screen=screen
                )
                next_sequence += len(records)
                start = 0
                for item in run:
                    answers.append(outcomes[start : start + len(item.records)])
                    start += len(item.records)
                run = []
            if work is not None:
                answers.append(self._operate(connection, work))
        connection.execute("COMMIT")
        self._next_sequence = next_sequence
        return answers

    @staticmethod
    def _operate(connection: sqlite3.Connection, work: _Operation) -> object:
        """Run one operation so that its refusal undoes only itself."""
        connection.execute("SAVEPOINT operation")
        try:
            answer: object = work.run(connection)
        except (StoreError, *_VALUE_ERRORS) as error:
            connection.execute("ROLLBACK TO operation")
            answer = error
        connection.execute("RELEASE operation")
        return answer

    def _caused(self, error: sqlite3.Error | OSError) -> StoreError:
        typed = translate_error(error, self._path)
        typed.__cause__ = error
        return typed

    def _roll_back(self, *, reconnect: bool) -> None:
        """Leave the transaction; after a failure of the disk also leave the connection."""
        self._next_sequence = None
        connection = self._connection
        if connection is None:
            return
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            reconnect = True
        if reconnect:
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error:
                # Nothing is lost: what was acknowledged is in the log, which the next open reads.
                return
