"""What is fuzzed from: requests, packets and specs that are in order, and the cohorts they belong to."""

from __future__ import annotations

from typing import Any

import zstandard

from fmi.plain import packet_from_plain
from fmi.v1 import admin_service_pb2 as admin
from fmi.v1 import cohort_pb2, packet_pb2
from fmi.v1 import interchange_service_pb2 as interchange
from fmi.v1 import registry_service_pb2 as registry

__all__ = [
    "NOW_S", "batch", "dictionary", "packets", "plain_packets", "requests", "specs", "zstd_envelope",
]  # fmt: skip

NOW_S = 1_750_000_000
"""The time that it is while fuzzing, so that a finding is one tomorrow too."""

PACKET_ID = "0190b2c4-7e8a-7c3d-9f10-000000000001"


def plain_packets() -> list[dict[str, Any]]:
    """Packets of each type as plain data, flat, nested and as ProtoJSON."""
    header = {
        "packet_id": PACKET_ID,
        "domain_id": "site-1",
        "cohort": "free",
        "rev": 1,
        "emitted_at": NOW_S,
    }
    return [
        {
            **header,
            "type": "msp",
            "window_span": (1, 4),
            "metrics": {"gain_p50": 1.5, "err": {"max": 2, "mean": 0.5}},
            "controller": {"tau": 0.9},
            "evidence": {"confidence": 0.8, "samples": 12, "tau": {"stderr": 0.1}},
            "profile_class": "icu-small",
            "provenance": {"software": "a/1", "regime_tag": "winter", "n_samples": 9},
        },
        {
            "header": {**header, "cohort": "clinic", "emitted_at": "2025-06-15T15:06:40Z"},
            "msp": {"metrics": {"gain": 1.0}, "controller": {"tau": 0.5}},
        },
        {
            **header,
            "type": "pop",
            "bundle": {"lr": 0.1, "opt": "adam", "warm": True, "deep": {"x": {"number": 2}}},
            "before": {"gain": 1.0, "loss": 2.0},
            "after": {"gain": 1.5},
            "windows": 8,
            "confidence": 0.7,
            "control_delta": {"gain": 0.1},
        },
        {
            **header,
            "type": "ccs",
            "causal_pairs": [
                ("load", "latency", 0.5, "direct", 0.1),
                {"source": "a", "target": "b", "weight": -1.0},
            ],
            "concepts": [{"id": "load", "score": 0.5, "links": ["latency"]}],
            "tested_nodes": ["load", "latency", "a", "b"],
            "stability_delta": 0.1,
            "trust": 0.9,
        },
        {
            "packet_type": "MSP",
            "packetId": PACKET_ID,
            "domainId": "site-2",
            "cohort": "private",
            "rev": 1,
            "timestamp": "2025-06-15T15:06:40Z",
            "controller": {"tau": "0.25"},
            "provenance": {
                "applied_privacy": {"mechanism": "gaussian", "epsilon": 1.0, "delta": 1e-6}
            },
        },
    ]


def packets() -> list[packet_pb2.Packet]:
    """The same packets, typed."""
    return [packet_from_plain(plain) for plain in plain_packets()]


def specs() -> list[cohort_pb2.CohortSpec]:
    """The cohorts that the packets belong to: a closed one, a strict one, a free one and a private one."""
    section = cohort_pb2
    tau = cohort_pb2.SignalSpec(
        name="tau", section=section.SIGNAL_SECTION_CONTROLLER, lower=0.0, upper=1.0
    )
    gain = cohort_pb2.SignalSpec(
        name="gain",
        section=section.SIGNAL_SECTION_METRICS,
        direction=section.SIGNAL_DIRECTION_HIGHER_IS_BETTER,
        guardrail=True,
        scale=0.1,
    )
    strict = cohort_pb2.CohortSpec(
        name="strict",
        ingest=cohort_pb2.IngestSpec(
            max_packet_bytes=600, max_norm=10.0, min_trust=0.5, dp_required=True
        ),
        policy=cohort_pb2.PolicySpec(quantum={"lr": 0.01}),
        aggregation=cohort_pb2.AggregationSpec(vote_min_sites=1, metrics_aggregation="median"),
    )
    strict.release.min_interval.FromMilliseconds(1500)
    strict.retention.packets.FromSeconds(60)
    private = cohort_pb2.CohortSpec(
        name="private",
        signals=[tau],
        privacy=cohort_pb2.PrivacySpec(dp_epsilon=2.0, dp_delta=1e-6, dp_epochs=10),
    )
    private.release.max_interval.FromSeconds(60)
    return [
        cohort_pb2.CohortSpec(name="clinic", description="two", signals=[tau, gain]),
        strict,
        cohort_pb2.CohortSpec(
            name="free", aggregation=cohort_pb2.AggregationSpec(vote_min_sites=1)
        ),
        private,
    ]


