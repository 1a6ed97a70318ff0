"""FMIEmitter: typed packets without a network, refused at once where they break the contract."""

from __future__ import annotations

import math
import uuid
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi.plain import CURRENT_REVISION
from fmi.v1 import packet_pb2
from fmi_client import ContractError, FMIEmitter
from fmi_client._contract import packet_violations
from fmi_server.contracts import FMIContractRegistry


def test_the_example_of_the_overview():
    emitter = FMIEmitter(domain_id="site_001")
    packet = emitter.emit_msp(
        metrics={"gain_p50": 0.15},
        controller={"tau": 0.9},
    )
    assert isinstance(packet, packet_pb2.Packet)
    assert dict(packet.msp.metrics) == {"gain_p50": 0.15}
    assert dict(packet.msp.controller) == {"tau": 0.9}
    assert packet.header.domain_id == "site_001"
    assert packet.header.cohort == "default"
    assert packet.header.rev == CURRENT_REVISION


def test_header_says_what_the_emitter_was_made_with():
    emitter = FMIEmitter(
        "site_001",
        cohort="retail/eu",
        profile_class="small",
        schema_hash="a" * 64,
        provenance={"software": "tuner/1", "n_samples": 900},
        clock=lambda: 1_700_000_000.25,
    )
    header = emitter.emit_msp(controller={"tau": 1}).header
    assert (header.cohort, header.profile_class, header.schema_hash) == (
        "retail/eu",
        "small",
        "a" * 64,
    )
    assert (header.provenance.software, header.provenance.n_samples) == ("tuner/1", 900)
    assert header.emitted_at.ToMilliseconds() == 1_700_000_000_250
    packet_id = uuid.UUID(header.packet_id)
    assert packet_id.version == 7
    assert packet_id.int >> 80 == 1_700_000_000_250


def test_every_packet_has_an_id_of_its_own():
    emitter = FMIEmitter("s")
    assert (
        len({emitter.emit_msp(controller={"t": 1}).header.packet_id for _ in range(1000)}) == 1000
    )


def test_nested_numbers_are_flattened():
    packet = FMIEmitter("s").emit_msp(controller={"ctl": {"tau": 0.9, "deep": {"rho": 1}}})
    assert dict(packet.msp.controller) == {"ctl.tau": 0.9, "ctl.deep.rho": 1.0}


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2), np.array([0.5])[0]]
)
def test_any_real_number_will_do(number):
    packet = FMIEmitter("s").emit_pop({"tau": number}, {"loss": number}, {"loss": np.int64(2)})
    assert packet.pop.bundle["tau"].number == 0.5
    assert packet.pop.before["loss"] == 0.5
    assert packet.pop.after["loss"] == 2.0


def test_evidence_and_window():
    packet = FMIEmitter("s").emit_msp(
        metrics={"gain": 1},
        controller={"tau": 0.9},
        evidence={"confidence": 0.8, "samples": 900, "tau": {"stderr": 0.02}},
        window_span=(3, 7),
    )
    assert packet.msp.evidence.confidence == 0.8
    assert packet.msp.evidence.signals["tau"].stderr == 0.02
    assert (packet.msp.window_span.start, packet.msp.window_span.end) == (3, 7)


def test_pop():
    packet = FMIEmitter("s").emit_pop(
        {"tau": 0.8, "mode": "greedy", "warm": True},
        {"loss": 0.4},
        {"loss": 0.3},
        windows=12,
        confidence=0.7,
        control_delta={"loss": -0.01},
    )
    bundle = {name: value.WhichOneof("kind") for name, value in packet.pop.bundle.items()}
    assert bundle == {"tau": "number", "mode": "text", "warm": "flag"}
    assert (packet.pop.windows, packet.pop.confidence) == (12, 0.7)
    assert dict(packet.pop.control_delta) == {"loss": -0.01}


def test_optional_numbers_stay_unset():
    pop = FMIEmitter("s").emit_pop({"tau": 1}, {"loss": 1}, {"loss": 1}).pop
    ccs = FMIEmitter("s").emit_ccs(tested_nodes=["a"]).ccs
    assert not pop.HasField("confidence")
    assert not ccs.HasField("trust")


def test_ccs():
    packet = FMIEmitter("s").emit_ccs(
        causal_pairs=[("dose", "outcome", 0.4, "lagged", 0.1), {"source": "a", "target": "b"}],
        concepts=[{"id": "load", "score": 0.7, "links": ["staff"]}],
        tested_nodes=["dose", "outcome", "a", "b"],
        stability_delta=-0.1,
        trust=0.9,
    )
    first, second = packet.ccs.causal_pairs
    assert (first.type, first.stderr) == ("lagged", 0.1)
    assert (second.source, second.target) == ("a", "b")
    assert packet.ccs.concepts[0].links == ["staff"]
    assert packet.ccs.trust == 0.9


