"""The registry: what is missing, what is wrong, and where; all at once, bounded, and quoted."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from parts import ccs, msp, packet, pop

import fmi
from fmi.descriptors import CONTRACT_FILES, SERVICE_NAMES
from fmi.rules import MAX_PROBLEMS, SECTIONS
from fmi.v1 import admin_service_pb2, cohort_pb2, packet_pb2, registry_service_pb2
from fmi.v1 import interchange_service_pb2 as wire_pb2
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import PacketRefusedError, Reason, RequestInvalidError, ThingNotFoundError


@pytest.fixture(scope="module")
def registry() -> FMIContractRegistry:
    return FMIContractRegistry()


def rules(registry, packet) -> dict[str, str]:
    found = registry.violations(packet)
    told = {violation.field: violation.rule_id for violation in found}
    assert len(told) == len(found)
    return told


GOOD = {
    "type": "msp",
    "packet_id": "00000001-0000-7000-8000-000000000001",
    "domain_id": "site_001",
    "cohort": "healthcare",
    "rev": 1,
    "emitted_at": 1_750_000_000,
    "controller": {"tau": 0.9},
}


# validate and coerce, as the overview has them


def test_a_good_packet_is_valid_in_every_form(registry):
    assert registry.validate(GOOD) == (True, [])
    assert registry.validate(registry.coerce(GOOD)) == (True, [])
    for good in (msp(controller={"tau": 0.9}), pop(), ccs(pairs=(("a", "b", 1.0),))):
        assert registry.validate(good) == (True, [])


def test_what_is_missing_is_named(registry):
    header = ["packet_id", "domain_id", "cohort", "rev", "emitted_at"]
    of_all_types = ["type", *(f"header.{name}" for name in header)]
    assert registry.validate({}) == (False, of_all_types)
    assert registry.validate({"type": "xyz"}) == (False, of_all_types)
    assert registry.validate({**GOOD, "type": ""}) == (False, ["type"])
    assert registry.validate({"type": "msp"}) == (
        False,
        [
            "header.packet_id",
            "header.domain_id",
            "header.cohort",
            "header.rev",
            "header.emitted_at",
            "msp",
        ],
    )
    assert registry.validate(packet_pb2.Packet()) == (False, ["body", "header"])
    bare = packet()
    bare.pop.windows = 1
    assert registry.validate(bare) == (False, ["pop.bundle", "pop.before", "pop.after"])
    bare.ccs.SetInParent()
    assert registry.validate(bare) == (False, ["ccs"])


@pytest.mark.parametrize("name", ["packet_id", "domain_id", "cohort", "rev", "emitted_at"])
def test_each_missing_field_is_named_alone(registry, name):
    without = {key: value for key, value in GOOD.items() if key != name}
    assert registry.validate(without) == (False, [f"header.{name}"])


def test_a_packet_can_be_invalid_with_nothing_missing(registry):
    assert registry.validate({**GOOD, "domain_id": "no spaces here"}) == (False, [])
    assert registry.validate({**GOOD, "rev": "x"}) == (False, [])


def test_coerce_gives_a_typed_packet_back_as_it_is(registry):
    typed = msp()
    assert registry.coerce(typed) is typed


def test_coerce_tells_everything_that_cannot_be_translated(registry):
    with pytest.raises(PacketRefusedError) as caught:
        registry.coerce({**GOOD, "nonsense": 1, "metrics": {"a": "x"}, "domain_id": 5})
    assert {v.field for v in caught.value.violations} == {
        "nonsense",
        'msp.metrics["a"]',
        "header.domain_id",
    }
    assert caught.value.reason == Reason.CONTRACT_VIOLATION


def told(registry, plain) -> dict[str, str]:
    with pytest.raises(PacketRefusedError) as caught:
        registry.coerce(plain)
    found = [(v.field, v.rule_id.removeprefix("fmi.")) for v in caught.value.violations]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_what_cannot_be_translated_hides_no_broken_rule_of_the_rest(registry):
    plain = {
        "type": "msp",
        "domain_id": "no spaces here",
        "rev": "x",
        "emitted_at": 1_750_000_000,
        "metrics": {"a": "x", "b": math.nan},
        "evidence": {"ghost": {"confidence": 0.5}},
        "nonsense": 1,
    }
    assert told(registry, plain) == {
        "nonsense": "plain.unknown_field",
        "header.rev": "plain.integer",
        'msp.metrics["a"]': "plain.number",
        "header.packet_id": "required",
        "header.domain_id": "string.pattern",
        "header.cohort": "required",
        'msp.metrics["b"]': "double.gte_lte",
        'msp.evidence.signals["ghost"]': "msp.evidence_of_a_signal",
    }
    assert registry.validate(plain) == (False, ["header.packet_id", "header.cohort"])


def test_a_revision_of_the_future_is_told_beside_what_cannot_be_translated(registry):
    plain = {**GOOD, "rev": 9, "metrics": {"a": "x"}}
    assert told(registry, plain) == {'msp.metrics["a"]': "plain.number", "header.rev": "header.rev"}


HEADER = {name: GOOD[name] for name in ("packet_id", "domain_id", "cohort", "rev", "emitted_at")}


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"type": "msp", "header": 5, "msp": {"metrics": {"a": 1}}}, {"header"}),
        ({"type": "msp", **HEADER, "msp": 5}, {"msp"}),
        ({"type": "msp", **HEADER, "metrics": 5}, {"msp.metrics"}),
        ({"type": "msp", **HEADER, "metrics": {"a": "x"}}, {'msp.metrics["a"]'}),
        ({"type": "msp", **HEADER, "emitted_at": "x", "metrics": {"a": 1}}, {"header.emitted_at"}),
        ({"type": "msp", **HEADER, "window_span": 5}, {"msp.window_span", "msp"}),
        (
            {"type": "msp", **HEADER, "metrics": 5, "evidence": {"a": {"confidence": 1}}},
            {"msp.metrics"},
        ),
        (
            {"type": "msp", **HEADER, "metrics": {"a": 1}, "evidence": {"samples": {"a": "x"}}},
            {'msp.evidence.samples["a"]'},
        ),
        (
            {"type": "pop", **HEADER, "bundle": 5, "before": 5, "after": {"a": 1}, "windows": "x"},
            {"pop.bundle", "pop.before", "pop.windows"},
        ),
        ({"type": "pop", **HEADER}, None),
        ({"type": "ccs", **HEADER, "concepts": 5}, {"ccs.concepts"}),
        (
            {
                "type": "ccs",
                **HEADER,
                "causal_pairs": [(1, 2, "x"), (), ("a", "b", math.inf)],
            },
            {
                "ccs.causal_pairs[0].source",
                "ccs.causal_pairs[0].target",
                "ccs.causal_pairs[0].weight",
                "ccs.causal_pairs[1]",
                "ccs.causal_pairs[2].weight",
            },
        ),
        ({"type": "xyz", **HEADER, "metrics": {"a": 1}}, {"type"}),
    ],
)
def test_what_only_follows_from_a_field_that_was_given_is_not_told(registry, given, fields):
    if fields is None:
        registry.coerce(given)  # what is left out is told by `validate`
    else:
        assert told(registry, given).keys() == fields


@pytest.mark.parametrize("wrong", [5, None, "packet", []])
def test_what_is_no_mapping_is_told_as_that(registry, wrong):
    assert told(registry, wrong) == {"packet": "plain.mapping", "type": "plain.packet_type"}


def test_faults_stand_in_the_order_of_the_contract_and_of_their_names(registry):
    bad = packet()
    bad.header.domain_id = "a b"
    bad.msp.metrics.update({f"x {i:02}": 1.0 for i in range(60)})
    bad.msp.controller.update({f"y {i:02}": 1.0 for i in range(60)})
    found = [v.field for v in registry.violations(bad)]
    names = [f'msp.metrics["x {i:02}"]' for i in range(60)]
    assert found == [
        "header.domain_id",
        *names,
        *(f'msp.controller["y {i:02}"]' for i in range(39)),
    ]


def test_a_lost_value_hides_neither_its_name_nor_that_there_are_too_many(registry):
    metrics = {f"g{i}": 1.0 for i in range(1100)} | {" bad": "abc"}
    found = [
        (v.field, v.rule_id)
        for v in problems_of(registry, {"type": "msp", **HEADER, "metrics": metrics})
    ]
    assert sorted(found) == [
        ("msp.metrics", "map.max_pairs"),
        ('msp.metrics[" bad"]', "fmi.plain.number"),
        ('msp.metrics[" bad"]', "string.pattern"),
    ]
    nodes = ["a", 5, *(f"n{i}" for i in range(5000))]
    found = told(registry, {"type": "ccs", **HEADER, "tested_nodes": nodes})
    assert found == {"ccs.tested_nodes": "repeated.max_items", "ccs.tested_nodes[1]": "plain.text"}


def problems_of(registry, plain):
    with pytest.raises(PacketRefusedError) as caught:
        registry.coerce(plain)
    return caught.value.violations


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"type": "msp", **HEADER, "msp": {"controler": {"t": 1}}}, {"msp.controler"}),
        ({"type": "msp", **HEADER, "controler": {"t": 1}}, {"controler"}),
        (
            {
                "type": "msp",
                **HEADER,
                "metrics": {"a": 1},
                "controler": {"t": 1},
                "evidence": {"t": {"confidence": 1}},
            },
            {"controler"},
        ),
        (
            {"type": "pop", **HEADER, "bundle": {"a": 1}, "befor": {"a": 1}, "after": {"a": 1}},
            {"befor", "pop.windows"},
        ),
        (
            {"type": "msp", **HEADER, "metrics": {"a": 1}, "nonsense": 1, "domain_id": "a b"},
            {"nonsense", "header.domain_id"},
        ),
    ],
)
def test_a_misspelt_field_is_not_told_as_a_missing_one_too(registry, given, fields):
    assert told(registry, given).keys() == fields


def test_each_field_of_a_small_message_is_told_by_itself(registry):
    provenance = {"foo": 1, "bar": 2, "regime_tag": 5, "software": "s"}
    pairs = [{"source": "a", "targt": "b", "weight": "x", "type": 5}]
    found = told(
        registry, {"type": "ccs", **HEADER, "provenance": provenance, "causal_pairs": pairs}
    )
    assert found == {
        "header.provenance.foo": "plain.unknown_field",
        "header.provenance.bar": "plain.unknown_field",
        "header.provenance.regime_tag": "plain.message",
        "ccs.causal_pairs[0].targt": "plain.unknown_field",
        "ccs.causal_pairs[0].weight": "plain.message",
        "ccs.causal_pairs[0].type": "plain.message",
    }


@pytest.mark.parametrize("name", [None, True, 1.5, ("a", "b")])
def test_a_name_that_is_no_text_is_told(registry, name):
    metrics = {name: 3.0, "a": 1.0, "b": math.nan, " c": "x"}
    found = problems_of(registry, {"type": "msp", **HEADER, "metrics": metrics})
    assert [v.rule_id.removeprefix("fmi.") for v in found] == [
        "plain.name",
        "plain.number",
        "string.pattern",
        "double.gte_lte",
    ]
    assert found[0].field.startswith('msp.metrics["')
    assert found[0].description.startswith("a name must be text, not ")


# Rules


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200, -1e151, 1.0000001e150])
def test_numbers_that_no_estimator_takes_are_refused(registry, section, value):
    bad = packet()
    getattr(bad.msp, section)["tau"] = value
    assert rules(registry, bad) == {f'msp.{section}["tau"]': "double.gte_lte"}
    (violation,) = registry.violations(bad)
    assert f"{value:g}" in violation.description
    assert "0000000" not in violation.description


@pytest.mark.parametrize("value", [1e150, -1e150, 0.0, 5e-324])
def test_numbers_at_the_edge_are_taken(registry, value):
    assert rules(registry, msp(controller={"tau": value})) == {}


@pytest.mark.parametrize("field", ["before", "after", "control_delta"])
def test_numbers_of_outcomes_are_held_to_the_same(registry, field):
    bad = pop(before={"loss": 1.0}, after={"loss": 1.0})
    getattr(bad.pop, field)["x"] = math.nan
    assert rules(registry, bad) == {f'pop.{field}["x"]': "double.gte_lte"}


def test_numbers_of_causes_are_held_to_the_same(registry):
    bad = ccs(pairs=(("a", "b", math.inf),), concepts={"c": math.nan})
    bad.ccs.causal_pairs[0].stderr = 0.0
    bad.ccs.stability_delta = math.nan
    bad.ccs.trust = 1.5
    assert rules(registry, bad).keys() == {
        "ccs.causal_pairs[0].weight",
        "ccs.causal_pairs[0].stderr",
        "ccs.concepts[0].score",
        "ccs.stability_delta",
        "ccs.trust",
    }


def test_a_signal_stands_in_one_section(registry):
    bad = msp(metrics={"tau": 1.0}, controller={"tau": 1.0, "x": 1.0}, evaluator={"y": 1.0})
    assert rules(registry, bad) == {'msp.controller["tau"]': "fmi.msp.signal_in_one_section"}


def test_evidence_is_of_a_signal_in_the_packet(registry):
    bad = msp(controller={"tau": 1.0})
    bad.msp.evidence.signals["tau"].confidence = 0.5
    bad.msp.evidence.signals["other"].confidence = 0.5
    bad.msp.evidence.confidence = math.nan
    found = rules(registry, bad)
    assert found.pop('msp.evidence.signals["other"]') == "fmi.msp.evidence_of_a_signal"
    assert found.keys() == {"msp.evidence.confidence"}


def test_outcomes_need_a_metric_in_common(registry):
    bad = pop(before={"a": 1.0}, after={"b": 1.0})
    assert rules(registry, bad) == {"pop.after": "fmi.pop.common_metric"}
    bad.pop.bundle["empty"].SetInParent()
    assert 'pop.bundle["empty"].kind' in rules(registry, bad)


def test_pairs_and_concepts_stand_once(registry):
    bad = ccs(pairs=(("a", "b", 1.0), ("a", "b", 2.0), ("b", "a", 1.0)))
    bad.ccs.causal_pairs[1].type = "direct"  # what unset means
    bad.ccs.concepts.add(id="c", score=1)
    bad.ccs.concepts.add(id="c", score=2)
    assert rules(registry, bad) == {
        "ccs.causal_pairs[1]": "fmi.ccs.pair_once",
        "ccs.concepts[1].id": "fmi.ccs.concept_once",
    }
    bad.ccs.causal_pairs[1].type = "lagged"
    del bad.ccs.concepts[1]
    assert rules(registry, bad) == {}


def test_a_pair_is_between_two(registry):
    bad = ccs(pairs=(("a", "a", 1.0), ("", "b", 1.0)))
    found = rules(registry, bad)
    assert found["ccs.causal_pairs[0]"] == "fmi.causal_pair.self_loop"
    assert found["ccs.causal_pairs[1].source"] == "required"


@pytest.mark.parametrize("start_end", [(5, 4), (-1, 4), (2**63 - 1, 0)])
def test_windows_are_in_order(registry, start_end):
    bad = msp(controller={"tau": 1.0})
    bad.msp.window_span.start, bad.msp.window_span.end = start_end
    assert rules(registry, bad)


@pytest.mark.parametrize(
    ("seconds", "nanos"),
    [(0, 0), (-5, 0), (253_402_300_800, 0), (2**63 - 1, 0), (5, -1), (5, 10**9), (5, 2**31 - 1)],
)
def test_a_moment_that_is_no_timestamp_is_refused(registry, seconds, nanos):
    bad = msp(controller={"tau": 1.0})
    bad.header.emitted_at.seconds, bad.header.emitted_at.nanos = seconds, nanos
    assert list(rules(registry, bad)) == ["header.emitted_at"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("domain_id", "site\n"),
        ("domain_id", "-site"),
        ("domain_id", "x" * 129),
        ("domain_id", "sité"),
        ("cohort", "Care"),
        ("cohort", "care/"),
        ("cohort", "care//eu"),
        ("cohort", "../etc"),
        ("cohort", "a" * 129),
        ("cohort", "care\n"),
        ("packet_id", "1"),
        ("packet_id", "0000000A-0000-7000-8000-000000000001"),
        ("packet_id", "00000001-0000-7000-8000-000000000001\n"),
        ("profile_class", " "),
        ("schema_hash", "abc"),
    ],
)
def test_names_that_are_no_names_are_refused(registry, name, value):
    bad = msp(controller={"tau": 1.0})
    setattr(bad.header, name, value)
    assert list(rules(registry, bad)) == [f"header.{name}"]


@pytest.mark.parametrize("revision", [2, 99, 2**32 - 1])
def test_a_revision_of_the_future_is_told_alone(registry, revision):
    bad = packet(rev=revision)  # no body: nothing else is said of it
    (violation,) = registry.violations(bad)
    assert (violation.field, violation.rule_id) == ("header.rev", "fmi.header.rev")
    assert violation.reason == Reason.CONTRACT_REVISION_UNSUPPORTED
    assert "takes 1 to 1" in violation.description


def test_an_unknown_type_is_refused(registry):
    assert registry.validate({**GOOD, "type": "xyz"}) == (False, ["type"])
    unknown = packet_pb2.Packet()
    unknown.MergeFromString(msp(controller={"tau": 1.0}).SerializeToString())
    unknown.ClearField("msp")
    unknown.MergeFromString(b"\x7a\x02\x08\x01")  # field 15: a body of the future
    assert rules(registry, unknown) == {"body": "required"}


# All at once, bounded, quoted


def test_all_violations_are_told_at_once(registry):
    bad = msp("bad site", metrics={"a": math.nan, "tau": 1.0}, controller={"tau": 1.0})
    bad.header.packet_id = ""
    bad.header.provenance.regime_tag = " "
    bad.msp.window_span.start = 3
    bad.msp.evidence.signals["ghost"].SetInParent()
    assert rules(registry, bad).keys() == {
        "header.packet_id",
        "header.domain_id",
        "header.provenance.regime_tag",
        "msp.window_span",
        'msp.metrics["a"]',
        'msp.controller["tau"]',
        'msp.evidence.signals["ghost"]',
    }


def test_the_answer_to_a_hostile_packet_is_bounded(registry):
    bad = packet()
    for number in range(1000):
        bad.msp.metrics[f"s{number}"] = math.nan
        bad.msp.controller[f"s{number}"] = math.nan
        bad.msp.evidence.signals[f"ghost{number}"].SetInParent()
    assert len(registry.violations(bad)) == MAX_PROBLEMS
    assert len(registry.message_violations(bad)) == MAX_PROBLEMS
    with pytest.raises(RequestInvalidError) as caught:
        registry.check_request(bad)
    assert len(caught.value.violations) == MAX_PROBLEMS
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "name",
    [
        'tau"\n; drop',
        "\x00",
        "\x1b[31m",
        "x" * 10_000,
        "\u202e",
        "\u2028",
        "a b",
        "\N{PILE OF POO}",
    ],
)
def test_hostile_names_are_quoted(registry, name):
    bad = packet()
    bad.msp.metrics[name] = 1.0
    bad.msp.evidence.signals[name + "x"].SetInParent()
    found = registry.violations(bad)
    assert len(found) == 3
    for violation in found:
        shown = str(violation)
        assert shown.isprintable()
        assert shown.isascii()
        assert len(shown) < 2000
        assert violation.field.count('"') - violation.field.count('\\"') == 2


def test_a_registry_may_be_shared_by_threads(registry):
    bad = msp("bad site", metrics={"a": math.nan})
    expected = registry.violations(bad)
    results = []

    def check() -> None:
        results.extend(registry.violations(bad) == expected for _ in range(200))

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 800


def test_requests_are_checked_and_may_leave_a_part_to_others(registry):
    request = wire_pb2.EmitRequest(packet=packet())
    with pytest.raises(RequestInvalidError):
        registry.check_request(request)
    registry.check_request(request, skip="packet")
    bad = wire_pb2.SubscribeRequest(cohorts=["care"], kinds=[0])
    with pytest.raises(RequestInvalidError) as caught:
        registry.check_request(bad, reason=Reason.INVALID_FILTER)
    assert caught.value.reason == Reason.INVALID_FILTER
    assert [(v.field, v.reason) for v in caught.value.violations] == [
        ("kinds[0]", Reason.INVALID_FILTER)
    ]


# The contract itself


def test_messages_are_found_by_both_names(registry):
    assert registry.descriptor("Packet") is packet_pb2.Packet.DESCRIPTOR
    assert registry.descriptor("fmi.v1.CohortSpec") is cohort_pb2.CohortSpec.DESCRIPTOR
    for unknown in ("", "Nothing", "fmi.v1", "google.protobuf.Timestamp"):
        with pytest.raises(ThingNotFoundError):
            registry.descriptor(unknown)


def test_the_contract_hash_is_over_the_descriptors_and_stable(registry):
    digest = hashlib.sha256()
    for file in sorted(CONTRACT_FILES, key=lambda file: file.name):
        digest.update(len(file.serialized_pb).to_bytes(8, "big") + file.serialized_pb)
    assert registry.contract_hash == digest.hexdigest()
    assert FMIContractRegistry().contract_hash == registry.contract_hash


def test_the_descriptor_set_stands_on_its_own(registry):
    files = descriptor_pb2.FileDescriptorSet.FromString(registry.descriptor_set()).file
    seen: set[str] = set()
    for file in files:
        assert set(file.dependency) <= seen, "imports come first"
        seen.add(file.name)
    assert {file.name for file in CONTRACT_FILES} <= seen
    assert len(SERVICE_NAMES) == 3


PROTO = Path(fmi.__file__).parent / "v1"


@pytest.mark.parametrize("path", sorted(PROTO.glob("*.proto")), ids=lambda path: path.name)
def test_everything_in_the_contract_has_a_comment(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    declared = re.compile(
        r"^\s*(message|enum|service|rpc|oneof)\s+\w+|^\s*(repeated |optional )?[\w.]+(<.*>)? \w+ = \d+"
        r"|^\s*[A-Z0-9_]+ = \d+;"
    )
    found = 0
    for place, line in enumerate(lines):
        if line.startswith(("syntax", "package", "import", "//")) or not declared.match(line):
            continue
        found += 1
        assert lines[place - 1].strip().startswith("//"), f"{path.name}:{place + 1}: {line.strip()}"
    assert found > 5


@pytest.mark.parametrize("path", sorted(PROTO.glob("*.proto")), ids=lambda path: path.name)
def test_every_field_says_whether_it_is_required(path):
    (file,) = [file for file in CONTRACT_FILES if file.name.endswith("/" + path.name)]
    text = path.read_text(encoding="utf-8")
    for message in file.message_types_by_name.values():
        for field in message.fields:
            if field.containing_oneof is not None and not field.has_presence:
                continue
            if field.containing_oneof is not None and len(field.containing_oneof.fields) > 1:
                continue  # the oneof says it
            block = text[text.index(f"message {message.name} {{") :]
            match = re.search(rf"((?:  //.*\n)+)  [^\n/]* {field.name} = {field.number}\b", block)
            assert match, f"{message.name}.{field.name}"
            assert match[1].strip().startswith(("// Required.", "// Optional.", "// Output only."))


@pytest.mark.parametrize("text", ["a\n", "\0", "\x1b[31m", "a\x7f", "a\x85b", "a\u2028b", "\u2029"])
def test_control_characters_are_refused_wherever_a_site_chooses_a_text(registry, text):
    bad = packet()
    bad.ccs.causal_pairs.add(source=text, target=f"{text}2", type=text, weight=1.0)
    bad.ccs.concepts.add(id=text, score=1.0, links=[text])
    bad.ccs.tested_nodes.append(text)
    assert rules(registry, bad) == {
        "ccs.causal_pairs[0].source": "string.pattern",
        "ccs.causal_pairs[0].target": "string.pattern",
        "ccs.causal_pairs[0].type": "string.pattern",
        "ccs.concepts[0].id": "string.pattern",
        "ccs.concepts[0].links[0]": "string.pattern",
        "ccs.tested_nodes[0]": "string.pattern",
    }


@pytest.mark.parametrize(
    "text", ["smoking", "blood pressure (mmHg)", "Rückfall", "因果", "a\u200db"]
)
def test_texts_of_people_are_taken(registry, text):
    good = packet()
    good.ccs.causal_pairs.add(source=text, target="x", type=text, weight=1.0)
    good.ccs.concepts.add(id=text, score=1.0, links=[text])
    assert rules(registry, good) == {}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (wire_pb2.GetUpdateRequest(cohort="A b", kind=1), "cohort"),
        (wire_pb2.GetWarmStartRequest(cohort="a" * 129), "cohort"),
        (wire_pb2.GetWarmStartRequest(cohort="a", concepts={"a\n": 1.0}), 'concepts["a\\n"]'),
        (wire_pb2.StartRevision(cohort="a/", kind=1, revision=1), "cohort"),
        (registry_service_pb2.GetCohortSpecRequest(cohort="a\n"), "cohort"),
        (admin_service_pb2.ReleaseNowRequest(cohort="/a"), "cohort"),
        (admin_service_pb2.ListSitesRequest(cohort="A"), "cohort"),
        (admin_service_pb2.ListQuarantineRequest(cohort="A"), "cohort"),
        (
            admin_service_pb2.SetQuarantineRequest(domain_id="a b", packet_id=GOOD["packet_id"]),
            "domain_id",
        ),
        (admin_service_pb2.SetQuarantineRequest(domain_id="a", packet_id="7"), "packet_id"),
        (cohort_pb2.PolicySpec(quantum={"a b": 1.0}), 'quantum["a b"]'),
        (cohort_pb2.AccessSpec(emit=["a", ""]), "emit[1]"),
        (cohort_pb2.AccessSpec(subscribe=["a" * 257]), "subscribe[0]"),
        (cohort_pb2.AccessSpec(admin=["a\n"]), "admin[0]"),
        (wire_pb2.SubscribeRequest(cohorts=["*a" * 8 + "*"]), "cohorts[0]"),
        (wire_pb2.SubscribeRequest(cohorts=["**a" * 8 + "**"]), "cohorts[0]"),
    ],
)
def test_names_are_held_to_their_form_in_every_request(registry, message, field):
    assert [v.field for v in registry.message_violations(message)] == [field]


@pytest.mark.parametrize(
    "message",
    [
        admin_service_pb2.ListSitesRequest(),
        admin_service_pb2.ListQuarantineRequest(cohort="retail/eu"),
        admin_service_pb2.SetQuarantineRequest(domain_id="a", packet_id=GOOD["packet_id"]),
        cohort_pb2.PolicySpec(quantum={"tau": 1.0}),
        cohort_pb2.AccessSpec(emit=["spiffe://care/site-1", "a" * 256]),
        wire_pb2.SubscribeRequest(cohorts=["*a" * 8, "a**" * 8, "**", "?" * 128]),
    ],
)
def test_names_in_their_form_are_taken(registry, message):
    assert registry.message_violations(message) == []
