"""Plain data in any form becomes one typed packet, or one error that names everything wrong."""

from __future__ import annotations

import datetime as dt
import uuid
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import NOW, packet_id

from fmi import plain
from fmi.plain import (
    PacketType,
    PlainDataError,
    flatten,
    new_packet_id,
    packet_from_plain,
    packet_to_plain,
    param_value,
)
from fmi.v1 import packet_pb2

HEADER = {
    "packet_id": packet_id(7),
    "domain_id": "site_001",
    "cohort": "healthcare",
    "rev": 1,
    "emitted_at": NOW,
}


def problems_of(data) -> dict[str, str]:
    with pytest.raises(PlainDataError) as caught:
        packet_from_plain(data)
    return {problem.field: problem.rule_id for problem in caught.value.problems}


# Forms


def test_the_three_forms_say_the_same():
    flat = packet_from_plain(
        {
            "type": "msp",
            **HEADER,
            "metrics": {"gain_p50": 0.15},
            "controller": {"tau": 0.9},
            "window_span": (3, 8),
        }
    )
    nested = packet_from_plain(
        {
            "header": HEADER,
            "msp": {
                "metrics": {"gain_p50": 0.15},
                "controller": {"tau": 0.9},
                "window_span": {"start": 3, "end": 8},
            },
        }
    )
    proto_json = packet_from_plain(
        {
            "header": {
                "packetId": packet_id(7),
                "domainId": "site_001",
                "cohort": "healthcare",
                "rev": 1,
                "emittedAt": "2025-06-15T15:06:40Z",
            },
            "msp": {
                "metrics": {"gain_p50": 0.15},
                "controller": {"tau": 0.9},
                "windowSpan": {"start": "3", "end": "8"},
            },
        }
    )
    assert flat == nested == proto_json
    assert flat.header.emitted_at.seconds == NOW
    assert (flat.msp.window_span.start, flat.msp.window_span.end) == (3, 8)


def test_proto_json_is_read_as_protobuf_itself_reads_it():
    text = {
        "header": {
            "packetId": packet_id(1),
            "domainId": "s",
            "cohort": "c",
            "rev": 1,
            "emittedAt": "2025-06-15T15:06:40.25Z",
            "provenance": {"nSamples": "12", "appliedPrivacy": {"mechanism": "g", "epsilon": 1}},
        },
        "pop": {
            "bundle": {"lr": {"number": 0.5}, "opt": {"text": "adam"}, "warm": {"flag": True}},
            "before": {"loss": 2},
            "after": {"loss": "1.5"},
            "windows": 3,
            "controlDelta": {"loss": -0.25},
            "confidence": 0.5,
        },
    }
    assert packet_from_plain(text) == json_format.ParseDict(text, packet_pb2.Packet())


def test_the_flat_form_of_the_overview_is_a_packet_of_each_type():
    pop = packet_from_plain(
        {
            **HEADER,
            "bundle": {"tau": 0.8, "mode": "fast", "on": True},
            "before": {"loss": 1.0},
            "after": {"loss": 0.5},
            "windows": 4,
            "confidence": 0.9,
        }
    )
    assert pop.pop.bundle["tau"].number == 0.8
    assert pop.pop.bundle["mode"].text == "fast"
    assert pop.pop.bundle["on"].flag is True
    ccs = packet_from_plain(
        {
            **HEADER,
            "causal_pairs": [("a", "b", 0.5, "direct"), ("b", "c", -1, "lagged", 0.1)],
            "concepts": [{"id": "drift", "score": 0.2, "links": ["season"]}],
            "stability_delta": -0.1,
            "trust": 0.7,
        }
    )
    assert [p.source + p.target + p.type for p in ccs.ccs.causal_pairs] == ["abdirect", "bclagged"]
    assert ccs.ccs.causal_pairs[1].stderr == 0.1
    assert list(ccs.ccs.concepts[0].links) == ["season"]
    msp = packet_from_plain(
        {
            **HEADER,
            "window_span": (0, 1),
            "metrics": {},
            "controller": {},
            "evaluator": {"g_min": 0.01},
            "operators": {},
            "evidence": {"confidence": 0.5, "samples": 10, "sites": 2.5},
        }
    )
    assert msp.msp.evaluator["g_min"] == 0.01
    assert (msp.msp.evidence.samples, msp.msp.evidence.sites) == (10, 2.5)


