from __future__ import annotations

import numpy as np
import pytest

from benchmarks.warm_start.experiment import CONDITIONS, NO_ATTACK, cases_of, warm_arm
from benchmarks.warm_start.federation import warm_starts
from benchmarks.warm_start.sites import Report
from fmi_client import CohortRuleError

NAMES = ("one", "two", "three", "four", "five", "six")


@pytest.fixture
def cases(space, bowl):
    tables = {name: type(bowl)(name, space, bowl.errors, 0.0) for name in NAMES}
    certain = {"rate": 1.0, "momentum": 1.0, "depth": 1.0}
    honest = {
        (name, i): Report(space.settings((6 + row % 3, 1 + row % 3, 1)), 0.0, certain, 50)
        for row, name in enumerate(NAMES)
        for i in range(2)
    }
    return cases_of(tables, honest, repetitions=2)


def test_the_data_set_left_out_says_nothing_and_liars_come_with_an_attack(cases):
    for (arm, left_out, _), case in cases.items():
        honest = {f"site-{name}" for name in NAMES if name != left_out}
        liars = set() if NO_ATTACK in arm else {"liar-1", "liar-2"}
        assert set(case.reports) == honest | liars


def test_both_estimators_get_the_same_packets_in_cohorts_of_their_own(cases):
    for condition in CONDITIONS:
        ours, mean = (
            cases[warm_arm(estimator, condition), "one", 1] for estimator in ("ours", "plain mean")
        )
        assert ours.reports == mean.reports
        assert (ours.estimator, mean.estimator) == ("trimmed_mean", "mean")
    assert len({case.name for case in cases.values()}) == len(cases)


async def test_a_cohort_on_a_real_server_stays_among_the_honest_and_a_mean_does_not(
    cases, space, tmp_path
):
    chosen = {
        (estimator, condition): cases[warm_arm(estimator, condition), "one", 0]
        for estimator in ("ours", "plain mean")
        for condition in CONDITIONS
    }
    given = await warm_starts(space, list(chosen.values()), tmp_path)
    unit = {key: space.to_unit(given[case.name]) for key, case in chosen.items()}
    reports = chosen["ours", NO_ATTACK].reports.values()
    honest = np.array([space.to_unit(report.settings) for (report,) in reports])
    low, high = honest.min(axis=0) - 1e-9, honest.max(axis=0) + 1e-9
    for condition in CONDITIONS:
        assert ((low <= unit["ours", condition]) & (unit["ours", condition] <= high)).all()
    assert unit["plain mean", NO_ATTACK] == pytest.approx(honest.mean(axis=0))
    corner = np.where(honest.mean(axis=0) < 0.5, 1.0, 0.0)
    pulled = (honest.sum(axis=0) + 2 * corner) / (len(honest) + 2)
    assert unit["plain mean", "far corner"] == pytest.approx(pulled)
    assert unit["plain mean", "drift"] == pytest.approx(pulled)


async def test_a_packet_that_the_server_refuses_ends_the_run(cases, space, tmp_path):
    case = cases[warm_arm("ours", NO_ATTACK), "one", 0]
    wrong = Report({"rate": 1e9, "momentum": 0.5, "depth": 1.0}, 0.0, {}, 1)
    refused = type(case)("refused", "mean", {"site-one": [wrong]})
    with pytest.raises(CohortRuleError, match="rate"):
        await warm_starts(space, [refused], tmp_path)


async def test_a_warm_start_that_is_not_made_of_all_sites_ends_the_run(cases, space, tmp_path):
    case = cases[warm_arm("ours", NO_ATTACK), "one", 0]
    few = type(case)("few", "trimmed_mean", dict(list(case.reports.items())[:2]))
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="few: .* no sites, not of 2")):
        await warm_starts(space, [few], tmp_path)
