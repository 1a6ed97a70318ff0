"""Telemetry: counts with closed labels, in Prometheus' form and as plain numbers."""

from __future__ import annotations

import itertools
import math
import re
from typing import get_args

import pytest
from parts import msp
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fmi.v1 import packet_pb2
from fmi_server import FMIService, FMITelemetry
from fmi_server.aggregation import IgnoredReason
from fmi_server.contracts import PacketStatus
from fmi_server.errors import REASONS, PacketRefusedError, reason_name

BODIES = packet_pb2.Packet.DESCRIPTOR.oneofs_by_name["body"].fields


def test_every_count_counts():
    telemetry = FMITelemetry()
    telemetry.packet("msp", "accepted", size=100)
    telemetry.packet("msp", "accepted", count=4)
    telemetry.packet("pop", "refused")
    telemetry.refusal("PACKET_STALE")
    telemetry.ignored("section_conflict", 3)
    telemetry.release("published", 0.02)
    telemetry.release("failed", 20.0)
    telemetry.update("prior")
    telemetry.conflated(7)
    telemetry.subscribers(5)
    telemetry.subscribers(2)
    telemetry.cohorts(4)
    assert telemetry.snapshot()["fmi_privacy_budget_ends_timestamp_seconds"] == math.inf
    telemetry.budgets(releasing=3, exhausted=2, first_end=1.7e9)
    counts = telemetry.snapshot()
    expected = {
        'fmi_packets_total{status="accepted",type="msp"}': 5,
        'fmi_packets_total{status="refused",type="pop"}': 1,
        'fmi_refusals_total{reason="PACKET_STALE"}': 1,
        "fmi_packet_bytes_total": 100,
        'fmi_ignored_values_total{reason="section_conflict"}': 3,
        'fmi_releases_total{outcome="published"}': 1,
        'fmi_releases_total{outcome="failed"}': 1,
        'fmi_updates_total{kind="prior"}': 1,
        "fmi_conflated_updates_total": 7,
        "fmi_subscribers": 2,
        "fmi_cohorts": 4,
        'fmi_private_cohorts{state="releasing"}': 3,
        'fmi_private_cohorts{state="exhausted"}': 2,
        "fmi_privacy_budget_ends_timestamp_seconds": 1.7e9,
        "fmi_release_seconds_count": 2,
        "fmi_release_seconds_sum": pytest.approx(20.02),
        'fmi_release_seconds_bucket{le="0.025"}': 1,
        'fmi_release_seconds_bucket{le="+Inf"}': 2,
    }
    assert {name: counts[name] for name in expected} == expected
    assert not [name for name in counts if "_created" in name]


def test_the_page_can_be_read_and_every_metric_has_a_help_text():
    telemetry = FMITelemetry()
    telemetry.packet("ccs", "quarantined")
    page = generate_latest(telemetry.registry).decode()
    families = list(text_string_to_metric_families(page))
    assert all(family.documentation for family in families)
    assert all(family.name.startswith("fmi_") for family in families)


def test_two_servers_in_one_process_count_apart():
    first, second = FMITelemetry(), FMITelemetry()
    first.update("prior")
    assert second.snapshot()['fmi_updates_total{kind="prior"}'] == 0


LABELS = {
    "fmi_packets_total": {
        "type": (*(body.name for body in BODIES), "unknown"),
        "status": get_args(PacketStatus),
    },
    "fmi_refusals_total": {"reason": [reason_name(reason) for reason in REASONS]},
    "fmi_ignored_values_total": {"reason": get_args(IgnoredReason)},
    "fmi_releases_total": {"outcome": ("published", "unchanged", "overtaken", "failed")},
    "fmi_updates_total": {"kind": ("prior", "policy_hint", "warm_start", "causal_consensus")},
    "fmi_uplink_packets_total": {"outcome": ("sent", "refused", "unavailable", "failed")},
    "fmi_apply_reports_total": {"outcome": ("applied", "failed")},
}


def test_every_count_is_there_before_it_counts():
    """Of a count that comes with its first failure, `increase()` sees nothing."""
    counts = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for metric in FMITelemetry().registry.collect()
        for sample in metric.samples
        if sample.name in LABELS
    }
    expected = {
        (name, frozenset(zip(labels, values, strict=True)))
        for name, labels in LABELS.items()
        for values in itertools.product(*labels.values())
    }
    assert counts == dict.fromkeys(expected, 0)


def test_every_count_with_labels_is_looked_at():
    found = generate_latest(FMITelemetry().registry).decode()
    counted = set(re.findall(r"^(\w+_total)\{", found, flags=re.MULTILINE))
    assert counted == LABELS.keys()


async def test_no_site_can_make_a_time_series():
    async with FMIService() as service:
        now = service.validator._clock()
        for number in range(30):
            await service.emit(
                msp(f"site-{number}", cohort=f"c{number}", controller={f"s{number}": 1.0}, at=now)
            )
            with pytest.raises(PacketRefusedError):
                await service.emit({"type": f"kind-{number}"})
        assert service.telemetry.snapshot().keys() == FMITelemetry().snapshot().keys()
    assert service.telemetry.snapshot()['fmi_packets_total{status="refused",type="unknown"}'] == 30
