"""The model held against real servers: what it says of them beside what they do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from benchmarks.abuse.run import serving
from benchmarks.memory import held_bytes
from benchmarks.scaling.effort import Effort
from benchmarks.scaling.model import KINDS_STORED, Duty, load_of
from benchmarks.scaling.plan import latency_of
from benchmarks.scaling.sites import (
    Followers,
    Meter,
    Packets,
    Sites,
    connected,
    declare,
    disk_bytes,
    spent_s,
)
from benchmarks.scaling.unit_costs import SIGNALS, UnitCosts
from fmi.v1 import interchange_service_pb2 as wire
from fmi.v1 import packet_pb2, update_pb2
from fmi.v1.interchange_service_pb2_grpc import InterchangeServiceStub

__all__ = ["Checked", "Point", "Points", "WayUp", "measure_points"]

COHORTS: Final = tuple(f"cohort-{number}" for number in range(4))
INTERVAL_S: Final = 1.0
LEVELS_S: Final = (1.0, 1.07, 1.13)
"""Of three levels, not the same for each: how these lie to each other in time decides who waits for whom, and
would stay as it happens to be."""

CHANGED: Final = "changed"
PRIOR: Final = update_pb2.UPDATE_KIND_PRIOR
NOISE_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Checked:
    """A number that was predicted, and measured."""

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured if self.measured else float("inf")


@dataclass(frozen=True, slots=True)
class Point:
    """A server under an even load.

    Attributes:
        sites: Sites that it holds, of 25 signals.
        packets_per_s: That came alone.
        subscribers: Over a connection each.
        cores: Processor.
        memory_bytes: The most that was held.
        disk_bytes: Of its store, when all its sites have sent one packet.
        update_bytes: A prior.
        updates_per_s: That a subscriber got.
        out_bytes_s: On the network, to a subscriber.
    """

    sites: int
    packets_per_s: float
    subscribers: int
    cores: Checked
    memory_bytes: Checked
    disk_bytes: Checked
    update_bytes: Checked
    updates_per_s: Checked
    out_bytes_s: Checked


@dataclass(frozen=True, slots=True)
class WayUp:
    """How long a change takes from sites to the top of three servers, in seconds.

    Attributes:
        quiet_s: Where nothing else happens, the median.
        busy_s: Where other sites send all the time, the median.
        most_s: The same, the longest.
    """

    quiet_s: Checked
    busy_s: Checked
    most_s: Checked


@dataclass(frozen=True, slots=True)
class Points:
    """All that was predicted and measured."""

    servers: tuple[Point, ...]
    way_up: WayUp


async def measure_points(effort: Effort, costs: UnitCosts, say: Callable[[str], None]) -> Points:
    """Measure servers of several sizes, and the way up through three levels."""
    found = []
    for sites, per_s in effort.points:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            subscribers = max(effort.subscribers // 3, 2)
            found.append(await _point(sites, per_s, subscribers, effort, costs, Path(folder)))
        say(f"a server of {sites:,} sites: {time.monotonic() - begun:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        way_up = await _way_up(effort.changes, costs, Path(folder))
        say(f"three levels: {time.monotonic() - begun:.0f} s")
    return Points(tuple(found), way_up)


async def _point(
    sites: int, per_s: float, subscribers: int, effort: Effort, costs: UnitCosts, folder: Path
) -> Point:
    duty = Duty(sites, SIGNALS, len(COHORTS), per_s, INTERVAL_S, subscribers + 1)
    told = load_of(duty, costs)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(folder))
        channel = await stack.enter_async_context(connected(server.target))
        for cohort in COHORTS:
            await declare(channel, cohort, interval_s=INTERVAL_S)
        senders = Sites(channel, Packets(COHORTS, sites, SIGNALS))
        await senders.emit_batches(sites)
        followers = Followers(stack)
        await followers.add(server.target, subscribers, COHORTS, own_connections=True)
        meter = Meter(stack, server.target)
        await meter.listen()
        await followers.add(meter.target, 1, COHORTS[:1], own_connections=True)
        await asyncio.sleep(2 * INTERVAL_S)
        updates, size, down = followers.updates, followers.size, meter.down
        begun = time.monotonic()
        with spent_s(server.pid) as used:
            await senders.emit_evenly(per_s, effort.point_s)
        took = time.monotonic() - begun
        count, size = followers.updates - updates, followers.size - size
        memory = held_bytes("VmHWM", server.pid)
        out = (meter.down - down) / took
        listed = InterchangeServiceStub(channel)
        revisions = [
            (await listed.GetUpdate(wire.GetUpdateRequest(cohort=name, kind=PRIOR))).update.revision
            for name in COHORTS
        ]
    # It has ended, so that nothing stands in its log. It is young: nothing was compacted.
    packets = sites + int(per_s * effort.point_s)
    disk = packets * (costs.live_disk_bytes + costs.live_signal_disk_bytes * SIGNALS)
    disk += sum(revisions) * KINDS_STORED * told.update_bytes
    per_cohort = told.releases_per_s / len(COHORTS)
    return Point(
        sites=sites,
        packets_per_s=per_s,
        subscribers=subscribers + 1,
        cores=Checked(told.cores, used[0] / took),
        memory_bytes=Checked(told.memory_bytes, float(memory)),
        disk_bytes=Checked(disk, float(disk_bytes(folder))),
        update_bytes=Checked(told.update_bytes, size / max(count, 1)),
        updates_per_s=Checked(per_cohort, count / (subscribers + 1) / took),
        out_bytes_s=Checked(per_cohort * (told.update_bytes + costs.told_frame_bytes), out),
    )


async def _way_up(changes: int, costs: UnitCosts, folder: Path) -> WayUp:
    """Time changes that three sites of the lowest server agree on, until the highest one tells them."""
    async with contextlib.AsyncExitStack() as stack:
        above, targets = "", []
        others: list[Sites] = []
        for number, interval_s in enumerate(reversed(LEVELS_S)):
            flags = ["--parent", above, "--parent-domain-id", "below"] if above else []
            server = await stack.enter_async_context(serving(folder / str(number), flags))
            channel = await stack.enter_async_context(connected(server.target))
            await declare(channel, COHORTS[0], interval_s=interval_s, min_sites=1)
            above = server.target
            targets.append(above)
            # Other sites of each level, which do not have the signal that changes.
            others.append(Sites(channel, Packets(COHORTS[:1], 20, 2)))
        channel = await stack.enter_async_context(connected(targets[-1]))
        changers = Changers(channel)
        followers = Followers(stack)
        await changers.agree()
        await followers.add(targets[0], 1, COHORTS[:1], own_connections=True)

        async def time_of_change() -> float:
            begun, value = time.monotonic(), await changers.agree()
            await followers.until(lambda: _said(followers, value))
            return time.monotonic() - begun

        await time_of_change()
        quiet, busy = [], []
        for _ in range(changes):
            await asyncio.sleep(1.5 * INTERVAL_S)
            quiet.append(await time_of_change())
        noise = [asyncio.create_task(sites.emit_evenly(20.0, NOISE_S)) for sites in others]
        for number in range(changes):
            # At different times of the interval.
            await asyncio.sleep(INTERVAL_S * (0.5 + number / changes))
            busy.append(await time_of_change())
        for task in noise:
            task.cancel()
        await asyncio.wait(noise)
    loads = [load_of(Duty(20, 3, 1, 20.0, interval_s), costs) for interval_s in LEVELS_S]
    told = latency_of(loads, costs)
    return WayUp(
        quiet_s=Checked(told.quiet_s, statistics.median(quiet)),
        busy_s=Checked(told.busy_s, statistics.median(busy)),
        most_s=Checked(told.most_s, max(busy)),
    )


class Changers:
    """Three sites that agree on a new value each time.

    Args:
        channel: To their server.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = InterchangeServiceStub(channel)
        self._values = itertools.count(1)

    async def agree(self) -> float:
        """Send a value from each; return it."""
        value = float(next(self._values))
        batch = packet_pb2.PacketBatch(packets=Packets(COHORTS[:1], 3, 0).made(3))
        for packet in batch.packets:
            packet.header.domain_id = f"changer_{packet.header.domain_id}"
            packet.msp.controller[CHANGED] = value
        # All at once: a release between two of them would have the rest wait for the next.
        call = self._stub.EmitStream()
        await call.write(wire.EmitStreamRequest(packets=batch))
        await call.done_writing()
        await call.read()
        return value


def _said(followers: Followers, value: float) -> bool:
    newest = followers.newest
    return newest is not None and newest.prior_update.prior.get(CHANGED) == value
