"""The overview's promises: every component, every snippet, every name; only the imports are ours.

The snippets stand here as they stand in the overview. What a snippet takes as given (`packet_dict`,
`msp1`, `current_metrics`) is made before it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest
from server_harness import DEADLINE_S, Client

from fmi.plain import new_packet_id
from fmi.v1 import cohort_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi.v1.packet_pb2 import ConceptCausalSummary, MetaSignalPack, PolicyOutcomePack
from fmi.v1.update_pb2 import MetaPolicyHint, MetaPriorUpdate, WarmStartProfile
from fmi_client import FMIEncoder
from fmi_server import (
    AggregationConfig,
    FMIAggregator,
    FMIContractRegistry,
    FMIRouter,
    FMIService,
    FMITelemetry,
    FMIValidator,
    InProcessBus,
    PacketType,
    RouterConfig,
)
from fmi_server.testing import running_server


def plain(site: str = "site_001", kind: str = "msp", cohort: str = "healthcare", **body) -> dict:
    header = {"packet_id": new_packet_id(), "domain_id": site, "cohort": cohort, "rev": 1}
    return {"type": kind, **header, "emitted_at": time.time(), **body}


# Usage example


def test_the_usage_example(capsys):
    from fmi_client import FMIEmitter  # noqa: PLC0415 - the example's own lines, in its order
    from fmi_server import AggregationConfig, FMIAggregator  # noqa: PLC0415

    # Site emits its state
    emitter = FMIEmitter(domain_id="site_001")
    packet = emitter.emit_msp(
        metrics={"gain_p50": 0.15},
        controller={"tau": 0.9},
    )

    packet1, packet2, packet3 = (
        FMIEmitter(domain_id=f"site_00{i}").emit_msp(
            metrics={"gain_p50": 0.15},
            controller={"tau": tau},
            evaluator={"g_min": 0.008},
        )
        for i, tau in enumerate((0.90, 0.91, 0.92))
    )

    # Central aggregator receives from multiple sites
    aggregator = FMIAggregator(config=AggregationConfig())
    result = aggregator.aggregate("healthcare", [packet1, packet2, packet3])

    print(result.prior_update.prior)  # noqa: T201 - it is the example's
    # {"tau": 0.91, "g_min": 0.008}  # noqa: ERA001 - the example's

    assert packet.msp.controller == {"tau": 0.9}
    assert dict(result.prior_update.prior) == {
        "tau": pytest.approx(0.91),
        "g_min": pytest.approx(0.008),
    }
    assert "0.91" in capsys.readouterr().out


# Packet types


def test_packet_type():
    assert PacketType.MSP == "msp"
    assert PacketType.POP == "pop"
    assert PacketType.CCS == "ccs"
    assert isinstance(PacketType.MSP, str)
    assert [kind.value for kind in PacketType] == ["msp", "pop", "ccs"]


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (
            MetaSignalPack,
            {"window_span", "metrics", "controller", "evaluator", "operators", "evidence"},
        ),
        (PolicyOutcomePack, {"bundle", "before", "after", "windows", "confidence"}),
        (ConceptCausalSummary, {"causal_pairs", "concepts", "stability_delta", "trust"}),
        (MetaPriorUpdate, {"rev", "prior", "contexts", "confidence", "cohorts"}),
        (WarmStartProfile, {"profile_class", "init", "context_selector"}),
        (MetaPolicyHint, {"hint_id", "bundle", "bounds", "reason", "confidence"}),
    ],
)
def test_the_fields_of_the_dataclasses(message, names):
    assert names <= set(message.DESCRIPTOR.fields_by_name)


def test_a_packet_of_each_type_in_the_overviews_form():
    registry = FMIContractRegistry()
    msp = registry.coerce(
        plain(
            window_span=(3, 9),
            metrics={"gain_p50": 0.15},
            controller={"ctl": {"tau": 0.9}},
            evaluator={"g_min": 0.008},
            operators={"mix": 0.5},
            evidence={"confidence": 0.8},
        )
    ).msp
    assert (msp.window_span.start, msp.window_span.end) == (3, 9)
    assert dict(msp.controller) == {"ctl.tau": 0.9}
    pop = registry.coerce(
        plain(
            kind="pop",
            bundle={"lr": 0.1, "mode": "fast", "warm": True},
            before={"gain": 1.0},
            after={"gain": 2.0},
            windows=8,
            confidence=0.7,
        )
    ).pop
    assert (pop.bundle["mode"].text, pop.bundle["warm"].flag, pop.windows) == ("fast", True, 8)
    ccs = registry.coerce(
        plain(
            kind="ccs",
            causal_pairs=[("load", "latency", 0.5, "direct")],
            concepts=[{"id": "rush", "score": 0.3}],
            stability_delta=0.1,
            trust=0.9,
        )
    ).ccs
    pair = ccs.causal_pairs[0]
    assert (pair.source, pair.target, pair.weight, pair.type) == ("load", "latency", 0.5, "direct")
    assert ccs.concepts[0].id == "rush"


# Key components


def test_the_contract_registry():
    packet_dict = plain(controller={"tau": 0.9})

    registry = FMIContractRegistry()

    # Validate a packet
    is_valid, missing = registry.validate(packet_dict)

    # Coerce dict to typed packet
    packet = registry.coerce(packet_dict)

    assert is_valid is True
    assert missing == []
    assert packet.msp.controller["tau"] == 0.9
    del packet_dict["domain_id"], packet_dict["emitted_at"]
    is_valid, missing = registry.validate(packet_dict)
    assert is_valid is False
    assert set(missing) == {"header.domain_id", "header.emitted_at"}


def test_the_aggregator():
    msp1, msp2 = (plain(f"site_{i}", controller={"tau": 0.9}) for i in (1, 2))
    pop1 = plain("site_1", "pop", bundle={"lr": 0.1}, before={"g": 1}, after={"g": 2}, windows=1)
    ccs1 = plain("site_1", "ccs", causal_pairs=[("a", "b", 0.5, "direct")], trust=1.0)

    aggregator = FMIAggregator(config=AggregationConfig())

    result = aggregator.aggregate(
        cohort="healthcare",
        packets=[msp1, msp2, pop1, ccs1],
    )
    # result.prior_update: Aggregated priors
    # result.warm_start: Warm start profile
    # result.policy_hint: Policy recommendations

    assert isinstance(result.prior_update, MetaPriorUpdate)
    assert isinstance(result.warm_start, WarmStartProfile)
    assert isinstance(result.policy_hint, MetaPolicyHint)
    assert list(result.prior_update.cohorts) == ["healthcare"]
    assert result.prior_update.estimates["tau"].sites == 2
    assert "quorum" in result.prior_update.estimates["tau"].reason or not result.prior_update.prior


def test_the_aggregation_features():
    """Trimmed mean for robustness, weighted by confidence; noise where it is asked for."""

    def packets(taus, confidences):
        return [
            plain(f"site_{i}", controller={"tau": tau}, evidence={"confidence": confidence})
            for i, (tau, confidence) in enumerate(zip(taus, confidences, strict=True))
        ]

    aggregator = FMIAggregator(config=AggregationConfig())
    lied = aggregator.aggregate("c", packets([0.9, 0.9, 0.9, 0.9, 1e9], [1.0] * 5))
    assert lied.prior_update.prior["tau"] == pytest.approx(0.9)
    doubted = aggregator.aggregate(
        "c", packets([0.0, *[0.4] * 5, 0.8, 1.0], [*[1.0] * 6, 0.1, 1.0])
    )
    # Five at 0.4 and one at 0.8 are left. With equal weights it would be 0.467, with the declared ones
    # 0.408; what is odd loses reputation too, so it is at most that.
    assert 0.4 < doubted.prior_update.prior["tau"] < (5 * 0.4 + 0.1 * 0.8) / 5.1 + 1e-9
    # Optional differential privacy: noise, and it needs the bounds of what it hides.
    private = FMIAggregator(config=AggregationConfig(dp_epsilon=8.0, dp_delta=1e-6))
    spec = cohort_pb2.CohortSpec()
    spec.signals.add(name="tau", section="SIGNAL_SECTION_CONTROLLER", lower=0.0, upper=1.0)
    same = packets([0.9] * 40, [1.0] * 40)
    drawn = {private.aggregate("c", same, spec=spec).prior_update.prior["tau"] for _ in range(8)}
    assert len(drawn) == 8
    assert all(abs(value - 0.9) < 0.3 for value in drawn)
    with pytest.raises(Exception, match="must be declared in a private cohort"):
        private.aggregate("c", same)


def test_the_validator():
    registry = FMIContractRegistry()
    packet = registry.coerce(plain(controller={"tau": float("nan")}))

    validator = FMIValidator(registry=registry)

    errors = validator.validate(packet)
    # Returns list of validation errors

    assert [error.field for error in errors] == ['msp.controller["tau"]']
    assert validator.validate(registry.coerce(plain(controller={"tau": 0.5}))) == []


def test_the_emitter():
    from fmi_client import FMIEmitter  # noqa: PLC0415 - the snippet's

    current_metrics = {"gain_p50": 0.15}
    controller_state = {"tau": 0.9}
    evaluator_state = {"g_min": 0.008}

    emitter = FMIEmitter(domain_id="site_001")

    packet = emitter.emit_msp(
        metrics=current_metrics,
        controller=controller_state,
        evaluator=evaluator_state,
    )

    assert packet.header.domain_id == "site_001"
    assert packet.header.packet_id
    assert FMIValidator().validate(packet) == []


async def test_the_router():
    packet = FMIContractRegistry().coerce(plain(controller={"tau": 0.9}))

    router = FMIRouter(config=RouterConfig())

    await router.route(packet, destination="aggregator")

    assert await router.receive("aggregator") is packet


def test_the_encoder_and_the_telemetry_exist():
    packet = FMIContractRegistry().coerce(plain(controller={"tau": 0.9}))
    assert FMIEncoder().encode([packet])
    telemetry = FMITelemetry()
    telemetry.packet("msp", "accepted")
    assert telemetry.snapshot()['fmi_packets_total{status="accepted",type="msp"}'] == 1


# Configuration


def test_the_defaults_of_aggregation_config():
    config = AggregationConfig()
    assert config.metrics_trim_alpha == 0.1
    assert config.vote_min_sites == 3
    assert config.metrics_aggregation == "trimmed_mean"
    assert config.dp_noise_sigma == 0.0
    assert config.dp_epsilon == 0.0
    assert config.dp_delta == 0.0
    assert config.dp_sensitivity == 1.0
    names = [field.name for field in dataclasses.fields(config)]
    assert names[:7] == [
        "metrics_trim_alpha",
        "vote_min_sites",
        "metrics_aggregation",
        "dp_noise_sigma",
        "dp_epsilon",
        "dp_delta",
        "dp_sensitivity",
    ]


# Integration


def test_the_bus_takes_a_result():
    packets = [plain(f"site_{i}", controller={"tau": 0.9}) for i in range(3)]
    result = FMIAggregator(config=AggregationConfig()).aggregate("healthcare", packets)
    bus = InProcessBus()
    handled, applied = [], {}

    def handle_packet(topic, payload):
        handled.append((topic, payload))

    # Meta layer receives aggregated priors
    def handle_fmi_update(topic, payload):
        del topic
        prior = payload["prior"]
        # Update hyperparameters
        applied.update(prior)

    # Federation receives packets
    bus.subscribe("federation.packet", handle_packet)

    bus.subscribe("meta.fmi_update", handle_fmi_update)

    # Aggregated results go to meta layer
    bus.publish("meta.fmi_update", result.prior_update)

    bus.publish("federation.packet", packets[0])
    assert applied == {"tau": pytest.approx(0.9)}
    assert handled == [("federation.packet", packets[0])]


async def test_the_service_joins_the_bus_both_ways():
    """FMIService takes `federation.packet` from the bus and publishes `meta.fmi_update` on it."""
    bus = InProcessBus()
    updates: asyncio.Queue = asyncio.Queue()
    bus.subscribe("meta.fmi_update", lambda topic, payload: updates.put_nowait((topic, payload)))
    async with FMIService(bus=bus):
        for i in range(3):
            bus.publish("federation.packet", plain(f"site_{i}", controller={"tau": 0.9}))
        bus.publish("federation.packet", {"type": "msp", "domain_id": "wrong"})
        async with asyncio.timeout(DEADLINE_S):
            topic, payload = await updates.get()
    assert topic == "meta.fmi_update"
    assert payload["prior"] == {"tau": pytest.approx(0.9)}
    assert payload["rev"] == 1
    assert payload["cohorts"] == ["healthcare"]
    assert bus.failures == 0


# The same, over the network


async def test_what_an_emitter_makes_is_what_a_subscriber_gets(data_dir):
    from fmi_client import FMIEmitter  # noqa: PLC0415 - as in the overview

    async with (
        running_server(data_dir) as server,
        Client(server.target) as client,
        client.subscribed("healthcare") as events,
    ):
        await events.snapshot()
        for i, tau in enumerate((0.90, 0.91, 0.92)):
            emitter = FMIEmitter(domain_id=f"site_00{i}", cohort="healthcare")
            (result,) = await client.emit(emitter.emit_msp(controller={"tau": tau}))
            assert result.status == wire_pb2.EMIT_STATUS_ACCEPTED
        event = await events.next()
        assert dict(event.update.prior_update.prior) == {"tau": pytest.approx(0.91)}
