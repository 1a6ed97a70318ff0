"""BOUNDED: a packet that waits to be counted holds no memory but its own."""

from __future__ import annotations

import asyncio
import gc
import math
import resource
import weakref
from pathlib import Path

import pytest
from parts import NOW, Clock, msp

from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1 import packet_pb2
from fmi_server import checking
from fmi_server.cohorts import CohortRegistry
from fmi_server.contracts import FMIContractRegistry
from fmi_server.emission import Candidate, Intake, slices
from fmi_server.errors import PacketRefusedError
from fmi_server.service import FMIService
from fmi_server.validator import FMIValidator

GOOD = msp(controller={"tau": 0.5})
SMALL_BUT_BAD = packet_pb2.Packet(
    header=GOOD.header, ccs=packet_pb2.ConceptCausalSummary.FromString(b"\x0a\x00" * 500)
).SerializeToString()
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


@pytest.mark.parametrize(
    ("sizes", "turns"),
    [
        ([], [0]),
        ([600], [1]),
        ([600] * 128, [128]),
        ([600] * 129, [128, 1]),
        ([1] * 300, [128, 128, 44]),
        ([2**18] * 3, [1, 1, 1]),
        ([2**17, 1, 1], [2, 1]),
    ],
)
def test_a_batch_is_checked_in_turns(sizes, turns):
    items = [bytes(size) for size in sizes]
    found = slices(items)
    assert [len(turn) for turn in found] == turns
    assert [item for turn in found for item in turn] == items


async def test_a_small_batch_does_not_wait_for_the_whole_of_a_large_one(monkeypatch):
    monkeypatch.setattr(checking, "TURN_S", math.inf)
    checked = []
    check = Intake.inspect_many

    def noting(self, items, **given):
        checked.append(len(items))
        return check(self, items, **given)

    monkeypatch.setattr(Intake, "inspect_many", noting)
    async with FMIService(clock=Clock(NOW)) as service:
        large = asyncio.create_task(service.emit_batch([b"\xff"] * 1280))
        small = asyncio.create_task(service.emit_batch([GOOD.SerializeToString()] * 100))
        assert [answer.status for answer in await small] == ["accepted"] + ["duplicate"] * 99
        assert not large.done()
        answers = await large
    assert checked[:3] == [128, 100, 128]
    assert len(checked) == 11
    told = {error.violations[0].field for error in (answer.error for answer in answers)}
    assert told == {f"packets[{index}]" for index in range(1280)}, "by their places in the batch"


async def test_a_turn_ends_in_time_though_what_is_wrong_takes_long_to_be_told(monkeypatch):
    monkeypatch.setattr(checking, "TURN_S", 0.0)
    checked = []
    check = Intake.inspect_many

    def noting(self, items, **given):
        checked.append(len(items))
        return check(self, items, **given)

    monkeypatch.setattr(Intake, "inspect_many", noting)
    items = [GOOD.SerializeToString(), SMALL_BUT_BAD] * 20
    async with FMIService(clock=Clock(NOW)) as service:
        answers = await service.emit_batch(items)
    assert checked == list(range(40, 0, -1)), "one in each turn"
    assert [answer.status for answer in answers[:4]] == [
        "accepted",
        "refused",
        "duplicate",
        "refused",
    ]
    assert len(answers) == 40


async def test_whatever_breaks_the_contract_is_told_beside_the_event_loop():
    """What is wrong with a packet of 1 kB takes 25 ms to be told: few of them would hold up everybody."""
    async with FMIService(clock=Clock(NOW)) as service:
        async with service._checking.turns.taken(""):
            waiting = [
                asyncio.create_task(work)
                for work in (
                    service.emit(SMALL_BUT_BAD),
                    service.inspect(SMALL_BUT_BAD),
                    service.emit_batch([GOOD.SerializeToString(), SMALL_BUT_BAD]),
                )
            ]
            done, _ = await asyncio.wait(waiting, timeout=0.2)
            assert not done
            answer = await service.emit(GOOD.SerializeToString())
            assert answer.status == "accepted"
        with pytest.raises(PacketRefusedError) as caught:
            await waiting[0]
        assert len(caught.value.violations) == 100
        assert (await waiting[1]).violations == caught.value.violations
        assert [answer.status for answer in await waiting[2]] == ["duplicate", "refused"]


def test_what_no_cohort_takes_is_refused_before_it_is_parsed():
    largest = CohortRegistry(FMIContractRegistry()).largest_packet_bytes
    with pytest.raises(PacketRefusedError) as caught:
        INTAKE.parsed(b"\xff" * (largest + 1))
    assert [found.rule_id for found in caught.value.violations] == ["fmi.policy.max_packet_bytes"]
    with pytest.raises(PacketRefusedError) as caught:
        INTAKE.parsed(b"\xff" * largest)
    assert [found.rule_id for found in caught.value.violations] == ["fmi.packet.malformed"]


def test_what_was_refused_is_not_kept():
    """Each takes 12 MB when it is parsed, and the answers wait for the last of their batch."""
    pairs = packet_pb2.ConceptCausalSummary.FromString(b"\x0a\x00" * 120_000)
    bad = packet_pb2.Packet(header=GOOD.header, ccs=pairs).SerializeToString()
    INTAKE.inspect_many([bad], received_at_us=1)
    before = rss_mb()
    answers = INTAKE.inspect_many([bytes(bytearray(bad)) for _ in range(30)], received_at_us=1)
    assert all(len(answer.error.violations) == 100 for answer in answers)
    assert rss_mb() - before < 100


async def test_a_packet_that_is_refused_is_let_go_of_without_the_garbage_collector():
    """Its frames have the packet."""
    bad = [packet_pb2.Packet(header=GOOD.header).SerializeToString(), b"\xff" * 600_000]
    async with FMIService(clock=Clock(NOW)) as service:
        for data in bad:
            gc.collect()
            gc.disable()
            try:
                with pytest.raises(PacketRefusedError) as caught:
                    await service.emit(data)
                gone = weakref.ref(caught.value)
                del caught
                for _ in range(10_000):  # the thread that told of it lets go of it too
                    if gone() is not None:
                        await asyncio.sleep(0.001)
                assert gone() is None
            finally:
                gc.enable()


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


async def test_a_large_packet_is_checked_beside_the_event_loop():
    """What is wrong with it takes long to be told; small ones are checked at once."""
    pairs = packet_pb2.ConceptCausalSummary.FromString(b"\x0a\x00" * 30_000)
    large = packet_pb2.Packet(header=GOOD.header, ccs=pairs).SerializeToString()
    async with FMIService(clock=Clock(NOW)) as service:
        async with service._checking.turns.taken(""):
            refused = asyncio.create_task(service.emit(large))
            told = asyncio.create_task(service.inspect(large))
            answer = await service.emit(GOOD.SerializeToString())
            assert answer.status == "accepted"
            assert (await service.inspect(GOOD.SerializeToString())).violations == ()
            assert not refused.done()
            assert not told.done()
        with pytest.raises(PacketRefusedError):
            await refused
        assert (await told).violations
