"""Cohort specs: defaults filled in, changed safely, refused where this version cannot keep its word."""

from __future__ import annotations

import copy
import math

import pytest
from google.protobuf import json_format

from fmi.v1 import cohort_pb2
from fmi_server.cohorts import CohortRegistry, IngestRules
from fmi_server.config import AggregationConfig
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import (
    CohortUnknownError,
    Reason,
    SettingUnsupportedError,
    SpecChangeUnsafeError,
    SpecInvalidError,
)

CONTRACT = FMIContractRegistry()
DAY_S = 86_400.0


def spec(**fields) -> cohort_pb2.CohortSpec:
    return json_format.ParseDict({"name": "care", **fields}, cohort_pb2.CohortSpec())


def signal(name: str = "tau", section: str = "CONTROLLER", **fields) -> dict:
    return {"name": name, "section": f"SIGNAL_SECTION_{section}", **fields}


@pytest.fixture
def cohorts() -> CohortRegistry:
    return CohortRegistry(CONTRACT)


def fields_of(error) -> dict[str, str]:
    return {violation.field: violation.rule_id for violation in error.value.violations}


# Defaults


def test_an_empty_spec_has_the_documented_defaults(cohorts):
    rules = cohorts.compile(spec())
    assert rules.aggregation == AggregationConfig()
    assert rules.ingest == IngestRules(
        max_packet_bytes=262_144,
        max_age_s=7 * DAY_S,
        max_clock_skew_s=300,
        max_norm=math.inf,
        min_trust=0,
        dp_required=False,
        refuse_schema_mismatch=False,
    )
    assert (rules.min_interval_s, rules.max_interval_s) == (1.0, 60.0)
    assert (rules.policy_window_s, rules.site_ttl_s) == (30 * DAY_S, 30 * DAY_S)
    assert rules.updates_kept == 1000
    assert rules.free_signals
    assert not rules.signals


def test_what_is_written_is_compiled(cohorts):
    rules = cohorts.compile(
        spec(
            signals=[
                signal("loss", "METRICS", direction="SIGNAL_DIRECTION_LOWER_IS_BETTER", scale=0.1),
                signal(lower=0.1, upper=0.9, transform="SIGNAL_TRANSFORM_LOGIT", unit="ms"),
            ],
            aggregation={"metricsTrimAlpha": 0.2, "maxByzantine": 0, "weightCap": 1},
            ingest={"maxNorm": 5, "schemaMismatch": "SCHEMA_MISMATCH_REFUSE", "minTrust": 0.5},
            release={"minInterval": "0.25s", "maxInterval": "0.25s"},
            policy={"quantum": {"tau": 0.01}, "window": "60s"},
            retention={"siteTtl": "1.5s", "updates": 1},
        )
    )
    assert rules.signals["loss"].direction == -1
    assert rules.signals["loss"].scale == 0.1
    tau = rules.signals["tau"]
    assert (tau.section, tau.lower, tau.upper, tau.transform, tau.unit, tau.direction) == (
        "controller", 0.1, 0.9, "logit", "ms", None,
    )  # fmt: skip
    assert not rules.free_signals, "a vocabulary is closed where it is not said to be open"
    assert (rules.aggregation.metrics_trim_alpha, rules.aggregation.max_byzantine) == (0.2, 0)
    assert (rules.ingest.max_norm, rules.ingest.min_trust) == (5.0, 0.5)
    assert rules.ingest.refuse_schema_mismatch
    assert (rules.min_interval_s, rules.max_interval_s, rules.site_ttl_s) == (0.25, 0.25, 1.5)
    assert rules.quantum == {"tau": 0.01}


def test_the_defaults_of_the_server_fill_in(cohorts):
    own = CohortRegistry(CONTRACT, defaults=AggregationConfig(vote_min_sites=7, max_byzantine=2))
    assert own.compile(spec()).aggregation.vote_min_sites == 7
    assert own.rules("anything").aggregation.max_byzantine == 2
    told = own.compile(spec(aggregation={"voteMinSites": 4})).aggregation
    assert (told.vote_min_sites, told.max_byzantine) == (4, 2)
    assert own.compile(spec()).schema_hash != cohorts.compile(spec()).schema_hash


