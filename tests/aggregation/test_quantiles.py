from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from fmi_server.aggregation.quantiles import (
    normal_quantile,
    t_central_probability,
    t_quantile,
    wilson_lower_bound,
)

DEGREES = [*range(1, 60), 99, 100, 250, 499, 500, 501, 502, 750, 1_000, 10_000, 100_000, 1_000_000]


@pytest.mark.parametrize("level", [0.01, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_t_quantile_agrees_with_scipy(level):
    for df in DEGREES:
        expected = stats.t.ppf(0.5 + level / 2, df)
        assert t_quantile(df, level) == pytest.approx(expected, rel=1e-9), df


def test_t_central_probability_agrees_with_scipy():
    distances = np.array([0.0, 1e-9, 0.01, 0.5, 1.0, 2.5, 7.0, 40.0, 1e5, np.inf])
    for df in DEGREES:
        found = t_central_probability(distances, np.full(len(distances), df))
        expected = stats.t.cdf(distances, df) - stats.t.cdf(-distances, df)
        np.testing.assert_allclose(found, expected, atol=2e-8)


def test_t_central_probability_answers_rows_of_different_degrees():
    distances, df = np.array([1.0, 2.0, 3.0, 1.0]), np.array([3, 100, 3, 1])
    found = t_central_probability(distances, df)
    np.testing.assert_allclose(found, 2 * stats.t.cdf(distances, df) - 1, atol=2e-8)
    assert t_central_probability(np.zeros(0), np.zeros(0, dtype=int)).shape == (0,)


def test_t_quantile_is_cached_per_degrees_and_level():
    t_quantile.cache_clear()
    t_quantile(7, 0.95)
    t_quantile(7, 0.95)
    t_quantile(7, 0.9)
    assert t_quantile.cache_info()[:2] == (1, 2)


@pytest.mark.parametrize(("df", "level"), [(0, 0.95), (-1, 0.95), (5, 0.0), (5, 1.0)])
def test_t_quantile_refuses(df, level):
    with pytest.raises(ValueError, match=r"degrees of freedom|level"):
        t_quantile(df, level)


@pytest.mark.parametrize("probability", [1e-9, 0.025, 0.5, 0.975, 0.9999])
def test_normal_quantile_agrees_with_scipy(probability):
    expected = stats.norm.ppf(probability)
    assert normal_quantile(probability) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (3, 3), (3, 10), (99, 100), (500, 901)])
def test_wilson_agrees_with_statsmodels(successes, trials):
    # One-sided 95 % is the lower end of the two-sided 90 % interval.
    expected = proportion_confint(successes, trials, alpha=0.1, method="wilson")[0]
    found = wilson_lower_bound(successes, trials, 0.95)
    assert found == pytest.approx(max(0.0, expected), abs=1e-12)


def test_wilson_without_trials_says_nothing():
    assert wilson_lower_bound(0, 0, 0.95) == 0.0


def test_wilson_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="successes"):
        wilson_lower_bound(4, 3, 0.95)