@pytest.mark.parametrize("kind", ["msp", "MSP", PacketType.MSP])
@pytest.mark.parametrize("key", ["type", "packet_type"])
def test_the_type_may_be_said_in_several_ways(key, kind):
    assert packet_from_plain({key: kind, "metrics": {"a": 1}}).WhichOneof("body") == "msp"


def test_packet_types_are_the_bodies_of_the_contract():
    bodies = [f.name for f in packet_pb2.Packet.DESCRIPTOR.oneofs_by_name["body"].fields]
    assert [kind.value for kind in PacketType] == bodies
    names = {name for name, _ in packet_pb2.PacketType.items() if not name.endswith("UNSPECIFIED")}
    assert {f"PACKET_TYPE_{kind.name}" for kind in PacketType} == names


def test_nothing_is_invented():
    packet = packet_from_plain({"type": "msp"})
    assert packet.header == packet_pb2.PacketHeader()
    assert packet.msp == packet_pb2.MetaSignalPack()
    assert not packet.header.HasField("emitted_at")


# Numbers and names


def test_nested_numbers_are_flattened():
    assert flatten({"ctl": {"tau": 0.9, "pid": {"p": 1}}, "x": 2}) == {
        "ctl.tau": 0.9,
        "ctl.pid.p": 1.0,
        "x": 2.0,
    }


def test_names_that_flatten_to_the_same_are_refused_in_every_map():
    both = {"a": {"b": 1}, "a.b": 2}
    assert problems_of({"metrics": both}) == {'msp.metrics["a.b"]': "fmi.plain.name_collision"}
    assert problems_of({"bundle": both}) == {'pop.bundle["a.b"]': "fmi.plain.name_collision"}


def test_a_field_that_is_given_twice_is_refused():
    twice = {"header": {"cohort": "a"}, "cohort": "b", "msp": {"metrics": {}}, "metrics": {}}
    assert problems_of(twice) == {
        "cohort": "fmi.plain.name_collision",
        "metrics": "fmi.plain.name_collision",
    }
    assert problems_of({"metrics": {}, "domain_id": "a", "domainId": "b"}) == {
        "domain_id": "fmi.plain.name_collision"
    }


@pytest.mark.parametrize(
    "number",
    [
        1,
        1.0,
        "1",
        np.float64(1),
        np.float32(1),
        np.int8(1),
        np.uint64(1),
        Fraction(1),
        np.array(1)[()],
    ],
)
def test_every_kind_of_real_number_is_a_number(number):
    assert flatten({"a": number}) == {"a": 1.0}
    assert packet_from_plain({**HEADER, "rev": number, "metrics": {}}).header.rev == 1


@pytest.mark.parametrize(
    "wrong",
    [
        True,
        np.True_,
        None,
        "one",
        "",
        b"1",
        [1],
        {1},
        1j,
        10**400,
        pytest.param(10**5000, id="huge"),
        Decimal(1),
        np.array([1.0, 2.0]),
        object(),
    ],
)
def test_what_is_no_number_is_refused_and_shown_short(wrong):
    with pytest.raises(PlainDataError) as caught:
        flatten({"a": wrong}, field="metrics")
    (problem,) = caught.value.problems
    assert (problem.field, problem.rule_id) == ('metrics["a"]', "fmi.plain.number")
    assert type(wrong).__name__ in problem.description
    assert len(problem.description) < 120


def test_infinities_pass_the_translation_so_that_the_contract_can_tell_of_them():
    assert flatten({"a": float("inf"), "b": "-Infinity"}) == {"a": np.inf, "b": -np.inf}


