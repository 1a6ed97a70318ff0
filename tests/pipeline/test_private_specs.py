"""What the spec of a private cohort may say, and how it may change."""

from __future__ import annotations

import pytest
from google.protobuf import json_format
from parts import NOW, msp

from fmi.v1 import cohort_pb2
from fmi_server.aggregator import FMIAggregator
from fmi_server.cohorts import CohortRegistry
from fmi_server.config import AggregationConfig
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import SettingUnsupportedError, SpecChangeUnsafeError, SpecInvalidError
from fmi_server.privacy.budget import BudgetError, natural_sensitivity, plan_budget
from fmi_server.private_specs import privacy_settings

CONTRACT = FMIContractRegistry()
TAU = {"name": "tau", "section": "SIGNAL_SECTION_CONTROLLER", "lower": 0.0, "upper": 1.0}
GAIN = {"name": "gain", "section": "SIGNAL_SECTION_METRICS", "lower": -1.0, "upper": 1.0}
PRIVATE = {
    "signals": [TAU, GAIN],
    "privacy": {"dpEpsilon": 2.0, "dpDelta": 1e-6, "dpEpochs": 50},
}


def spec(**fields) -> cohort_pb2.CohortSpec:
    return json_format.ParseDict({"name": "care", **fields}, cohort_pb2.CohortSpec())


@pytest.fixture
def cohorts() -> CohortRegistry:
    return CohortRegistry(CONTRACT)


def told(refused) -> dict[str, str]:
    return {v.field: v.rule_id.removeprefix("fmi.cohort_spec.") for v in refused.value.violations}


def test_a_private_cohort_has_defaults_that_keep_its_promise(cohorts):
    rules, _ = cohorts.declare(spec(**PRIVATE))
    plan = rules.privacy
    assert (plan.epsilon, plan.delta, plan.epochs, plan.sums.signals) == (2.0, 1e-6, 50, 2)
    settings = rules.aggregation
    assert (settings.metrics_aggregation, settings.metrics_trim_alpha) == ("mean", 0.0)
    assert (settings.weight_cap, settings.max_byzantine or 0) == (1.0, 0)
    assert (rules.min_interval_s, rules.max_interval_s) == (86_400.0, 86_400.0)
    assert not rules.free_signals
    assert cohorts.any_private


def test_what_is_filled_in_is_taken_again_and_changes_nothing(cohorts):
    rules, _ = cohorts.declare(spec(**PRIVATE))
    again, changed = cohorts.declare(rules.spec)
    assert not changed
    assert again.schema_hash == rules.schema_hash


@pytest.mark.parametrize(
    ("fields", "broken"),
    [
        ({"signals": []}, {"signals": "private_vocabulary"}),
        ({"freeSignals": True}, {"free_signals": "private_vocabulary"}),
        (
            {"signals": [TAU, {**GAIN, "lower": None}]},
            {"signals[1].lower": "private_bounds"},
        ),
        (
            {"signals": [{**TAU, "upper": None}, {**GAIN, "lower": None, "upper": None}]},
            {"signals[0].upper": "private_bounds", "signals[1].lower": "private_bounds"},
        ),
        *(
            (
                {"aggregation": {"metricsAggregation": name}},
                {"aggregation.metrics_aggregation": "private_estimator"},
            )
            for name in ("trimmed_mean", "median", "mean_of_median")
        ),
        (
            {"aggregation": {"metricsTrimAlpha": 0.1, "weightCap": 0.25, "maxByzantine": 1}},
            {
                "aggregation.metrics_trim_alpha": "private_estimator",
                "aggregation.weight_cap": "private_estimator",
                "aggregation.max_byzantine": "private_estimator",
            },
        ),
        ({"release": {"minInterval": "1s"}}, {"release.min_interval": "private_schedule"}),
        ({"release": {"maxInterval": "0.05s"}}, {"release.max_interval": "private_schedule"}),
        ({"privacy": {"dpEpsilon": 1.0, "dpEpochs": 5}}, {"privacy.dp_delta": "privacy_budget"}),
        (
            {"privacy": {"dpEpsilon": 1.0, "dpSensitivity": 1.0}},
            {
                "privacy.dp_delta": "privacy_budget",
                "privacy.dp_epochs": "privacy_budget",
                "privacy.dp_sensitivity": "privacy_budget",
            },
        ),
        ({"privacy": {"dpEpsilon": 1.0, "dpDelta": 1e-6}}, {"privacy.dp_epochs": "privacy_budget"}),
        (
            {"privacy": {**PRIVATE["privacy"], "dpNoiseSigma": 1.0}},
            {"privacy.dp_noise_sigma": "privacy_budget"},
        ),
        (
            {"privacy": {**PRIVATE["privacy"], "dpSensitivity": 1.0}},
            {"privacy.dp_sensitivity": "privacy_budget"},
        ),
        (
            {"privacy": {**PRIVATE["privacy"], "dpSensitivity": 0.5, "dpClipNorm": 1.0}},
            {"privacy.dp_sensitivity": "privacy_budget"},
        ),
        ({"privacy": {"dpDelta": 1e-6}}, {"privacy.dp_epsilon": "privacy_unasked"}),
        ({"privacy": {"dpSensitivity": 3.0}}, {"privacy.dp_epsilon": "privacy_unasked"}),
        ({"privacy": {"dpEpochs": 3}}, {"privacy.dp_epsilon": "privacy_unasked"}),
        ({"privacy": {"dpClipNorm": 3.0}}, {"privacy.dp_epsilon": "privacy_unasked"}),
    ],
)
def test_each_contradiction_is_refused_where_it_stands(cohorts, fields, broken):
    signals = fields.get("signals", PRIVATE["signals"])
    clean = [{name: v for name, v in s.items() if v is not None} for s in signals]
    with pytest.raises(SpecInvalidError) as refused:
        cohorts.declare(spec(**{**PRIVATE, **fields, "signals": clean}), force=True)
    assert told(refused) == broken
    assert all(len(v.description) > 20 for v in refused.value.violations)
    assert "care" not in cohorts
    assert not cohorts.any_private


