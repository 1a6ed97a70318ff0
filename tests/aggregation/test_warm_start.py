from __future__ import annotations

import numpy as np
import pytest

from fmi_server.aggregation import (
    CohortMatrix,
    EstimatorSettings,
    SiteContext,
    SiteGroups,
    WarmStartRequest,
    describe_contexts,
    warm_start,
)

RULES = EstimatorSettings()


@pytest.fixture
def matrix():
    """Six clinics at night (tau 1), four clinics by day (tau 3), three labs untagged (tau 9)."""
    cohort = CohortMatrix()
    for site in range(13):
        tau = 1.0 if site < 6 else 3.0 if site < 10 else 9.0
        values = {"controller": {"tau": tau + 0.01 * site}, "metrics": {"gain": 0.5}}
        if site in (0, 7, 11, 12):
            values["operators"] = {"rare": 7.0}
        cohort.put(f"s{site}", values, now=0.0)
    return cohort


@pytest.fixture
def contexts():
    night = [SiteContext(f"s{i}", "clinic", "night", {"load": 0.1, "risk": 0.9}) for i in range(6)]
    day = [SiteContext(f"s{i}", "clinic", "day", {"load": 0.9, "risk": 0.2}) for i in range(6, 10)]
    labs = [SiteContext(f"s{i}", "lab") for i in range(10, 13)]
    return [*night, *day, *labs]


def test_class_and_regime_come_first(matrix, contexts):
    found = warm_start(matrix, SiteGroups(contexts), WarmStartRequest("clinic", "night"), RULES)
    tau = found.init["tau"]
    assert (found.source, found.regime, found.regime_distance) == ("profile_and_regime", "night", 0)
    assert (tau.source, tau.sites) == ("profile_and_regime", 6)
    assert tau.value == pytest.approx(np.mean([1.01, 1.02, 1.03, 1.04]))


def test_each_value_says_where_it_came_from(matrix, contexts):
    found = warm_start(matrix, SiteGroups(contexts), WarmStartRequest("clinic", "night"), RULES)
    # One night clinic and one day clinic know `rare`; only the cohort has enough sites.
    assert (found.init["rare"].source, found.init["rare"].sites) == ("cohort", 4)


def test_metrics_start_nothing(matrix, contexts):
    found = warm_start(matrix, SiteGroups(contexts), WarmStartRequest("clinic"), RULES)
    assert set(found.init) == {"tau", "rare"}


@pytest.mark.parametrize(
    ("load", "risk", "regime"), [(0.2, 0.8, "night"), (0.8, 0.8, "day"), (0.95, 0.1, "day")]
)
def test_the_nearest_regime_by_concepts(matrix, contexts, load, risk, regime):
    request = WarmStartRequest(concepts={"load": load, "risk": risk})
    found = warm_start(matrix, SiteGroups(contexts), request, RULES)
    centre = {"night": (0.1, 0.9), "day": (0.9, 0.2)}[regime]
    expected = np.linalg.norm(np.subtract((load, risk), centre)) / np.sqrt(2)
    assert (found.regime, found.source) == (regime, "regime")
    assert found.regime_distance == pytest.approx(expected)
    assert found.shared_concepts == ("load", "risk")


def test_a_regime_must_share_half_of_the_concepts(matrix, contexts):
    request = WarmStartRequest(concepts={"load": 0.1, "x": 1.0, "y": 1.0})
    found = warm_start(matrix, SiteGroups(contexts), request, RULES)
    assert (found.regime, found.regime_distance, found.source) == (None, None, "cohort")


def test_the_fallback_is_labelled(matrix, contexts):
    lab = warm_start(matrix, SiteGroups(contexts), WarmStartRequest("lab", "unknown"), RULES)
    assert (lab.source, lab.regime) == ("profile_class", None)
    assert lab.init["tau"].value == pytest.approx(9.11)
    other = warm_start(matrix, SiteGroups(contexts), WarmStartRequest("bank"), RULES)
    assert (other.source, other.init["tau"].sites) == ("cohort", 13)
    other_class = warm_start(matrix, SiteGroups(contexts), WarmStartRequest("bank", "day"), RULES)
    assert (other_class.source, other_class.init["tau"].sites) == ("regime", 4)
    nothing = warm_start(CohortMatrix(), SiteGroups([]), WarmStartRequest("bank"), RULES)
    assert (nothing.source, nothing.init) == ("none", {})


def test_a_small_regime_is_never_matched(matrix):
    contexts = [SiteContext("s0", "", "lonely", {"load": 0.5})]
    found = warm_start(
        matrix, SiteGroups(contexts), WarmStartRequest("", "lonely", {"load": 0.5}), RULES
    )
    assert (found.regime, found.source) == (None, "cohort")


def test_a_liar_in_the_regime_does_not_move_the_start(matrix, contexts):
    matrix.put("s0", {"controller": {"tau": 1e9}}, now=1.0)
    found = warm_start(matrix, SiteGroups(contexts), WarmStartRequest("clinic", "night"), RULES)
    assert 1.01 <= found.init["tau"].value <= 1.05


def test_contexts_describe_regimes_by_medians(matrix, contexts):
    report = describe_contexts(matrix, SiteGroups(contexts), RULES)
    day, night = report.regimes
    assert (day.name, day.sites, day.withheld) == ("day", 4, None)
    assert day.concepts == {"load": 0.9, "risk": 0.2}
    assert day.settings["tau"] == pytest.approx(3.075)
    assert (night.name, night.sites) == ("night", 6)
    assert "rare" not in night.settings  # one night site sent it
    assert report.untagged_sites == 3


def test_a_regime_of_few_sites_discloses_no_values(matrix, contexts):
    few = [SiteContext("s0", "", "lonely", {"load": 0.123}), *contexts[1:]]
    report = describe_contexts(matrix, SiteGroups(few), RULES)
    lonely = next(regime for regime in report.regimes if regime.name == "lonely")
    assert (lonely.sites, lonely.withheld) == (1, "below_quorum")
    assert (dict(lonely.concepts), dict(lonely.settings)) == ({}, {})


def test_ids_of_untagged_sites_are_not_published(matrix, contexts):
    names = {
        regime.name for regime in describe_contexts(matrix, SiteGroups(contexts), RULES).regimes
    }
    assert names == {"day", "night"}
