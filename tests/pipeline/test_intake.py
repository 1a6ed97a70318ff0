"""BOUNDED: a packet that waits to be counted holds no memory but its own."""

from __future__ import annotations

import resource
from pathlib import Path

from parts import NOW, Clock, msp

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2
from fmi_server.contracts import FMIContractRegistry
from fmi_server.emission import Candidate, Intake
from fmi_server.validator import FMIValidator

GOOD = msp(controller={"tau": 0.5})
REGISTRY = FMIContractRegistry()
INTAKE = Intake(REGISTRY, FMIValidator(REGISTRY, clock=Clock(NOW)))


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def behind_a_bomb(packet: packet_pb2.Packet) -> bytes:
    """A request for a packet, and before it half a megabyte of empty pairs that it takes the place of."""
    pairs = packet_pb2.ConceptCausalSummary.FromString(b"\x0a\x00" * 250_000)
    bomb = wire_pb2.EmitRequest(packet=packet_pb2.Packet(ccs=pairs))
    return bomb.SerializeToString() + wire_pb2.EmitRequest(packet=packet).SerializeToString()


def test_what_was_overwritten_is_not_kept():
    sent = behind_a_bomb(GOOD)
    wire_pb2.EmitRequest.FromString(sent)
    before = rss_mb()
    kept = [
        INTAKE.inspect(wire_pb2.EmitRequest.FromString(sent).packet, received_at_us=int(NOW * 1e6))
        for _ in range(20)
    ]
    assert all(candidate.packet == GOOD for candidate in kept)
    assert rss_mb() - before < 100, "each took 25 MB"


def test_a_good_packet_does_not_keep_its_batch():
    batch = packet_pb2.PacketBatch(packets=[GOOD])
    bomb = packet_pb2.ConceptCausalSummary.FromString(b"\x0a\x00" * 250_000)
    batch.packets.add(ccs=bomb)
    sent = batch.SerializeToString()
    packet_pb2.PacketBatch.FromString(sent)
    before = rss_mb()
    kept = [
        INTAKE.inspect_many(
            packet_pb2.PacketBatch.FromString(sent).packets, received_at_us=int(NOW * 1e6)
        )[0]
        for _ in range(20)
    ]
    assert all(isinstance(candidate, Candidate) for candidate in kept)
    assert rss_mb() - before < 100
