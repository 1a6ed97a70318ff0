"""One replica at work: what it writes goes into the log, what comes out of the log goes into its view.

A write is answered by the view and not by the broker: its answer is what came of it at its place in the
order. So it does not matter who else writes meanwhile, nor whether the acknowledgement or the entry comes
first.

Appends go in groups: what waits is put into one entry, while the groups before are on their way. One entry
is one write of the broker's disk, however many packets are in it, and whole or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from fmi_server.storage.base import (
    StoreBehindError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreStoppedError,
    StoreUnavailableError,
)
from fmi_server.storage.jetstream_broker import FenceError
from fmi_server.storage.jetstream_commands import Append, Command, change_of, encode_command
from fmi_server.storage.jetstream_feed import LogFeed
from fmi_server.storage.jetstream_log import BrokerLog, LogBehindError
from fmi_server.storage.jetstream_view import CarriedOut, LogEntry, ViewPosition, apply_entries
from fmi_server.storage.records import (
    AppendOutcome,
    Change,
    PacketRecord,
    StoreStats,
    record_problem,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fmi_server.storage.jetstream_names import LogNames
    from fmi_server.storage.records import UnavailableReason
    from fmi_server.storage.sqlite import SqliteStore
    from fmi_server.storage.sqlite_writer import GroupLimits

__all__ = ["Replica"]

_LOG = logging.getLogger(__name__)

_IN_FLIGHT = 4
"""Groups on their way at a time: enough to hide the way there and back, few enough that groups fill up."""

_GROUP_BYTES = 256 * 1024
"""Of packets in one entry, give or take one call: encoding it holds the event loop up by a millisecond."""

_OFF_LOOP_RECORDS = 1024
"""A call of more records is encoded on a thread."""

_RECORD_BYTES = 200
"""What a record needs beside its payload, roughly."""

_RETRY_PAUSE_S = 0.5
_FENCE_PAUSE_S = 0.01


@dataclass(slots=True, eq=False)
class _Waiting:
    """A call of `append` that waits: what can be kept of it, and what is wrong with the rest."""

    sound: list[PacketRecord]
    problems: list[str]
    records: Sequence[PacketRecord]
    payload_bytes: int
    future: asyncio.Future[list[AppendOutcome]]


@dataclass(slots=True)
class _Fence:
    """What this replica knows of a subject whose entries must follow each other.

    Attributes:
        last: The last entry under it that is in the view; None before the brokers were asked.
        turn: Who writes under it now.
    """

    last: int | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Replica:
    """Write to a log, and keep a view of it.

    Everything here runs on one event loop. `run` must be running for anything to be answered.

    Attributes:
        listeners: Are told of what other replicas wrote.
    """

    def __init__(
        self,
        log: BrokerLog,
        view: SqliteStore,
        names: LogNames,
        position: ViewPosition,
        *,
        limits: GroupLimits,
        patience_s: float,
    ) -> None:
        self._log = log
        self._view = view
        self._names = names
        self._position = position
        self._limits = limits
        self._patience_s = patience_s
        self.listeners: list[Callable[[Change], None]] = []
        self._feed = LogFeed(log)
        self._stats = StoreStats()
        self._view_fault: UnavailableReason | None = None
        self._broken: StoreError | None = None
        self._stopping = False
        self._calls = 0
        self._commands: dict[str, tuple[Command, asyncio.Future[object]]] = {}
        self._fences: dict[str, _Fence] = {}
        self._queue: deque[_Waiting] = deque()
        self._unanswered: set[_Waiting] = set()
        self._pending_records = 0
        self._pending_bytes = 0
        self._wakened = asyncio.Event()
        self._moved = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def position(self) -> int:
        """The last entry of the log that is in the view."""
        return self._position.sequence

    @property
    def stopped(self) -> StoreError | None:
        """Why it carries out nothing more; None while it does."""
        return self._broken

    def stats(self) -> StoreStats:
        """Return the counters with what waits now."""
        broken = self._broken
        fault = self._view_fault or self._stats.fault or self._feed.fault
        damage = None
        if isinstance(broken, StoreUnavailableError):
            fault = broken.cause
        elif broken is not None:
            damage = str(broken)
        return replace(
            self._stats,
            pending_records=self._pending_records,
            pending_bytes=self._pending_bytes,
            fault=fault,
            damage=damage,
            stalled=broken is not None or self._view_fault is not None,
        )

    # Writing

    async def append(self, records: Sequence[PacketRecord]) -> list[AppendOutcome]:
        """Keep packets with the next group."""
        self._check_open()
        problems = [record_problem(record) for record in records]
        sound = [record for record, problem in zip(records, problems, strict=True) if not problem]
        size = sum(len(record.payload) for record in sound)
        pending = self._pending_records + len(records)
        limits = self._limits
        # One call larger than the bound is let in when nothing else waits, or it never could be.
        if self._pending_records and (
            pending > limits.pending_records or self._pending_bytes + size > limits.pending_bytes
        ):
            raise StoreBusyError(
                pending_records=self._pending_records,
                pending_bytes=self._pending_bytes,
                path=self._log.location,
            )
        self._pending_records = pending
        self._pending_bytes += size
        future: asyncio.Future[list[AppendOutcome]] = asyncio.get_running_loop().create_future()
        self._begin()
        waiting = _Waiting(sound, problems, records, size, future)
        self._unanswered.add(waiting)
        self._queue.append(waiting)
        self._wakened.set()
        return await future

    async def submit(self, command: Command, subject: str) -> object:
        """Write a command and return what came of it.

        Raises:
            StoreError: What the view refused it with; or nothing was written.
        """
        self._check_open()
        data = encode_command(command)
        self._begin()
        try:
            return await self._write(command, data, subject)
        finally:
            self._end()

    async def submit_fenced(
        self, command: Command, subject: str, check: Callable[[], None] | None = None
    ) -> object:
        """The same, as the direct successor of what this replica has seen under the subject.

        The brokers refuse it where somebody else wrote there. Then it is tried again behind that: whether it
        still holds is for its own fence in the view to say, which everybody sees in the same way; or for
        `check`, which is called before each try, when listeners know all that it would follow, and raises
        where it is not to be written.
        """
        self._check_open()
        data = encode_command(command)
        self._begin()
        try:
            fence = self._fences.setdefault(subject, _Fence())
            # One after the other: of two from here the one that came first is first.
            async with fence.turn:
                return await self._write(command, data, subject, fence, check)
        finally:
            self._end()

    async def _look(self, fence: _Fence, subject: str) -> None:
        """Learn the last entry under a subject from the brokers, and wait until it is in the view.

        What the brokers say counts, also where it is less: entries that are in a snapshot are gone there.
        """
        last = await self._log.last_of(subject)
        await self.reach(last)
        fence.last = last

    async def _write(
        self,
        command: Command,
        data: bytes,
        subject: str,
        fence: _Fence | None = None,
        check: Callable[[], None] | None = None,
    ) -> object:
        command_id = secrets.token_hex(16)
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._commands[command_id] = (command, future)
        try:
            if fence is None:
                sequence = await self._log.write(subject, command_id, data)
            else:
                sequence = await self._write_behind(fence, subject, command_id, data, check)
            answer = await self._answer(future, sequence)
        finally:
            del self._commands[command_id]
        if self._stats.fault is not None:
            # Whatever came of it: it is in the log, and the view has come to it.
            self._stats = replace(self._stats, fault=None)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def _write_behind(
        self,
        fence: _Fence,
        subject: str,
        command_id: str,
        data: bytes,
        check: Callable[[], None] | None,
    ) -> int:
        """Write behind the last entry of a subject, whichever that becomes; return the place."""
        if fence.last is None:
            await self._look(fence, subject)
        future = self._commands[command_id][1]
        deadline = time.monotonic() + self._patience_s
        while True:
            if check is not None:
                check()  # nothing else runs between it and the look at what is last
            refused = fence.last
            try:
                return await self._log.write(subject, command_id, data, expected_last=refused)
            except FenceError:
                await self._look(fence, subject)
            # The entry that stands there may be this one, whose acknowledgement was lost.
            if future.done():
                return self.position
            if time.monotonic() > deadline:
                raise StoreUnavailableError(
                    "no_answer",
                    detail=f"others write under {subject} all the time, or the brokers do not agree",
                    path=self._log.location,
                )
            if fence.last == refused:
                # A cluster refuses what follows an entry that is still on its way to the others.
                await asyncio.sleep(_FENCE_PAUSE_S)

    async def _answer(self, future: asyncio.Future[object], sequence: int) -> object:
        """Wait until the view has carried out what the brokers have acknowledged."""
        await self.reach(sequence)
        if not future.done():
            raise self._break(
                StoreCorruptError(
                    path=self._log.location,
                    detail=f"entry {sequence} was acknowledged and is not what was written there",
                )
            )
        return future.result()

    async def reach(self, sequence: int) -> None:
        """Wait until the view has come to an entry, as long as it moves.

        Raises:
            StoreUnavailableError: It does not move.
        """
        while self.position < sequence:
            self._check_sound()
            moved = self._moved
            try:
                async with asyncio.timeout(self._patience_s):
                    await moved.wait()
            except TimeoutError:
                raise StoreUnavailableError(
                    "no_answer",
                    detail=f"this replica stands at entry {self.position} and waits for {sequence}",
                    path=self._log.location,
                ) from None

    async def catch_up(self) -> None:
        """Wait until the view has all that anyone was answered before now.

        Raises:
            StoreUnavailableError: The brokers do not answer, or the view cannot be written.
        """
        self._check_open()
        last = (await self._log.state()).last
        try:
            await self.reach(last)
        except StoreUnavailableError as error:
            if self._view_fault is None:
                raise
            raise StoreUnavailableError(
                self._view_fault,
                detail=f"the view cannot be written, and has entry {self.position} of {last}",
                path=str(self._view.path),
            ) from error

    # At work

    async def run(self) -> None:
        """Send groups and follow the log, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send_groups(tasks), name="store groups")
                tasks.create_task(self._follow(), name="store log")
        except BaseExceptionGroup as group:
            error = group.exceptions[0]
            _LOG.error(
                "the replica of %s has stopped at entry %d: %s",
                self._log.location,
                self.position,
                error,
                exc_info=None if isinstance(error, StoreError) else group,
            )
            self._break(
                error
                if isinstance(error, StoreError)
                else StoreStoppedError(
                    detail=f"the replica stopped for an error that nobody foresaw: {error!r}",
                    path=self._log.location,
                )
            )
        finally:
            self._queue.clear()
            # Also those whose group was cancelled before it began.
            for waiting in tuple(self._unanswered):
                self._resolve(waiting, self._broken or self._closed())

    async def drain(self) -> None:
        """Take nothing more, and wait until what was taken is answered."""
        self._stopping = True
        await self._idle.wait()

    async def _send_groups(self, tasks: asyncio.TaskGroup) -> None:
        slots = asyncio.Semaphore(_IN_FLIGHT)
        while True:
            await self._wakened.wait()
            await slots.acquire()
            group = self._next_group()
            if not self._queue:
                self._wakened.clear()
            command = Append([record for waiting in group for record in waiting.sound])
            if len(command.records) > _OFF_LOOP_RECORDS:
                data = await asyncio.to_thread(encode_command, command)
            else:
                data = encode_command(command)
            tasks.create_task(self._send_group(group, command, data, slots), name="store group")
            # Lets it reach the connection before the next one does, so that they keep their order.
            await asyncio.sleep(0)

    def _next_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        records = size = 0
        while self._queue and records < self._limits.group_records and size < _GROUP_BYTES:
            waiting = self._queue.popleft()
            group.append(waiting)
            records += len(waiting.sound)
            size += waiting.payload_bytes + _RECORD_BYTES * len(waiting.sound)
        return group

    async def _send_group(
        self, group: list[_Waiting], command: Append, data: bytes, slots: asyncio.Semaphore
    ) -> None:
        started = time.perf_counter()
        answer: object = []
        try:
            if command.records:
                answer = await self._write(command, data, self._names.subject("packets"))
        except StoreError as error:
            answer = error
        except BaseException:
            answer = self._broken or self._closed()
            raise
        finally:
            slots.release()
            self._settle(group, answer, time.perf_counter() - started)

    def _settle(self, group: list[_Waiting], answer: object, seconds: float) -> None:
        """Hand the answers out and count."""
        old = self._stats
        count = sum(len(waiting.records) for waiting in group)
        if isinstance(answer, StoreError):
            fault = answer.cause if isinstance(answer, StoreUnavailableError) else None
            self._stats = replace(
                old,
                failed_groups=old.failed_groups + 1,
                last_group=count,
                commit_seconds=old.commit_seconds + seconds,
                fault=fault,
            )
            for waiting in group:
                self._resolve(waiting, answer)
            return
        # An append answers with the outcomes of its records.
        outcomes = iter(cast("list[AppendOutcome]", answer))
        tally = {"stored": 0, "duplicate": 0, "reused": 0, "rejected": 0}
        stored_bytes = 0
        for waiting in group:
            own = []
            for record, problem in zip(waiting.records, waiting.problems, strict=True):
                outcome = (
                    AppendOutcome("rejected", 0, record.received_at_us, False, "", problem)
                    if problem
                    else next(outcomes)
                )
                tally[outcome.status] += 1
                if outcome.status == "stored":
                    stored_bytes += len(record.payload)
                own.append(outcome)
            self._resolve(waiting, own)
        self._stats = replace(
            old,
            groups=old.groups + 1,
            records_stored=old.records_stored + tally["stored"],
            payload_bytes_stored=old.payload_bytes_stored + stored_bytes,
            duplicates=old.duplicates + tally["duplicate"],
            reused=old.reused + tally["reused"],
            rejected=old.rejected + tally["rejected"],
            largest_group=max(old.largest_group, count),
            last_group=count,
            commit_seconds=old.commit_seconds + seconds,
            fault=None,
        )

    def _resolve(self, waiting: _Waiting, answer: list[AppendOutcome] | StoreError) -> None:
        self._unanswered.discard(waiting)
        self._pending_records -= len(waiting.records)
        self._pending_bytes -= waiting.payload_bytes
        self._end()
        if waiting.future.done():  # cancelled by its caller
            return
        if isinstance(answer, StoreError):
            waiting.future.set_exception(answer)
        else:
            waiting.future.set_result(answer)

    async def _follow(self) -> None:
        """Carry out what the log holds, and answer who waits for it."""
        try:
            async with contextlib.aclosing(self._feed.follow(self._position)) as batches:
                async for batch in batches:
                    await self._take(batch)
        except LogBehindError as error:
            detail = f"{error}: start this replica again, and it begins with a snapshot"
            raise self._break(StoreBehindError(detail=detail, path=self._log.location)) from error
        except StoreError as error:
            self._break(error)
            raise

    async def _take(self, batch: list[LogEntry]) -> None:
        done = await self._carry_out([self._with_command(entry) for entry in batch])
        for entry, carried in zip(batch, done, strict=True):
            fence = self._fences.get(entry.subject)
            if fence is not None:
                fence.last = entry.sequence
            found = self._commands.get(entry.command_id)
            if found is None:
                if carried.command is not None and not carried.refused:
                    self._tell(carried.command)
            elif entry.part == entry.parts and not found[1].done():
                found[1].set_result(carried.answer)
        last = batch[-1]
        self._position = ViewPosition(last.sequence, last.command_id)
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _tell(self, command: Command) -> None:
        """Tell of what another replica wrote."""
        change = change_of(command)
        if change is not None:
            for listener in self.listeners:
                listener(change)

    async def _carry_out(self, entries: list[LogEntry]) -> list[CarriedOut]:
        """Carry entries out in the view, again and again while its disk does not take them."""
        change = partial(apply_entries, entries=entries, where=self._log.location)
        while True:
            try:
                done = await self._view.transact(change)
            except StoreUnavailableError as error:
                if error.cause == "closed":
                    raise
                if self._view_fault != error.cause:
                    _LOG.warning("the view cannot be written: %s", error)
                    self._view_fault = error.cause
            else:
                self._view_fault = None
                return done
            await asyncio.sleep(_RETRY_PAUSE_S)

    def _with_command(self, entry: LogEntry) -> LogEntry:
        """Add the command where it is one of this replica's, so that it need not be read again."""
        found = self._commands.get(entry.command_id)
        if found is None or entry.part < entry.parts:
            return entry
        return replace(entry, command=found[0])

    # What stands in the way

    def _begin(self) -> None:
        self._calls += 1
        self._idle.clear()

    def _end(self) -> None:
        self._calls -= 1
        if not self._calls:
            self._idle.set()

    def _break(self, error: StoreError) -> StoreError:
        """Serve nobody any more; say why, now and later."""
        if self._broken is None:
            self._broken = error
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        return self._broken

    def _closed(self) -> StoreUnavailableError:
        return StoreUnavailableError(
            "closed", detail="open() it before use", path=self._log.location
        )

    def _check_open(self) -> None:
        if self._stopping:
            raise self._closed()
        self._check_sound()

    def _check_sound(self) -> None:
        if self._broken is not None:
            raise self._broken.with_traceback(None)
