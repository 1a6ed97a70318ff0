"""The aggregator: the overview's example, and what each part of a result says and keeps to itself."""

from __future__ import annotations

import importlib

import pytest
from google.protobuf import json_format
from parts import NOW, Clock, ccs, msp, packet, pop

from fmi.v1 import cohort_pb2, update_pb2
from fmi_client import FMIEmitter
from fmi_server import AggregationConfig, FMIAggregator
from fmi_server.aggregator import AggregationResult
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRegistry
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import PacketRefusedError
from fmi_server.update_messages import MAX_EDGES_TOLD

CONTRACT = FMIContractRegistry()


@pytest.fixture
def aggregator() -> FMIAggregator:
    return FMIAggregator(registry=CONTRACT, clock=Clock())


def test_the_overview_works_as_it_stands():
    packet1, packet2, packet3 = (
        FMIEmitter(domain_id=f"site_{number:03}").emit_msp(
            metrics={"gain_p50": 0.15},
            controller={"tau": tau},
            evaluator={"g_min": 0.008},
        )
        for number, tau in enumerate([0.9, 0.91, 0.92], start=1)
    )
    aggregator = FMIAggregator(config=AggregationConfig())
    result = aggregator.aggregate("healthcare", [packet1, packet2, packet3])
    assert dict(result.prior_update.prior) == {
        "tau": pytest.approx(0.91),
        "g_min": pytest.approx(0.008),
    }


def test_packets_of_all_types_go_in_together(aggregator):
    msp1, msp2 = msp("a", controller={"tau": 1.0}), msp("b", controller={"tau": 2.0})
    pop1, ccs1 = pop("c"), ccs("d", pairs=(("x", "y", 1.0),))
    result = aggregator.aggregate(cohort="healthcare", packets=[msp1, msp2, pop1, ccs1])
    assert isinstance(result, AggregationResult)
    assert isinstance(result.prior_update, update_pb2.MetaPriorUpdate)
    assert isinstance(result.warm_start, update_pb2.WarmStartProfile)
    assert isinstance(result.policy_hint, update_pb2.MetaPolicyHint)
    assert isinstance(result.causal_consensus, update_pb2.CausalConsensus)
    assert result.prior_update.cohorts == ["healthcare"]
    assert result.prior_update.rev == 0, "nothing is published"
    assert result.prior_update.lineage.packets == 2
    assert result.policy_hint.lineage.packets == 1
    assert result.causal_consensus.lineage.packets == 1


def test_plain_packets_are_taken_too(aggregator):
    plain = [
        {
            "type": "msp",
            "packet_id": packet().header.packet_id,
            "domain_id": f"s{i}",
            "cohort": "care",
            "rev": 1,
            "emitted_at": NOW,
            "controller": {"ctl": {"tau": 0.5}},
        }
        for i in range(3)
    ]
    assert dict(aggregator.aggregate("care", plain).prior_update.prior) == {"ctl.tau": 0.5}


def test_a_packet_that_breaks_the_contract_is_refused(aggregator):
    for bad in (packet(), {"type": "xyz"}, msp("bad site", controller={"tau": 1.0})):
        with pytest.raises(PacketRefusedError):
            aggregator.aggregate("care", [msp(controller={"tau": 1.0}), bad])


def test_nothing_in_gives_reasons_and_no_values(aggregator):
    result = aggregator.aggregate("care", [])
    assert not result.prior_update.prior
    assert not result.warm_start.init
    assert result.warm_start.context_selector.source == update_pb2.WARM_START_SOURCE_NONE
    assert result.policy_hint.hint_id == ""
    assert result.policy_hint.reason == "no hint: no site has sent a policy outcome"
    assert not result.causal_consensus.edges


def test_aggregate_keeps_nothing(aggregator):
    packets = [msp(f"s{i}", controller={"tau": 1.0}) for i in range(3)]
    first = aggregator.aggregate("care", packets)
    assert aggregator.aggregate("care", packets) == first
    assert not aggregator.aggregate("care", packets[:2]).prior_update.prior


def test_old_packets_that_are_given_all_count(aggregator):
    packets = [msp(f"s{i}", controller={"tau": 1.0}, at=1000.0) for i in range(3)]
    assert dict(aggregator.aggregate("care", packets).prior_update.prior) == {"tau": 1.0}


