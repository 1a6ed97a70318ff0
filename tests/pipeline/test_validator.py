"""Deep validation: contract rules, then cohort and policy rules, everything wrong at once."""

from __future__ import annotations

import math

import pytest
from google.protobuf import json_format
from parts import NOW, Clock, ccs, msp, packet, pop

from fmi.rules import MAX_PROBLEMS
from fmi.v1 import cohort_pb2
from fmi_server import FMIContractRegistry, FMIValidator
from fmi_server.cohorts import CohortRegistry
from fmi_server.errors import Reason
from fmi_server.validator import Inspection

CONTRACT = FMIContractRegistry()

SIGNALS = [
    {"name": "tau", "section": "SIGNAL_SECTION_CONTROLLER", "lower": 0.1, "upper": 0.9},
    {"name": "g_min", "section": "SIGNAL_SECTION_EVALUATOR", "lower": 0},
    {"name": "loss", "section": "SIGNAL_SECTION_METRICS", "upper": 10},
]


def validator(*, now: float = NOW, open_cohorts: bool = True, **spec) -> FMIValidator:
    cohorts = CohortRegistry(CONTRACT, open_cohorts=open_cohorts)
    if spec:
        message = json_format.ParseDict({"name": "care", **spec}, cohort_pb2.CohortSpec())
        cohorts.declare(message)
    return FMIValidator(CONTRACT, cohorts=cohorts, clock=Clock(now))


def told(errors) -> dict[str, tuple[str, int]]:
    return {violation.field: (violation.rule_id, violation.reason) for violation in errors}


def test_the_overview_works_as_it_stands():
    registry = FMIContractRegistry()
    validator = FMIValidator(registry=registry)
    packet = registry.coerce(
        {
            "type": "msp",
            "packet_id": "00000001-0000-7000-8000-000000000001",
            "domain_id": "site_001",
            "cohort": "healthcare",
            "rev": 1,
            "emitted_at": 1,
            "controller": {"tau": 0.9},
        }
    )
    (stale,) = validator.validate(packet)
    assert stale.reason == Reason.PACKET_STALE
    packet.header.emitted_at.GetCurrentTime()
    assert validator.validate(packet) == []


def test_an_empty_registry_of_cohorts_is_the_one_that_is_used():
    cohorts = CohortRegistry(CONTRACT, open_cohorts=False)
    assert len(cohorts) == 0
    (violation,) = FMIValidator(CONTRACT, cohorts=cohorts, clock=Clock()).validate(
        msp(controller={"tau": 1.0})
    )
    assert violation.reason == Reason.COHORT_UNKNOWN
    cohorts.declare(cohort_pb2.CohortSpec(name="care"))
    assert (
        FMIValidator(CONTRACT, cohorts=cohorts, clock=Clock()).validate(
            msp(controller={"tau": 1.0})
        )
        == []
    )


def test_a_broken_contract_is_told_before_the_cohort_is_asked():
    errors = validator(open_cohorts=False).validate(msp("bad site", controller={"a": math.nan}))
    assert {error.reason for error in errors} == {Reason.CONTRACT_VIOLATION}
    assert len(errors) == 2


# Policy

WAY_BACK = 7 * 86_400


@pytest.mark.parametrize(
    ("age_s", "reason"),
    [
        (0, None),
        (WAY_BACK, None),
        (WAY_BACK + 1, Reason.PACKET_STALE),
        (-300, None),
        (-301, Reason.PACKET_FROM_FUTURE),
        (-1e10, Reason.PACKET_FROM_FUTURE),
    ],
)
def test_age_and_clock_are_bounded(age_s, reason):
    found = validator().validate(msp(controller={"tau": 1.0}, at=NOW - age_s))
    expected = [] if reason is None else [reason]
    assert [violation.reason for violation in found] == expected
    assert all(violation.field == "header.emitted_at" for violation in found)


def test_age_and_clock_are_the_cohorts():
    strict = validator(ingest={"maxAge": "10s", "maxClockSkew": "0s"})
    assert strict.validate(msp(controller={"tau": 1.0}, at=NOW - 10)) == []
    (stale,) = strict.validate(msp(controller={"tau": 1.0}, at=NOW - 11))
    assert "11 s old, the cohort takes at most 10 s" in stale.description
    (ahead,) = strict.validate(msp(controller={"tau": 1.0}, at=NOW + 0.001))
    assert ahead.reason == Reason.PACKET_FROM_FUTURE


