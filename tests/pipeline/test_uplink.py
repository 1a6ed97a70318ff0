from __future__ import annotations

import asyncio
import contextlib

import pytest

from fmi.v1 import update_pb2
from fmi_server import uplink as uplink_module
from fmi_server.contracts import FMIContractRegistry
from fmi_server.telemetry import FMITelemetry
from fmi_server.update_log import PublishedUpdate
from fmi_server.uplink import (
    LOOK_S,
    REFRESH_S,
    ParentRefusedError,
    ParentUnavailableError,
    Uplink,
    summary_packet,
)

AT = 1_790_000_000
REFUSED = 'fmi_uplink_packets_total{outcome="refused"}'


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


def published(update):
    return PublishedUpdate.from_payload(
        (update.cohort, update.kind),
        update.revision,
        update.revision,
        update.SerializeToString(),
        history_epoch="e1",
    )


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
async def linked(parent, newest, telemetry=None, clock=lambda: AT + 1.0):
    link = Uplink(
        "region-1",
        cohorts=lambda: list(newest),
        newest=lambda cohort: published(newest[cohort]) if cohort in newest else None,
        send=parent.send,
        telemetry=telemetry or FMITelemetry(),
        clock=clock,
    )
    task = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(parent, count):
    async with asyncio.timeout(60):
        while len(parent.taken) < count:
            parent.idle.clear()
            await parent.idle.wait()


async def refused(telemetry):
    async with asyncio.timeout(60):
        while not telemetry.snapshot().get(REFUSED):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)


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
        summary_packet(prior(tau=0.91), "region-1", now=AT),
        summary_packet(prior(), "region-2", now=AT),
        summary_packet(prior(cohort="cure"), "region-1", now=AT),
        summary_packet(prior(), "region-1", now=AT + REFRESH_S),
    ):
        assert other.header.packet_id != first.header.packet_id


def test_an_old_prior_is_dated_to_the_day():
    packet = summary_packet(prior(), "region-1", now=AT + 30.4 * REFRESH_S)
    assert packet.header.emitted_at.seconds == AT + 30 * REFRESH_S


def test_a_value_of_unknown_confidence_claims_none():
    update = prior()
    update.prior_update.estimates["tau"].confidence = 0.0
    packet = summary_packet(update, "region-1", now=AT)
    assert not packet.msp.evidence.signals["tau"].HasField("confidence")


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


@pytest.mark.parametrize("hint", [None, 0.0, -5.0])
async def test_a_parent_cannot_make_it_spin(hint, monkeypatch):
    monkeypatch.setattr(uplink_module, "FIRST_DELAY_S", 0.05)
    parent, telemetry = Parent(*[ParentUnavailableError("no", hint)] * 100), FMITelemetry()
    async with linked(parent, {"care": prior()}, telemetry):
        await asyncio.sleep(0.5)
    assert telemetry.snapshot()['fmi_uplink_packets_total{outcome="unavailable"}'] <= 8


async def test_one_cohort_that_is_refused_does_not_hold_up_another():
    parent = Parent(ParentRefusedError("too large"))
    async with linked(parent, {"care": prior(), "cure": prior(cohort="cure")}):
        await until(parent, 1)
    assert parent.taken[0].header.cohort == "cure"


async def test_a_refused_prior_is_tried_again_after_an_hour_and_the_next_at_once():
    parent, time = Parent(ParentRefusedError("no such cohort")), [AT + 1.0]
    newest = {"care": prior()}
    telemetry = FMITelemetry()
    async with linked(parent, newest, telemetry, clock=lambda: time[0]) as link:
        await refused(telemetry)
        link.notice(newest["care"])
        await asyncio.sleep(0.01)
        assert parent.taken == []
        time[0] += LOOK_S
        link.notice(newest["care"])
        await until(parent, 1)
        newest["care"] = prior(2, tau=0.8)
        link.notice(newest["care"])
        await until(parent, 2)


async def test_signals_that_the_parent_does_not_take_are_left_out(caplog):
    parent = Parent(
        ParentRefusedError("not of the cohort", ['msp.controller["zz"]', 'msp.controller["zy"]'])
    )
    async with linked(parent, {"care": prior(tau=0.9, zz=1.0, zy=2.0)}):
        await until(parent, 1)
    packet = parent.taken[0]
    assert dict(packet.msp.controller) == {"tau": 0.9}
    assert set(packet.msp.evidence.signals) == {"tau"}
    assert FMIContractRegistry().violations(packet) == []
    assert 'does not take 2 signals of cohort care, first msp.controller["zz"]' in caplog.text


@pytest.mark.parametrize(
    "fields", [["header.cohort"], ['msp.controller["other"]'], ['msp.controller["tau"]'], ["\0"]]
)
async def test_what_leaving_out_does_not_mend_is_refused(fields):
    parent, telemetry = Parent(*[ParentRefusedError("no", fields)] * 50), FMITelemetry()
    async with linked(parent, {"care": prior()}, telemetry):
        await refused(telemetry)
        await asyncio.sleep(0.05)
    assert parent.taken == []
    assert telemetry.snapshot()[REFUSED] == 1


async def test_a_prior_with_the_values_of_the_last_is_not_sent_until_it_is_due():
    parent, time = Parent(), [AT + 1.0]
    newest = {"care": prior(1)}
    async with linked(parent, newest, clock=lambda: time[0]) as link:
        await until(parent, 1)
        for revision in (2, 3):
            newest["care"] = prior(revision)
            link.notice(newest["care"])
            await asyncio.sleep(0.01)
        assert len(parent.taken) == 1
        time[0] += REFRESH_S
        link.notice(newest["care"])
        await until(parent, 2)
    first, second = parent.taken
    assert second.msp == first.msp
    assert second.header.emitted_at.seconds == first.header.emitted_at.seconds + REFRESH_S


async def test_one_fault_does_not_end_it(monkeypatch, caplog):
    def broken(update, *_, **__):
        if update.cohort == "care":
            raise RuntimeError("a fault")
        return summary_packet(update, "region-1", now=AT)

    monkeypatch.setattr(uplink_module, "summary_packet", broken)
    parent = Parent()
    async with linked(parent, {"care": prior(), "cure": prior(cohort="cure")}):
        await until(parent, 1)
    assert "cohort care could not be sent" in caplog.text


async def test_only_priors_go_up():
    parent = Parent()
    async with linked(parent, {}) as link:
        link.notice(update_pb2.Update(cohort="care", kind=update_pb2.UPDATE_KIND_POLICY_HINT))
        await asyncio.sleep(0.01)
    assert parent.taken == []
