from __future__ import annotations

import asyncio
import contextlib

import pytest

from fmi.v1 import update_pb2
from fmi_server import uplink as uplink_module
from fmi_server.contracts import FMIContractRegistry
from fmi_server.telemetry import FMITelemetry
from fmi_server.uplink import (
    REFRESH_S,
    ParentRefusedError,
    ParentUnavailableError,
    Uplink,
    summary_packet,
)

AT = 1_790_000_000


def prior(revision=1, cohort="care", **values):
    update = update_pb2.Update(
        cohort=cohort, kind=update_pb2.UPDATE_KIND_PRIOR, revision=revision, history_epoch="e1"
    )
    update.released_at.seconds = AT
    for name, value in (values or {"tau": 0.9}).items():
        found = update.prior_update.estimates[name]
        found.section, found.value, found.stderr = "controller", value, 0.01
        found.sites, found.effective_sites, found.confidence = 12, 10.5, 0.8
    return update


class Parent:
    """Takes packets, after failing as told."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.taken = []
        self.idle = asyncio.Event()

    async def send(self, packet):
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        self.taken.append(packet)
        self.idle.set()


@contextlib.asynccontextmanager
async def linked(parent, newest, telemetry=None):
    link = Uplink(
        "region-1",
        cohorts=lambda: list(newest),
        newest=newest.get,
        send=parent.send,
        telemetry=telemetry or FMITelemetry(),
        clock=lambda: AT + 1.0,
    )
    task = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(parent, count):
    async with asyncio.timeout(5):
        while len(parent.taken) < count:
            parent.idle.clear()
            await parent.idle.wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(uplink_module, "FIRST_DELAY_S", 0.001)


def test_the_packet_says_what_the_prior_says():
    packet = summary_packet(prior(tau=0.9, eta=0.1), "region-1", now=AT)
    assert dict(packet.msp.controller) == {"tau": 0.9, "eta": 0.1}
    assert packet.msp.evidence.sites == 10.5
    assert packet.msp.evidence.signals["tau"].stderr == 0.01
    assert packet.msp.evidence.signals["tau"].confidence == 0.8
    assert (packet.header.domain_id, packet.header.cohort) == ("region-1", "care")
    assert packet.header.emitted_at.seconds == AT
    assert FMIContractRegistry().violations(packet) == []


def test_the_packet_of_a_revision_is_always_the_same():
    first = summary_packet(prior(), "region-1", now=AT)
    assert summary_packet(prior(), "region-1", now=AT + REFRESH_S - 1) == first
    for other in (
        summary_packet(prior(2), "region-1", now=AT),
        summary_packet(prior(), "region-2", now=AT),
        summary_packet(prior(cohort="cure"), "region-1", now=AT),
        summary_packet(prior(), "region-1", now=AT + REFRESH_S),
    ):
        assert other.header.packet_id != first.header.packet_id


def test_an_old_prior_is_dated_to_the_day():
    packet = summary_packet(prior(), "region-1", now=AT + 30.4 * REFRESH_S)
    assert packet.header.emitted_at.seconds == AT + 30 * REFRESH_S


def test_a_prior_without_a_value_is_no_packet():
    update = prior()
    update.prior_update.estimates["tau"].ClearField("value")
    assert summary_packet(update, "region-1", now=AT) is None


def test_the_signals_of_most_sites_go_up_where_there_are_too_many():
    update = prior(**{f"s{i}": 1.0 for i in range(1030)})
    for i in range(6):
        update.prior_update.estimates[f"s{i}"].sites = 3
    packet = summary_packet(update, "region-1", now=AT)
    assert len(packet.msp.controller) == 1024
    assert not any(f"s{i}" in packet.msp.controller for i in range(6))
    assert FMIContractRegistry().violations(packet) == []


async def test_what_was_published_before_the_start_goes_up():
    parent = Parent()
    async with linked(parent, {"care": prior(), "cure": prior(cohort="cure")}):
        await until(parent, 2)
    assert {packet.header.cohort for packet in parent.taken} == {"care", "cure"}


async def test_a_parent_that_is_away_gets_the_newest_when_it_is_back():
    parent = Parent(*[ParentUnavailableError("away")] * 3)
    newest, telemetry = {"care": prior()}, FMITelemetry()
    async with linked(parent, newest, telemetry) as link:
        await asyncio.sleep(0)
        newest["care"] = prior(2, tau=0.7)
        link.notice(newest["care"])
        await until(parent, 1)
        await asyncio.sleep(0.02)
    assert [packet.msp.controller["tau"] for packet in parent.taken] == [0.7]
    assert telemetry.snapshot()['fmi_uplink_packets_total{outcome="unavailable"}'] == 3


async def test_the_parent_decides_how_long_to_wait():
    parent = Parent(ParentUnavailableError("busy", retry_after_s=0.2))
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with linked(parent, {"care": prior()}):
        await until(parent, 1)
    assert loop.time() - started >= 0.2


async def test_a_refused_prior_is_not_sent_again_and_the_next_is():
    parent = Parent(ParentRefusedError("no such signal"))
    newest = {"care": prior()}
    async with linked(parent, newest) as link:
        await asyncio.sleep(0.01)
        link.notice(newest["care"])
        await asyncio.sleep(0.01)
        assert parent.taken == []
        newest["care"] = prior(2)
        link.notice(newest["care"])
        await until(parent, 1)
    assert len(parent.taken) == 1


async def test_only_priors_go_up():
    parent = Parent()
    async with linked(parent, {}) as link:
        link.notice(update_pb2.Update(cohort="care", kind=update_pb2.UPDATE_KIND_POLICY_HINT))
        await asyncio.sleep(0.01)
    assert parent.taken == []
