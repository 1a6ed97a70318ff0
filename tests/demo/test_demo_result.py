from __future__ import annotations

import pytest

from fmi.v1 import update_pb2
from fmi_demo.events import Curve
from fmi_demo.result import best_so_far, compare_arms, edges_of, evaluations_to, prior_values
from fmi_demo.scenario import ARMS


def test_best_so_far_never_falls():
    assert best_so_far((0.2, 0.1, 0.5, 0.4)) == [0.2, 0.2, 0.5, 0.5]


@pytest.mark.parametrize(("target", "expected"), [(0.2, 1), (0.3, 3), (0.6, None)])
def test_evaluations_to_a_target(target, expected):
    assert evaluations_to(target, (0.2, 0.1, 0.5, 0.4)) == expected


def curves_of(**searches):
    return [
        Curve(arm, repetition, accuracies)
        for arm, all_accuracies in searches.items()
        for repetition, accuracies in enumerate(all_accuracies)
    ]


def test_arms_are_compared_by_the_cold_median():
    curves = curves_of(
        cold=[(0.1, 0.5, 0.6), (0.1, 0.2, 0.9), (0.3, 0.4, 0.7)],
        library=[(0.2, 0.2, 0.2), (0.2, 0.2, 0.2), (0.2, 0.2, 0.9)],
        warm_trimmed_mean=[(0.8, 0.8, 0.8), (0.5, 0.8, 0.8), (0.8, 0.1, 0.1)],
        warm_plain_mean=[(0.5, 0.7, 0.7), (0.5, 0.7, 0.7), (0.5, 0.6, 0.6)],
    )
    target, arms = compare_arms(curves[::-1], budget=3)  # in whatever order they came
    assert target == 0.7
    found = {arm.arm: arm for arm in arms}
    assert tuple(found) == ARMS
    # Cold needs 4 (not reached), 3, 3; the trimmed mean 1, 2, 1; the plain mean 2, 2, 4.
    assert [found[arm].evaluations for arm in ARMS] == [3, None, 1, 2]
    assert [found[arm].reached for arm in ARMS] == [2, 1, 3, 2]
    assert [found[arm].sooner for arm in ARMS] == [0, 0, 3, 2]
    assert [found[arm].first for arm in ARMS] == [0.1, 0.2, 0.8, 0.5]
    assert [found[arm].final for arm in ARMS] == [0.7, 0.2, 0.8, 0.7]


def test_a_prior_shows_the_settings_that_have_a_value():
    prior = update_pb2.MetaPriorUpdate()
    prior.estimates["gamma"].value = 0.1
    prior.estimates["gamma"].lower = 0.05
    prior.estimates["gamma"].upper = 0.2
    prior.estimates["gamma"].sites = 13
    prior.estimates["eta0"].reason = "below quorum"
    prior.estimates["accuracy"].value = 0.9
    values = prior_values(prior)
    assert set(values) == {"gamma"}
    assert (values["gamma"].lower, values["gamma"].upper, values["gamma"].sites) == (0.05, 0.2, 13)


def test_a_consensus_keeps_what_is_not_known_apart_from_zero():
    consensus = update_pb2.CausalConsensus(
        edges=[update_pb2.ConsensusEdge(source="eta0", target="accuracy", weight=0.5, sites=4)]
    )
    (edge,) = edges_of(consensus)
    assert (edge.weight, edge.lower, edge.sites) == (0.5, None, 4)


@pytest.mark.parametrize(("weight", "opposite"), [(0.5, 2), (-0.5, 10)])
def test_sites_with_the_opposite_sign_are_counted_against_the_pooled_weight(weight, opposite):
    edge = update_pb2.ConsensusEdge(weight=weight, sites=12, positive_sites=10, negative_sites=2)
    (found,) = edges_of(update_pb2.CausalConsensus(edges=[edge]))
    assert found.opposite_sites == opposite
