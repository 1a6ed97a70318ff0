"""The time at which a packet counts, whatever the clock of its site says; see docs/time.md.

A site's clock orders its packets, and a clock that is ahead must not let one packet shadow those after it. So
a packet counts as of its emission, but never later than its receipt. Both are in the store, so a restart
counts every packet as of the same time.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Final

from fmi.v1 import packet_pb2

__all__ = ["NewestSignals", "as_counted", "counted_at_us"]

MAX_SITES: Final = 2**16
"""Sites of a cohort whose newest signals are remembered; past it the one longest silent goes."""

REORDERED_US: Final = 1_000_000
"""Microseconds by which packets that were sent side by side may pass each other: nothing to warn of."""


def counted_at_us(emitted_at_us: int, received_at_us: int) -> int:
    """Return the time as of which a packet counts, Unix microseconds."""
    return min(emitted_at_us, received_at_us)


def as_counted(packet: packet_pb2.Packet, received_at_us: int) -> packet_pb2.Packet:
    """Return a packet as it is to be counted: a copy where its clock was ahead, else itself."""
    emitted_at = packet.header.emitted_at
    emitted_at_us = emitted_at.seconds * 1_000_000 + emitted_at.nanos // 1_000
    if emitted_at_us <= received_at_us:
        return packet
    counted = packet_pb2.Packet()
    counted.CopyFrom(packet)
    counted.header.emitted_at.FromMicroseconds(received_at_us)
    return counted


class NewestSignals:
    """Remembers as of when the newest signals of each site count, to tell of a clock that fell back.

    Each cohort has its own memory: what is forgotten in one must not tell who sends to another.
    """

    def __init__(self, *, max_sites: int = MAX_SITES) -> None:
        self._max_sites = max_sites
        self._newest_us: defaultdict[str, OrderedDict[str, int]] = defaultdict(OrderedDict)

    def note(self, cohort: str, domain_id: str, counted_us: int) -> int:
        """Note signals that count; return by how many microseconds newer ones overtake them, 0 for none."""
        sites = self._newest_us[cohort]
        newest_us = sites.get(domain_id, counted_us)
        sites[domain_id] = max(newest_us, counted_us)
        sites.move_to_end(domain_id)
        if len(sites) > self._max_sites:
            sites.popitem(last=False)
        behind_us = newest_us - counted_us
        return behind_us if behind_us > REORDERED_US else 0