def test_what_is_allowed_beside_privacy(cohorts):
    rules, _ = cohorts.declare(
        spec(
            **PRIVATE
            | {
                "aggregation": {"metricsAggregation": "weighted_mean", "voteMinSites": 20},
                "release": {"maxInterval": "3600s"},
                "privacy": {
                    "dpNoiseSigma": 20.0,
                    "dpDelta": 1e-6,
                    "dpEpsilon": 3.0,
                    "dpSensitivity": 2.0 * natural_sensitivity(2),
                    "firstReleaseAt": "2030-01-01T00:00:00Z",
                },
            }
        )
    )
    plan = rules.privacy
    assert plan.noise_multiplier == pytest.approx(40.0)
    assert plan.spent(plan.epochs) <= 3.0 < plan.spent(plan.epochs + 1)
    assert rules.first_release_at == 1_893_456_000.0
    assert rules.aggregation.vote_min_sites == 20


# Changes


@pytest.mark.parametrize(
    ("privacy", "why"),
    [
        (None, "is taken away"),
        ({"dpEpsilon": 2.1}, "grows from epsilon 2 at delta 1e-06 to epsilon 2.1"),
        ({"dpDelta": 2e-6}, "at delta 2e-06"),
        ({"dpNoiseSigma": 100.0, "dpEpsilon": 0, "dpEpochs": 100_000}, "grows from"),
    ],
)
def test_a_promise_is_weakened_by_force_only(cohorts, privacy, why):
    cohorts.declare(spec(**PRIVATE))
    asked = {} if privacy is None else {"privacy": {**PRIVATE["privacy"], **privacy}}
    weaker = spec(**{**PRIVATE, "privacy": {}, **asked})
    with pytest.raises(SpecChangeUnsafeError, match=r"more than sites|without noise") as refused:
        cohorts.declare(weaker)
    (change,) = refused.value.violations
    assert change.field == "privacy"
    assert why in change.description
    _, changed = cohorts.declare(weaker, force=True)
    assert changed
    assert cohorts.any_private == (privacy is not None)


@pytest.mark.parametrize(
    "privacy",
    [
        {"dpEpsilon": 1.0},
        {"dpDelta": 1e-7},
        {"dpEpochs": 100},
        {"dpEpochs": 10},
        {"dpNoiseSigma": 60.0},
    ],
)
def test_a_promise_that_holds_as_well_as_before_is_no_unsafe_change(cohorts, privacy):
    cohorts.declare(spec(**PRIVATE))
    _, changed = cohorts.declare(spec(**{**PRIVATE, "privacy": {**PRIVATE["privacy"], **privacy}}))
    assert changed


@pytest.mark.parametrize("name", ["maxAge", "maxClockSkew"])
def test_older_packets_are_taken_by_force_only(cohorts, name):
    """What is refused then tells what was forgotten."""
    cohorts.declare(spec(**PRIVATE))
    with pytest.raises(SpecChangeUnsafeError, match="which packets were forgotten"):
        cohorts.declare(spec(**PRIVATE, ingest={name: "9000000s"}))
    cohorts.declare(spec(**PRIVATE, ingest={name: "1s"}))
    cohorts.declare(spec(**PRIVATE), force=True)


def test_a_budget_is_planned_for_the_signals_that_there_are(cohorts):
    signals = [{**TAU, "name": f"x{number}"} for number in range(100)]
    privacy = {"dpNoiseSigma": 2e5, "dpSensitivity": 12.3, "dpDelta": 1e-6, "dpEpochs": 1}
    rules, _ = cohorts.declare(spec(signals=signals, privacy=privacy))
    assert rules.privacy.noise_multiplier == pytest.approx(2e5, rel=0.01)