def test_size_is_bounded_as_it_is_on_the_wire():
    small = validator(ingest={"maxPacketBytes": 200})
    packet = msp(controller={f"s{i}": 1.0 for i in range(20)})
    (violation,) = small.validate(packet)
    assert violation.rule_id == "fmi.policy.max_packet_bytes"
    assert violation.reason == Reason.PACKET_TOO_LARGE
    assert f"has {packet.ByteSize()} bytes" in violation.description
    assert small.inspect(packet, size=200).violations == ()
    assert len(small.inspect(packet, size=201).violations) == 1


def test_the_norm_is_that_of_all_signals_together():
    bound = validator(ingest={"maxNorm": 5})
    assert bound.validate(msp(metrics={"a": 3.0}, controller={"b": 4.0})) == []
    (violation,) = bound.validate(msp(metrics={"a": 3.0}, controller={"b": 4.0001}))
    assert violation.reason == Reason.NORM_EXCEEDED
    huge = {f"s{i}": 1e150 for i in range(500)}
    assert [v.reason for v in bound.validate(msp(metrics=huge))] == [Reason.NORM_EXCEEDED]
    assert bound.validate(pop(before={"m": 100.0}, after={"m": 100.0})) == []


def test_declared_privacy_may_be_required():
    private = validator(ingest={"dpRequired": True})
    packet = msp(controller={"tau": 1.0})
    assert told(private.validate(packet)) == {
        "header.provenance.applied_privacy": ("fmi.policy.dp_required", Reason.PRIVACY_REQUIRED)
    }
    packet.header.provenance.applied_privacy.mechanism = "gaussian"
    packet.header.provenance.applied_privacy.epsilon = 1.0
    assert private.validate(packet) == []


def test_low_trust_is_quarantined_and_breaks_no_rule():
    careful = validator(ingest={"minTrust": 0.5})
    doubtful = ccs(pairs=(("a", "b", 1.0),), trust=0.49)
    assert careful.validate(doubtful) == []
    assert careful.inspect(doubtful).quarantine_reason == "trust 0.49 is below the cohort's 0.5"
    assert careful.inspect(ccs(pairs=(("a", "b", 1.0),), trust=0.5)) == Inspection()
    assert careful.inspect(ccs(pairs=(("a", "b", 1.0),))) == Inspection(), "unset means 1"
    assert careful.inspect(msp(controller={"tau": 1.0})) == Inspection()


# The cohort's spec


@pytest.mark.parametrize("refuses", [False, True])
def test_another_schema_hash_is_warned_of_or_refused(refuses):
    mode = "SCHEMA_MISMATCH_REFUSE" if refuses else "SCHEMA_MISMATCH_WARN"
    checker = validator(ingest={"schemaMismatch": mode})
    found = checker.inspect(msp(controller={"tau": 1.0}, schema_hash="0" * 64))
    if refuses:
        assert told(found.violations) == {
            "header.schema_hash": ("fmi.cohort.schema_hash", Reason.SCHEMA_HASH_MISMATCH)
        }
    else:
        assert found.violations == ()
        assert found.warnings[0].startswith("header.schema_hash: was built against cohort spec 000")
    assert checker.inspect(msp(controller={"tau": 1.0})) == Inspection(), "unsaid is taken"


def test_the_right_schema_hash_is_taken():
    cohorts = CohortRegistry(CONTRACT)
    rules, _ = cohorts.declare(cohort_pb2.CohortSpec(name="care"))
    checker = FMIValidator(CONTRACT, cohorts=cohorts, clock=Clock())
    packet = msp(controller={"tau": 1.0}, schema_hash=rules.schema_hash)
    assert checker.inspect(packet) == Inspection()


def test_a_closed_vocabulary_refuses_what_it_does_not_know():
    closed = validator(signals=SIGNALS)
    assert closed.validate(msp(controller={"tau": 0.5}, metrics={"loss": 1.0})) == []
    assert told(closed.validate(msp(controller={"tau": 0.5, "ghost": 1.0}))) == {
        'msp.controller["ghost"]': ("fmi.cohort.vocabulary", Reason.COHORT_RULE_VIOLATION)
    }


