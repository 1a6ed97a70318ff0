"""Sites that emit through whatever happens to the server, and send again what was not answered."""

from __future__ import annotations

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod

import grpc
from guarantees import Answer
from rig import COHORT, QUICK_RECONNECT, SHORT, Rig
from server_harness import Client, ccs, identity, msp, pop, zstd

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2

__all__ = ["Emitter", "SingleEmitter", "StreamEmitter"]

STATUSES = {
    wire_pb2.EMIT_STATUS_ACCEPTED: "accepted",
    wire_pb2.EMIT_STATUS_DUPLICATE: "duplicate",
}
CALL_S = 10.0
BREAKS = (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError)
"""How a call ends whose connection is gone; the second where it was before the next write."""

REMEMBERED = 2000
"""Packets that a site may send again although they were answered."""


class Emitter(ABC):
    """A site that emits as fast as it is answered but for short rests, and sends again what was not.

    Args:
        rig: The server and the notebook.
        site: The name of the site.
        target: Where it connects, if not where the rig says.
    """

    def __init__(self, rig: Rig, site: str, target: str = "") -> None:
        self._rig = rig
        self._site = site
        self._target = target
        self._chance = random.Random(rig.chance.random())
        self._pending: dict[str, packet_pb2.Packet] = {}
        self._acknowledged: list[packet_pb2.Packet] = []

    async def run(self) -> None:
        """Emit until the rig is stopping and all is answered."""
        while not self._rig.stopping.is_set() or self._pending:
            await self._rig.up.wait()
            async with Client(self._target or self._rig.somewhere(), QUICK_RECONNECT) as client:
                with contextlib.suppress(*BREAKS):
                    await self.emit(client)
            await asyncio.sleep(0.02)

    @abstractmethod
    async def emit(self, client: Client) -> None:
        """Emit over one connection, until it breaks or there is nothing left to send."""

    def batch(self, size: int) -> list[packet_pb2.Packet]:
        """What to send next: what waits for its answer, then new packets, then a repeat or two."""
        packets = list(self._pending.values())[:size]
        while len(packets) < size and not self._rig.stopping.is_set():
            packet = self._new()
            self._pending[packet.header.packet_id] = packet
            packets.append(packet)
        if self._acknowledged and self._chance.random() < 0.2:
            packets.append(self._chance.choice(self._acknowledged))
        return packets

    def answered(self, packet: packet_pb2.Packet, status: int, sequence: int = 0) -> None:
        """Write down an answer."""
        header = packet.header
        key = (header.domain_id, header.packet_id)
        self._rig.history.answers.append(Answer(key, STATUSES[status], sequence))
        self._rig.answered.set()
        if self._pending.pop(header.packet_id, None) is None:
            return
        if len(self._acknowledged) < REMEMBERED:
            self._acknowledged.append(packet)
        else:
            self._acknowledged[self._chance.randrange(REMEMBERED)] = packet

    def _new(self) -> packet_pb2.Packet:
        cohort = SHORT if self._chance.random() < 0.3 else COHORT
        kind = self._chance.random()
        if kind < 0.9:
            return msp(self._site, cohort, controller={"tau": self._chance.random()})
        if kind < 0.95:
            return pop(self._site, cohort, after={"gain": self._chance.random()})
        return ccs(self._site, cohort)


class SingleEmitter(Emitter):
    """Emits packet by packet."""

    async def emit(self, client: Client) -> None:
        while packets := self.batch(1):
            for packet in packets:
                request = wire_pb2.EmitRequest(packet=packet)
                call = client.interchange.Emit(request, timeout=CALL_S)
                self._rig.sent.set()
                (result,) = (await call).results
                self.answered(packet, result.status, result.sequence)
            await asyncio.sleep(self._chance.uniform(0.0, 0.01))


class StreamEmitter(Emitter):
    """Emits batches on a stream, in envelopes and plain."""

    async def emit(self, client: Client) -> None:
        call = client.interchange.EmitStream()
        while packets := self.batch(self._chance.randint(1, 40)):
            async with asyncio.timeout(CALL_S):
                await call.write(self._request(packets))
                self._rig.sent.set()
                answer = await call.read()
            if answer is grpc.aio.EOF:
                return
            assert not answer.HasField("refusal"), answer
            exceptions = {result.index: result for result in answer.exceptions}
            assert answer.accepted + len(exceptions) == answer.packets == len(packets)
            for index, packet in enumerate(packets):
                result = exceptions.get(index)
                if result is None:
                    self.answered(packet, wire_pb2.EMIT_STATUS_ACCEPTED)
                else:
                    self.answered(packet, result.status, result.sequence)
            await asyncio.sleep(self._chance.uniform(0.0, 0.1))
        await call.done_writing()

    def _request(self, packets: list[packet_pb2.Packet]) -> wire_pb2.EmitStreamRequest:
        match self._chance.randint(0, 2):
            case 0:
                batch = packet_pb2.PacketBatch(packets=packets)
                return wire_pb2.EmitStreamRequest(packets=batch)
            case 1:
                return wire_pb2.EmitStreamRequest(encoded=identity(*packets))
            case _:
                return wire_pb2.EmitStreamRequest(encoded=zstd(*packets))
