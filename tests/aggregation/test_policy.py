from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fmi_server.aggregation import (
    EstimatorSettings,
    PolicyOutcome,
    PolicySettings,
    SignalRule,
    bundle_key,
    decide_policy,
    outcome_deltas,
)

GAIN = SignalRule("gain", direction=1, scale=0.1)
LATENCY = SignalRule("latency", direction=-1, scale=10.0)
RULES = (GAIN, LATENCY, SignalRule("load"))
SETTINGS = PolicySettings(steps={"lr": 0.01})


def outcomes(gains, bundle=None, *, latency=0.0, prefix="s"):
    return [
        PolicyOutcome(
            f"{prefix}{i}",
            {"lr": 0.1} if bundle is None else bundle,
            {"gain": 0.5, "latency": 50.0},
            {"gain": 0.5 + 0.1 * gain, "latency": 50.0 + latency},
        )
        for i, gain in enumerate(gains)
    ]


def test_a_bundle_that_helps_becomes_a_hint():
    gains = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 1.9, 1.8]
    decision = decide_policy(outcomes(gains), (GAIN,), SETTINGS, cohort="retail")
    hint = decision.hint
    assert decision.reason == "hint"
    assert (hint.sites, hint.bundle, hint.bounds) == (8, {"lr": 0.1}, {"lr": (0.1, 0.1)})
    # The trimmed mean of eight sites, plus two that saw nothing.
    mean = stats.trim_mean(gains, 1 / 8)
    assert hint.effect == pytest.approx(mean * 8 / 10)
    assert 0.0 < hint.lower_bound < hint.effect
    assert 0.0 < hint.confidence <= 1.0
    assert hint.reason.startswith("Observational")


def test_deltas_follow_direction_scale_and_control():
    outcome = PolicyOutcome(
        "s",
        {},
        {"gain": 0.5, "latency": 50.0, "load": 1.0, "gone": 1.0},
        {"gain": 0.6, "latency": 70.0, "load": 2.0, "new": 1.0},
        control_delta={"gain": 0.04},
    )
    directed = {rule.name: rule for rule in RULES}
    deltas = outcome_deltas(outcome, directed)
    assert deltas == {"gain": pytest.approx(0.6), "latency": pytest.approx(-2.0)}


def test_metrics_without_direction_make_no_hint():
    found = decide_policy(outcomes([2.0] * 5), [SignalRule("gain")], SETTINGS)
    assert (found.hint, found.reason, found.unscored) == (None, "no_scored_outcome", 5)
    assert decide_policy([], RULES, SETTINGS).reason == "no_outcome"


def test_below_quorum_there_is_no_hint():
    found = decide_policy(outcomes([2.0, 2.0]), RULES, SETTINGS)
    assert (found.hint, found.reason) == (None, "below_quorum")
    assert found.assessments[0].sites == 2


def test_one_site_has_one_vote_however_often_it_reports():
    stuffed = outcomes([-1.0, -1.1, -0.9]) + outcomes([9.0] * 1, prefix="liar") * 50
    found = decide_policy(stuffed, (GAIN,), SETTINGS)
    assert found.hint is None
    assert found.assessments[0].sites == 4


def test_a_site_is_averaged_over_its_outcomes():
    repeated = outcomes([1.0, 2.0, 3.0, 4.0]) + outcomes([3.0, 2.0, 3.0, 4.0])
    single = outcomes([2.0, 2.0, 3.0, 4.0])
    left, right = (decide_policy(o, (GAIN,), SETTINGS).assessments[0] for o in (repeated, single))
    assert left.effect == pytest.approx(right.effect)


def test_two_thirds_must_agree():
    found = decide_policy(outcomes([5.0] * 6 + [-0.1] * 4), (GAIN,), SETTINGS)
    assert (found.hint, found.reason) == (None, "no_agreement")
    assert decide_policy(outcomes([5.0] * 8 + [-0.1] * 4), (GAIN,), SETTINGS).hint is not None


