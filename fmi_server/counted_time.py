"""The time at which a packet counts, whatever the clock of its site says; see docs/time.md.

A site's clock orders its packets, and a clock that is ahead must not let one packet shadow those after it. So
a packet counts as of its emission, but never later than its receipt. Both are in the store, so a restart
counts every packet as of the same time.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from fmi.v1 import packet_pb2

__all__ = ["NewestSignals", "as_counted", "counted_at_us"]

MAX_SITES: Final = 2**16
"""Sites, each cohort's own, whose newest signals are remembered; past it the one longest silent goes."""

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
    """Remembers as of when the newest signals of each site count, to tell of a clock that fell back."""

    def __init__(self, *, max_sites: int = MAX_SITES) -> None:
        self._max_sites = max_sites
        self._newest_us: OrderedDict[tuple[str, str], int] = OrderedDict()

    def note(self, cohort: str, domain_id: str, counted_us: int) -> int:
        """Note signals that count; return by how many microseconds newer ones overtake them, 0 for none."""
        site = (cohort, domain_id)
        newest_us = self._newest_us.get(site, counted_us)
        self._newest_us[site] = max(newest_us, counted_us)
        self._newest_us.move_to_end(site)
        if len(self._newest_us) > self._max_sites:
            self._newest_us.popitem(last=False)
        behind_us = newest_us - counted_us
        return behind_us if behind_us > REORDERED_US else 0
