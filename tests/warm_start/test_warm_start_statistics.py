from __future__ import annotations

import numpy as np
import pytest

from benchmarks.warm_start.statistics import (
    TARGET_AT,
    evaluations_to,
    first_hits,
    losses,
    mean_interval,
    share_reached,
    speed_up,
    target_of,
)

BUDGET = 50


def _reaching(*evaluations):
    """One repetition per number: the error is 1 until that evaluation, then 0."""
    at = np.arange(1, BUDGET + 1)
    return np.array([(at < n).astype(float) for n in evaluations])


def test_the_target_is_the_median_after_25_evaluations_of_each_data_set():
    traces = np.linspace(1.0, 0.0, BUDGET) + np.array([0.0, 0.1, 0.5])[None, :, None]
    assert target_of(traces) == pytest.approx([1.0 - (TARGET_AT - 1) / (BUDGET - 1) + 0.1])


def test_evaluations_are_counted_from_one_and_a_search_that_fails_counts_as_its_budget():
    traces = np.stack([_reaching(1, 10, BUDGET + 1)])
    target = np.array([0.0])
    assert first_hits(traces, target).tolist() == [[1, 10, BUDGET]]
    assert evaluations_to(traces, target).tolist() == [10.0]
    assert share_reached(traces, target)[[0, 8, 9, 49]] == pytest.approx(
        [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    )


def test_two_kinds_of_mean_speed_up():
    cold = np.stack([_reaching(20, 20, 20), _reaching(40, 40, 40)])
    warm = np.stack([_reaching(20, 20, 20), _reaching(10, 10, 10)])
    of_means, geometric = speed_up(cold, warm, np.zeros(2))
    assert of_means.value == pytest.approx(60 / 30)
    assert geometric.value == pytest.approx(2.0)
    # With two data sets a resample has the one, the other or both.
    assert (of_means.lower, of_means.upper) == pytest.approx((1.0, 4.0))
    assert (geometric.lower, geometric.upper) == pytest.approx((1.0, 4.0))


def test_an_arm_against_itself_is_one_times_as_fast_for_certain():
    traces = np.stack([_reaching(3, 9, 30), _reaching(5, 6, 7)])
    for interval in speed_up(traces, traces, np.zeros(2)):
        assert (interval.value, interval.lower, interval.upper) == (1.0, 1.0, 1.0)


def test_the_interval_of_a_mean_is_near_the_t_interval():
    values = np.random.default_rng(0).normal(2.0, 1.0, size=200)
    interval = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean())
    assert interval.lower == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.upper == pytest.approx(values.mean() + half, abs=0.03)


def test_losses_are_the_data_sets_and_budgets_with_a_larger_error_for_certain():
    rng = np.random.default_rng(1)
    cold = rng.random((2, 40, 25))
    warm = cold.copy()
    warm[1, :, 9] += 0.1 + 0.01 * rng.random(40)
    warm[0, :, 24] += rng.normal(0.0, 1.0, 40) * np.tile([1.0, -1.0], 20)
    (loss,) = losses(["even", "worse"], {"even": 0.1, "worse": 0.2}, cold, warm)
    assert (loss.data_set, loss.evaluations, loss.noise) == ("worse", 10, 0.2)
    assert 0.1 < loss.difference.lower < loss.difference.value < loss.difference.upper < 0.11


def test_a_gain_is_no_loss():
    cold = np.ones((1, 20, 25))
    assert losses(["better"], {"better": 0.0}, cold, cold - 0.5) == []