def test_all_broken_rules_are_told_at_once():
    with pytest.raises(ContractError) as caught:
        FMIEmitter("!", cohort="No Such").emit_msp(
            metrics={"tau": 1, "bad name": 2},
            controller={"tau": math.nan},
            evidence={"ghost": {"stderr": -1}},
        )
    rules = {(v.field, v.rule_id) for v in caught.value.violations}
    assert rules == {
        ("header.domain_id", "string.pattern"),
        ("header.cohort", "string.pattern"),
        ('msp.metrics["bad name"]', "string.pattern"),
        ('msp.controller["tau"]', "double.gte_lte"),
        ('msp.controller["tau"]', "fmi.msp.signal_in_one_section"),
        ('msp.evidence.signals["ghost"].stderr', "double.gte"),
        ('msp.evidence.signals["ghost"]', "fmi.msp.evidence_of_a_signal"),
    }
    assert caught.value.reason == "CONTRACT_VIOLATION"
    assert not caught.value.retryable
    assert caught.value.code is None
    assert 'msp.metrics["bad name"]' in str(caught.value)


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (lambda e: e.emit_msp(), "fmi.msp.no_signal"),
        (lambda e: e.emit_msp(controller={"tau": "high"}), "fmi.plain.number"),
        (lambda e: e.emit_msp(controller={"tau": True}), "fmi.plain.number"),
        (lambda e: e.emit_pop({}, {"a": 1}, {"a": 1}), "map.min_pairs"),
        (lambda e: e.emit_pop({"t": 1}, {"a": 1}, {"b": 1}), "fmi.pop.common_metric"),
        (lambda e: e.emit_pop({"t": 1}, {"a": 1}, {"a": 1}, windows=0), "uint32.gte"),
        (lambda e: e.emit_ccs(), "fmi.ccs.empty"),
        (lambda e: e.emit_ccs([("a", "a", 1.0)]), "fmi.causal_pair.self_loop"),
        (lambda e: e.emit_ccs([("a", "b", 1.0)] * 2), "fmi.ccs.pair_once"),
        (lambda e: e.emit_ccs(concepts=[{"id": "c", "score": 1}] * 2), "fmi.ccs.concept_once"),
        (lambda e: e.emit_plain({"type": "xyz"}), "fmi.plain.packet_type"),
        (lambda e: e.emit_msp(controller={"t": 1}, window_span=(5, 2)), "fmi.window_span.order"),
    ],
)
def test_rule(build, rule):
    with pytest.raises(ContractError) as caught:
        build(FMIEmitter("s"))
    assert rule in [v.rule_id for v in caught.value.violations]


def test_what_cannot_be_translated_hides_no_broken_rule_of_the_rest():
    with pytest.raises(ContractError) as caught:
        FMIEmitter("two words", cohort="care").emit_msp(
            controller={"tau": "much", "bad name": 1}, window_span=(3, "x")
        )
    assert {v.field for v in caught.value.violations} == {
        'msp.controller["tau"]',
        'msp.controller["bad name"]',
        "msp.window_span",
        "header.domain_id",
    }


def test_wrong_provenance_is_told_when_the_emitter_is_made():
    with pytest.raises(ContractError):
        FMIEmitter("s", provenance={"no_such_field": 1})


names = st.sampled_from(["tau", "rho", "gain", "bad name", "", "x" * 200, 'q"uote\n'])
numbers = st.sampled_from([0.0, 1.0, -1e151, 1e300, math.inf, math.nan])
maps = st.dictionaries(names, numbers, max_size=3)
texts = st.sampled_from(["", "a", "b", "c" * 200])


@st.composite
def packets(draw):
    header = packet_pb2.PacketHeader(
        packet_id=draw(st.sampled_from(["", "x", "01a20630-9d0c-740a-8c0f-f7a872d9832e"])),
        domain_id=draw(st.sampled_from(["", "site_001", "!"])),
        cohort=draw(st.sampled_from(["", "care", "A", "a/b", "x" * 200])),
        rev=draw(st.sampled_from([0, 1])),
    )
    packet = packet_pb2.Packet(header=header)
    kind = draw(st.sampled_from(["none", "msp", "pop", "ccs"]))
    if kind == "msp":
        packet.msp.SetInParent()
        for section in ("metrics", "controller", "evaluator", "operators"):
            getattr(packet.msp, section).update(draw(maps))
        for name in draw(st.sets(names, max_size=2)):
            packet.msp.evidence.signals[name].stderr = draw(numbers)
    elif kind == "pop":
        packet.pop.SetInParent()
        packet.pop.before.update(draw(maps))
        packet.pop.after.update(draw(maps))
        for name in draw(st.sets(names, max_size=2)):
            packet.pop.bundle[name].number = draw(numbers)
    elif kind == "ccs":
        packet.ccs.SetInParent()
        for _ in range(draw(st.integers(0, 3))):
            packet.ccs.causal_pairs.add(
                source=draw(texts), target=draw(texts), weight=draw(numbers)
            )
        for _ in range(draw(st.integers(0, 3))):
            packet.ccs.concepts.add(id=draw(texts), score=draw(numbers))
    return packet


REGISTRY = FMIContractRegistry()


@given(packets())
def test_the_client_and_the_server_find_the_same_rules_broken(packet):
    """One contract: the same rules on the same fields on both sides."""

    def told(violations):
        return sorted((v.field, v.rule_id) for v in violations)

    assert told(packet_violations(packet)) == told(REGISTRY.violations(packet))
