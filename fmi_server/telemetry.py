"""FMITelemetry: what the server did, as counts for people, programs and Prometheus."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fmi.v1 import update_pb2
from fmi_server.aggregation import IgnoredReason
from fmi_server.contracts import PacketStatus, PacketType
from fmi_server.errors import REASONS, reason_name
from fmi_server.feed_requests import kind_name

__all__ = ["FMITelemetry"]

_LATENCY_BUCKETS_S: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)


_Release = Literal["published", "unchanged", "overtaken", "failed"]
_SentUp = Literal["sent", "refused", "unavailable", "failed"]
_Report = Literal["applied", "failed"]
_TYPES: Final = (*PacketType, "unknown")
_KINDS: Final = tuple(map(kind_name, update_pb2.UpdateKind.values()[1:]))


class FMITelemetry:
    """Counts packets, refusals, releases and subscribers.

    Labels come from closed sets (packet types, reasons, kinds): never from names that a site chooses,
    so that no site can blow up the number of time series. Each count is there from the start, as 0: of one
    that comes with its first failure, Prometheus sees no increase.

    Attributes:
        registry: The Prometheus registry that the metrics stand in.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._packets = Counter(
            "fmi_packets",
            "Packets by type and what became of them.",
            ("type", "status"),
            registry=self.registry,
        )
        self._refusals = Counter(
            "fmi_refusals", "Refusals by reason.", ("reason",), registry=self.registry
        )
        self._bytes = Counter(
            "fmi_packet_bytes", "Bytes of packets stored, uncompressed.", registry=self.registry
        )
        self._ignored = Counter(
            "fmi_ignored_values",
            "Values of accepted packets that could not be counted.",
            ("reason",),
            registry=self.registry,
        )
        self._releases = Counter(
            "fmi_releases",
            "Releases by outcome; `overtaken` by another server or another spec.",
            ("outcome",),
            registry=self.registry,
        )
        self._updates = Counter(
            "fmi_updates", "Updates published, by kind.", ("kind",), registry=self.registry
        )
        self._conflated = Counter(
            "fmi_conflated_updates",
            "Updates that subscribers did not get because newer ones overtook them.",
            registry=self.registry,
        )
        self._subscribers = Gauge("fmi_subscribers", "Open subscriptions.", registry=self.registry)
        self._cohorts = Gauge("fmi_cohorts", "Cohorts known.", registry=self.registry)
        self._store_writable = Gauge(
            "fmi_store_writable",
            "Whether the store takes writes: 1, or 0 while it refuses them.",
            registry=self.registry,
        )
        self._store_damaged = Gauge(
            "fmi_store_damaged",
            "Whether a read or a write came upon damage in the store: 0, or 1 until a restart.",
            registry=self.registry,
        )
        self._follows = Gauge(
            "fmi_follows",
            "Whether what other servers on the store write is taken in: 1, or 0 while it is not.",
            registry=self.registry,
        )
        self._follows.set(1)  # also where there are no others, so that 0 always means something
        self._partitions = Gauge(
            "fmi_partitions",
            "Partitions of cohorts, of 64, that this server releases among others on the store.",
            registry=self.registry,
        )
        self._memory = Gauge(
            "fmi_resident_memory_bytes", "Resident memory of the process.", registry=self.registry
        )
        self._memory_pressed = Gauge(
            "fmi_memory_pressed",
            "Whether calls are refused because memory is short: 0, or 1 while they are.",
            registry=self.registry,
        )
        self._private_cohorts = Gauge(
            "fmi_private_cohorts",
            "Private cohorts of this server, `releasing`, or `exhausted` where the budget is spent.",
            ("state",),
            registry=self.registry,
        )
        self._budget_ends = Gauge(
            "fmi_privacy_budget_ends_timestamp_seconds",
            "Unix time of the last release that a private cohort can pay for, of the first that ends; +Inf "
            "where none releases.",
            registry=self.registry,
        )
        self.budgets(releasing=0, exhausted=0, first_end=math.inf)
        self._release_seconds = Histogram(
            "fmi_release_seconds",
            "Seconds from the start of a release until it is durable.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._uplink = Counter(
            "fmi_uplink_packets",
            "Priors sent to the parent, by what became of them.",
            ("outcome",),
            registry=self.registry,
        )
        self._reports = Counter(
            "fmi_apply_reports",
            "Reports of subscribers on updates, by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        _begin_at_zero(self._packets, _TYPES, get_args(PacketStatus))
        _begin_at_zero(self._refusals, map(reason_name, REASONS))
        _begin_at_zero(self._ignored, get_args(IgnoredReason))
        _begin_at_zero(self._releases, get_args(_Release))
        _begin_at_zero(self._updates, _KINDS)
        _begin_at_zero(self._uplink, get_args(_SentUp))
        _begin_at_zero(self._reports, get_args(_Report))
        # The children are looked up once: the lookup by labels costs more than the count.
        self._packet_children: dict[tuple[str, str], Counter] = {}

    def packet(self, kind: str, status: PacketStatus, *, size: int = 0, count: int = 1) -> None:
        """Count packets of a type (`msp`, `pop`, `ccs`, `unknown`) that met with a status."""
        child = self._packet_children.get((kind, status))
        if child is None:
            child = self._packets.labels(kind, status)
            self._packet_children[kind, status] = child
        child.inc(count)
        if size:
            self._bytes.inc(size)

    def refusal(self, reason: str) -> None:
        """Count a refusal by the name of its reason."""
        self._refusals.labels(reason).inc()

    def ignored(self, reason: IgnoredReason, count: int = 1) -> None:
        """Count values of accepted packets that could not be counted."""
        self._ignored.labels(reason).inc(count)

    def release(self, outcome: _Release, seconds: float) -> None:
        """Count a release: `published`, `unchanged` or `failed`; `overtaken` by another server or spec."""
        self._releases.labels(outcome).inc()
        self._release_seconds.observe(seconds)

    def update(self, kind: str) -> None:
        """Count an update that was published."""
        self._updates.labels(kind).inc()

    def conflated(self, count: int) -> None:
        """Count updates that a slow subscriber did not get."""
        self._conflated.inc(count)

    def uplink(self, outcome: _SentUp) -> None:
        """Count an attempt to send a prior to the parent: `sent`, `refused`, `unavailable` or `failed`."""
        self._uplink.labels(outcome).inc()

    def report(self, outcome: _Report) -> None:
        """Count a subscriber's report on an update: `applied` or `failed`."""
        self._reports.labels(outcome).inc()

    def subscribers(self, count: int) -> None:
        """Set the number of open subscriptions."""
        self._subscribers.set(count)

    def cohorts(self, count: int) -> None:
        """Set the number of cohorts."""
        self._cohorts.set(count)

    def store_takes_writes(self, takes: bool) -> None:
        """Set whether the store takes writes."""
        self._store_writable.set(takes)

    def store_is_damaged(self) -> None:
        """Set that the store is damaged."""
        self._store_damaged.set(1)

    def follows(self, well: bool) -> None:
        """Set whether what other servers write is taken in."""
        self._follows.set(well)

    def partitions(self, owned: int) -> None:
        """Set how many partitions this server releases."""
        self._partitions.set(owned)

    def memory(self, held: int, *, pressed: bool) -> None:
        """Set the resident memory, in bytes, and whether calls are refused for it."""
        self._memory.set(held)
        self._memory_pressed.set(pressed)

    def budgets(self, *, releasing: int, exhausted: int, first_end: float) -> None:
        """Set how many private cohorts have budget left and how many do not, and when the first ends.

        Args:
            releasing: Cohorts with budget left.
            exhausted: Cohorts without.
            first_end: Unix seconds of the last release of that which ends first; infinity for none.
        """
        self._private_cohorts.labels("releasing").set(releasing)
        self._private_cohorts.labels("exhausted").set(exhausted)
        self._budget_ends.set(first_end)

    def snapshot(self) -> Mapping[str, float]:
        """Return every count by name and labels, for example `fmi_packets_total{type="msp",...}`."""
        values: dict[str, float] = {}
        for metric in self.registry.collect():
            for sample in metric.samples:
                if sample.name.endswith("_created"):
                    continue
                labels = ",".join(
                    f'{key}="{value}"' for key, value in sorted(sample.labels.items())
                )
                values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return values


def _begin_at_zero(counter: Counter, *labels: Iterable[str]) -> None:
    for values in itertools.product(*labels):
        counter.labels(*values)