def test_an_open_vocabulary_still_holds_what_is_declared():
    opened = validator(signals=SIGNALS, freeSignals=True)
    assert told(opened.validate(msp(controller={"tau": 1.0, "ghost": 1e9}))) == {
        'msp.controller["tau"]': ("fmi.cohort.bounds", Reason.COHORT_RULE_VIOLATION)
    }


def test_a_vocabulary_may_be_closed_and_empty():
    nothing = validator(freeSignals=False)
    assert list(told(nothing.validate(msp(controller={"tau": 1.0})))) == ['msp.controller["tau"]']


def test_a_signal_in_the_wrong_section_is_told():
    (violation,) = validator(signals=SIGNALS).validate(msp(metrics={"tau": 0.5}))
    assert violation.rule_id == "fmi.cohort.section"
    assert violation.field == 'msp.metrics["tau"]'
    assert "signal of controller" in violation.description


@pytest.mark.parametrize(
    ("value", "good"), [(0.1, True), (0.9, True), (0.0999, False), (0.9001, False), (-1e150, False)]
)
def test_bounds_are_inclusive(value, good):
    found = validator(signals=SIGNALS).validate(msp(controller={"tau": value}))
    assert [v.rule_id for v in found] == ([] if good else ["fmi.cohort.bounds"])
    assert all("[0.1, 0.9]" in v.description for v in found)


def test_an_open_end_is_shown():
    (violation,) = validator(signals=SIGNALS).validate(msp(evaluator={"g_min": -1.0}))
    assert "[0, inf]" in violation.description


def test_outcomes_are_held_to_the_vocabulary_of_metrics():
    checker = validator(signals=SIGNALS)
    bad = pop(
        bundle={"tau": 5.0, "mode": "fast", "unknown": 1.0},
        before={"loss": 11.0, "tau": 0.5},
        after={"loss": 1.0, "ghost": 1.0},
    )
    bad.pop.control_delta["loss"] = 100.0  # a difference, not a value
    assert {field: rule for field, (rule, _) in told(checker.validate(bad)).items()} == {
        'pop.before["loss"]': "fmi.cohort.bounds",
        'pop.before["tau"]': "fmi.cohort.section",
        'pop.after["ghost"]': "fmi.cohort.vocabulary",
        'pop.bundle["tau"]': "fmi.cohort.bounds",
    }


# All at once


def test_everything_wrong_is_told_at_once():
    strict = validator(
        signals=SIGNALS,
        ingest={
            "maxPacketBytes": 10,
            "maxAge": "5s",
            "maxNorm": 1,
            "dpRequired": True,
            "schemaMismatch": "SCHEMA_MISMATCH_REFUSE",
        },
    )
    bad = msp(
        metrics={"loss": 11.0, "g_min": 1.0},
        controller={"ghost": 1.0},
        at=NOW - 6,
        schema_hash="0" * 64,
    )
    assert {reason for _, reason in told(strict.validate(bad)).values()} == {
        Reason.PACKET_TOO_LARGE,
        Reason.PACKET_STALE,
        Reason.NORM_EXCEEDED,
        Reason.PRIVACY_REQUIRED,
        Reason.SCHEMA_HASH_MISMATCH,
        Reason.COHORT_RULE_VIOLATION,
    }
    assert len(strict.validate(bad)) == 8


def test_the_answer_to_a_hostile_packet_is_bounded():
    bad = packet()
    for number in range(1000):
        bad.msp.metrics[f"m{number}"] = 1.0
        bad.msp.controller[f"c{number}"] = 1.0
    assert len(validator(signals=SIGNALS).validate(bad)) == MAX_PROBLEMS


def test_a_packet_larger_than_any_cohort_takes_is_not_looked_into():
    checks = validator(ingest={"max_packet_bytes": 300_000})
    huge = msp(cohort="care", metrics={f"{'m' * 100} {n}": math.nan for n in range(4000)})
    (found,) = checks.validate(huge)
    assert (found.field, found.rule_id) == ("packet", "fmi.policy.max_packet_bytes")
    assert found.reason == Reason.PACKET_TOO_LARGE
    assert "no cohort takes more than 300000" in found.description
