from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.warm_start.attacks import ATTACKS
from benchmarks.warm_start.chart import draw_chart
from benchmarks.warm_start.experiment import (
    COLD,
    CONDITIONS,
    ESTIMATORS,
    FULL,
    NO_ATTACK,
    Effort,
    Outcome,
    tpe_arm,
    warm_arm,
)
from benchmarks.warm_start.report import text_of
from benchmarks.warm_start.summary import summarise

BUDGET = 50
NAMES = ("easy", "hard")
SEEDS = 8


def _falling(*rates, jitter=0.1):
    """Errors that fall by a power of the evaluations, by data set, with searches that differ."""
    at = np.arange(1, BUDGET + 1)
    spread = 1.0 + jitter * np.random.default_rng(0).random(SEEDS)
    return np.array([[factor * at**-rate for factor in spread] for rate in rates])


def _outcome(*, ours_under_attack):
    traces = dict.fromkeys(COLD, _falling(0.5, 0.5))
    for estimator in ESTIMATORS:
        for condition in CONDITIONS:
            traces[warm_arm(estimator, condition)] = _falling(1.5, 1.5)
    traces[warm_arm("ours", "mirror")] = ours_under_attack
    traces |= {tpe_arm(condition): _falling(1.0, 1.0) for condition in (NO_ATTACK, "mirror")}
    return Outcome(NAMES, dict.fromkeys(NAMES, 0.01), traces, Effort(SEEDS, BUDGET, 30))


@pytest.fixture
def good():
    return _outcome(ours_under_attack=_falling(1.0, 1.0))


@pytest.fixture
def bad():
    return _outcome(ours_under_attack=_falling(1.0, 0.1))


def test_the_worst_attack_is_the_one_that_costs_most_evaluations(good):
    summary = summarise(good)
    assert summary.worst["ours"] == "mirror"
    row = summary.headline()
    assert row.evaluations == summary.rows["cold random"]["warm ours, mirror"].evaluations
    assert row.mean == max(
        summary.rows["cold random"][warm_arm("ours", attack)].mean for attack in ATTACKS
    )


def test_a_goal_that_is_reached_is_said_with_its_interval(good):
    summary = summarise(good)
    text = text_of(good, summary)
    fewer = summary.headline().fewer
    assert fewer.value >= 2.5
    assert "under the worst attack (mirror): reached" in text
    assert f"{fewer.value:.2f}x [{fewer.lower:.2f}, {fewer.upper:.2f}]" in text
    assert "under any attack: yes." in text


def test_a_goal_that_is_missed_and_every_loss_are_told(bad):
    summary = summarise(bad)
    text = text_of(bad, summary)
    assert "under the worst attack (mirror): NOT reached" in text
    assert "under any attack: no; see hard." in text
    assert "hard after 25: +0." in text
    assert "Slower than random search to its median at 25: hard." in text
    assert summary.headline().evaluations["hard"] == BUDGET
    assert summary.headline().unreached == pytest.approx(0.5)
    assert f"{BUDGET} or more" in text


def test_a_run_of_few_searches_says_so(good):
    assert "too few to conclude from" in text_of(good, summarise(good))
    enough = replace(good, effort=FULL)
    assert "too few" not in text_of(enough, summarise(enough))


def test_the_numbers_are_written_as_json(bad):
    summary = summarise(bad)
    plain = json.loads(json.dumps(summary.as_json(bad)))
    assert plain["effort"]["repetitions"] == SEEDS
    row = plain["rows"]["cold random"]["warm ours, mirror"]
    assert row["fewer"]["value"] == pytest.approx(summary.headline().fewer.value)
    assert {loss["data_set"] for loss in plain["losses"]["warm ours, mirror"]["cold random"]} == {
        "hard"
    }


def test_the_chart_is_drawn(good, tmp_path):
    draw_chart(good, summarise(good), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
