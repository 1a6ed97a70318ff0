"""What one of each thing costs, measured at real servers: a packet, a site, a release, a subscriber.

Processor time is that of the server's process, user and system, and not of whoever sends to it. Bytes on the
network are those of the connections, HTTP/2 included, TCP and IP not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.abuse.run import Server, processor_s, resident, serving
from benchmarks.memory import held_bytes
from benchmarks.scaling.effort import Effort
from benchmarks.scaling.fitting import costs_of
from benchmarks.scaling.sites import (
    Followers,
    Meter,
    Packets,
    Sites,
    connected,
    declare,
    disk_bytes,
    release,
    spent_s,
)
from fmi_demo.cluster import brokers
from fmi_server.app import STORE_FILE
from fmi_server.service import FMIService
from fmi_server.storage import SqliteStore

__all__ = ["SIGNALS", "UnitCosts", "measure"]

SIGNALS: Final = 25
COHORT: Final = "bench"
NEVER_S: Final = 86_400.0
"""Of a cohort that is released only when it is asked for."""

TOLD_SIGNALS: Final = (10, 100)
TOLD_SITES: Final = 50
NAMED_SITES: Final = 1000
"""Sites up to which the lineage of a prior names their reputations."""

ENOUGH_S: Final = 0.5
"""Processor time of releases that is told from the ticks it is counted in."""

MOST_RELEASES: Final = 64
BROKERS: Final = 3


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """What one of each thing costs. Seconds are of one processor core.

    Attributes:
        idle_cpu: Cores that a server with nothing to do takes.
        server_bytes: Memory of a server without sites.
        packet_alone_cpu_s: To take a packet of 25 signals that comes alone, each with a commit of its own, to
            count it, and to judge its site.
        packet_crowd_cpu_s: The same where 64 come at a time.
        packet_batched_cpu_s: To take a packet of an envelope.
        packet_alone_up_bytes: On the network, to the server.
        packet_alone_down_bytes: On the network, the answer.
        packet_batched_up_bytes: On the network, of an envelope.
        compaction_cpu_s: To judge a packet whether it can still count.
        release_cpu_s: A release, whatever is in it, with the call that asks for it.
        release_site_cpu_s: The same for each site of the cohort.
        release_cell_cpu_s: The same for each value held.
        update_bytes: A prior as a message, whatever is in it.
        update_signal_bytes: The same for each signal.
        update_named_site_bytes: The same for each site that its lineage names.
        told_cpu_s: To give an update to a subscriber.
        told_byte_cpu_s: The same for each byte.
        told_frame_bytes: On the network, beside the message.
        subscriber_bytes: Memory of a subscriber with a connection of its own.
        stream_bytes: Memory of one of many on a connection.
        working_bytes: Memory that a server at work takes beside what it holds.
        site_bytes: Memory of a site.
        cell_bytes: Memory of a value, with what a release takes.
        live_disk_bytes: On disk, a packet that counts, whatever is in it.
        live_signal_disk_bytes: The same for each signal.
        retired_disk_bytes: On disk, a packet that cannot count any more.
        start_site_s: Of a start, for each packet that counts.
        uplink_cpu_s: To send a prior to the parent.
        hop_s: From an Emit to the update at a subscriber, of a small cohort where nothing else happens.
        cluster_take_cpu_s: To take a packet of a batch, and send it to the brokers.
        cluster_follow_cpu_s: To carry out and count a packet that another server took.
        cluster_broker_cpu_s: The same at each of three brokers.
        cluster_alone_take_cpu_s: Of a packet that comes alone.
        cluster_alone_follow_cpu_s: Of a packet that comes alone.
        cluster_alone_broker_cpu_s: Of a packet that comes alone.
        cluster_crowd_take_cpu_s: Of a packet where 64 come at a time.
        cluster_crowd_follow_cpu_s: Of a packet where 64 come at a time.
        cluster_crowd_broker_cpu_s: Of a packet where 64 come at a time.
        cluster_view_bytes: On the disk of each server, a packet.
        cluster_log_bytes: On the disk of each broker, a packet until the log is shortened.
    """

    idle_cpu: float
    server_bytes: float
    packet_alone_cpu_s: float
    packet_crowd_cpu_s: float
    packet_batched_cpu_s: float
    packet_alone_up_bytes: float
    packet_alone_down_bytes: float
    packet_batched_up_bytes: float
    compaction_cpu_s: float
    release_cpu_s: float
    release_site_cpu_s: float
    release_cell_cpu_s: float
    update_bytes: float
    update_signal_bytes: float
    update_named_site_bytes: float
    told_cpu_s: float
    told_byte_cpu_s: float
    told_frame_bytes: float
    subscriber_bytes: float
    stream_bytes: float
    working_bytes: float
    site_bytes: float
    cell_bytes: float
    live_disk_bytes: float
    live_signal_disk_bytes: float
    retired_disk_bytes: float
    start_site_s: float
    uplink_cpu_s: float
    hop_s: float
    cluster_take_cpu_s: float
    cluster_follow_cpu_s: float
    cluster_broker_cpu_s: float
    cluster_alone_take_cpu_s: float
    cluster_alone_follow_cpu_s: float
    cluster_alone_broker_cpu_s: float
    cluster_crowd_take_cpu_s: float
    cluster_crowd_follow_cpu_s: float
    cluster_crowd_broker_cpu_s: float
    cluster_view_bytes: float
    cluster_log_bytes: float


Found = dict[str, float]


async def measure(effort: Effort, say: Callable[[str], None]) -> UnitCosts:
    """Measure all of it, one part after the other."""
    found: Found = {}
    parts: dict[str, Callable[[Effort, Path], Awaitable[Found]]] = {
        "packets": packets_taken,
        "bytes on the network": bytes_sent,
        "subscribers": subscribers_told,
        "cohorts": cohorts_released,
        "compaction": packets_compacted,
        "a parent": priors_sent_up,
        "several servers": several_servers,
    }
    for name, part in parts.items():
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found |= await part(effort, Path(folder))
        say(f"{name}: {time.monotonic() - begun:.0f} s")
    # A packet brought each release.
    found["release_cpu_s"] = max(found["release_cpu_s"] - found["packet_alone_cpu_s"], 0.0)
    return UnitCosts(**{field.name: found[field.name] for field in fields(UnitCosts)})


# Packets


async def packets_taken(effort: Effort, folder: Path) -> Found:
    """Measure what a server takes to acknowledge and count packets, and what it takes without.

    Each time at a server of its own, which gets fewer packets than start compaction: that is counted by
    itself.
    """
    spent: defaultdict[str, list[float]] = defaultdict(list)
    alone, crowd, batched = effort.packets // 4, effort.packets // 2, effort.packets
    held: list[float] = []
    for number in range(effort.rounds):
        for name, count, callers in (
            ("packet_alone_cpu_s", alone, 1),
            ("packet_crowd_cpu_s", crowd, 64),
            ("packet_batched_cpu_s", batched, 0),
        ):
            async with (
                serving(folder / f"{name}-{number}") as server,
                connected(server.target) as channel,
            ):
                held.append(float(resident(server.pid)))
                await declare(channel, COHORT, interval_s=NEVER_S)
                sites = Sites(channel, Packets([COHORT], effort.packets, SIGNALS))
                await sites.emit_batches(effort.packets // 8)  # warms up
                await release(channel, COHORT)
                with spent_s(server.pid) as once:
                    await sites.emit(1)
                    await release(channel, COHORT)
                with spent_s(server.pid) as used:
                    if callers:
                        await sites.emit(count, callers=callers)
                    else:
                        await sites.emit_batches(count)
                    await release(channel, COHORT)  # counts what waits
                spent[name].append(max(used[0] - once[0], 0.0) / count)
    async with serving(folder / "idle") as server:
        await asyncio.sleep(1.0)
        with spent_s(server.pid) as used:
            await asyncio.sleep(effort.idle_s)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    return {
        **medians,
        "server_bytes": statistics.median(held),
        "idle_cpu": used[0] / effort.idle_s,
    }


async def bytes_sent(effort: Effort, folder: Path) -> Found:
    """Measure what goes over connections for a packet and for an update."""
    count = max(effort.packets // 20, 10)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(folder))
        async with connected(server.target) as channel:
            await declare(channel, COHORT, interval_s=NEVER_S)
        meter = Meter(stack, server.target)
        await meter.listen()
        channel = await stack.enter_async_context(connected(meter.target))
        sites = Sites(channel, Packets([COHORT], 50, SIGNALS))
        await sites.emit(10)
        up, down = meter.up, meter.down
        await sites.emit(count)
        alone_up, alone_down = (meter.up - up) / count, (meter.down - down) / count
        up = meter.up
        await sites.emit_batches(10 * count)
        batched_up = (meter.up - up) / (10 * count)
        followers = Followers(stack)
        direct = await stack.enter_async_context(connected(server.target))
        await release(direct, COHORT)
        await followers.add(meter.target, 1, [COHORT], own_connections=True)
        others = Sites(direct, Packets([COHORT], 50, SIGNALS))
        down, size = meter.down, followers.size
        for number in range(1, count // 4 + 1):
            await others.emit(1)
            await release(direct, COHORT)
            await followers.got(number + 1)
        frames = meter.down - down - (followers.size - size)
    return {
        "packet_alone_up_bytes": alone_up,
        "packet_alone_down_bytes": alone_down,
        "packet_batched_up_bytes": batched_up,
        "told_frame_bytes": max(frames / (count // 4), 0.0),
    }


# Subscribers


async def subscribers_told(effort: Effort, folder: Path) -> Found:
    """Measure what a subscriber holds, and what it takes to give it an update."""
    amounts, totals, held = [], [], {}
    for signals in TOLD_SIGNALS:
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(serving(folder / str(signals)))
            channel = await stack.enter_async_context(connected(server.target))
            await declare(channel, COHORT, interval_s=NEVER_S)
            sites = Sites(channel, Packets([COHORT], TOLD_SITES, signals))
            await sites.emit(TOLD_SITES)
            await release(channel, COHORT)
            turns = effort.releases * 3

            async def released() -> None:
                await sites.emit(1)  # noqa: B023 - it is called within this turn
                await release(channel, COHORT)  # noqa: B023

            with spent_s(server.pid) as without:
                for _ in range(turns):
                    await released()
            followers = Followers(stack)
            own = signals == TOLD_SIGNALS[0]
            before = resident(server.pid)
            await followers.add(server.target, effort.subscribers, [COHORT], own_connections=own)
            key = "subscriber_bytes" if own else "stream_bytes"
            held[key] = (resident(server.pid) - before) / effort.subscribers
            begun, size = followers.updates, followers.size
            with spent_s(server.pid) as used:
                for turn in range(1, turns + 1):
                    await released()
                    await followers.got(begun + turn * effort.subscribers)
            told = turns * effort.subscribers
            amounts.append([told, followers.size - size])
            totals.append(max(used[0] - without[0], 1e-3))
    told_cpu_s, told_byte_cpu_s = costs_of(amounts, totals)
    return {"told_cpu_s": told_cpu_s, "told_byte_cpu_s": told_byte_cpu_s, **held}


# Cohorts


async def cohorts_released(effort: Effort, folder: Path) -> Found:
    """Measure cohorts of several sizes: memory, disk, updates, and releases after one packet."""
    sizes, memory, disk, updates, releases = effort.cohorts, [], [], [], []
    stored = []
    for number, (count, signals) in enumerate(sizes):
        data_dir = folder / str(number)
        async with serving(data_dir) as server, connected(server.target) as channel:
            await declare(channel, COHORT, interval_s=NEVER_S)
            sites = Sites(channel, Packets([COHORT], count, signals))
            before, files = held_bytes("VmHWM", server.pid), disk_bytes(data_dir)
            await sites.emit_batches(count)
            published = await release(channel, COHORT)
            kept, turns, used_s = sum(update.ByteSize() for update in published), 0, 0.0
            while turns < effort.releases or (used_s < ENOUGH_S and turns < MOST_RELEASES):
                with spent_s(server.pid) as used:
                    for _ in range(effort.releases):
                        await sites.emit(1)
                        published = await release(channel, COHORT)
                        kept += sum(update.ByteSize() for update in published)
                turns += effort.releases
                used_s += used[0]
            releases.append(max(used_s / turns, 1e-4))
            updates.append(next(u.ByteSize() for u in published if u.HasField("prior_update")))
            memory.append(held_bytes("VmHWM", server.pid) - before)
            stored.append([count + turns, (count + turns) * signals])
        disk.append(max(disk_bytes(data_dir) - files - kept, 1))
    begun = await _start_s(folder / str(len(sizes) - 1))
    empty = await _start_s(folder / "empty")
    cells = [[1, count, count * signals] for count, signals in sizes]
    named = [[1, signals, count if count <= NAMED_SITES else 0] for count, signals in sizes]
    fits: list[tuple[str, list[list[int]], list[int] | list[float]]] = [
        ("live_disk_bytes live_signal_disk_bytes", stored, disk),
        ("update_bytes update_signal_bytes update_named_site_bytes", named, updates),
        ("release_cpu_s release_site_cpu_s release_cell_cpu_s", cells, releases),
    ]
    found = {"start_site_s": max(begun - empty, 0.0) / stored[-1][0]}
    for names, amounts, totals in fits:
        found |= zip(names.split(), costs_of(amounts, totals), strict=True)
    # Of memory the large cohorts tell: what small ones take is bounded, and does not grow with them.
    held = costs_of(cells, memory, relative=False)
    found |= zip(("working_bytes", "site_bytes", "cell_bytes"), held, strict=True)
    return found


async def _start_s(data_dir: Path) -> float:
    """Start a server; return the seconds until it listens."""
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        async with serving(data_dir):
            times.append(time.perf_counter() - begun)
    return min(times)


async def packets_compacted(effort: Effort, folder: Path) -> Found:
    """Measure what it takes to judge packets, and what is left on disk of those that are retired.

    The service runs in this process: a server compacts when it sees fit.
    """
    count, turns = effort.packets // 4, 4
    path = folder / STORE_FILE
    async with FMIService(store=SqliteStore(path)) as service:
        sent = Packets([COHORT], count, SIGNALS)
        for _ in range(turns):
            await service.emit_batch(list(sent.made(count)))
            await service.release(COHORT)
        begun = time.process_time()
        done = await service.compactor.compact(COHORT)
        spent = time.process_time() - begun
        used = await asyncio.to_thread(_used_bytes, path)
    async with FMIService(store=SqliteStore(folder / "live.sqlite3")) as service:
        await service.emit_batch(list(sent.made(count)))
        await service.release(COHORT)
        live = await asyncio.to_thread(_used_bytes, folder / "live.sqlite3")
    return {
        "compaction_cpu_s": spent / (done.live + done.retired),
        "retired_disk_bytes": max(used - live, 0) / done.retired,
    }


def _used_bytes(path: Path) -> int:
    """Return the bytes of the pages of a store that are in use."""
    import sqlite3  # noqa: PLC0415 - it stays out of what servers are measured by

    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
    return int((pages - free) * size)


# Levels and replicas


async def priors_sent_up(effort: Effort, folder: Path) -> Found:
    """Measure what it takes to send a prior to a parent, and how soon an update follows an Emit."""
    turns = effort.releases * 15
    spent, hops = {}, []
    async with contextlib.AsyncExitStack() as stack:
        parent = await stack.enter_async_context(serving(folder / "parent"))
        for name, flags in (
            ("alone", ()),
            ("region", ("--parent", parent.target, "--parent-domain-id", "region")),
        ):
            server = await stack.enter_async_context(serving(folder / name, flags))
            channel = await stack.enter_async_context(connected(server.target))
            await declare(channel, COHORT, interval_s=0.01)
            sites = Sites(channel, Packets([COHORT], TOLD_SITES, SIGNALS))
            followers = Followers(stack)
            await sites.emit(TOLD_SITES)
            await followers.add(server.target, 1, [COHORT], own_connections=True)
            await asyncio.sleep(0.5)
            with spent_s(server.pid) as used:
                for _ in range(turns):
                    before, begun = followers.updates, time.perf_counter()
                    await sites.emit(1)
                    await followers.got(before + 1)
                    hops.append(time.perf_counter() - begun)
                    await asyncio.sleep(0.05)
            spent[name] = used[0] / turns
    return {
        "uplink_cpu_s": max(spent["region"] - spent["alone"], 0.0),
        "hop_s": statistics.median(hops),
    }


async def several_servers(effort: Effort, folder: Path) -> Found:
    """Measure two servers on a store at three brokers, of which one takes all packets."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(effort.rounds):
        for name, value in (await _two_servers(effort, folder / str(number))).items():
            found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


