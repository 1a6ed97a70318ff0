"""The load of a soak: sites that emit at a steady rate, subscribers that stay, and some that come and go.

Everything goes over a fixed number of connections, so that what grows at the server is not the load.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import grpc

from fmi.plain import new_packet_id, packet_from_plain
from fmi.v1 import admin_service_pb2, cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as wire
from fmi.v1.admin_service_pb2_grpc import AdminServiceStub
from fmi.v1.interchange_service_pb2_grpc import InterchangeServiceStub

__all__ = ["Load", "Tally"]

COHORTS: Final = tuple(f"soak/{number}" for number in range(4))
SITES: Final = 100
SIGNALS: Final = 25
BATCH: Final = 40
STEADY_SUBSCRIBERS: Final = 20
VISITS_PER_S: Final = 2.0
LONGEST_VISIT_S: Final = 10.0
CALL_S: Final = 30.0
WINDOW_S: Final = 60
"""Seconds for which outcomes, summaries and values count. Until then they are kept, up to 256 outcomes and 64
summaries of each site, and the memory for that shall be full when the warm-up is over. Over the default of 30
days the summaries alone would grow for most of an hour."""

NEVER_READS: Final = (
    # A window that does not grow, so that what nobody reads stays at the server.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65_536),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass
class Tally:
    """What was done since the last reading, and what went wrong since the start."""

    latencies_s: list[float] = field(default_factory=list)
    packets: int = 0
    updates: int = 0
    visits: int = 0
    faults: list[str] = field(default_factory=list)


class Load:
    """Sites and subscribers against one server.

    Args:
        target: Where the server is.
        per_s: Packets a second, one in five alone and the rest in batches.
        seed: Makes values and visits the same again.
    """

    def __init__(self, target: str, *, per_s: float, seed: int) -> None:
        self._target = target
        self._per_s = per_s
        self._chance = random.Random(seed)
        self.tally = Tally()

    async def run(self) -> None:
        """Declare the cohorts, and keep the load up until cancelled."""
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(self._target, options))
                for options in (*[(("grpc.use_local_subchannel_pool", 1),)] * 3, NEVER_READS)
            ]
            await self._declare(channels[0])
            singles, batches, readers, asleep = map(InterchangeServiceStub, channels)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_paced(self._per_s / 5, lambda due: self._emit(singles, due)))
                batches_per_s = self._per_s * 4 / 5 / BATCH
                tasks.create_task(_paced(batches_per_s, lambda _due: self._emit_batch(batches)))
                for number in range(STEADY_SUBSCRIBERS):
                    tasks.create_task(self._follow(readers, every=number % 2 == 0))
                tasks.create_task(_paced(VISITS_PER_S, lambda _due: self._visit(readers)))
                tasks.create_task(self._never_read(asleep))

    async def _declare(self, channel: grpc.aio.Channel) -> None:
        admin = AdminServiceStub(channel)
        for name in COHORTS:
            spec = cohort_pb2.CohortSpec(name=name)
            spec.policy.window.FromSeconds(WINDOW_S)
            spec.retention.site_ttl.FromSeconds(WINDOW_S)
            request = admin_service_pb2.PutCohortSpecRequest(spec=spec)
            await admin.PutCohortSpec(request, timeout=CALL_S)

    def _packet(self) -> packet_pb2.Packet:
        chance = self._chance
        header = {
            "packet_id": new_packet_id(),
            "domain_id": f"site_{chance.randrange(SITES):03}",
            "cohort": chance.choice(COHORTS),
            "rev": 1,
        }
        kind = chance.random()
        if kind < 0.9:
            values = {f"signal_{number}": chance.gauss() for number in range(SIGNALS)}
            body: dict[str, object] = {"type": "msp", "controller": values}
        elif kind < 0.95:
            body = {
                "type": "pop",
                "bundle": {"lr": chance.choice((0.1, 0.2))},
                "before": {"loss": 0.5},
                "after": {"loss": 0.5 * chance.random()},
                "windows": 8,
            }
        else:
            pairs = [("load", "latency", chance.gauss(0.5, 0.1)), ("heat", "load", 0.2)]
            body = {"type": "ccs", "causal_pairs": pairs, "trust": 1.0}
        packet = packet_from_plain({**header, **body})
        packet.header.emitted_at.GetCurrentTime()
        return packet

    async def _emit(self, stub: InterchangeServiceStub, due: float) -> None:
        """Emit one packet; how long that took counts from when it was due."""
        request = wire.EmitRequest(packet=self._packet())
        try:
            response = await stub.Emit(request, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            self._fault("Emit", error)
            return
        self.tally.latencies_s.append(time.monotonic() - due)
        self.tally.packets += 1
        if response.results[0].status != wire.EMIT_STATUS_ACCEPTED:
            self.tally.faults.append(f"Emit: {response.results[0]}")

    async def _emit_batch(self, stub: InterchangeServiceStub) -> None:
        batch = packet_pb2.PacketBatch(packets=[self._packet() for _ in range(BATCH)])
        call = stub.EmitStream(timeout=CALL_S)
        try:
            await call.write(wire.EmitStreamRequest(packets=batch))
            await call.done_writing()
            answer = await call.read()
        except grpc.aio.AioRpcError as error:
            self._fault("EmitStream", error)
            return
        if not isinstance(answer, wire.EmitStreamResponse) or answer.accepted != BATCH:
            self.tally.faults.append(f"EmitStream: {answer}")
        self.tally.packets += BATCH

    async def _follow(self, stub: InterchangeServiceStub, *, every: bool) -> None:
        """Subscribe and read; the stream has no end of its own, so an end is a fault."""
        mode = wire.DELIVERY_MODE_EVERY if every else wire.DELIVERY_MODE_LATEST
        last: dict[tuple[str, int], int] = {}
        try:
            async for event in stub.Subscribe(wire.SubscribeRequest(cohorts=["**"], mode=mode)):
                if event.HasField("update"):
                    self.tally.updates += 1
                    key, revision = (event.update.cohort, event.update.kind), event.update.revision
                    if revision <= last.get(key, 0):
                        self.tally.faults.append(f"revision {revision} of {key} came again")
                    if every and revision != last.get(key, revision - 1) + 1:
                        self.tally.faults.append(f"a gap before revision {revision} of {key}")
                    last[key] = revision
        except grpc.aio.AioRpcError as error:
            self._fault("Subscribe", error)
        else:
            self.tally.faults.append("Subscribe: the stream ended")

    async def _visit(self, stub: InterchangeServiceStub) -> None:
        """Subscribe for a while, and leave."""
        every = self._chance.random() < 0.5
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._chance.uniform(0.0, LONGEST_VISIT_S)):
                await self._follow(stub, every=every)
        self.tally.visits += 1

    async def _never_read(self, stub: InterchangeServiceStub) -> None:
        mode = wire.DELIVERY_MODE_LATEST
        call = stub.Subscribe(wire.SubscribeRequest(cohorts=["**"], mode=mode))
        try:
            await asyncio.Event().wait()
        finally:
            call.cancel()

    def _fault(self, what: str, error: grpc.aio.AioRpcError) -> None:
        self.tally.faults.append(f"{what}: {error.code().name}: {error.details()}")


async def _paced(per_s: float, act: Callable[[float], Awaitable[None]]) -> None:
    """Begin an act at even times, however long those before it take; each is told when it was due."""
    async with asyncio.TaskGroup() as tasks:
        due = time.monotonic()
        while True:
            due += 1.0 / per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.create_task(_done(act(due)))


async def _done(act: Awaitable[None]) -> None:
    await act
