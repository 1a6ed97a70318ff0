"""Following: what other servers write to a store that several share is taken in here.

Every server counts every packet, tells its subscribers of every update and has every cohort's rules in force,
whoever wrote them. The store says that something was written (`storage.records.Change`), once it can be read
here; what it came to is read from the store, so that nothing of it waits in memory.

Packets are counted from the store, this server's own too: a packet has one place there, and is counted once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from fmi_server.cohorts import CohortRegistry
from fmi_server.compaction import Compactor
from fmi_server.dictionaries import DictionaryShelf
from fmi_server.errors import CohortUnknownError, FMIError
from fmi_server.releases import Releaser
from fmi_server.storage import Store, StoreError
from fmi_server.storage.base import UnknownPacketError
from fmi_server.storage.records import Change, StoredPacket
from fmi_server.stored_packets import parsed

__all__ = ["Following"]

PAGE_PACKETS: Final = 500
"""Packets that are read at once."""

LINGER_S: Final = 0.01
"""Seconds for which more packets are waited for, before all of them are taken in: a look into the store costs
the same for one packet as for many. Nothing else waits: a packet that comes behind a release and is counted
with it would be taken for one that was judged in it."""

RETRY_S: Final = 1.0
"""Seconds after which what could not be taken in is tried again."""

FAILURES: Final = 3
"""Failures in a row after which this server must not release what it may know too little of."""

LASTING: Final = 15
"""Failures in a row, by an error that nobody foresaw, after which trying again is no longer hoped to help."""

_log = logging.getLogger(__name__)


class Following:
    """Takes in what other servers write, for as long as `run` runs.

    Args:
        store: The store, open. Its changes are noted from now on.
        cohorts: The cohorts and their rules.
        releaser: Counts packets, and tells of updates.
        compactor: Is told what others made live again.
        dictionaries: Compression dictionaries.
        put_in_force: Puts the stored spec of a cohort in force.
    """

    def __init__(
        self,
        store: Store,
        cohorts: CohortRegistry,
        releaser: Releaser,
        *,
        compactor: Compactor,
        dictionaries: DictionaryShelf,
        put_in_force: Callable[[str], Awaitable[None]],
    ) -> None:
        self._store = store
        self._cohorts = cohorts
        self._releaser = releaser
        self._compactor = compactor
        self._dictionaries = dictionaries
        self._put_in_force = put_in_force
        self._changes: dict[tuple[object, ...], Change] = {}
        self._woken = asyncio.Event()
        self._pressing = asyncio.Event()
        self._turn = asyncio.Lock()
        self._settling: asyncio.Future[None] | None = None
        self._putting = ""
        self._counted_to = 0
        self._failures = 0
        self._unforeseen = 0
        self._trouble: Exception | None = None
        store.follow(self._note)

    @property
    def well(self) -> bool:
        """Whether what the store tells of is taken in; a failure that does not last is none."""
        return self._failures < FAILURES

    def spec_waits(self, cohort: str) -> bool:
        """Say whether another server changed the spec of a cohort, which is not in force here yet."""
        return cohort == self._putting or ("cohort", cohort, None) in self._changes

    @property
    def trouble(self) -> Exception | None:
        """The error that nobody foresaw for which it fails again and again; None where there is none."""
        return self._trouble

    async def load(self) -> None:
        """Note where counting goes on: before the packets that are there are brought back."""
        self._counted_to = await self._store.last_sequence()

    def wake(self) -> None:
        """Look for packets: this server wrote some."""
        self._woken.set()

    async def run(self) -> None:
        """Take in what is written, until cancelled."""
        while True:
            await self._woken.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self._pressing.wait()
            self._woken.clear()
            self._pressing.clear()
            try:
                async with self._turn:
                    failed = await self._take_in()
            except Exception as error:
                failed = [error]
            self._tell(failed)
            if failed:
                await asyncio.sleep(RETRY_S)
                self._woken.set()

    def _tell(self, failed: Sequence[Exception]) -> None:
        if failed and not self._failures:
            for error in failed:
                _log.warning(
                    "what another server wrote could not be taken in, which is tried again: %s",
                    error,
                    exc_info=None if isinstance(error, FMIError) else error,
                )
        elif self._failures and not failed:
            _log.info("what other servers wrote is taken in again")
        self._failures = self._failures + 1 if failed else 0
        unforeseen = [error for error in failed if not isinstance(error, FMIError)]
        self._unforeseen = self._unforeseen + 1 if unforeseen else 0
        self._trouble = unforeseen[0] if self._unforeseen >= LASTING else None

    async def settle(self) -> None:
        """Take in all that anybody was answered before now, wherever it was written.

        Raises:
            StoreUnavailableError: The brokers do not answer.
        """
        # Who comes while another one settles waits for the next turn, together with whoever else comes.
        if self._settling is not None:
            await asyncio.wait({self._settling})
        if self._settling is None or self._settling.done():
            self._settling = asyncio.ensure_future(self._settle())
            # Whoever asked may have gone.
            self._settling.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._settling)

    async def _settle(self) -> None:
        await self._store.catch_up()
        async with self._turn:
            for error in await self._take_in():
                # What else fails hinders nobody who waits here, and is tried again.
                if isinstance(error, StoreError):
                    raise error
            # One of this server's own may be in the store, and known elsewhere, and be told of here next.
            await self._hear_of_updates()

    def _note(self, change: Change) -> None:
        key = (change.kind, change.cohort, change.packet)
        known = self._changes.get(key)
        if known is not None and change.reputations:
            merged = {**dict(known.reputations), **dict(change.reputations)}
            change = Change(change.kind, change.cohort, reputations=tuple(merged.items()))
        self._changes[key] = change
        if change.kind != "packets":
            self._pressing.set()
        self._woken.set()

    async def _take_in(self) -> list[Exception]:
        """Take in what was told until now, and count what is there; return what went wrong.

        What comes meanwhile is for the next turn: under load this one would not end. One change that
        cannot be taken in does not keep the others from it.
        """
        failed: list[Exception] = []
        # Specs first: packets that came behind one are not counted by the rules of before.
        for key in sorted(self._changes, key=lambda key: key[0] != "cohort"):
            change = self._changes.pop(key)
            try:
                await self._take(change)
            except BaseException as error:
                self._changes.setdefault(key, change)
                if not isinstance(error, Exception):
                    raise
                failed.append(error)
        await self._count()
        return failed

    async def _take(self, change: Change) -> None:
        match change.kind:
            case "updates":
                await self._count()  # the release was of these
                await self._hear_of_updates()
            case "cohort":
                self._putting = change.cohort
                try:
                    await self._put_in_force(change.cohort)
                finally:
                    self._putting = ""
            case "quarantine":
                await self._recount(change)
            case "reputations":
                await self._releaser.take_reputations(change.cohort, dict(change.reputations))
            case "spend":
                await self._releaser.private.refresh()
            case "dictionary":
                await self._dictionaries.load()
            case "forgotten":
                await self._compactor.load()
            case "packets":
                pass  # they are counted behind everything else

    async def _hear_of_updates(self) -> None:
        for cohort, at in (await self._releaser.publisher.catch_up()).items():
            await self._releaser.released_elsewhere(cohort, at)

    async def _recount(self, change: Change) -> None:
        """Count a cohort anew of which another server put a packet into quarantine, or took it out."""
        if change.packet is None:
            return
        try:
            stored = await self._store.packet(change.packet)
        except UnknownPacketError:
            return
        if stored is None or stored.record.cohort not in self._cohorts:
            return
        cohort, domain_id = stored.record.cohort, stored.record.domain_id
        if self._compactor.compacted(cohort):
            # What was retired here meanwhile was judged with that packet, or without it.
            async with self._compactor.suspended(cohort, domain_id=domain_id):
                await self._releaser.rebuild(cohort)
        else:
            await self._releaser.rebuild(cohort)

    async def _count(self) -> None:
        last = await self._store.last_sequence()
        while self._counted_to < last:
            page = await self._store.load(after=self._counted_to, limit=PAGE_PACKETS)
            if not page:
                return
            counting = [stored for stored in page if not stored.record.quarantined]
            await self._count_page(counting)
            self._counted_to = page[-1].sequence

    async def _count_page(self, stored: Sequence[StoredPacket]) -> None:
        packets = parsed(stored, self._store.location)
        for item, packet in zip(stored, packets, strict=True):
            try:
                self._cohorts.open(item.record.cohort)
            except CohortUnknownError:
                continue  # kept, not counted
            self._releaser.note_newest(item.record)
            await self._releaser.count(packet, sequence=item.sequence)