@pytest.mark.parametrize("value", [-1, 1.5, 2**32, True, "x", None, np.nan, np.inf, 10**400])
def test_what_is_no_whole_number_is_refused(value):
    assert problems_of({"type": "msp", "rev": value}) == {"header.rev": "fmi.plain.integer"}


def test_param_values_keep_their_kind():
    assert param_value(True).flag is True
    assert param_value("x").text == "x"
    assert param_value(np.int64(2)).number == 2.0
    assert param_value(packet_pb2.ParamValue(text="t")).text == "t"
    with pytest.raises(PlainDataError):
        param_value([1])


def test_nested_bundles_are_flattened_also_where_a_parameter_is_called_number():
    packet = packet_from_plain({"bundle": {"opt": {"number": 3, "lr": 0.1}, "on": {"flag": 1}}})
    values = {name: value.number for name, value in packet.pop.bundle.items()}
    assert values == {"opt.number": 3.0, "opt.lr": 0.1, "on.flag": 1.0}


def test_nesting_is_bounded():
    deep: dict = {"x": 1}
    for _ in range(5000):
        deep = {"d": deep}
    (rule,) = problems_of({"metrics": deep}).values()
    assert rule == "fmi.plain.nesting"


# Times and ids


@pytest.mark.parametrize(
    "moment",
    [
        dt.datetime(2025, 6, 15, 15, 6, 40, tzinfo=dt.UTC),
        dt.datetime(2025, 6, 15, 17, 6, 40, tzinfo=dt.timezone(dt.timedelta(hours=2))),
        "2025-06-15T15:06:40Z",
        "2025-06-15T17:06:40+02:00",
        NOW,
        np.float64(NOW),
        int(NOW),
    ],
)
def test_a_moment_may_be_said_in_several_ways(moment):
    packet = packet_from_plain({"type": "msp", "timestamp": moment})
    assert packet.header.emitted_at.ToNanoseconds() == int(NOW) * 10**9


@pytest.mark.parametrize("moment", ["2025", "", "\ud800", np.nan, np.inf, 1e300, [], True, None])
def test_what_is_no_moment_is_refused(moment):
    assert problems_of({"type": "msp", "emitted_at": moment}) == {
        "header.emitted_at": "fmi.plain.timestamp"
    }


@given(st.lists(st.integers(0, 2**48 - 1), min_size=2, max_size=20))
def test_packet_ids_are_uuids_of_version_7_and_sort_by_time(moments):
    ids = [new_packet_id(now_ms=ms) for ms in moments]
    for ms, text in zip(moments, ids, strict=True):
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        assert parsed.int >> 80 == ms
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    assert [moments[i] for i in order] == sorted(moments)


def test_packet_ids_are_unique_and_of_now():
    before = dt.datetime.now(dt.UTC).timestamp() * 1000 - 1
    ids = {new_packet_id() for _ in range(2000)}
    after = dt.datetime.now(dt.UTC).timestamp() * 1000 + 1
    assert len(ids) == 2000
    assert all(before <= uuid.UUID(text).int >> 80 <= after for text in ids)


# Everything wrong at once