# Hash


def test_equal_meaning_has_an_equal_hash():
    cohorts = CohortRegistry(
        CONTRACT, authenticated=True
    )  # access without lists is refused elsewhere
    plain = cohorts.compile(spec(signals=[signal()]))
    written_out = cohorts.compile(
        spec(
            signals=[signal(transform="SIGNAL_TRANSFORM_LINEAR")],
            freeSignals=False,
            aggregation={
                "metricsTrimAlpha": 0.1,
                "voteMinSites": 3,
                "metricsAggregation": "trimmed_mean",
                "weightCap": 0.25,
            },
            release={"minInterval": "1s", "maxInterval": "60s"},
            ingest={"maxAge": "604800s", "schemaMismatch": "SCHEMA_MISMATCH_WARN", "minTrust": 0},
            privacy={"dpEpsilon": 0},
            access={"emit": []},
        )
    )
    assert plain.schema_hash == written_out.schema_hash
    assert len(plain.schema_hash) == 64
    assert cohorts.compile(plain.spec).schema_hash == plain.schema_hash, "filling in is stable"


def test_the_hash_of_an_open_cohort_is_that_of_its_declaration(cohorts):
    assert cohorts.open("care").schema_hash == cohorts.compile(spec()).schema_hash
    assert cohorts.rules("other").schema_hash != cohorts.rules("care").schema_hash


@pytest.mark.parametrize(
    "change",
    [
        {"signals": [signal(upper=1)]},
        {"signals": [signal(unit="s")]},
        {"signals": [signal(), signal("x")]},
        {"freeSignals": True},
        {"aggregation": {"voteMinSites": 2}},
        {"release": {"minInterval": "2s"}},
        {"ingest": {"dpRequired": True}},
        {"policy": {"quantum": {"tau": 1}}},
        {"retention": {"updates": 5}},
    ],
)
def test_another_meaning_has_another_hash(cohorts, change):
    base = {"signals": [signal()]}
    assert cohorts.compile(spec(**base)).schema_hash != (
        cohorts.compile(spec(**{**base, **change})).schema_hash
    )


# Wrong specs


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"name": "Not A Name"}, "name"),
        ({"name": ""}, "name"),
        ({"signals": [signal("9")]}, "signals[0].name"),
        ({"signals": [{"name": "a"}]}, "signals[0].section"),
        ({"signals": [signal(), signal()]}, "signals[1].name"),
        ({"signals": [signal(lower=1, upper=1)]}, "signals[0]"),
        ({"signals": [signal(lower=2, upper=1)]}, "signals[0]"),
        ({"signals": [signal(lower="NaN")]}, "signals[0].lower"),
        ({"signals": [signal(scale=0)]}, "signals[0].scale"),
        ({"signals": [signal(transform="SIGNAL_TRANSFORM_LOG")]}, "signals[0].lower"),
        ({"signals": [signal(transform="SIGNAL_TRANSFORM_LOG", lower=0)]}, "signals[0].lower"),
        ({"signals": [signal(transform=2, upper=1, lower=-1)]}, "signals[0].lower"),
        ({"signals": [signal(transform=3, lower=0.1)]}, "signals[0].lower"),
        ({"signals": [signal(transform=3, lower=-0.1, upper=0.5)]}, "signals[0].lower"),
        ({"signals": [signal(transform=3, lower=0.1, upper=1.1)]}, "signals[0].lower"),
        ({"signals": [signal("m", "METRICS", guardrail=True)]}, "signals[0].guardrail"),
        ({"signals": [signal(direction=1)]}, "signals[0].direction"),
        ({"release": {"maxInterval": "0.5s"}}, "release.max_interval"),
        ({"release": {"minInterval": "61s"}}, "release.max_interval"),
        ({"release": {"minInterval": "-1s"}}, "release.min_interval"),
        ({"aggregation": {"metricsAggregation": "best"}}, "aggregation.metrics_aggregation"),
        ({"aggregation": {"metricsTrimAlpha": 0.5}}, "aggregation.metrics_trim_alpha"),
        ({"aggregation": {"voteMinSites": 0}}, "aggregation.vote_min_sites"),
        ({"aggregation": {"weightCap": 0}}, "aggregation.weight_cap"),
        ({"ingest": {"maxNorm": 0}}, "ingest.max_norm"),
        ({"ingest": {"minTrust": 2}}, "ingest.min_trust"),
        ({"ingest": {"maxAge": "0s"}}, "ingest.max_age"),
        ({"policy": {"quantum": {"a": 0}}}, 'policy.quantum["a"]'),
        ({"retention": {"updates": 0}}, "retention.updates"),
    ],
)
def test_a_wrong_spec_names_the_field(cohorts, fields, where):
    with pytest.raises(SpecInvalidError) as caught:
        cohorts.declare(spec(**fields))
    assert where in fields_of(caught)
    assert caught.value.reason == Reason.SPEC_INVALID
    assert len(cohorts) == 0


