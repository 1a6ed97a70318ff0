"""A site whose outbox has a fault, started by a test to show that the test would notice.

faulty_outbox_site.py FAULT TARGET FOLDER SITE LIFE (async|blocking)
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from outbox_site import SlowToForget, main

from fmi.plain import new_packet_id
from fmi.v1 import packet_pb2
from fmi_client import ClientClosedError, outbox
from fmi_client._outbox_store import Item
from fmi_client.outbox import FileOutbox

LATE_S = 0.3


class ReturnsEarly(SlowToForget):
    """Says that packets are written, and writes them a moment later."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._late: dict[int, bytes] = {}

    def append(self, items: Sequence[tuple[Item, bytes]], *, dropped: Sequence[int]) -> None:
        self._late.update((item.sequence, data) for item, data in items)

        def write() -> None:
            time.sleep(LATE_S)
            with contextlib.suppress(ClientClosedError):  # the site has ended, and these are lost
                super(ReturnsEarly, self).append(items, dropped=dropped)

        threading.Thread(target=write, daemon=True).start()

    def read(self, items: Sequence[Item]) -> list[bytes]:
        written = [item for item in items if item.sequence not in self._late]
        found = dict(zip(written, super().read(written), strict=True)) if written else {}
        return [found.get(item) or self._late[item.sequence] for item in items]


class ForgetsEarly(SlowToForget):
    """Forgets packets when they are about to be sent, and sends them a moment later."""

    def read(self, items: Sequence[Item]) -> list[bytes]:
        cache: dict[int, bytes] = self.__dict__.setdefault("cache", {})
        new = [item for item in items if item.sequence not in cache]
        if new:
            cache.update(zip((i.sequence for i in new), super().read(new), strict=True))
            super().settle([item.sequence for item in new], [])
            time.sleep(LATE_S)
        return [cache[item.sequence] for item in items]


class MakesNewIds(SlowToForget):
    """Gives every packet a new id when it is read."""

    def read(self, items: Sequence[Item]) -> list[bytes]:
        packets = [packet_pb2.Packet.FromString(data) for data in super().read(items)]
        for packet in packets:
            packet.header.packet_id = new_packet_id(now_ms=int(time.time() * 1000))
        return [packet.SerializeToString() for packet in packets]


def newest_first(self: FileOutbox, max_packets: int, max_bytes: int) -> list[tuple[Item, bytes]]:
    """Send what came last at first."""
    del max_bytes
    with self._turn:
        # A few at a time: on a slow machine there are seldom more than are sent at once.
        items = list(self._waiting.values())[-min(max_packets, 5) :]
        return list(zip(items, self._store.read(items), strict=True)) if items else []


def install(fault: str) -> None:
    stores: dict[str, Callable[..., SlowToForget]] = {
        "returns early": ReturnsEarly,
        "forgets early": ForgetsEarly,
        "makes new ids": MakesNewIds,
    }
    if fault == "newest first":
        FileOutbox.head = newest_first
    else:
        outbox.FileStore = stores[fault]


if __name__ == "__main__":
    install(sys.argv.pop(1))
    main()
