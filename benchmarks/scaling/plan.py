"""One server, several that share a store, and a hierarchy of regions, for so and so many sites."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from benchmarks.scaling.model import (
    DAY_S,
    Duty,
    Limits,
    Load,
    load_of,
    release_rate,
    replica_of,
)
from benchmarks.scaling.unit_costs import UnitCosts

__all__ = ["Demand", "Latency", "Level", "Plan", "Replicas", "plan", "text_of"]

MOST_REPLICAS: Final = 200


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for.

    Attributes:
        sites: Sites in all.
        packets_per_site_day: Packets of a site in a day.
        signals: Signals of each packet.
        cohorts: Cohorts, each with as many sites as the others.
        subscribers: Subscribers of the prior of one cohort each; as many as sites where it is None.
        min_interval_s: Shortest time between two releases of a cohort.
        batched: Whether packets come in envelopes.
        fan_out: Most children of a server in the hierarchy.
        leaf_sites: Most sites of a region.
    """

    sites: int
    packets_per_site_day: float = 24.0
    signals: int = 25
    cohorts: int = 20
    subscribers: int | None = None
    min_interval_s: float = 60.0
    batched: bool = False
    fan_out: int = 100
    leaf_sites: int = 10_000

    @property
    def duty(self) -> Duty:
        """What one server would have to do for all of it."""
        return Duty(
            sites=self.sites,
            signals=self.signals,
            cohorts=self.cohorts,
            packets_per_s=self.sites * self.packets_per_site_day / DAY_S,
            min_interval_s=self.min_interval_s,
            subscribers=self.sites if self.subscribers is None else self.subscribers,
            batched=self.batched,
        )


@dataclass(frozen=True, slots=True)
class Latency:
    """From an Emit to the update at a subscriber, in seconds.

    Attributes:
        quiet_s: Where nothing else happens.
        busy_s: On average, where each level has just released when it comes: it waits half an interval.
        most_s: Where it waits a whole one.
    """

    quiet_s: float
    busy_s: float
    most_s: float


@dataclass(frozen=True, slots=True)
class Level:
    """A level of a hierarchy.

    Attributes:
        servers: How many there are.
        duty: Of each of them.
        load: Of each of them.
        latency: From an Emit at a region to the update at a subscriber here.
    """

    servers: int
    duty: Duty
    load: Load
    latency: Latency


@dataclass(frozen=True, slots=True)
class Replicas:
    """Servers that share a store.

    Attributes:
        servers: The least that keep all limits, or of those that were tried the one that comes nearest.
        load: Of each.
        broker_cpu: Cores of each of three brokers.
        log_bytes_s: What the log grows by, at each broker, until it is shortened.
    """

    servers: int
    load: Load
    broker_cpu: float
    log_bytes_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """All three ways.

    Attributes:
        one: The load of a single server.
        replicas: Servers that share a store.
        levels: The hierarchy, regions first.
    """

    demand: Demand
    limits: Limits
    one: Load
    replicas: Replicas
    levels: tuple[Level, ...]


def plan(demand: Demand, costs: UnitCosts, limits: Limits | None = None) -> Plan:
    """Plan for a demand."""
    limits = limits or Limits()
    return Plan(
        demand=demand,
        limits=limits,
        one=load_of(demand.duty, costs),
        replicas=_replicas(demand.duty, costs, limits),
        levels=tuple(_levels(demand, costs)),
    )


def latency_of(loads: Sequence[Load], costs: UnitCosts) -> Latency:
    """Return how long a change takes up through levels, to the average subscriber of the last."""
    quiet_s = sum(costs.hop_s + load.release_s for load in loads) + loads[-1].told_s / 2.0
    waits_s = sum(load.min_interval_s for load in loads)
    return Latency(quiet_s, quiet_s + waits_s / 2.0, quiet_s + waits_s)


def _replicas(duty: Duty, costs: UnitCosts, limits: Limits) -> Replicas:
    best: tuple[float, int, Load] | None = None
    for servers in range(2, MOST_REPLICAS + 1):
        load = load_of(replica_of(duty, servers), costs)
        used = load.most_used(limits)
        if best is None or used < best[0] * 0.999:
            best = used, servers, load
        if used <= 1.0:
            break
    assert best is not None
    broker_s = costs.cluster_broker_cpu_s if duty.batched else costs.cluster_alone_broker_cpu_s
    return Replicas(
        servers=best[1],
        load=best[2],
        broker_cpu=duty.packets_per_s * broker_s,
        log_bytes_s=duty.packets_per_s * costs.cluster_log_bytes,
    )


def _levels(demand: Demand, costs: UnitCosts) -> Iterator[Level]:
    """Go up from regions of equal size until one server is left."""
    duty = demand.duty
    servers = math.ceil(demand.sites / demand.leaf_sites)
    part = replace(
        duty,
        sites=duty.sites / servers,
        packets_per_s=duty.packets_per_s / servers,
        subscribers=duty.subscribers / servers,
        has_parent=servers > 1,
    )
    loads: list[Load] = []
    while True:
        load = load_of(part, costs)
        loads.append(load)
        yield Level(servers, part, load, latency_of(loads, costs))
        if servers == 1:
            return
        above = math.ceil(servers / demand.fan_out)
        children = servers / above
        # Each child is a site of each cohort, and sends each prior that is new, alone.
        part = replace(
            duty,
            sites=children * demand.cohorts,
            packets_per_s=children * demand.cohorts * release_rate(part, costs),
            subscribers=0.0,
            batched=False,
            has_parent=above > 1,
        )
        servers = above


def text_of(found: Plan) -> str:
    """Say it in a table, and what each way meets first."""
    names = ("servers", "cores", "memory", "disk", "out", "release")
    widths = (8, 8, 10, 10, 12, 10)
    heads = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"{'':26}{heads}  met first"]

    def row(name: str, servers: int, load: Load) -> None:
        limit, used = load.nearest(found.limits)[0]
        lines.append(
            f"{name:26}{servers:>8,}{load.cores:>8.2f}{load.memory_bytes / 1e9:>7.2f} GB"
            f"{load.disk_bytes / 1e9:>7.1f} GB{load.out_bytes_s / 1e6:>7.2f} MB/s"
            f"{load.release_s * 1e3:>7.1f} ms  {limit}, {used:.0%}"
        )

    row("one server", 1, found.one)
    row("each of several on a store", found.replicas.servers, found.replicas.load)
    for number, level in enumerate(found.levels):
        name = "region" if number == 0 else f"parent, level {number + 1}"
        row(f"each {name}", level.servers, level.load)
    lines.append(f"each of three brokers{found.replicas.broker_cpu:>21.2f}")
    top = found.levels[-1].latency
    lines.append(
        f"a change is at the top after {top.quiet_s:.2f} s where nothing else happens, "
        f"{top.busy_s:.0f} s on average where much does, {top.most_s:.0f} s at most"
    )
    return "\n".join(lines)