def test_rules_of_the_contract_and_across_fields_are_told_together(cohorts):
    wrong = spec(
        signals=[signal("a b"), signal("m", "METRICS", guardrail=True)],
        release={"maxInterval": "0.1s"},
    )
    with pytest.raises(SpecInvalidError) as caught:
        cohorts.declare(wrong)
    assert fields_of(caught) == {
        "signals[0].name": "string.pattern",
        "signals[1].guardrail": "fmi.cohort_spec.guardrail_direction",
        "release.max_interval": "fmi.cohort_spec.interval_order",
    }


def test_all_that_is_wrong_is_told_at_once(cohorts):
    wrong = spec(
        signals=[signal(), signal(), signal("m", "METRICS", guardrail=True)],
        release={"maxInterval": "0.1s"},
    )
    with pytest.raises(SpecInvalidError) as caught:
        cohorts.declare(wrong)
    assert fields_of(caught) == {
        "signals[1].name": "fmi.cohort_spec.signal_once",
        "signals[2].guardrail": "fmi.cohort_spec.guardrail_direction",
        "release.max_interval": "fmi.cohort_spec.interval_order",
    }


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"access": {"emit": ["site"]}}, "access.emit"),
        ({"access": {"subscribe": ["site"]}}, "access.subscribe"),
        ({"access": {"admin": ["boss"]}}, "access.admin"),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_what_this_version_cannot_keep_is_refused_and_never_ignored(
    cohorts, fields, setting, force
):
    with pytest.raises(SettingUnsupportedError) as caught:
        cohorts.declare(spec(**fields), force=force)
    assert caught.value.setting == setting
    assert caught.value.reason == Reason.SETTING_UNSUPPORTED
    assert "care" not in cohorts


# Changes

BASE = {
    "freeSignals": False,
    "signals": [
        signal(lower=0.1, upper=0.9),
        signal("rate", lower=0.001, transform="SIGNAL_TRANSFORM_LOG"),
        signal("loss", "METRICS"),
    ],
}


def changed(**of_tau) -> dict:
    fields = copy.deepcopy(BASE)
    fields["signals"][0] = signal(**{"lower": 0.1, "upper": 0.9, **of_tau})
    return fields


@pytest.mark.parametrize(
    ("fields", "where", "rule"),
    [
        ({**BASE, "signals": BASE["signals"][1:]}, 'signals["tau"]', "signal_removed"),
        (changed(section="EVALUATOR"), 'signals["tau"].section', "section_changed"),
        (changed(transform=3), 'signals["tau"].transform', "transform_changed"),
        (changed(lower=0.2), 'signals["tau"].lower', "bounds_narrowed"),
        (changed(upper=0.8), 'signals["tau"].upper', "bounds_narrowed"),
        (
            {**BASE, "signals": [*BASE["signals"][:2], signal("loss", "METRICS", upper=1e9)]},
            'signals["loss"].upper',
            "bounds_narrowed",
        ),
    ],
)
def test_an_unsafe_change_is_refused_unless_forced_and_names_the_field(
    cohorts, fields, where, rule
):
    before, _ = cohorts.declare(spec(**BASE))
    with pytest.raises(SpecChangeUnsafeError) as caught:
        cohorts.declare(spec(**fields))
    assert fields_of(caught) == {where: f"fmi.cohort_change.{rule}"}
    assert "force" in str(caught.value)
    assert cohorts.rules("care") is before, "nothing changed"
    after, did_change = cohorts.declare(spec(**fields), force=True)
    assert did_change
    assert cohorts.rules("care") is after