# The prior


def test_a_prior_has_settings_and_estimates_have_metrics_too(aggregator):
    packets = [
        msp(f"s{i}", metrics={"loss": i / 10}, controller={"tau": 0.5}, at=NOW - i)
        for i in range(5)
    ]
    packets.append(msp("s0", controller={"rare": 1.0}, at=NOW - 30))
    update = aggregator.aggregate("care", packets).prior_update
    assert set(update.prior) == {"tau"}
    assert set(update.estimates) == {"loss", "tau", "rare"}
    loss = update.estimates["loss"]
    assert (loss.section, loss.sites, loss.trimmed, loss.tolerated) == ("metrics", 5, 2, 1)
    assert loss.lower < loss.value < loss.upper
    assert loss.value == pytest.approx(0.2)
    rare = update.estimates["rare"]
    assert not rare.HasField("value")
    assert (rare.reason, rare.sites) == ("below_quorum", 1)
    assert 0 < update.confidence <= 1
    assert (update.lineage.packets, update.lineage.sites) == (6, 5)
    assert update.lineage.window.seconds == 30
    assert update.lineage.estimator == "trimmed_mean"
    assert set(update.lineage.reputations) == {f"s{i}" for i in range(5)}


def test_the_quorum_is_the_configs():
    packets = [msp(f"s{i}", controller={"tau": 0.5}) for i in range(4)]
    for quorum, expected in ((4, {"tau": 0.5}), (5, {})):
        chosen = FMIAggregator(AggregationConfig(vote_min_sites=quorum), registry=CONTRACT)
        assert dict(chosen.aggregate("care", packets).prior_update.prior) == expected


def test_the_estimator_is_the_configs():
    packets = [msp(f"s{i}", controller={"tau": value}) for i, value in enumerate([0.0, 1.0, 5.0])]
    for name, expected in (("mean", 2.0), ("median", 1.0), ("trimmed_mean", 1.0)):
        chosen = FMIAggregator(AggregationConfig(metrics_aggregation=name), registry=CONTRACT)
        update = chosen.aggregate("care", packets).prior_update
        assert update.prior["tau"] == pytest.approx(expected)
        assert update.lineage.estimator == name


# Contexts and warm starts


def sites_of(
    regime: str, tau: float, *, count: int = 3, profile_class: str = "", drift: float = 0.0
):
    for i in range(count):
        name = f"{regime or 'none'}-{profile_class or 'none'}-{i}"
        header = {"regime": regime, "profile_class": profile_class}
        yield msp(name, controller={"tau": tau}, metrics={"loss": 1.0}, **header)
        yield ccs(name, concepts={"drift": drift}, at=NOW - 1, **header)


def test_regimes_have_their_medians_and_small_ones_are_not_named(aggregator):
    packets = [
        *sites_of("winter", 1.0, drift=0.9),
        *sites_of("summer", 3.0, drift=0.1),
        *sites_of("rare", 9.0, count=2),
        *sites_of("", 2.0, count=2),
    ]
    update = aggregator.aggregate("care", packets).prior_update
    contexts = {context.regime: context for context in update.contexts}
    assert set(contexts) == {"winter", "summer"}
    assert dict(contexts["winter"].settings) == {"tau": 1.0}
    assert dict(contexts["winter"].concepts) == {"drift": pytest.approx(0.9)}
    assert "rare" not in str(update.contexts)
    assert update.untagged_sites == 2


def test_a_class_with_a_quorum_gets_its_profile_and_a_smaller_one_none(aggregator):
    packets = [
        *sites_of("", 1.0, count=4, profile_class="big"),
        *sites_of("", 3.0, count=3, profile_class="small"),
        *sites_of("", 9.0, count=2, profile_class="secret"),
    ]
    result = aggregator.aggregate("care", packets)
    profiles = {profile.profile_class: profile for profile in result.warm_starts.profiles}
    assert list(profiles) == ["big", "default", "small"]
    assert "secret" not in str(result.warm_starts)
    assert dict(profiles["big"].init) == {"tau": 1.0}
    assert dict(profiles["small"].init) == {"tau": 3.0}
    assert profiles["small"].origins["tau"].source == update_pb2.WARM_START_SOURCE_PROFILE_CLASS
    assert profiles["small"].origins["tau"].sites == 3
    assert profiles["default"].origins["tau"].source == update_pb2.WARM_START_SOURCE_COHORT
    assert result.warm_start == profiles["big"], "the class of most sites"
    assert all(0 < profile.confidence <= 1 for profile in profiles.values())


