"""A cluster: several servers that share a store, seen from one of them.

Each takes in what the others write (`following`), and releases alone what it holds the leases of
(`partitions`). Here is what joins the two: a server that does not know enough holds no leases.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from fmi_server.cohorts import CohortRegistry
from fmi_server.compaction import Compactor
from fmi_server.dictionaries import DictionaryShelf
from fmi_server.following import Following
from fmi_server.partitions import Partitions, partition_of
from fmi_server.releases import Releaser
from fmi_server.storage import Store, StoreError
from fmi_server.storage.jetstream_leases import LeaseTable
from fmi_server.store_watch import StoreWatch
from fmi_server.telemetry import FMITelemetry

__all__ = ["Cluster", "UnfitError"]

BROKERS_AWAY: Final = frozenset({"no_answer", "no_broker", "no_quorum"})
"""Faults of a store that every server has at the same time."""

_log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Seconds between two looks at whether this server hears of what others write."""


class UnfitError(Exception):
    """This server fails at its part among others by an error that nobody foresaw; another start may help."""


class Cluster:
    """What a server is to the others that share its store.

    Args:
        store: The store, open and shared.
        cohorts: The cohorts and their rules.
        releaser: Counts packets, and releases what is this server's.
        compactor: Is told what others made live again.
        dictionaries: Compression dictionaries.
        put_in_force: Puts the stored spec of a cohort in force.
        watch: Says whether the store takes writes.
        leases: Of all servers.
        telemetry: Shows how this server stands.

    Attributes:
        following: Takes in what others write.
        partitions: What this server releases.
        end: Why the server has to end, so that it is started again; None where it need not. It stays.
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
        watch: StoreWatch,
        leases: LeaseTable,
        telemetry: FMITelemetry,
    ) -> None:
        self._store = store
        self._cohorts = cohorts
        self._releaser = releaser
        self._watch = watch
        self._telemetry = telemetry
        self._changed = asyncio.Event()
        self._well = True
        self._ended = asyncio.Event()
        self.end: UnfitError | None = None
        self.following = Following(
            store,
            cohorts,
            releaser,
            compactor=compactor,
            dictionaries=dictionaries,
            put_in_force=put_in_force,
        )
        self.partitions = Partitions(
            leases,
            server=secrets.token_hex(8),
            on_gain=self._take_over,
            fit=self._may_release,
            on_change=telemetry.partitions,
        )

    async def join(self) -> None:
        """Become one of the servers, before what is stored is brought back."""
        await self.following.load()
        self._releaser.owns = self.partitions.owns
        self._releaser.spec_waits = self.following.spec_waits

    def work(self) -> dict[str, Coroutine[Any, Any, None]]:
        """Return what runs for as long as the server does, by name."""
        return {
            "following": self.following.run(),
            "partitions": self.partitions.run(),
            "cluster": self._look_again_and_again(),
            "end of the part among others": self._end_where_unfit(),
        }

    async def leave(self) -> None:
        """Give up what this server releases, so that others go on at once."""
        await self.partitions.give_back()

    async def settle(self) -> None:
        """See all that any of the servers was answered before now.

        Raises:
            StoreUnavailableError: That cannot be known now.
        """
        await self.following.settle()

    @property
    def well(self) -> bool:
        """Whether what others write comes to subscribers here, as of the last look."""
        return self._well

    async def changed(self) -> None:
        """Wait until `well` became something else. For one waiter."""
        await self._changed.wait()
        self._changed.clear()

    async def ended(self) -> None:
        """Wait until the server has to end, see `end`."""
        await self._ended.wait()

    async def _look_again_and_again(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(LOOK_S)

    @property
    def _trouble(self) -> Exception | None:
        return self.following.trouble or self.partitions.trouble

    async def _end_where_unfit(self) -> None:
        """Wait until this server fails at what another one goes on with."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._trouble is None or not await self._others_go_on():
                continue
            trouble = self._trouble  # it may be over by now
            if trouble is not None:
                break
        self.end = UnfitError(
            "this server fails again and again at its part among others, by an error that nobody foresaw "
            f"({trouble!r}), and others go on: start it again"
        )
        self.end.__cause__ = trouble
        self._ended.set()

    async def _others_go_on(self) -> bool:
        """Say whether another server does what this one cannot.

        What fails at every server, such as a packet that none of them can count, must end none: they take
        packets and are read at, and each start would come to it again.
        """
        try:
            return await self.partitions.go_on_elsewhere()
        except StoreError:
            return False  # it is asked again
        except Exception:
            _log.warning("who the other servers are cannot be known", exc_info=True)
            return True  # leases are what fails, and only another start makes anything of them

    def _look(self) -> bool:
        """See whether what others write comes here and is taken in; say so where that changed."""
        well = self.following.well and not self._store.stats().stalled
        if well != self._well:
            self._well = well
            self._telemetry.follows(well)
            self._changed.set()
        return well

    def _may_release(self) -> bool:
        """Say whether this server hears what others write; what it releases would else be of the past.

        Brokers that do not answer are no reason: they say the same to everybody.
        """
        if not self._look():
            return False
        # What was short a moment ago may be so again in the next.
        return {self._store.stats().fault, self._watch.fault} <= {None, *BROKERS_AWAY}

    async def _take_over(self, partitions: frozenset[int]) -> None:
        """Go on where other servers were with the cohorts of partitions."""
        await self.settle()
        for rules in self._cohorts:
            if partition_of(rules.name) in partitions:
                self._releaser.take_over(rules.name)