def test_closing_the_vocabulary_is_unsafe(cohorts):
    cohorts.declare(spec(signals=[signal()], freeSignals=True))
    with pytest.raises(SpecChangeUnsafeError) as caught:
        cohorts.declare(spec(signals=[signal()]))
    assert fields_of(caught) == {"free_signals": "fmi.cohort_change.vocabulary_closed"}


def test_every_unsafe_change_is_told_at_once(cohorts):
    cohorts.declare(spec(**BASE))
    with pytest.raises(SpecChangeUnsafeError) as caught:
        cohorts.declare(spec(signals=[signal(lower=0.2, upper=0.8, section="OPERATORS")]))
    assert fields_of(caught).keys() == {
        'signals["tau"].section',
        'signals["tau"].lower',
        'signals["tau"].upper',
        'signals["rate"]',
        'signals["loss"]',
    }


def test_a_log_signal_cannot_become_an_undeclared_one_unnoticed(cohorts):
    cohorts.declare(spec(**BASE))
    with pytest.raises(SpecChangeUnsafeError) as caught:
        cohorts.declare(spec(signals=[], freeSignals=True))
    assert fields_of(caught).keys() == {'signals["rate"].transform'}


def test_bounds_on_a_signal_that_was_free_are_narrowed_bounds(cohorts):
    cohorts.declare(spec(freeSignals=True))
    with pytest.raises(SpecChangeUnsafeError) as caught:
        cohorts.declare(spec(signals=[signal("new", lower=0)], freeSignals=True))
    assert fields_of(caught).keys() == {'signals["new"].lower'}


def test_a_forced_change_is_logged_with_the_cohort_and_what_changed(cohorts, caplog):
    cohorts.declare(spec(**BASE))
    cohorts.declare(spec(**changed(lower=0.05)), force=True)
    assert not caplog.records, "a safe change needs no force"
    cohorts.declare(spec(**changed(upper=0.8, section="EVALUATOR")), force=True)
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    section, lower, upper = (record.getMessage() for record in caplog.records)
    for line, field in ((section, "section"), (lower, "lower"), (upper, "upper")):
        assert f'cohort care was changed by force: signals["tau"].{field}: ' in line
    assert "changes from controller to evaluator" in section
    assert "is narrowed from [0.05, 0.9] to [0.1, 0.8]" in upper


@pytest.mark.parametrize(
    "fields",
    [
        changed(lower=0.05),
        changed(upper=2),
        changed(unit="s"),
        {**BASE, "signals": [*BASE["signals"], signal("new")]},
        {**BASE, "freeSignals": True},
        {
            "signals": [BASE["signals"][1]],
            "freeSignals": True,
        },  # the one that is averaged by its log
        {**BASE, "release": {"minInterval": "5s"}},
        {**BASE, "aggregation": {"voteMinSites": 9}},
    ],
)
def test_a_safe_change_is_made(cohorts, fields):
    before, first = cohorts.declare(spec(**BASE))
    after, did_change = cohorts.declare(spec(**fields))
    assert (first, did_change) == (True, True)
    assert after.schema_hash != before.schema_hash
    assert cohorts.rules("care") is after


def test_the_same_again_changes_nothing(cohorts):
    cohorts.declare(spec(**BASE))
    assert cohorts.declare(spec(**BASE))[1] is False