def test_regimes_and_profiles_are_told_while_their_values_fit(aggregator, monkeypatch):
    packets = [
        *sites_of("winter", 1.0, count=5, profile_class="big"),
        *sites_of("summer", 3.0, count=4, profile_class="middle"),
        *sites_of("autumn", 9.0, count=3, profile_class="small"),
    ]
    full = aggregator.aggregate("care", packets)
    assert [context.regime for context in full.prior_update.contexts] == [
        "autumn",
        "summer",
        "winter",
    ]
    # A regime has a median of `tau`, of `loss` and of the concept `drift`; a profile has `tau`.
    monkeypatch.setattr("fmi_server.update_messages.MAX_VALUES_TOLD", 6)
    assert [
        context.regime for context in aggregator.aggregate("care", packets).prior_update.contexts
    ] == ["summer", "winter"]
    monkeypatch.setattr("fmi_server.update_messages.MAX_VALUES_TOLD", 3)
    few = aggregator.aggregate("care", packets)
    assert [profile.profile_class for profile in few.warm_starts.profiles] == [
        "big",
        "default",
        "middle",
    ]
    assert few.warm_start == full.warm_start


def test_regimes_and_classes_are_bounded(aggregator, monkeypatch):
    # By its name the package has the function.
    module = importlib.import_module("fmi_server.aggregation.warm_start")
    monkeypatch.setattr(module, "MAX_REGIMES", 2)
    monkeypatch.setattr("fmi_server.cohort_state.MAX_CLASSES_TOLD", 2)
    packets = [
        *sites_of("a", 1.0, count=3, profile_class="a"),
        *sites_of("b", 3.0, count=5, profile_class="b"),
        *sites_of("c", 9.0, count=4, profile_class="c"),
    ]
    result = aggregator.aggregate("care", packets)
    assert [context.regime for context in result.prior_update.contexts] == ["b", "c"]
    told = [profile.profile_class for profile in result.warm_starts.profiles]
    assert told == ["b", "c", "default"]


# Hints


def directed(**policy) -> tuple[FMIAggregator, CohortState]:
    spec = {
        "name": "care",
        "freeSignals": True,
        "signals": [
            {
                "name": "loss",
                "section": "SIGNAL_SECTION_METRICS",
                "direction": "SIGNAL_DIRECTION_LOWER_IS_BETTER",
                "scale": 0.1,
            },
            {
                "name": "latency",
                "section": "SIGNAL_SECTION_METRICS",
                "direction": "SIGNAL_DIRECTION_LOWER_IS_BETTER",
                "guardrail": bool(policy.get("guardrail")),
            },
        ],
    }
    rules = CohortRegistry(CONTRACT).compile(json_format.ParseDict(spec, cohort_pb2.CohortSpec()))
    return FMIAggregator(registry=CONTRACT), CohortState(rules)


def hint_of(packets, **policy) -> update_pb2.MetaPolicyHint:
    aggregator, state = directed(**policy)
    state.count_all(packets)
    return aggregator.result(state, now=NOW).policy_hint


def outcomes(count: int, gain: float = 0.3, **fields):
    return [
        pop(f"s{i}", before={"loss": 1.0}, after={"loss": 1.0 - gain - i / 1000}, **fields)
        for i in range(count)
    ]


def test_what_helped_at_a_quorum_of_sites_is_hinted():
    bundle = {"tau": 0.5, "mode": "fast", "warm": True}
    hint = hint_of(outcomes(5, bundle=bundle))
    assert hint.hint_id
    assert hint.bundle["tau"].number == pytest.approx(0.5)
    assert hint.bundle["mode"].text == "fast"
    assert hint.bundle["warm"].flag is True
    assert set(hint.bounds) == {"tau"}
    assert hint.bounds["tau"].lower <= hint.bundle["tau"].number <= hint.bounds["tau"].upper
    assert hint.reason.startswith("Observational")
    assert 0 < hint.effect_lower < hint.effect
    assert 0 < hint.confidence <= 1
    assert hint.sites == hint.lineage.sites == 5
    assert hint_of(outcomes(6, bundle=bundle)).hint_id == hint.hint_id, "the same advice"