# The server's own default


def test_privacy_can_be_the_default_of_every_declared_cohort():
    defaults = AggregationConfig(dp_epsilon=2.0, dp_delta=1e-6, dp_epochs=50, dp_clip_norm=1.0)
    cohorts = CohortRegistry(CONTRACT, open_cohorts=False, defaults=defaults)
    rules, _ = cohorts.declare(spec(signals=[TAU, GAIN]))
    clipped = {**PRIVATE, "privacy": {**PRIVATE["privacy"], "dpClipNorm": 1.0}}
    stated, _ = CohortRegistry(CONTRACT).declare(spec(**clipped))
    for name in ("epsilon", "delta", "epochs", "rho"):
        assert getattr(rules.privacy, name) == getattr(stated.privacy, name)
    assert rules.privacy.sums.clip_norm == stated.privacy.sums.clip_norm == 1.0
    assert rules.schema_hash == stated.schema_hash
    own, _ = cohorts.declare(
        spec(name="own", signals=[TAU], privacy={"dpEpsilon": 1.0, "dpDelta": 1e-7, "dpEpochs": 3})
    )
    assert (own.privacy.epsilon, own.privacy.epochs) == (1.0, 3)
    assert own.privacy.sums.clip_norm is None, (
        "the server's own privacy is taken whole or not at all"
    )
    later, _ = cohorts.declare(
        spec(name="later", signals=[TAU], privacy={"firstReleaseAt": "2030-01-01T00:00:00Z"})
    )
    assert (later.privacy.epsilon, later.first_release_at) == (2.0, 1_893_456_000.0)
    with pytest.raises(SpecInvalidError, match="must be declared in a private cohort"):
        cohorts.declare(spec(name="free"))


def test_a_cohort_that_opens_by_itself_cannot_be_private():
    defaults = AggregationConfig(dp_epsilon=2.0, dp_delta=1e-6)
    with pytest.raises(SettingUnsupportedError, match="open_cohorts"):
        CohortRegistry(CONTRACT, defaults=defaults)


# Aggregates that are computed at once


def test_no_site_chooses_the_time_of_a_private_aggregate():
    """Of plain packets the newest says what time it is; here that would let one site shut out the others."""
    now = 1_760_000_000.0
    aggregator = FMIAggregator(
        AggregationConfig(dp_noise_sigma=0.01, dp_delta=1e-6), clock=lambda: now
    )
    packets = [msp(f"s{i}", controller={"tau": 0.25}, at=now - 10.0) for i in range(9)]
    packets.append(msp("late", controller={"tau": 0.75}, at=now + 1e9))
    result = aggregator.aggregate("care", packets, spec=spec(signals=[TAU]))
    assert result.prior_update.estimates["tau"].effective_sites == pytest.approx(10.0, abs=0.15)
    assert result.prior_update.prior["tau"] == pytest.approx(0.3, abs=0.02)
    assert result.warm_start.init["tau"] == result.prior_update.prior["tau"]
    assert not result.policy_hint.hint_id
    assert "private" in result.policy_hint.reason
    assert not result.causal_consensus.edges


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "name", ["dp_epsilon", "dp_delta", "dp_noise_sigma", "dp_sensitivity", "dp_clip_norm"]
)
def test_a_number_that_measures_nothing_is_refused(cohorts, name, number):
    private = spec(**PRIVATE)
    setattr(private.privacy, name, number)
    with pytest.raises(SpecInvalidError) as refused:
        cohorts.declare(private)
    assert set(told(refused)) == {f"privacy.{name}"}
    with pytest.raises(BudgetError):
        plan_budget(privacy_settings(private.privacy), 2)


def test_a_first_release_at_no_time_is_refused(cohorts):
    private = spec(**PRIVATE)
    for nanos, seconds in ((2**31 - 1, NOW), (-1, NOW), (0, 2**62)):
        private.privacy.first_release_at.seconds = int(seconds)
        private.privacy.first_release_at.nanos = nanos
        with pytest.raises(SpecInvalidError) as refused:
            cohorts.declare(private)
        assert told(refused) == {"privacy.first_release_at": "valid_time"}


def test_what_is_quoted_of_a_spec_of_many_faults_is_bounded_and_printable(cohorts):
    """Past a hundred faults the contract's word on a name is not told, and the next rule speaks of it."""
    private = spec(**PRIVATE, aggregation={"metricsAggregation": "\u202e\n" * 3000})
    for _ in range(120):
        private.signals.add(name="\u202e\n" * 3000)
    with pytest.raises(SpecInvalidError) as refused:
        cohorts.declare(private)
    for violation in refused.value.violations:
        assert f"{violation.field}{violation.description}".isprintable(), violation
        assert len(violation.description) < 1000