def test_everything_wrong_is_told_at_once():
    found = problems_of(
        {
            "type": "msp",
            "domain_id": 5,
            "rev": -1,
            "emitted_at": "yesterday",
            "nonsense": 1,
            "metrics": {"a": "x", "b": None},
            "controller": [1],
            "window_span": (1, 2, 3),
            "evidence": {"tau": {"nonsense": 1}, "samples": -1},
        }
    )
    assert found == {
        "header.domain_id": "fmi.plain.text",
        "header.rev": "fmi.plain.integer",
        "header.emitted_at": "fmi.plain.timestamp",
        "nonsense": "fmi.plain.unknown_field",
        'msp.metrics["a"]': "fmi.plain.number",
        'msp.metrics["b"]': "fmi.plain.number",
        "msp.controller": "fmi.plain.mapping",
        "msp.window_span": "fmi.plain.window_span",
        'msp.evidence.signals["tau"].nonsense': "fmi.plain.unknown_field",
        "msp.evidence.samples": "fmi.plain.integer",
    }


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "must say the packet type"),
        ({"type": "xyz"}, "unknown packet type str 'xyz'"),
        ({"type": 10**5000}, "unknown packet type"),
        ({"type": "msp", "pop": {}}, "more than one packet type: msp, pop"),
        ({"metrics": {}, "bundle": {}}, "more than one packet type"),
    ],
)
def test_an_unclear_type_is_told(data, said):
    with pytest.raises(PlainDataError, match=said) as caught:
        packet_from_plain(data)
    assert [problem.rule_id for problem in caught.value.problems] == ["fmi.plain.packet_type"]


@pytest.mark.parametrize("data", [None, 5, "packet", [("type", "msp")], packet_pb2.Packet()])
def test_what_is_no_mapping_is_refused(data):
    assert "type" in problems_of(data)


def test_names_that_are_not_unicode_are_refused_wherever_they_stand():
    bad = "\ud800"
    for data in (
        {"metrics": {bad: 1}},
        {"metrics": {"a": {bad: 1}}},
        {"bundle": {bad: 1}},
        {"metrics": {"a": 1}, "evidence": {bad: {"samples": 1}}},
        {"metrics": {"a": 1}, "evidence": {"signals": {bad: {"samples": 1}}}},
        {"metrics": {"a": 1}, "evidence": {"confidence": {bad: 1}}},
        {"causal_pairs": [(bad, "b", 1)]},
        {"tested_nodes": [bad]},
        {"concepts": [{"id": bad, "score": 1}]},
        {"type": "msp", "domain_id": bad},
    ):
        with pytest.raises(PlainDataError):
            packet_from_plain(data)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.sampled_from([4000, 5000]).map(lambda digits: 10**digits),
    st.floats(),
    st.text(st.characters(), max_size=8),
    st.sampled_from(["\ud800", "NaN", "msp", "2025-06-15T15:06:40Z", "1e999", "9" * 5000]),
    st.binary(max_size=4),
    st.floats(width=32).map(np.float32),
    st.integers(-100, 100).map(np.int16),
    st.sampled_from([np.True_, np.float64("nan"), np.datetime64(0, "s"), np.array([1.0])]),
    st.decimals(),
    st.datetimes(),
    st.dates(),
    st.complex_numbers(),
)
keys = st.one_of(
    st.sampled_from(
        sorted(
            {
                *packet_pb2.Packet.DESCRIPTOR.fields_by_name,
                *packet_pb2.PacketHeader.DESCRIPTOR.fields_by_name,
                *packet_pb2.PacketHeader.DESCRIPTOR.fields_by_camelcase_name,
                *packet_pb2.MetaSignalPack.DESCRIPTOR.fields_by_name,
                *packet_pb2.PolicyOutcomePack.DESCRIPTOR.fields_by_name,
                *packet_pb2.ConceptCausalSummary.DESCRIPTOR.fields_by_name,
                *packet_pb2.Provenance.DESCRIPTOR.fields_by_name,
                *packet_pb2.CausalPair.DESCRIPTOR.fields_by_name,
                *packet_pb2.Concept.DESCRIPTOR.fields_by_name,
                *("type", "packet_type", "timestamp", "signals", "start", "end", "number", "text"),
            }
        )
    ),
    st.text(max_size=4),
    st.just("\udfff"),
    st.one_of(st.integers(), st.none(), st.booleans(), st.floats()),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.tuples(inner, inner, inner),
        st.dictionaries(keys, inner, max_size=6),
    ),
    max_leaves=25,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.one_of(
        anything,
        st.dictionaries(keys, anything, max_size=8),
        st.builds(
            lambda kind, body: {kind: body},
            st.sampled_from(["msp", "pop", "ccs", "header"]),
            st.dictionaries(keys, anything, max_size=6),
        ),
    )
)
def test_whatever_comes_is_a_packet_or_one_plain_data_error(data):
    problems = None
    try:
        packet = packet_from_plain(data)
    except PlainDataError as error:
        problems = error.problems
    if problems is None:
        assert packet_pb2.Packet.FromString(packet.SerializeToString()) is not packet
    else:
        assert problems
        assert all(problem.rule_id.startswith("fmi.plain.") for problem in problems)
        assert all(len(problem.description) < 400 for problem in problems)


