"""The bus: the overview's snippets as they stand, and a federation joined to it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest
from parts import msp

from fmi.plain import packet_to_plain
from fmi.v1 import update_pb2
from fmi_server import FMIAggregator, FMIService, InProcessBus
from fmi_server.bus import PACKET_TOPIC, UPDATE_TOPIC, Bus, FederationBusAdapter
from fmi_server.errors import CohortUnknownError


def test_the_overview_works_as_it_stands():
    bus = InProcessBus()
    seen = {}

    def handle_fmi_update(topic, payload):
        prior = payload["prior"]
        seen[topic] = prior

    packets = []

    def handle_packet(topic, payload):
        assert topic == "federation.packet"
        packets.append(payload)

    bus.subscribe("federation.packet", handle_packet)
    bus.subscribe("meta.fmi_update", handle_fmi_update)
    bus.publish("federation.packet", {"type": "msp"})
    result = FMIAggregator().aggregate(
        "healthcare", [msp(f"s{i}", controller={"tau": 0.9}) for i in range(3)]
    )
    assert bus.publish("meta.fmi_update", result.prior_update) == 1
    assert seen == {"meta.fmi_update": {"tau": pytest.approx(0.9)}}
    assert packets == [{"type": "msp"}]
    assert bus.failures == 0


def test_a_handler_finds_every_field_also_where_it_is_empty():
    payloads = []
    bus = InProcessBus()
    bus.subscribe(UPDATE_TOPIC, lambda _topic, payload: payloads.append(payload))
    bus.publish(UPDATE_TOPIC, update_pb2.MetaPriorUpdate())
    bus.publish(UPDATE_TOPIC, update_pb2.MetaPriorUpdate(rev=3, prior={"tau": 0.5}))
    assert [(p["rev"], p["prior"], p["contexts"], p["cohorts"]) for p in payloads] == [
        (0, {}, [], []),
        (3, {"tau": 0.5}, [], []),
    ]
    assert payloads[0]["confidence"] == 0.0


def test_handlers_are_called_in_order_and_one_that_fails_harms_no_other(caplog):
    bus = InProcessBus()
    calls = []

    def failing(_topic, _payload):
        calls.append("failing")
        raise RuntimeError("of the test")

    bus.subscribe("t", lambda *_: calls.append("first"))
    bus.subscribe("t", failing)
    bus.subscribe("t", lambda *_: calls.append("last"))
    bus.subscribe("other", lambda *_: calls.append("other"))
    with caplog.at_level(logging.ERROR):
        assert bus.publish("t", {}) == 2
    assert calls == ["first", "failing", "last"]
    assert bus.failures == 1
    assert "of the test" in caplog.text


def test_a_subscription_can_be_ended_twice_and_in_its_own_call():
    bus = InProcessBus()
    calls = []

    def once(_topic, payload):
        calls.append(payload)
        end()

    end = bus.subscribe("t", once)
    assert bus.publish("t", {"n": 1}) == 1
    assert bus.publish("t", {"n": 2}) == 0
    end()
    assert calls == [{"n": 1}]


def test_nobody_listening_is_no_error():
    assert InProcessBus().publish("nothing", update_pb2.MetaPriorUpdate()) == 0


class Ingest:
    """Takes packets and does with each what the test says."""

    def __init__(self) -> None:
        self.taken = []
        self.first = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def emit(self, packet):
        await self.open.wait()
        self.taken.append(packet)
        self.first.set()
        if "error" in packet:
            raise packet["error"]


async def started(adapter: FederationBusAdapter) -> asyncio.Task[None]:
    task = asyncio.create_task(adapter.run())
    await asyncio.sleep(0)
    return task


async def test_what_the_service_refuses_is_counted_and_the_next_is_taken(caplog):
    bus, ingest = InProcessBus(), Ingest()
    adapter = FederationBusAdapter(bus, ingest)
    task = await started(adapter)
    bus.publish(PACKET_TOPIC, {"error": CohortUnknownError("care")})
    bus.publish(PACKET_TOPIC, {"error": ZeroDivisionError("a fault of the server")})
    bus.publish(PACKET_TOPIC, {"good": True})
    await asyncio.wait_for(adapter.drained(), 60)
    assert len(ingest.taken) == 3
    assert adapter.refused == 2
    assert "a fault of the server" in caplog.text
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert bus.publish(PACKET_TOPIC, {}) == 0, "it does not listen any more"


async def test_what_finds_no_room_is_dropped_and_counted():
    bus, ingest = InProcessBus(), Ingest()
    ingest.open.clear()
    adapter = FederationBusAdapter(bus, ingest, queue_packets=2)
    task = await started(adapter)
    taken = [bus.publish(PACKET_TOPIC, {"n": n}) for n in range(5)]
    assert taken == [1, 1, 0, 0, 0]
    assert (adapter.dropped, bus.failures) == (3, 3)
    ingest.open.set()
    await asyncio.wait_for(adapter.drained(), 60)
    assert [packet["n"] for packet in ingest.taken] == [0, 1]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_packets_published_from_other_threads_are_taken_at_once_and_bounded():
    bus, ingest = InProcessBus(), Ingest()
    ingest.open.clear()
    adapter = FederationBusAdapter(bus, ingest, queue_packets=100)
    task = await started(adapter)
    threads = [
        threading.Thread(target=lambda: [bus.publish(PACKET_TOPIC, {}) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()  # the event loop stands still meanwhile, and takes nothing
    assert (adapter.dropped, bus.failures) == (100, 100)
    ingest.open.set()
    await asyncio.wait_for(adapter.drained(), 60)
    assert len(ingest.taken) == 100
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_packet_from_another_thread_wakes_an_idle_loop():
    bus, ingest = InProcessBus(), Ingest()
    task = await started(FederationBusAdapter(bus, ingest))
    thread = threading.Timer(0.05, bus.publish, (PACKET_TOPIC, {}))
    thread.start()
    # Nothing wakes the loop before the time is over but the packet.
    began = time.monotonic()
    await asyncio.wait_for(ingest.first.wait(), 60)
    assert time.monotonic() - began < 30
    thread.join()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_federation_on_a_bus_gives_its_prior_to_the_meta_layer():
    bus: Bus = InProcessBus()
    told: asyncio.Queue[dict] = asyncio.Queue()
    bus.subscribe(UPDATE_TOPIC, lambda _topic, payload: told.put_nowait(payload))
    async with FMIService(bus=bus) as service:
        now = service.validator._clock()
        for wrong in ({}, {"metrics": {"\ud800": 1}}, {"type": 10**5000}, {"type": "msp"}):
            bus.publish(PACKET_TOPIC, wrong)
        for site in range(3):
            packet = msp(f"s{site}", controller={"tau": 0.9}, at=now)
            bus.publish(PACKET_TOPIC, packet_to_plain(packet))
        payload = await asyncio.wait_for(told.get(), 60)
        assert service._bus.refused == 4
    assert payload["prior"] == {"tau": pytest.approx(0.9)}
    assert payload["rev"] == 1
    assert payload["cohorts"] == ["care"]
