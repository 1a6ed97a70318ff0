"""Partitions: which of several servers releases which cohorts.

A cohort is in one of 64 partitions, by a hash of its name. Each server that runs holds a lease of its own
name; a partition is for the one of these servers that comes first by a hash of both (rendezvous hashing:
Thaler and Ravishankar 1998), so that where a server comes or goes only what was its own moves. It holds a
lease of the partition too, and does nothing alone without it.

A lease spares work and decides nothing: what two servers would release at the same time the fences of the
store keep apart (`publication`, `private_releases`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from fmi_server.storage import StoreError
from fmi_server.storage.jetstream_leases import Lease, LeaseLostError, LeaseTable

__all__ = ["PARTITIONS", "Partitions", "partition_of", "share_of"]

PARTITIONS: Final = 64

LOOKS: Final = 5
"""Looks within the time of a lease: how soon a server that came or went is noticed."""

RENEWED_AT: Final = 0.6
"""The part of its time from which on a lease is renewed."""

LASTING: Final = 5
"""Looks since it last had a partition that failed by an error that nobody foresaw, after which trying again
is no longer hoped to help. Between two of them is the whole time of a lease: to take leases and give them
back disturbs others."""

GIVE_BACK_S: Final = 3.0
"""Seconds for giving leases back: who goes must not wait for brokers that do not answer."""

SERVER: Final = "server-"
PARTITION: Final = "partition-"

_log = logging.getLogger(__name__)


def partition_of(cohort: str) -> int:
    """Return the partition of a cohort."""
    return _hash(cohort) % PARTITIONS


def share_of(server: str, servers: Iterable[str]) -> frozenset[int]:
    """Return the partitions of one of several servers."""
    everybody = sorted({server, *servers})
    return frozenset(
        partition
        for partition in range(PARTITIONS)
        if server == max(everybody, key=lambda name: (_hash(f"{name} {partition}"), name))
    )


class Partitions:
    """Takes, holds and gives back the partitions of this server, for as long as `run` runs.

    Args:
        leases: Of all servers.
        server: The name of this one, of letters, digits and hyphens; no other one may have it.
        on_gain: Is awaited with the partitions that were taken, before anything is done for them.
        fit: Says whether this server can release at all. While it cannot, it leaves everything to the others.
        on_change: Is told how many it has, when that changed.
    """

    def __init__(
        self,
        leases: LeaseTable,
        *,
        server: str,
        on_gain: Callable[[frozenset[int]], Awaitable[None]],
        fit: Callable[[], bool] = lambda: True,
        on_change: Callable[[int], None] = lambda _owned: None,
    ) -> None:
        self._leases = leases
        self._server = server
        self._on_gain = on_gain
        self._fit = fit
        self._on_change = on_change
        self._own: Lease | None = None
        self._held: dict[int, Lease] = {}
        self._ready: set[int] = set()
        self._closing = False
        self._turn = asyncio.Lock()
        self._away = False
        self._unforeseen = 0
        self._trouble: Exception | None = None

    def owns(self, cohort: str) -> bool:
        """Say whether this server releases a cohort, now."""
        partition = partition_of(cohort)
        lease = self._held.get(partition)
        return lease is not None and partition in self._ready and _good(lease)

    @property
    def owned(self) -> frozenset[int]:
        """The partitions of this server, now."""
        return frozenset(p for p, lease in self._held.items() if p in self._ready and _good(lease))

    @property
    def trouble(self) -> Exception | None:
        """The error that nobody foresaw for which it fails again and again; None where there is none."""
        return self._trouble

    async def go_on_elsewhere(self) -> bool:
        """Say whether another server holds its own lease all the time, and so does its part.

        It takes two times that of a lease: who fails as this server does gives its own back in between.

        Raises:
            StoreError: The brokers do not answer.
        """
        before = await self._others()
        await asyncio.sleep(2 * self._leases.ttl_s)
        return bool(before & await self._others())

    async def _others(self) -> frozenset[tuple[str, int]]:
        held = await self._leases.held(SERVER)
        return frozenset(
            (name, lease.token) for name, lease in held.items() if lease.holder != self._server
        )

    async def run(self) -> None:
        """Take what is this server's, and give back what is not, until cancelled.

        Where that fails by an error that nobody foresaw, it gives everything back and tries again later.
        """
        told = 0
        while True:
            try:
                async with self._turn:
                    await self._look()
            except Exception as error:
                if not self._away:
                    _log.warning(
                        "leases cannot be had, and without them nothing is released: %s",
                        error,
                        exc_info=not isinstance(error, StoreError),
                    )
                self._away = True
                await self._note(error)
            else:
                # What fails as soon as something is taken is not mended by a look that had nothing to take.
                if self.owned or not self._unforeseen:
                    self._away = False
                    self._unforeseen, self._trouble = 0, None
            if (owned := len(self.owned)) != told:
                _log.info("this server releases %d of %d partitions", owned, PARTITIONS)
                self._on_change(owned)
                told = owned
            await asyncio.sleep(self._leases.ttl_s / (1 if self._unforeseen else LOOKS))

    async def _note(self, error: Exception) -> None:
        """Count an error that nobody foresaw; others do then what this server holds and does not do."""
        if isinstance(error, StoreError):
            return
        self._unforeseen += 1
        if self._unforeseen >= LASTING:
            self._trouble = error
        # What fails here too runs out by itself: it is held no more, and not renewed.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(GIVE_BACK_S), self._turn:
                await self._give_all_back()

    async def give_back(self) -> None:
        """Give everything back, so that others go on at once."""
        self._closing = True
        self._ready.clear()
        with contextlib.suppress(StoreError, TimeoutError):
            async with asyncio.timeout(GIVE_BACK_S), self._turn:
                await self._give_all_back()

    async def _give_all_back(self) -> None:
        self._ready.clear()
        leases = [*self._held.values(), *([self._own] if self._own else [])]
        self._held, self._own = {}, None
        await asyncio.gather(*(self._leases.release(lease) for lease in leases))

    async def _look(self) -> None:
        if self._closing:
            return
        if not self._fit():
            await self._give_all_back()
            return
        self._own = await self._kept(self._own, f"{SERVER}{self._server}")
        servers = [name.removeprefix(SERVER) for name in await self._leases.held(SERVER)]
        share = share_of(self._server, servers) if self._own else frozenset()
        for partition in self._held.keys() - share:
            # Nothing is begun for it any more; what is under way is behind the fences.
            self._ready.discard(partition)
            await self._leases.release(self._held.pop(partition))
        await self._hold(share)
        gained = self._held.keys() - self._ready
        if gained:
            await self._on_gain(frozenset(gained))
            if not self._closing:
                self._ready |= gained

    async def _hold(self, share: frozenset[int]) -> None:
        """Renew or take the leases of a share, as far as they can be had."""
        wanted = sorted(share)
        found = await asyncio.gather(
            *(self._kept(self._held.get(p), f"{PARTITION}{p}") for p in wanted),
            return_exceptions=True,
        )
        failure: BaseException | None = None
        for partition, lease in zip(wanted, found, strict=True):
            if isinstance(lease, BaseException):
                failure = lease  # what was held is as good as it was
            elif lease is not None:
                self._held[partition] = lease
            elif self._held.pop(partition, None) is not None:
                self._ready.discard(partition)
        if failure is not None:
            raise failure

    async def _kept(self, lease: Lease | None, name: str) -> Lease | None:
        """Return a lease that is held: as it was, renewed, or taken; None where another server has it."""
        if lease is not None:
            if lease.good_until - time.monotonic() > RENEWED_AT * self._leases.ttl_s:
                return lease
            try:
                return await self._leases.renew(lease)
            except LeaseLostError:
                # Others may have been at it: it is taken anew, as if it had never been held.
                self._ready.discard(_number(name))
        return await self._leases.acquire(name, self._server)


def _number(name: str) -> int:
    """Return the number of a partition's lease; -1 for another one."""
    return int(name.removeprefix(PARTITION)) if name.startswith(PARTITION) else -1


def _good(lease: Lease) -> bool:
    return time.monotonic() < lease.good_until


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