def test_an_effect_within_the_noise_is_no_hint():
    found = decide_policy(outcomes([0.1, 0.2, -3.0, 4.0, 3.0, 0.1]), (GAIN,), SETTINGS)
    assert (found.hint, found.reason) == (None, "not_better_than_nothing")
    assert found.assessments[0].lower_bound < 0.0


def test_a_directed_metric_that_surely_falls_is_a_guardrail():
    helped = outcomes([9.0, 9.1, 9.2, 9.3, 9.4, 9.5], latency=30.0)
    found = decide_policy(helped, RULES, SETTINGS)
    assert (found.hint, found.reason) == (None, "guardrail_harmed")
    assert found.assessments[0].harmed == ("latency",)


def test_the_same_effect_at_too_few_sites_gives_no_hint():
    assert decide_policy(outcomes([9.0] * 6), RULES, SETTINGS).reason == "certainty_unknown"
    assert decide_policy(outcomes([9.0] * 7), RULES, SETTINGS).hint is not None


@pytest.mark.parametrize(
    "before", [[0.45, 0.55, 0.3], [0.1, 0.7, 1e3], [0.45, np.nextafter(0.45, 1), 0.45]]
)
def test_rounding_is_no_evidence(before):
    alike = [
        PolicyOutcome(f"s{i}", {"lr": 0.1}, {"gain": at}, {"gain": at + 0.1})
        for i, at in enumerate(before)
    ]
    assert decide_policy(alike, (GAIN,), SETTINGS).reason == "certainty_unknown"


@pytest.mark.parametrize("other", [-5.0, 20.0])
def test_one_who_differs_does_not_take_a_hint_away(other):
    agreed = decide_policy(outcomes([9.0] * 7), RULES, SETTINGS).hint
    found = decide_policy(outcomes([9.0] * 7 + [other]), RULES, SETTINGS).hint
    assert found.lower_bound > 0.0
    assert found.confidence == pytest.approx(agreed.confidence, abs=0.02)


def test_a_declared_guardrail_may_not_fall_at_all_and_must_be_seen():
    latencies = itertools.cycle([-20.0, 25.0])
    noisy = [outcomes([9.0 + 0.1 * i] * (i + 1), latency=next(latencies))[i] for i in range(6)]
    assert decide_policy(noisy, RULES, SETTINGS).hint is not None
    guarded = PolicySettings(guardrails=frozenset({"latency"}))
    assert decide_policy(noisy, RULES, guarded).reason == "guardrail_harmed"
    unseen = decide_policy(noisy, (GAIN,), guarded)
    assert unseen.reason == "guardrail_unobserved"
    assert unseen.assessments[0].harmed == ("latency",)


def test_the_best_lower_bound_wins_not_the_best_mean():
    loud = outcomes([1.0, 9.0, 5.0, 2.0, 8.0, 4.0], {"lr": 0.5}, prefix="a")
    sure = outcomes([3.0, 3.1, 3.2, 2.9, 3.0, 3.1], {"lr": 0.1}, prefix="b")
    found = decide_policy(loud + sure, (GAIN,), SETTINGS)
    effects = {assessment.key: assessment.effect for assessment in found.assessments}
    assert effects[bundle_key({"lr": 0.5}, SETTINGS.steps)] > found.hint.effect
    assert found.hint.bundle == {"lr": 0.1}


def test_one_liar_cannot_make_a_hint():
    honest = [0.01, -0.02, 0.03, -0.01, 0.0, 0.02, -0.03]
    found = decide_policy(outcomes([*honest, 1e9]), (GAIN,), SETTINGS)
    assert found.hint is None
    assert abs(found.assessments[0].effect) <= 0.03