async def _two_servers(effort: Effort, folder: Path) -> Found:
    """Measure them once, with fewer packets than start compaction: that is counted by itself."""
    spent: Found = {}
    few, many = effort.packets // 16, effort.packets * 3 // 4
    async with contextlib.AsyncExitStack() as stack:
        found = brokers(folder / "brokers", folder / "broker.log")
        for broker in found:
            await stack.enter_async_context(broker)
        url = "nats://" + ",".join(broker.address for broker in found)
        flags = ("--store", url, "--store-replicas", str(BROKERS))
        servers: list[Server] = [
            await stack.enter_async_context(serving(folder / f"server-{number}", flags))
            for number in range(2)
        ]
        pids = [*(server.pid for server in servers), *_pids_below(folder / "brokers")]
        channel = await stack.enter_async_context(connected(servers[0].target))
        await declare(channel, COHORT, interval_s=NEVER_S)
        sites = Sites(channel, Packets([COHORT], effort.packets, SIGNALS))
        await sites.emit_batches(effort.packets // 8)
        await _carried_out(servers)
        for kind, count, sending in (
            ("alone_", few, sites.emit),
            ("crowd_", few, partial(sites.emit, callers=64)),
            ("", many, sites.emit_batches),
        ):
            with spent_s(*pids) as used:
                await sending(count)
                await _carried_out(servers)
            own, other, *rest = (seconds / count for seconds in used)
            spent[f"cluster_{kind}take_cpu_s"] = own
            spent[f"cluster_{kind}follow_cpu_s"] = other
            spent[f"cluster_{kind}broker_cpu_s"] = sum(rest) / len(rest)
        # Journals are as large as they become by now.
        view, log = disk_bytes(folder / "server-1"), disk_bytes(folder / "brokers")
        await sites.emit_batches(2 * effort.packets)
        await _carried_out(servers)
        grown = disk_bytes(folder / "brokers") - log
        view = disk_bytes(folder / "server-1") - view
    return {
        **spent,
        "cluster_view_bytes": max(view, 0) / (2 * effort.packets),
        "cluster_log_bytes": max(grown, 0) / BROKERS / (2 * effort.packets),
    }


async def _carried_out(servers: Sequence[Server]) -> None:
    """Wait until servers are done with what came: they use next to nothing."""
    while True:
        before = [processor_s(server.pid) for server in servers]
        await asyncio.sleep(0.5)
        after = [processor_s(server.pid) for server in servers]
        if all(later - begun < 0.1 for begun, later in zip(before, after, strict=True)):
            return


def _pids_below(folder: Path) -> list[int]:
    """Return the processes that were started with a file of a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.fsencode(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return sorted(found)
