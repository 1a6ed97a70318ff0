"""The tables of docs/scaling.md, made of what was measured; the text around them is written by hand."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from benchmarks.scaling.model import Limits, Load, load_of
from benchmarks.scaling.plan import Demand, Plan, plan
from benchmarks.scaling.record import Record
from benchmarks.scaling.unit_costs import SIGNALS, UnitCosts

__all__ = ["PARTS", "generated"]

SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)
INTERVALS_S: Final = (1.0, 10.0, 60.0)
Row = Sequence[str]


def generated(document: str, record: Record) -> str:
    """Return a document with its tables as the record says.

    Raises:
        ValueError: There is no place for a table.
    """
    for name, part in PARTS.items():
        before, begin, rest = document.partition(f"<!-- begin {name}: generated -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        if not end:
            raise ValueError(f"there must be a place for {name}")
        document = "".join((before, begin, part(record), end, after))
    return document


def _table(rows: Iterable[Row]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    width = lines[0].count(" | ") + 1
    return "\n".join([lines[0], f"|{' --- |' * width}", *lines[1:]]) + "\n"


def _costs(record: Record) -> UnitCosts:
    if record.costs is None:
        raise ValueError("unit costs were not measured")
    return record.costs


# What is measured


def _machine(record: Record) -> str:
    return textwrap.fill(f"Measured on {record.machine}.", 120) + "\n"


def _grows(record: Record) -> str:
    costs = _costs(record)
    live = costs.live_disk_bytes + SIGNALS * costs.live_signal_disk_bytes
    a_site = costs.release_site_cpu_s + SIGNALS * costs.release_cell_cpu_s
    rows: list[Row] = [
        ("one more", "processor", "memory", "disk", "network"),
        (
            f"packet of {SIGNALS} signals that comes alone",
            f"{_time(costs.packet_alone_cpu_s)}; {_time(costs.packet_crowd_cpu_s)} where 64 come at a time",
            "none",
            f"{_bytes(live)} while it counts, {_bytes(costs.retired_disk_bytes)} for a week after",
            f"{_bytes(costs.packet_alone_up_bytes)} in, {_bytes(costs.packet_alone_down_bytes)} out",
        ),
        (
            "packet in an envelope of 200",
            _time(costs.packet_batched_cpu_s),
            "none",
            "the same",
            f"{_bytes(costs.packet_batched_up_bytes)} in",
        ),
        (
            "packet that compaction looks at, once or twice each and once an hour all that count",
            _time(costs.compaction_cpu_s),
            "none",
            "",
            "",
        ),
        (
            f"site of {SIGNALS} signals",
            f"{_time(a_site)} of each release of its cohort; {_time(costs.start_site_s)} of each start",
            _bytes(costs.site_bytes + SIGNALS * costs.cell_bytes),
            "its newest packet",
            "",
        ),
        (
            "signal of a site",
            f"{_time(costs.release_cell_cpu_s)} of each release",
            _bytes(costs.cell_bytes),
            _bytes(costs.live_signal_disk_bytes),
            f"{_bytes(costs.update_signal_bytes)} of each update",
        ),
        (
            "release of a cohort",
            _time(costs.release_cpu_s),
            "1,024 newest updates",
            "1,000 updates of each kind",
            f"an update of {_bytes(_update(costs, SIGNALS))} to each subscriber",
        ),
        (
            "site in a cohort of up to 1,000",
            "",
            "",
            "",
            f"{_bytes(costs.update_named_site_bytes)} of each update, for its reputation",
        ),
        (
            "subscriber with a connection of its own",
            f"{_time(costs.told_cpu_s + costs.told_byte_cpu_s * _update(costs, SIGNALS))} of each update",
            f"{_bytes(costs.subscriber_bytes)}; {_bytes(costs.stream_bytes)} as one of many on a connection",
            "none",
            "each update",
        ),
        ("parent", f"{_time(costs.uplink_cpu_s)} of each release", "none", "none", "each prior"),
        (
            "server, with nothing to do",
            f"{_percent(costs.idle_cpu, 1)} of a core",
            _bytes(costs.server_bytes),
            "",
            "",
        ),
    ]
    return _table(rows)


def _stores(record: Record) -> str:
    costs = _costs(record)
    live = costs.live_disk_bytes + SIGNALS * costs.live_signal_disk_bytes
    return _table(
        [
            (
                "a packet",
                "SQLite",
                "brokers: who takes it",
                "each other server",
                "each of three brokers",
            ),
            (
                "alone, processor",
                _time(costs.packet_alone_cpu_s),
                _time(costs.cluster_alone_take_cpu_s),
                _time(costs.cluster_alone_follow_cpu_s),
                _time(costs.cluster_alone_broker_cpu_s),
            ),
            (
                "where 64 come at a time, processor",
                _time(costs.packet_crowd_cpu_s),
                _time(costs.cluster_crowd_take_cpu_s),
                _time(costs.cluster_crowd_follow_cpu_s),
                _time(costs.cluster_crowd_broker_cpu_s),
            ),
            (
                "in an envelope, processor",
                _time(costs.packet_batched_cpu_s),
                _time(costs.cluster_take_cpu_s),
                _time(costs.cluster_follow_cpu_s),
                _time(costs.cluster_broker_cpu_s),
            ),
            (
                "in an envelope, disk",
                _bytes(live),
                _bytes(costs.cluster_view_bytes),
                _bytes(costs.cluster_view_bytes),
                f"{_bytes(costs.cluster_log_bytes)}, until the log is shortened",
            ),
        ]
    )


def _points(record: Record) -> str:
    rows: list[Row] = [
        (
            "sites, packets/s, subscribers",
            "cores",
            "memory",
            "disk",
            "an update",
            "updates/s",
            "out, to one subscriber",
        )
    ]

    def pair(found: dict[str, float], show: Callable[[float], str]) -> str:
        predicted, measured = found["predicted"], found["measured"]
        ratio = predicted / measured if measured else float("inf")
        return f"{show(predicted)} / {show(measured)} ({ratio:.2f})"

    rows += [
        (
            f"{point['sites']:,}, {point['packets_per_s']:g}, {point['subscribers']}",
            pair(point["cores"], lambda value: f"{value:.2f}"),
            pair(point["memory_bytes"], _bytes),
            pair(point["disk_bytes"], _bytes),
            pair(point["update_bytes"], _bytes),
            pair(point["updates_per_s"], lambda value: f"{value:.2f}"),
            pair(point["out_bytes_s"], lambda value: f"{_bytes(value)}/s"),
        )
        for point in record.points["servers"]
    ]
    return _table(rows)


def _way_up(record: Record) -> str:
    found = record.points["way_up"]
    rows: list[Row] = [("a change through three servers, each of another", "computed", "measured")]
    for name, what in (
        ("quiet_s", "where nothing else happens, median"),
        ("busy_s", "amid other sites at each level, median"),
        ("most_s", "the same, longest"),
    ):
        rows.append((what, *(f"{found[name][side]:.2f} s" for side in ("predicted", "measured"))))
    return _table(rows)


# What is computed


LOAD_HEAD: Final = ("cores", "memory", "disk", "out", "a release", "start", "nearest limits")


def _load(load: Load, limits: Limits) -> Row:
    return (
        f"{load.cores:.2f}",
        _bytes(load.memory_bytes),
        _bytes(load.disk_bytes),
        f"{_bytes(load.out_bytes_s)}/s",
        _time(load.release_s),
        _time(load.start_s),
        "; ".join(f"{name} {_share(used)}" for name, used in load.nearest(limits)[:2]),
    )


def _plans(record: Record) -> Iterator[tuple[int, Plan]]:
    for sites in SIZES:
        yield sites, plan(Demand(sites), _costs(record))


def _one(record: Record) -> str:
    rows: list[Row] = [("sites", *LOAD_HEAD)]
    rows += [(f"{sites:,}", *_load(found.one, found.limits)) for sites, found in _plans(record)]
    return _table(rows)


def _intervals(record: Record) -> str:
    rows: list[Row] = [
        ("`min_interval`", "updates/s to each subscriber", *LOAD_HEAD[:4], LOAD_HEAD[-1])
    ]
    for interval_s in INTERVALS_S:
        demand = Demand(SIZES[1], min_interval_s=interval_s)
        load = load_of(demand.duty, _costs(record))
        told = _load(load, Limits())
        rate = load.releases_per_s / demand.cohorts
        rows.append((f"{interval_s:g} s", f"{rate:.3f}", *told[:4], told[-1]))
    return _table(rows)


def _replicas(record: Record) -> str:
    rows: list[Row] = [("sites", "servers", *LOAD_HEAD[:4], LOAD_HEAD[-1], "each broker, cores")]
    for sites, found in _plans(record):
        told = _load(found.replicas.load, found.limits)
        broker = f"{found.replicas.broker_cpu:.2f}"
        rows.append((f"{sites:,}", f"{found.replicas.servers}", *told[:4], told[-1], broker))
    return _table(rows)


def _levels(record: Record) -> str:
    rows: list[Row] = [
        (
            "sites",
            "level",
            "servers",
            "its sites",
            *LOAD_HEAD[:4],
            LOAD_HEAD[-1],
            "a change is here after",
        )
    ]
    for sites, found in _plans(record):
        for number, level in enumerate(found.levels):
            told = _load(level.load, found.limits)
            quiet, busy = level.latency.quiet_s, level.latency.busy_s
            rows.append(
                (
                    f"{sites:,}",
                    "regions" if number == 0 else f"parents, {number}",
                    f"{level.servers:,}",
                    f"{level.duty.sites / (level.duty.cohorts if number else 1):,.0f}",
                    *told[:4],
                    told[-1],
                    f"{quiet:.2f} s, {busy:.0f} s where much happens",
                )
            )
    return _table(rows)


def _short(record: Record) -> str:
    costs = _costs(record)
    limits = Limits()
    room = 0.8 * limits.memory_bytes - costs.server_bytes - costs.working_bytes
    held = room / (costs.site_bytes + SIGNALS * costs.cell_bytes)
    alone, batched = (
        limits.cores / (once + 2 * costs.compaction_cpu_s)
        for once in (costs.packet_alone_cpu_s, costs.packet_batched_cpu_s)
    )
    told = limits.cores / (costs.told_cpu_s + costs.told_byte_cpu_s * _update(costs, SIGNALS))
    day = plan(Demand(SIZES[-1]), costs)
    million = replace(day.demand.duty, subscribers=0)
    alone_million = load_of(million, costs)
    above = sum(level.servers for level in day.levels[1:])
    most = max(level.load.most_used(limits) for level in day.levels)
    one = (
        f"With half a core one server takes {_round(alone):,} packets/s that come alone for good, or "
        f"{_round(batched):,} in envelopes, compaction included; or gives {_round(told):,} updates/s."
    )
    room_for = f"In 8 GB it holds {_round(held):,} sites of {SIGNALS} signals."
    all_at_one = (
        "One server for 1,000,000 sites that send once an hour would take "
        f"{alone_million.cores:.2f} cores, {_bytes(alone_million.memory_bytes)} of memory and "
        f"{_bytes(alone_million.disk_bytes)} of disk, before anybody subscribes; with as many subscribers, "
        f"{day.one.cores:.2f} cores, {_bytes(day.one.memory_bytes)} and "
        f"{day.one.subscribers / limits.subscribers:,.0f} times the subscriptions that it takes."
    )
    levels = (
        f"As a hierarchy it is {day.levels[0].servers} regions and {above} above them, none of which uses "
        f"more than {_share(most)} of a limit."
    )
    said = (one, room_for, all_at_one, levels)
    return "".join(f"{textwrap.fill(f'* {line}', 120, subsequent_indent='  ')}\n" for line in said)


# What is simulated


def _precision(record: Record) -> str:
    found = record.simulated["precisions"]
    rows: list[Row] = [
        (
            "sites, regions",
            "alike; regions alike",
            "alike; regions differ",
            "sizes unlike; regions alike",
            "sizes unlike; regions differ",
        )
    ]
    for sites, regions in dict.fromkeys((row["sites"], row["regions"]) for row in found):
        cells = []
        for sizes in ("alike", "unlike"):
            for differ in (False, True):
                (row,) = [
                    row
                    for row in found
                    if (row["sites"], row["sizes"], row["differ"]) == (sites, sizes, differ)
                ]
                three = row["three_levels"]
                more = "" if three is None else f"; three levels {three / row['flat']:.2f}"
                cells.append(f"{row['two_levels'] / row['flat']:.2f}{more}")
        rows.append((f"{sites:,}, {regions}", *cells))
    return _table(rows)


def _lies(record: Record) -> str:
    found = record.simulated["breakdowns"]
    places = ("flat", "spread", "whole regions", "aimed")
    rows: list[Row] = [
        (
            "sites that lie",
            "all sites at once",
            "two levels, liars everywhere",
            "two levels, whole regions",
            "two levels, placed to do most harm",
        )
    ]
    most = max(row["sites"] for row in found)
    for row in found:
        if row["sites"] == most:
            cells = [
                f"{max(row['moved'][place], 0.0):.2f}{', lost' if row['broken'][place] else ''}"
                for place in places
            ]
            rows.append((_percent(row["share"], 1), *cells))
    return _table(rows)


def _sketches(record: Record) -> str:
    found = record.simulated["sketches"]
    shares = list(found["accuracy"][0]["broken"])
    rows: list[Row] = [
        (
            "sketch",
            "bytes, merged",
            "bytes, one region's",
            "error, merged",
            "error, kept by region",
            "error of the median",
            *(f"lost at {share.replace('%', ' %')} liars" for share in shares),
        )
    ]
    rows += [
        (
            row["kind"],
            _bytes(row["merged_bytes"]),
            _bytes(row["region_bytes"]),
            f"{row['trimmed_mean_error']:.4f}",
            "cannot" if row["joined_error"] is None else f"{row['joined_error']:.5f}",
            f"{row['median_error']:.4f}",
            *(_percent(row["broken"][share]) for share in shares),
        )
        for row in found["accuracy"]
    ]
    return _table(rows)


def _trust(record: Record) -> str:
    found = record.simulated["sketches"]["trust"]

    def lost(share: float) -> str:
        return f"lost in {_percent(share)} of the runs"

    return _table(
        [
            (
                "what happens",
                "one sketch that takes every packet",
                "a sketch of each region, made anew",
            ),
            (
                "sites send ten times and drift by 0.1 each time",
                f"off by {found['drift_inserted']:.2f}",
                f"off by {found['drift_replaced']:.4f}",
            ),
            (
                f"{_percent(found['eager_share'])} of the sites lie, and send twenty times as often",
                lost(found["eager_inserted"]),
                lost(found["eager_replaced"]),
            ),
            (
                f"{_percent(found['aimed_share'], 1)} of the sites lie, just more in a region than it trims",
                "",
                lost(found["aimed_merged"]),
            ),
            (
                "one region of a hundred lies, and claims as many sites as all others have",
                "",
                f"{lost(found['claimed'])}; {lost(found['claimed_capped'])} where sizes are capped",
            ),
        ]
    )


def _take_over(record: Record) -> str:
    costs = _costs(record)
    found = record.simulated["sketches"]
    chosen = next(row for row in found["accuracy"] if row["kind"] == "KLL, k = 800")
    rows: list[Row] = [
        (
            "sites, signals",
            "a value per site, at one server",
            "sketches of 100 regions, at the parent",
            "values of 100 regions, at the parent (as it is)",
        )
    ]
    for sites in SIZES[1:]:
        for signals in (SIGNALS, 200):
            matrix = sites * (costs.site_bytes + signals * costs.cell_bytes)
            sketched = found["regions"] * signals * chosen["region_bytes"]
            values = found["regions"] * (costs.site_bytes + signals * costs.cell_bytes)
            rows.append((f"{sites:,}, {signals}", _bytes(matrix), _bytes(sketched), _bytes(values)))
    return _table(rows)


PARTS: Final[dict[str, Callable[[Record], str]]] = {
    "machine": _machine,
    "short": _short,
    "costs": _grows,
    "stores": _stores,
    "one server": _one,
    "intervals": _intervals,
    "replicas": _replicas,
    "levels": _levels,
    "points": _points,
    "way up": _way_up,
    "precision": _precision,
    "lies": _lies,
    "sketches": _sketches,
    "trust": _trust,
    "take over": _take_over,
}


def _update(costs: UnitCosts, signals: int) -> float:
    return costs.update_bytes + costs.update_signal_bytes * signals


def _round(value: float) -> int:
    """Round to two digits."""
    return int(float(f"{value:.2g}"))


def _share(used: float) -> str:
    return _percent(used) if used < 1.995 else f"{used:.3g} x"


def _percent(share: float, digits: int = 0) -> str:
    return f"{share * 100:.{digits}f} %"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return (
                f"{value / size:.3g} {unit}"
                if value < 999 * size
                else f"{value / size:,.0f} {unit}"
            )
    return f"{value:.0f} B"


def _time(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return (
                f"{value / size:.3g} {unit}"
                if value < 999.5 * size
                else f"{value / size:,.0f} {unit}"
            )
    return f"{value * 1e6:.2f} µs"
