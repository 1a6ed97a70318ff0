"""The client's own sampler against the exact probabilities. Randomness is seeded, so that a test that passes
goes on passing; the default is the operating system's entropy."""

from __future__ import annotations

import inspect
import random
import secrets
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from fmi_client._discrete_gaussian import _discrete_laplace, _exp_minus, discrete_gaussian

DRAWS = 30_000
WIDE = 1 << 40


def draws(sigma, seed, count=DRAWS):
    below = random.Random(seed).randrange
    return np.array([discrete_gaussian(sigma, below) for _ in range(count)])


def mass(sigma):
    """The exact probabilities of -reach..reach, up to what doubles can say, and the places."""
    x = np.arange(-12 * sigma, 12 * sigma + 1)
    weights = np.exp(-(x**2) / (2.0 * sigma * sigma))
    return x, weights / weights.sum()


def chi_square(drawn, x, probability):
    """The p-value; what is too rare to be counted by itself is counted together, a tail at a time."""
    expected = probability * len(drawn)
    usual = expected >= 10.0
    low, high = x[usual][0], x[usual][-1]
    places = np.clip(drawn, low - 1, high + 1) - (low - 1)
    counted = np.bincount(places, minlength=high - low + 3)
    tails = expected[x < low].sum(), expected[x > high].sum()
    return stats.chisquare(counted, [tails[0], *expected[usual], tails[1]]).pvalue


@pytest.mark.parametrize("sigma", [1, 2, 3, 7, 20])
def test_draws_have_the_probabilities_of_the_distribution(sigma):
    assert chi_square(draws(sigma, sigma), *mass(sigma)) > 1e-3


def test_the_test_sees_a_sigma_that_is_wrong_by_five_percent():
    x = np.arange(-240, 241)
    weights = np.exp(-(x**2) / (2.0 * 21.0 * 21.0))
    assert chi_square(draws(20, 1), x, weights / weights.sum()) < 1e-6


@pytest.mark.parametrize("sigma", [5, WIDE])
@pytest.mark.parametrize("sigmas", [1.0, 2.0, 3.0])
def test_the_tails_are_as_heavy_as_they_should_be(sigma, sigmas):
    beyond = sum(abs(int(x)) > sigmas * sigma for x in draws(sigma, 2))
    probability = 2.0 * stats.norm.sf(sigmas)
    if sigma == 5:
        x, probabilities = mass(sigma)
        probability = probabilities[np.abs(x) > sigmas * sigma].sum()
    assert stats.binomtest(beyond, DRAWS, probability).pvalue > 1e-3


def test_wide_noise_is_normal_and_even_and_odd_alike():
    drawn = draws(WIDE, 3)
    assert stats.kstest(drawn / float(WIDE), "norm").pvalue > 1e-3
    for bit in range(20):
        ones = int(np.count_nonzero(drawn >> bit & 1))
        assert stats.binomtest(ones, DRAWS, 0.5).pvalue > 1e-4


def test_laplace_candidates_have_their_probabilities():
    below = random.Random(4).randrange
    drawn = np.array([_discrete_laplace(3, below) for _ in range(DRAWS)])
    x = np.arange(-60, 61)
    weights = np.exp(-np.abs(x) / 3.0)
    assert chi_square(drawn, x, weights / weights.sum()) > 1e-3


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 3), Fraction(1), Fraction(5, 2)])
def test_coins_come_true_with_the_exponential(share):
    below = random.Random(5).randrange
    tossed = Counter(_exp_minus(share.numerator, share.denominator, below) for _ in range(DRAWS))
    assert stats.binomtest(tossed[True], DRAWS, float(np.exp(-float(share)))).pvalue > 1e-3


def test_entropy_is_the_operating_systems():
    assert inspect.signature(discrete_gaussian).parameters["below"].default is secrets.randbelow


def test_a_sigma_below_one_is_refused():
    with pytest.raises(ValueError, match="sigma"):
        discrete_gaussian(0)