# Round trip

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.:/@+-]{0,12}", fullmatch=True)
number_maps = st.dictionaries(names, finite, max_size=4)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@st.composite
def packets(draw) -> packet_pb2.Packet:  # noqa: C901, PLR0912 - one branch per field
    packet = packet_pb2.Packet()
    header = packet.header
    header.packet_id = packet_id(draw(st.integers(0, 2**32 - 1)))
    header.domain_id, header.cohort, header.profile_class = draw(st.tuples(texts, texts, texts))
    header.rev = draw(st.integers(0, 2**32 - 1))
    if draw(st.booleans()):
        header.emitted_at.seconds = draw(st.integers(-62135596800, 253402300799))
        header.emitted_at.nanos = draw(st.integers(0, 999_999_999))
    if draw(st.booleans()):
        header.provenance.n_samples = draw(st.integers(0, 2**64 - 1))
        header.provenance.applied_privacy.epsilon = draw(finite)
    kind = draw(st.sampled_from(list(PacketType)))
    body = getattr(packet, kind.value)
    body.SetInParent()
    if kind is PacketType.MSP:
        for section in ("metrics", "controller", "evaluator", "operators"):
            getattr(body, section).update(draw(number_maps))
        if draw(st.booleans()):
            body.window_span.start, body.window_span.end = draw(
                st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
            )
        if draw(st.booleans()):
            body.evidence.SetInParent()
            if draw(st.booleans()):
                body.evidence.confidence = draw(finite)
                body.evidence.samples = draw(st.integers(0, 2**64 - 1))
            for name in draw(st.lists(names, max_size=3, unique=True)):
                body.evidence.signals[name].SetInParent()
                if draw(st.booleans()):
                    body.evidence.signals[name].stderr = draw(finite)
    elif kind is PacketType.POP:
        for name in draw(st.lists(names, max_size=4, unique=True)):
            value = draw(st.one_of(finite, texts, st.booleans()))
            body.bundle[name].CopyFrom(param_value(value))
        body.before.update(draw(number_maps))
        body.after.update(draw(number_maps))
        body.control_delta.update(draw(number_maps))
        body.windows = draw(st.integers(0, 2**32 - 1))
        if draw(st.booleans()):
            body.confidence = draw(finite)
    else:
        for _ in range(draw(st.integers(0, 3))):
            pair = body.causal_pairs.add(
                source=draw(texts), target=draw(texts), weight=draw(finite)
            )
            if draw(st.booleans()):
                pair.stderr = draw(finite)
        for _ in range(draw(st.integers(0, 3))):
            body.concepts.add(id=draw(texts), score=draw(finite), links=draw(st.lists(texts)))
        body.tested_nodes.extend(draw(st.lists(texts, max_size=3)))
        body.stability_delta = draw(finite)
        if draw(st.booleans()):
            body.trust = draw(finite)
    return packet


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(packets())
def test_a_packet_survives_the_way_to_plain_data_and_back(packet):
    data = packet_to_plain(packet)
    assert packet_from_plain(data) == packet
    flat = {**data.get("header", {}), **next(v for k, v in data.items() if k != "header")}
    kind = packet.WhichOneof("body")
    assert packet_from_plain({"type": kind, **flat}) == packet


def test_public_names():
    assert all(hasattr(plain, name) for name in plain.__all__)
    assert plain.OLDEST_REVISION <= plain.CURRENT_REVISION
