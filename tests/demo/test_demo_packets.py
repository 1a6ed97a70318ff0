from __future__ import annotations

import math
from importlib import resources

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fmi_client import FMIEmitter
from fmi_demo.causes import COLUMNS, Cause, Causes
from fmi_demo.learner import Measurement, Trial, from_unit
from fmi_demo.liar import BOUNDS, falsify
from fmi_demo.packets import ccs_body, msp_body, pop_body, smallest_gain
from fmi_demo.scenario import BOX, COHORTS

EMITTER = FMIEmitter("site-01", cohort=COHORTS[0])
UNITS = st.tuples(*(st.floats(0, 1) for _ in BOX))
SHARES = st.floats(0, 1)
ACCURACIES = st.lists(SHARES, min_size=3, max_size=3).map(tuple)


def cohort_file(name):
    return yaml.safe_load(
        resources.files("fmi_demo").joinpath("cohorts", f"{name}.yaml").read_text()
    )


def measured(*accuracies):
    return Measurement(accuracies, 0.0, 260)


def signals(msp):
    return {**msp["metrics"], **msp["controller"], **msp["evaluator"]}


@pytest.mark.parametrize("cohort", COHORTS)
def test_the_cohort_files_have_the_bounds_that_the_sites_search(cohort):
    declared = {s["name"]: (s["lower"], s["upper"]) for s in cohort_file(cohort)["signals"]}
    assert declared == BOUNDS
    assert {
        s["name"] for s in cohort_file(cohort)["signals"] if s.get("transform") == "log"
    } == set(BOX)


def test_the_cohorts_differ_in_their_estimator_alone():
    robust, plain = (cohort_file(cohort) for cohort in COHORTS)
    assert robust.pop("aggregation").pop("metrics_aggregation") == "trimmed_mean"
    assert plain.pop("aggregation").pop("metrics_aggregation") == "mean"
    assert (robust.pop("name"), plain.pop("name")) == COHORTS
    assert robust == plain


@given(st.lists(st.builds(Trial, UNITS, SHARES), min_size=1, max_size=40), ACCURACIES, ACCURACIES)
def test_every_state_of_tuning_is_a_packet_of_the_cohort(trials, best, default):
    body = msp_body(trials, measured(*best), measured(*default), images=130)
    EMITTER.emit_plain(body)
    for name, value in signals(body["msp"]).items():
        assert BOUNDS[name][0] <= value <= BOUNDS[name][1]


def test_a_site_is_surer_of_the_setting_on_which_its_good_candidates_agree():
    trials = [Trial((0.5, i / 10, 0.4 + i / 50), 0.9) for i in range(10)]
    best = measured(0.9, 0.9, 0.9)
    evidence = msp_body(trials, best, best, images=130)["msp"]["evidence"]["signals"]
    surest, least, middle = (evidence[name]["confidence"] for name in BOX)
    assert surest == 1.0
    assert surest > middle > least


@given(st.floats(0, 1), st.integers(20, 1000))
def test_the_smallest_gain_is_a_binomial_standard_error(accuracy, images):
    assert 0.0 < smallest_gain(accuracy, images) <= 0.5 / math.sqrt(images) + 1e-12
    assert smallest_gain(0.5, images) == pytest.approx(0.5 / math.sqrt(images))


def test_a_policy_that_always_helps_is_told_with_full_confidence():
    body = pop_body({"averaging": True}, measured(0.8, 0.7, 0.6), measured(0.9, 0.8, 0.7))
    assert body["pop"]["confidence"] == pytest.approx(1.0)
    assert body["pop"]["after"]["accuracy"] - body["pop"]["before"]["accuracy"] == pytest.approx(
        0.1
    )
    packet = EMITTER.emit_plain(body)
    assert packet.pop.bundle["averaging"].flag


def test_a_policy_without_effect_is_told_without_confidence():
    same = measured(0.8, 0.7, 0.6)
    assert pop_body({"averaging": True}, same, same)["pop"]["confidence"] == 0.0


@given(UNITS, ACCURACIES)
def test_a_liar_goes_to_the_bound_that_is_farther_from_the_truth(unit, accuracies):
    truth = msp_body([Trial(unit, 0.9)], measured(*accuracies), measured(0, 0, 0), images=130)
    lie = falsify(truth)
    EMITTER.emit_plain(lie)
    assert lie["msp"]["evidence"]["confidence"] == 1.0
    settings = from_unit(unit)
    for name, value in signals(lie["msp"]).items():
        low, high = BOUNDS[name]
        assert value in (low, high)
        if name in BOX:
            half = math.log(high / low) / 2
            assert abs(math.log(value / settings[name])) >= half - 1e-9
        else:
            assert abs(value - signals(truth["msp"])[name]) >= (high - low) / 2 - 1e-9


@given(ACCURACIES, ACCURACIES)
def test_a_liar_turns_the_effect_of_a_policy_around(before, after):
    truth = pop_body({"n_components": 512}, measured(*before), measured(*after))["pop"]
    lie = falsify({"pop": truth})["pop"]
    EMITTER.emit_plain({"pop": lie})
    gained = truth["after"]["accuracy"] >= truth["before"]["accuracy"]
    assert lie["after"]["accuracy"] - lie["before"]["accuracy"] == (-1.0 if gained else 1.0)
    assert lie["bundle"] == truth["bundle"]
    assert lie["confidence"] == 1.0


def test_a_liar_turns_causes_around_and_claims_their_reverse():
    causes = Causes((Cause("eta0", "weight_norm", 0.9, 0.05, 1.0),), 1.0)
    truth = ccs_body(causes, {"ink": 0.3})
    lie = falsify(truth)["ccs"]
    assert set(EMITTER.emit_plain(truth).ccs.tested_nodes) == set(COLUMNS)
    packet = EMITTER.emit_plain({"ccs": lie})
    assert [(p.source, p.target, p.weight) for p in packet.ccs.causal_pairs] == [
        ("eta0", "weight_norm", -1e6),
        ("weight_norm", "eta0", -1e6),
    ]
    assert packet.ccs.trust == 1.0
