"""Watches whether the store takes writes, is sound and goes on, and says when that changes.

A server whose disk is full is read-only: Emits are refused with a typed error, everything that reads goes
on. Nothing has to be done for that, since each write is refused by itself; what is missing is that somebody
says so, and finds out without a packet when there is room again.

Damage is another matter: it does not go away, and what lies elsewhere in the file is still read and written.

A store that several servers share may come to an entry that it must not pass. It then stands still, and so
does all that is read from it. Where another start or another version is all that it wants, or where it
stopped for an error that nobody foresaw, the server ends (`ended`): the others do its part meanwhile. Where
all servers are in the same case, because the brokers lost or changed what they had, reads go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from fmi_server.storage import Store, StoreError
from fmi_server.storage.base import (
    StoreBehindError,
    StoreStoppedError,
    StoreVersionError,
    UnavailableReason,
)
from fmi_server.telemetry import FMITelemetry

__all__ = ["StoreWatch"]

LOOK_S: Final = 1.0
"""Seconds between two looks; a look at a sound store costs nothing."""

SOUND_LOOKS: Final = 3
"""Looks in a row without a failed write after which the store is called sound again. A disk with room for a
small write and not for a large one would else change its state each second."""

_log = logging.getLogger(__name__)


class StoreWatch:
    """Says whether a store takes writes, and whether it is damaged.

    Args:
        store: The store.
        telemetry: Shows it.

    Attributes:
        fault: Why writes fail; None while the store takes them.
        damage: What was found damaged; None where nothing was. It stays.
        end: Why the server has to end: `StoreBehindError` or `StoreStoppedError` where it has to be started
            again and nothing else, `StoreVersionError` where it takes a newer version; None where it need
            not. It stays.
    """

    def __init__(self, store: Store, *, telemetry: FMITelemetry) -> None:
        self.fault: UnavailableReason | None = None
        self.damage: str | None = None
        self.end: StoreBehindError | StoreStoppedError | StoreVersionError | None = None
        self._store = store
        self._telemetry = telemetry
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        telemetry.store_takes_writes(True)

    @property
    def sound(self) -> bool:
        """Whether the store takes writes, goes on and no damage was found: whether to send packets here."""
        return self.fault is None and self.damage is None and self.end is None

    async def changed(self) -> None:
        """Wait until `fault`, `damage` or `end` became something else. For one waiter."""
        await self._changed.wait()
        self._changed.clear()

    async def ended(self) -> None:
        """Wait until the server has to end, see `end`."""
        await self._ended.wait()

    async def run(self) -> None:
        """Look again and again, until cancelled. While writes fail, each look tries one of its own."""
        loop = asyncio.get_running_loop()
        since, sound = 0.0, 0
        while True:
            await asyncio.sleep(LOOK_S)
            stopped = self._store.stopped
            if isinstance(stopped, StoreBehindError | StoreStoppedError | StoreVersionError):
                self.end = stopped
                self._ended.set()
                self._changed.set()
                return  # nothing mends that before the next start
            stats = self._store.stats()
            found = stats.fault
            if stats.damage is not None and self.damage is None:
                self._tell_of_damage(stats.damage)
            if found is not None:
                sound = 0
                with contextlib.suppress(StoreError):
                    await self._store.probe()
            elif self.fault is not None:
                sound += 1
            if found is not None and self.fault is None:
                since = loop.time()
                _log.error(
                    "%s takes no writes (%s): Emits are refused and sites send again, releases wait; "
                    "what reads goes on",
                    self._store.location,
                    found,
                )
                self._set(found)
            elif self.fault is not None and sound >= SOUND_LOOKS:
                _log.info(
                    "%s takes writes again, after %.0f s", self._store.location, loop.time() - since
                )
                self._set(None)

    def _tell_of_damage(self, damage: str) -> None:
        if self._store.shared:
            # No backup mends that: the others may be well, and what is at the brokers may be whole.
            _log.critical(
                "%s: this server stands still (%s): it takes no packets and hears nothing more of what "
                "others write; what reads goes on",
                self._store.location,
                damage,
            )
        else:
            self._tell_of_damage_here(damage)
        self.damage = damage
        self._telemetry.store_is_damaged()
        self._changed.set()

    def _tell_of_damage_here(self, damage: str) -> None:
        _log.critical(
            "%s is damaged (%s): what needs the damaged part is refused as STORE_CORRUPT, all else goes on; "
            "stop the server and restore a backup",
            self._store.location,
            damage,
        )

    def _set(self, fault: UnavailableReason | None) -> None:
        self.fault = fault
        self._telemetry.store_takes_writes(fault is None)
        self._changed.set()
