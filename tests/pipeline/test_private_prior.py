"""The prior of a private cohort: right but for its noise, on each scale, and silent about the rest."""

from __future__ import annotations

import math

import numpy as np
import pytest
from google.protobuf import json_format
from parts import NOW, msp

from fmi.v1 import cohort_pb2
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRegistry
from fmi_server.contracts import FMIContractRegistry
from fmi_server.privacy.budget import BudgetPlan, PrivacySettings, plan_budget
from fmi_server.privacy.noisy_means import PrivateSums
from fmi_server.private_prior import private_prior

SIGNALS = [
    {"name": "gain", "section": "SIGNAL_SECTION_METRICS", "lower": -1.0, "upper": 3.0},
    {
        "name": "lr",
        "section": "SIGNAL_SECTION_CONTROLLER",
        "lower": 1e-5,
        "upper": 1.0,
        "transform": "SIGNAL_TRANSFORM_LOG",
    },
    {
        "name": "share",
        "section": "SIGNAL_SECTION_EVALUATOR",
        "lower": 0.01,
        "upper": 0.99,
        "transform": "SIGNAL_TRANSFORM_LOGIT",
        "scale": 0.05,
    },
]
# So little noise promises nothing, and no spec may ask for it.
TINY = BudgetPlan(math.inf, 1e-6, 1, math.inf, 1e-5, PrivateSums(3, 1e-5), PrivacySettings())
REAL = plan_budget(PrivacySettings(2.0, 1e-6, dp_epochs=1), 3)


def stream(seed):
    return np.random.default_rng(seed).bytes


def cohort(sites, *, seed=1, confidence=None):
    spec = {"name": "care", "signals": SIGNALS, "aggregation": {"metricsAggregation": "mean"}}
    rules = CohortRegistry(FMIContractRegistry()).compile(
        json_format.ParseDict(spec, cohort_pb2.CohortSpec())
    )
    state, rng = CohortState(rules), np.random.default_rng(seed)
    for number in range(sites):
        state.count(
            msp(
                f"s{number}",
                metrics={"gain": float(np.clip(rng.normal(1.2, 0.3), -1, 3))},
                controller={"lr": float(10 ** rng.normal(-2.5, 0.3))},
                evaluator={"share": float(rng.uniform(0.3, 0.6))},
                confidence=None if confidence is None else confidence(number),
                at=NOW,
            )
        )
    return state


def told(state, plan, **options):
    options = {"estimator": "mean", "min_sites": 3, **options}
    return private_prior(state.unit_cells(), plan, **options)


def test_without_noise_to_speak_of_it_is_the_mean_on_each_scale():
    state = cohort(40)
    plain = state.release(NOW).prior.estimates()
    found = told(state, TINY)
    assert found.keys() == plain.keys()
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(plain[name].value, rel=1e-4)
        assert estimate.weight == pytest.approx(40.0, rel=1e-4)
        assert estimate.lower < estimate.value < estimate.upper
        # What is told of the choice of sites is a bound: never less than what they show.
        assert estimate.stderr > plain[name].stderr
    assert found["share"].tolerance == pytest.approx(0.05)


def test_confidence_weighs_only_where_it_is_asked_for():
    state = cohort(40, confidence=lambda number: 0.25 if number % 2 else 1.0)
    assert told(state, TINY)["gain"].weight == pytest.approx(40.0, rel=1e-4)
    weighted = told(state, TINY, estimator="weighted_mean")["gain"]
    assert weighted.weight == pytest.approx(25.0, rel=1e-4)
    assert weighted.value != pytest.approx(told(state, TINY)["gain"].value, rel=1e-3)


def test_its_interval_holds_the_mean_about_as_often_as_it_says():
    state, bits, held = cohort(400), stream(2), []
    plain = state.release(NOW).prior.estimates()
    for _ in range(300):
        for name, estimate in told(state, REAL, entropy=bits).items():
            held.append(estimate.lower <= plain[name].value <= estimate.upper)
    assert 0.93 < np.mean(held) <= 1.0


def test_too_few_sites_have_no_value_and_their_number_is_no_secret_let_out():
    for sites in (0, 1, 2, 5):
        for name, estimate in told(cohort(sites), REAL, entropy=stream(sites)).items():
            assert (estimate.value, estimate.stderr, estimate.confidence) == (None, None, 0.0), name
            assert not math.isclose(estimate.weight, sites, abs_tol=1e-9) or estimate.weight == 0.0


def test_an_estimator_that_is_not_private_is_refused():
    with pytest.raises(ValueError, match="not private; these are: mean, weighted_mean"):
        told(cohort(5), REAL, estimator="trimmed_mean")
    with pytest.raises(ValueError, match="values must be"):
        told(cohort(5), plan_budget(PrivacySettings(1.0, 1e-6, dp_epochs=1), 2))
