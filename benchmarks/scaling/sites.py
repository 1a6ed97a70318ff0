"""Sites and subscribers against a real server, and what is read of its process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import grpc
import numpy as np
import zstandard

from benchmarks.abuse.run import processor_s
from fmi.plain import CURRENT_REVISION, new_packet_id
from fmi.v1 import cohort_pb2, packet_pb2, update_pb2
from fmi.v1 import interchange_service_pb2 as wire
from fmi.v1.admin_service_pb2 import PutCohortSpecRequest, ReleaseNowRequest
from fmi.v1.admin_service_pb2_grpc import AdminServiceStub
from fmi.v1.interchange_service_pb2_grpc import InterchangeServiceStub

__all__ = [
    "Followers",
    "Meter",
    "Packets",
    "Sites",
    "connected",
    "declare",
    "disk_bytes",
    "release",
    "spent_s",
]

BATCH: Final = 200
"""Packets of an envelope."""

OWN_CONNECTION: Final = (("grpc.use_local_subchannel_pool", 1),)
CALL_S: Final = 60.0
WAIT_S: Final = 120.0
TRIES: Final = 50
AGAIN_S: Final = 0.2
MOST_CALLS: Final = 64
"""Fewer than a server takes on one connection (`max_connection_calls`)."""


@contextlib.asynccontextmanager
async def connected(target: str) -> AsyncIterator[grpc.aio.Channel]:
    """Connect to a server, over a connection of its own."""
    options = (*OWN_CONNECTION, ("grpc.max_receive_message_length", 2**26))
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        await channel.channel_ready()
        yield channel


async def declare(
    channel: grpc.aio.Channel, cohort: str, *, interval_s: float, min_sites: int = 3
) -> None:
    """Put a cohort in force that is released at most once in an interval."""
    spec = cohort_pb2.CohortSpec(name=cohort, free_signals=True)
    spec.release.min_interval.FromMilliseconds(int(interval_s * 1e3))
    spec.release.max_interval.FromSeconds(max(60, int(interval_s)))
    spec.aggregation.vote_min_sites = min_sites
    await AdminServiceStub(channel).PutCohortSpec(PutCohortSpecRequest(spec=spec), timeout=CALL_S)


async def release(channel: grpc.aio.Channel, cohort: str) -> Sequence[update_pb2.Update]:
    """Release a cohort now; return what was published."""
    request = ReleaseNowRequest(cohort=cohort)
    return (await AdminServiceStub(channel).ReleaseNow(request, timeout=CALL_S)).updates


class Packets:
    """What sites of cohorts send: a value of each signal in every packet.

    Args:
        cohorts: Names; the sites are spread over them in turn.
        count: How many sites there are.
        signals: How many signals each has.
    """

    def __init__(self, cohorts: Sequence[str], count: int, signals: int) -> None:
        self._cohorts = cohorts
        self._count = count
        self._random = np.random.default_rng(1)
        self._names = [f"signal_{number:02}" for number in range(signals)]
        self._turn = 0

    def made(self, count: int) -> Iterator[packet_pb2.Packet]:
        """Make packets of one site after the other."""
        for _ in range(count):
            yield self._packet(self._turn % self._count)
            self._turn += 1

    def _packet(self, number: int) -> packet_pb2.Packet:
        packet = packet_pb2.Packet()
        header = packet.header
        header.packet_id, header.domain_id = new_packet_id(), f"site_{number:07}"
        header.cohort, header.rev = self._cohorts[number % len(self._cohorts)], CURRENT_REVISION
        header.emitted_at.GetCurrentTime()
        values = self._random.normal(1.0, 0.1, len(self._names)).tolist()
        packet.msp.controller.update(zip(self._names, values, strict=True))
        packet.msp.evidence.confidence = 0.9
        return packet


class Sites:
    """Sites that send packets to a server.

    Args:
        channel: To the server.
        packets: What they send.
    """

    def __init__(self, channel: grpc.aio.Channel, packets: Packets) -> None:
        self._stub = InterchangeServiceStub(channel)
        self._packets = packets

    async def emit(self, count: int, *, callers: int = 1) -> None:
        """Send packets alone, with so many calls on their way at a time."""
        made = iter([wire.EmitRequest(packet=packet) for packet in self._packets.made(count)])

        async def caller() -> None:
            for request in made:
                await self._emit(request)

        await asyncio.gather(*(caller() for _ in range(callers)))

    async def _emit(self, request: wire.EmitRequest) -> None:
        """Send a packet, and again where the server has too many calls, as the SDK does."""
        for _ in range(TRIES):
            try:
                await self._stub.Emit(request, timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(AGAIN_S)
            else:
                return
        raise RuntimeError("the server takes nothing")

    async def emit_batches(self, count: int) -> None:
        """Send packets in compressed envelopes, each when the one before is answered."""
        compressor = zstandard.ZstdCompressor(level=3)
        call = self._stub.EmitStream()
        left = count
        while left:
            made = packet_pb2.PacketBatch(packets=self._packets.made(min(BATCH, left)))
            left -= len(made.packets)
            data = made.SerializeToString()
            envelope = wire.EncodedPackets(
                encoding=wire.ENCODING_ZSTD,
                uncompressed_size=len(data),
                data=compressor.compress(data),
            )
            await call.write(wire.EmitStreamRequest(encoded=envelope))
            answer = await call.read()
            assert isinstance(answer, wire.EmitStreamResponse), "the stream ended"
            assert answer.accepted == len(made.packets), "the server refused packets"
        await call.done_writing()
        await call.read()

    async def emit_evenly(self, per_s: float, seconds: float) -> None:
        """Send packets alone at even times, however long those before take, while not too many do."""
        begun, room = time.monotonic(), asyncio.Semaphore(MOST_CALLS)
        async with asyncio.TaskGroup() as tasks:
            for number in range(int(per_s * seconds)):
                await asyncio.sleep(max(0.0, begun + number / per_s - time.monotonic()))
                await room.acquire()
                task = tasks.create_task(self.emit(1))
                task.add_done_callback(lambda _done: room.release())


class Followers:
    """Subscribers of priors, and what they got.

    Attributes:
        updates: Updates that all of them got.
        size: Bytes of these, as messages.
        newest: The newest prior.
    """

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack
        self._tasks: list[asyncio.Task[None]] = []
        self._started = 0
        self._changed = asyncio.Event()
        self.updates = self.size = 0
        self.newest: update_pb2.Update | None = None
        stack.push_async_callback(self._close)

    async def add(
        self, target: str, count: int, cohorts: Sequence[str], *, own_connections: bool
    ) -> None:
        """Subscribe to one of the cohorts each; return when all snapshots ended."""
        channel: grpc.aio.Channel | None = None
        for number in range(count):
            if channel is None or own_connections or number % 100 == 0:
                channel = grpc.aio.insecure_channel(target, options=OWN_CONNECTION)
                self._stack.push_async_callback(channel.close)
            follow = self._follow(channel, cohorts[number % len(cohorts)])
            self._tasks.append(asyncio.create_task(follow))
        await self.until(lambda: self._started == len(self._tasks))

    async def got(self, updates: int) -> None:
        """Wait until all of them together got so many updates."""
        await self.until(lambda: self.updates >= updates)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds that what subscribers get decides."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                changed = asyncio.create_task(self._changed.wait())
                done, _ = await asyncio.wait(
                    [changed, *self._tasks], return_when=asyncio.FIRST_COMPLETED
                )
                changed.cancel()
                for task in done - {changed}:
                    task.result()  # a subscription has no end of its own
                    raise RuntimeError("a subscription ended")

    async def _follow(self, channel: grpc.aio.Channel, cohort: str) -> None:
        request = wire.SubscribeRequest(cohorts=[cohort], kinds=[update_pb2.UPDATE_KIND_PRIOR])
        async for event in InterchangeServiceStub(channel).Subscribe(request):
            if event.HasField("update"):
                self.updates += 1
                self.size += event.ByteSize()
                self.newest = event.update
            self._started += event.HasField("snapshot_end")
            self._changed.set()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Meter:
    """Counts what goes over connections, by being in their way.

    Attributes:
        target: Where to connect instead.
        up: Bytes towards the server.
        down: Bytes from it.
    """

    def __init__(self, stack: contextlib.AsyncExitStack, target: str) -> None:
        self._stack = stack
        self._host, _, self._port = target.rpartition(":")
        self.up = self.down = 0
        self.target = ""

    async def listen(self) -> None:
        """Begin to listen."""
        server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._stack.callback(server.close)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_read, to_write = await asyncio.open_connection(self._host, int(self._port))
        await asyncio.gather(
            self._copy(reader, to_write, up=True), self._copy(to_read, writer, up=False)
        )

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


@contextlib.contextmanager
def spent_s(*pids: int) -> Iterator[list[float]]:
    """Yield a list that has, afterwards, the processor seconds that each process used meanwhile."""
    before = [processor_s(pid) for pid in pids]
    found: list[float] = []
    yield found
    found.extend(processor_s(pid) - begun for pid, begun in zip(pids, before, strict=True))


def disk_bytes(folder: Path) -> int:
    """Return what the files of a folder take."""
    files = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    return sum(path.stat().st_size for path in files if path.exists())