def dictionary() -> zstandard.ZstdCompressionDict:
    """A dictionary that is trained on the packets."""
    samples = []
    for number in range(60):
        for packet in packets():
            packet.header.domain_id = f"site-{number}"
            packet.header.emitted_at.seconds += number * 1234
            samples.append(packet.SerializeToString())
    return zstandard.train_dictionary(1024, samples, dict_id=77)


def batch() -> bytes:
    """A serialised `PacketBatch`."""
    return packet_pb2.PacketBatch(packets=packets()).SerializeToString()


def zstd_envelope(known: zstandard.ZstdCompressionDict | None = None) -> interchange.EncodedPackets:
    """An envelope of the packets in zstd."""
    data = batch()
    return interchange.EncodedPackets(
        encoding=interchange.ENCODING_ZSTD,
        dictionary_id=known.dict_id() if known else 0,
        uncompressed_size=len(data),
        data=zstandard.ZstdCompressor(dict_data=known).compress(data),
    )


def requests() -> list[tuple[str, Any]]:
    """A request or more for each method of the contract, under the method's name."""
    data = batch()
    identity = interchange.EncodedPackets(
        encoding=interchange.ENCODING_IDENTITY, uncompressed_size=len(data), data=data
    )
    private = cohort_pb2.PrivacySpec(dp_epsilon=1.0, dp_delta=1e-6, dp_epochs=4)
    start = interchange.StartRevision(cohort="free", kind=1, revision=1)
    return [
        *(("Emit", interchange.EmitRequest(packet=packet)) for packet in packets()),
        ("Emit", interchange.EmitRequest(encoded=identity)),
        ("Emit", interchange.EmitRequest(encoded=zstd_envelope())),
        ("EmitStream", interchange.EmitStreamRequest(batch_id=1, encoded=zstd_envelope())),
        (
            "EmitStream",
            interchange.EmitStreamRequest(
                batch_id=2, packets=packet_pb2.PacketBatch(packets=packets())
            ),
        ),
        ("Subscribe", interchange.SubscribeRequest(cohorts=["**"], kinds=[1, 3])),
        (
            "Subscribe",
            interchange.SubscribeRequest(
                cohorts=["free", "a*/?b"],
                mode=interchange.DELIVERY_MODE_EVERY,
                start_revisions=[start],
                subscriber="site-1",
                instance_id="0123456789abcdef",
            ),
        ),
        (
            "Subscribe",
            interchange.SubscribeRequest(
                cohorts=["*"],
                resume_token="fmi-epoch:0",
                handover=interchange.Handover(cohorts=["free"], resume_token="fmi-epoch:0"),
            ),
        ),
        ("GetUpdate", interchange.GetUpdateRequest(cohort="free", kind=1, revision=1)),
        (
            "GetWarmStart",
            interchange.GetWarmStartRequest(
                cohort="free", profile_class="icu-small", regime_tag="winter", concepts={"load": 1}
            ),
        ),
        (
            "ReportApplied",
            interchange.ReportAppliedRequest(
                subscriber="site-1",
                reports=[
                    interchange.ApplyReport(
                        cohort="free",
                        kind=1,
                        revision=1,
                        failure=interchange.ApplyFailure(code=3, message="no"),
                    )
                ],
            ),
        ),
        ("GetContract", registry.GetContractRequest(include_descriptors=True)),
        ("GetCohortSpec", registry.GetCohortSpecRequest(cohort="clinic")),
        ("ListCohortSpecs", registry.ListCohortSpecsRequest()),
        ("GetDictionary", registry.GetDictionaryRequest(dictionary_id=77)),
        *(
            ("ValidatePacket", registry.ValidatePacketRequest(packet=packet))
            for packet in packets()
        ),
        ("ListCohorts", admin.ListCohortsRequest()),
        *(("PutCohortSpec", admin.PutCohortSpecRequest(spec=spec, force=True)) for spec in specs()),
        ("PutCohortSpec", admin.PutCohortSpecRequest(spec=specs()[3], dry_run=True)),
        ("ListSites", admin.ListSitesRequest(cohort="free")),
        ("ListQuarantine", admin.ListQuarantineRequest(cohort="free", page_size=2, page_token="1")),
        (
            "SetQuarantine",
            admin.SetQuarantineRequest(
                domain_id="site-1", packet_id=PACKET_ID, quarantined=True, reason="odd"
            ),
        ),
        ("ReleaseNow", admin.ReleaseNowRequest(cohort="free")),
        (
            "RegisterDictionary",
            admin.RegisterDictionaryRequest(data=dictionary().as_bytes()),
        ),
        ("ListSubscribers", admin.ListSubscribersRequest(cohort="free", page_size=3)),
        ("ListApplied", admin.ListAppliedRequest(cohort="free", page_token="0")),
        ("PlanPrivacy", admin.PlanPrivacyRequest(sites=30, signals=2, privacy=private)),
        ("ListPrivacyBudgets", admin.ListPrivacyBudgetsRequest()),
        ("ListPrivacySpends", admin.ListPrivacySpendsRequest(cohort="private", page_size=9)),
    ]
