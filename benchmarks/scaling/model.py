"""From unit costs to the load of a server, and which of its limits is met first.

A server is told by what it has to do (`Duty`), whoever it is: the only one, one of several that share a
store, or a region or parent of a hierarchy. Costs add up; nothing is assumed to get cheaper with size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from benchmarks.scaling.unit_costs import NAMED_SITES, UnitCosts

__all__ = [
    "DAY_S",
    "KINDS_STORED",
    "Duty",
    "Limits",
    "Load",
    "load_of",
    "release_rate",
    "replica_of",
]

DAY_S: Final = 86_400.0
COMPACTED_FROM: Final = 10_000
"""Packets of a cohort after which it is compacted, where it has no more live ones."""

COMPACTED_EVERY_S: Final = 3600.0
KINDS_STORED: Final = 2
"""Updates of a release in a cohort that gets signals only: a prior, and the warm starts."""

UPDATES_KEPT: Final = 1000
"""Of each kind (`retention.updates`)."""

PACKETS_KEPT_S: Final = 7 * DAY_S
"""Seconds for which a packet that cannot count any more is known (`retention.packets`)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server has.

    Attributes:
        cores: Cores that may be in use on average. A server is one process, of which one thread at a time
            runs Python; half a core leaves room for peaks.
        memory_bytes: Memory; four fifths of it may be used (`max_memory_bytes`).
        disk_bytes: Disk.
        network_bytes_s: Bytes a second out; the default is a third of 1 Gbit/s.
        subscribers: Subscriptions (`max_subscribers`, `max_connections`).
    """

    cores: float = 0.5
    memory_bytes: float = 8e9
    disk_bytes: float = 250e9
    network_bytes_s: float = 40e6
    subscribers: int = 10_000


@dataclass(frozen=True, slots=True)
class Duty:
    """What a server has to do.

    Attributes:
        sites: Sites whose values it holds.
        signals: Signals of each.
        cohorts: Cohorts that they are spread over, evenly.
        packets_per_s: Packets of all of them together, whoever takes them.
        min_interval_s: Shortest time between two releases of a cohort.
        subscribers: Subscribers of the prior of one cohort each.
        batched: Whether packets come in envelopes.
        taken: Share of the packets that it takes; it follows the others.
        released: Share of the cohorts that it releases.
        clustered: Whether its store is at brokers.
        has_parent: Whether it sends its priors up.
    """

    sites: float
    signals: int
    cohorts: int
    packets_per_s: float
    min_interval_s: float
    subscribers: float = 0.0
    batched: bool = False
    taken: float = 1.0
    released: float = 1.0
    clustered: bool = False
    has_parent: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What that makes of a server.

    Attributes:
        cpu: Cores, by what they are for.
        memory_bytes: Memory.
        disk_bytes: Disk, when packets that cannot count have been kept for as long as they are.
        in_bytes_s: Network, to the server.
        out_bytes_s: Network, from it.
        subscribers: Subscriptions.
        releases_per_s: Releases of all cohorts.
        release_s: Seconds that one takes.
        told_s: Seconds until the last subscriber of a cohort has an update.
        update_bytes: A prior.
        start_s: Seconds of a start.
        min_interval_s: As in the duty.
    """

    cpu: dict[str, float]
    memory_bytes: float
    disk_bytes: float
    in_bytes_s: float
    out_bytes_s: float
    subscribers: float
    releases_per_s: float
    release_s: float
    told_s: float
    update_bytes: float
    start_s: float
    min_interval_s: float

    @property
    def cores(self) -> float:
        """Cores in all."""
        return sum(self.cpu.values())

    def shares(self, limits: Limits) -> dict[str, float]:
        """Return how much of each limit is used; past 1 it is not kept."""
        return {
            "processor": self.cores / limits.cores,
            "memory": self.memory_bytes / (0.8 * limits.memory_bytes),
            "disk": self.disk_bytes / limits.disk_bytes,
            "network": self.out_bytes_s / limits.network_bytes_s,
            "subscriptions": self.subscribers / limits.subscribers,
            # A release, and the telling of it, that take longer than the time between two, are late for ever.
            "time of a release": (self.release_s + self.told_s) / self.min_interval_s,
        }

    def nearest(self, limits: Limits) -> list[tuple[str, float]]:
        """Return the limits and how much of each is used, the most used first."""
        return sorted(self.shares(limits).items(), key=lambda item: -item[1])

    def most_used(self, limits: Limits) -> float:
        """Return how much is used of the limit that is met first."""
        return self.nearest(limits)[0][1]