@pytest.mark.parametrize(
    ("packets", "said"),
    [
        ([], "no site has sent a policy outcome"),
        (outcomes(2), "no bundle was tried by enough sites"),
        ([*outcomes(2), *outcomes(2)], "no bundle was tried by enough sites"),
        (outcomes(5, gain=-0.3), "too few found that it helps"),
        (
            [pop(f"s{i}", before={"other": 1.0}, after={"other": 0.5}) for i in range(5)],
            "gives a direction",
        ),
    ],
)
def test_where_nothing_qualifies_there_is_a_reason_and_no_hint(packets, said):
    hint = hint_of(packets)
    assert hint.hint_id == ""
    assert not hint.bundle
    assert hint.reason.startswith("no hint: ")
    assert said in hint.reason


def test_a_guardrail_is_never_harmed():
    harmful = [
        pop(
            f"s{i}",
            before={"loss": 1.0, "latency": 1.0},
            after={"loss": 0.1 - i / 1000, "latency": latency},
        )
        for i, latency in enumerate([1.3, 0.8, 1.3, 0.8, 1.3, 1.0])
    ]
    assert hint_of(harmful).hint_id
    assert "harms a guardrail" in hint_of(harmful, guardrail=True).reason
    assert "observed the guardrail" in hint_of(outcomes(6), guardrail=True).reason


# Causes


def test_edges_of_a_quorum_are_pooled_and_others_only_counted(aggregator):
    packets = [
        ccs(f"s{i}", pairs=(("a", "b", 0.5 + i / 100), ("b", "c", -1.0)), tested=("x",))
        for i in range(4)
    ]
    packets.append(ccs("s9", pairs=(("secret", "b", 1.0),)))
    consensus = aggregator.aggregate("care", packets).causal_consensus
    edges = {(edge.source, edge.target): edge for edge in consensus.edges}
    assert set(edges) == {("a", "b"), ("b", "c")}
    edge = edges["a", "b"]
    assert (edge.type, edge.sites, edge.positive_sites, edge.negative_sites) == ("direct", 4, 4, 0)
    assert 0.5 <= edge.weight <= 0.53
    assert 0 < edge.support < 1
    assert not edge.in_cycle
    assert dict(consensus.unpooled) == {"below_quorum": 1}
    assert "secret" not in str(consensus)


def test_cycles_and_conflicts_are_flagged_and_nothing_is_dropped(aggregator):
    packets = [
        ccs(f"s{i}", pairs=(("a", "b", 1.0), ("b", "a", 0.1 if i % 2 else -0.1))) for i in range(4)
    ]
    consensus = aggregator.aggregate("care", packets).causal_consensus
    assert len(consensus.edges) == 2
    assert all(edge.in_cycle and edge.direction_conflict for edge in consensus.edges)
    (cycle,) = consensus.cycles
    assert set(cycle.nodes) == {"a", "b"}
    assert (cycle.weakest_source, cycle.weakest_target) == ("b", "a")
    conflicts = {(edge.source, edge.target): edge.sign_conflict for edge in consensus.edges}
    assert conflicts == {("a", "b"): False, ("b", "a"): True}


def test_a_consensus_is_bounded_and_says_what_it_does_not_tell(aggregator):
    packets = []
    for i in range(4):
        edges = [(f"s{n}", f"t{n}", 1.0) for n in range(MAX_EDGES_TOLD + 50)]
        packets.append(ccs(f"s{i}", pairs=tuple(edges[: MAX_EDGES_TOLD - 10] if i == 3 else edges)))
    consensus = aggregator.aggregate("care", packets).causal_consensus
    assert len(consensus.edges) == MAX_EDGES_TOLD
    assert dict(consensus.unpooled) == {"not_told": 50}
    supports = [edge.support for edge in consensus.edges]
    assert supports == sorted(supports, reverse=True)
    assert sum(1 for edge in consensus.edges if edge.sites == 4) == MAX_EDGES_TOLD - 10