def test_bundles_meet_within_a_step_and_carry_bounds():
    rates = [0.098, 0.099, 0.100, 0.101, 0.102, 0.103]
    mixed = [
        PolicyOutcome(
            f"s{i}",
            {"lr": rate, "mode": "fast", "warm": True},
            {"gain": 0.0},
            {"gain": 0.1 * (2 + 0.1 * i if i else -0.1)},
        )
        for i, rate in enumerate(rates)
    ]
    hint = decide_policy(mixed, (GAIN,), SETTINGS).hint
    # The first site lost, so that its value is not among the winners.
    low, middle, high = np.quantile(rates[1:], [0.1, 0.5, 0.9])
    assert hint.bundle == {"lr": pytest.approx(middle), "mode": "fast", "warm": True}
    assert hint.bounds == {"lr": (pytest.approx(low), pytest.approx(high))}


def test_the_same_advice_keeps_its_id():
    gains = [2.0, 2.1, 2.2, 2.3, 2.4]
    first = decide_policy(outcomes(gains), (GAIN,), SETTINGS, cohort="a").hint
    shuffled = list(reversed(outcomes([*gains, 2.5])))
    second = decide_policy(shuffled, (GAIN,), SETTINGS, cohort="a").hint
    other = decide_policy(outcomes(gains), (GAIN,), SETTINGS, cohort="b").hint
    assert first.hint_id == second.hint_id != other.hint_id


def test_bundle_keys_are_canonical():
    steps = {"lr": 0.01}
    assert bundle_key({"a": 1, "lr": 0.101}, steps) == bundle_key({"lr": 0.0999, "a": 1.0}, steps)
    assert bundle_key({"a": -0.0}, {}) == bundle_key({"a": 0.0}, {})
    assert len({bundle_key({"a": v}, {}) for v in (1.0, True, "1", "true", 2.0)}) == 5
    with pytest.raises(ValueError, match="finite"):
        bundle_key({"a": math.nan}, {})


@given(st.floats(-1e150, 1e150), st.floats(min_value=5e-324, allow_infinity=False))
def test_every_number_and_step_has_a_canonical_form(value, step):
    ((_, kind, text),) = bundle_key({"a": value}, {"a": step})
    multiple = int(text.split("x")[0])
    assert kind == "number"
    error = abs(multiple - Fraction(value) / Fraction(step))
    # Half a step, and what the rounding of the quotient to a float may add.
    assert error <= Fraction(1, 2) + abs(multiple) * Fraction(1, 2**52)


def test_a_delta_past_the_largest_number_is_moved_to_it():
    rule = SignalRule("gain", direction=1, scale=5e-324)
    huge = PolicyOutcome("x", {"a": 1.0}, {"gain": -1e150}, {"gain": 1e150})
    assert outcome_deltas(huge, {"gain": rule}) == {"gain": 1e150}
    drift = PolicyOutcome("x", {"a": 1.0}, {"gain": 1.0}, {"gain": 1.0}, 1.0, {"gain": 1e150})
    assert outcome_deltas(drift, {"gain": rule}) == {"gain": -1e150}
    decision = decide_policy([huge], [rule], SETTINGS)
    assert decision.reason == "below_quorum"


def test_metrics_that_are_no_numbers_are_refused():
    bad = PolicyOutcome("x", {}, {"gain": 0.0}, {"gain": math.inf})
    with pytest.raises(ValueError, match="site 'x'"):
        decide_policy([bad], RULES, SETTINGS)


@pytest.mark.parametrize(
    "wrong", [{"steps": {"a": 0.0}}, {"agreement": 1.5}, {"prior_sites": -1.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).rstrip("s")):
        PolicySettings(**wrong)


def test_false_hints_are_rare_where_nothing_helps():
    rng = np.random.default_rng(1)
    settings = PolicySettings(estimator=EstimatorSettings())
    hints = sum(
        decide_policy(outcomes(rng.standard_normal(12)), (GAIN,), settings).hint is not None
        for _ in range(400)
    )
    # The lower end of a two-sided 95 % interval: at most 2.5 % before shrinkage; 3 sigma above.
    assert hints <= 400 * 0.025 + 3 * math.sqrt(400 * 0.025)