def release_rate(duty: Duty, costs: UnitCosts) -> float:
    """Return the releases a second of one cohort.

    Packets come independently; one that comes after the interval, which begins when the last release ended,
    brings the next.
    """
    per_s = duty.packets_per_s / duty.cohorts
    if per_s == 0.0:
        return 0.0
    return 1.0 / (duty.min_interval_s + _release_s(duty, costs) + 1.0 / per_s)


def load_of(duty: Duty, costs: UnitCosts) -> Load:
    """Return the load of a server."""
    rate, release_s = release_rate(duty, costs), _release_s(duty, costs)
    held = duty.sites / duty.cohorts
    update_bytes = (
        costs.update_bytes
        + costs.update_signal_bytes * duty.signals
        + costs.update_named_site_bytes * (held if held <= NAMED_SITES else 0.0)
    )
    told_one_s = costs.told_cpu_s + costs.told_byte_cpu_s * update_bytes
    releases = rate * duty.cohorts
    told_per_s = rate * duty.subscribers
    taken = duty.packets_per_s * duty.taken
    cpu = {
        "idle": costs.idle_cpu,
        "packets": taken * _take_s(duty, costs),
        "following": (duty.packets_per_s - taken) * _follow_s(duty, costs),
        "compaction": duty.released * _judged_per_s(duty) * costs.compaction_cpu_s,
        "releases": duty.released * releases * release_s,
        "subscribers": told_per_s * told_one_s,
        "parent": releases * costs.uplink_cpu_s if duty.has_parent else 0.0,
    }
    up = costs.packet_batched_up_bytes if duty.batched else costs.packet_alone_up_bytes
    live = costs.live_disk_bytes + costs.live_signal_disk_bytes * duty.signals
    kept = duty.packets_per_s * PACKETS_KEPT_S * costs.retired_disk_bytes
    updates = duty.cohorts * KINDS_STORED * UPDATES_KEPT * update_bytes
    return Load(
        cpu=cpu,
        memory_bytes=costs.server_bytes
        + costs.working_bytes
        + duty.sites * (costs.site_bytes + duty.signals * costs.cell_bytes)
        + duty.subscribers * costs.subscriber_bytes,
        disk_bytes=duty.sites * live + kept + updates,
        in_bytes_s=taken * up,
        out_bytes_s=taken * (0.0 if duty.batched else costs.packet_alone_down_bytes)
        + told_per_s * (update_bytes + costs.told_frame_bytes),
        subscribers=duty.subscribers,
        releases_per_s=releases,
        release_s=release_s,
        told_s=duty.subscribers / duty.cohorts * told_one_s,
        update_bytes=update_bytes,
        start_s=duty.sites * costs.start_site_s,
        min_interval_s=duty.min_interval_s,
    )


def replica_of(duty: Duty, servers: int) -> Duty:
    """Return the duty of one of several servers that share the sites and subscribers of one."""
    return replace(
        duty,
        subscribers=duty.subscribers / servers,
        taken=1.0 / servers,
        released=1.0 / servers,
        clustered=True,
    )


def _release_s(duty: Duty, costs: UnitCosts) -> float:
    held = duty.sites / duty.cohorts
    of_sites = costs.release_site_cpu_s * held
    return costs.release_cpu_s + of_sites + costs.release_cell_cpu_s * held * duty.signals


def _take_s(duty: Duty, costs: UnitCosts) -> float:
    if duty.clustered:
        return costs.cluster_take_cpu_s if duty.batched else costs.cluster_alone_take_cpu_s
    return costs.packet_batched_cpu_s if duty.batched else costs.packet_alone_cpu_s


def _follow_s(duty: Duty, costs: UnitCosts) -> float:
    return costs.cluster_follow_cpu_s if duty.batched else costs.cluster_alone_follow_cpu_s


def _judged_per_s(duty: Duty) -> float:
    """Return the packets a second that compaction looks at: all live ones, hourly and after many more."""
    per_cohort_s, held = duty.packets_per_s / duty.cohorts, duty.sites / duty.cohorts
    passes_s = 1.0 / COMPACTED_EVERY_S + per_cohort_s / max(COMPACTED_FROM, held)
    return duty.packets_per_s + duty.cohorts * held * passes_s