def test_an_open_cohort_may_be_declared_in_any_way(cohorts):
    assert not cohorts.open("care").declared
    rules, did_change = cohorts.declare(spec(**BASE))
    assert did_change
    assert rules.declared


def test_declaring_an_open_cohort_as_it_is_makes_it_declared(cohorts):
    cohorts.open("care")
    rules, did_change = cohorts.declare(spec())
    assert did_change
    assert rules.declared


def test_check_puts_nothing_in_force(cohorts):
    rules, did_change = cohorts.check(spec(**BASE))
    assert did_change
    assert rules.name == "care"
    assert "care" not in cohorts


# The registry


def test_undeclared_cohorts_are_open_or_unknown():
    closed = CohortRegistry(CONTRACT, open_cohorts=False)
    for call in (closed.rules, closed.open):
        with pytest.raises(CohortUnknownError) as caught:
            call("care")
        assert caught.value.metadata == {"cohort": "care"}
    closed.declare(spec())
    assert closed.rules("care").declared


def test_looking_at_a_cohort_does_not_open_it(cohorts):
    assert cohorts.rules("care").name == "care"
    assert "care" not in cohorts
    assert cohorts.open("care") == cohorts.rules("care")
    assert [rules.name for rules in cohorts] == ["care"]


def test_no_more_cohorts_are_opened_than_allowed():
    few = CohortRegistry(CONTRACT, max_cohorts=2)
    few.open("b")
    few.open("a")
    with pytest.raises(CohortUnknownError):
        few.open("c")
    assert few.open("a").name == "a", "what is open stays open"
    few.declare(spec(name="d"))
    assert [rules.name for rules in few] == ["a", "b", "d"]


@pytest.mark.parametrize(
    "section", ["retention.site_ttl", "ingest.max_age", "release.max_interval"]
)
@pytest.mark.parametrize(
    ("seconds", "nanos"), [(2**62, 0), (315_576_000_001, 0), (1, -1), (1, 2**31 - 1), (1, 10**9)]
)
def test_a_duration_that_protobuf_does_not_define_is_refused(section, seconds, nanos):
    """Reckoned with, it is past what a store can count, or is another one in each language."""
    spec = cohort_pb2.CohortSpec(name="care")
    message, _, field = section.partition(".")
    duration = getattr(getattr(spec, message), field)
    duration.seconds, duration.nanos = seconds, nanos
    with pytest.raises(SpecInvalidError) as refused:
        CohortRegistry(CONTRACT).declare(spec)
    assert [(v.field, v.rule_id) for v in refused.value.violations] == [
        (section, "fmi.cohort_spec.valid_time")
    ]


def test_cohorts_that_could_be_opened_are_forgotten_while_another_thread_asks(cohorts):
    """Packets are checked in the event loop and beside it."""

    class Forgetting(dict):
        def __contains__(self, name):
            found = super().__contains__(name)
            self.clear()  # what the other thread does, between two lines of this one
            return found

    cohorts._openable = Forgetting()
    for _ in range(3):
        assert cohorts.rules("new").name == "new"


def test_access_that_lets_nobody_is_refused_where_nobody_is_authenticated(cohorts):
    closed = spec(access={})
    assert closed.HasField("access")
    with pytest.raises(SettingUnsupportedError, match="access: of cohort 'care' cannot be kept"):
        cohorts.declare(closed)
    kept, _ = CohortRegistry(CONTRACT, authenticated=True).declare(closed)
    assert not kept.access.names


@pytest.mark.parametrize("within", ["spec", "access", "signals"])
def test_what_a_newer_version_asks_for_is_refused_and_not_ignored(cohorts, within):
    newer = spec(signals=[signal()], free_signals=True)
    cohorts.declare(newer)
    field = b"\xfa\x3f\x01x"  # number 1023
    match within:
        case "spec":
            newer.MergeFromString(field)
        case "access":
            newer.access.MergeFromString(field)
        case "signals":
            newer.signals[0].MergeFromString(field)
    with pytest.raises(
        SettingUnsupportedError, match="spec: of cohort 'care' has fields that this"
    ):
        cohorts.declare(newer, force=True)
