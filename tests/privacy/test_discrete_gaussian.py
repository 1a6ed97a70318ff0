"""The discrete Gaussian against its exact probabilities. The streams of random bytes are fixed, so that a
test that passes goes on passing; the default is the operating system's entropy."""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest
from scipy import stats

from fmi_server.privacy.discrete_gaussian import MAX_SIGMA_BITS, _Coins, discrete_gaussian

DRAWS = 400_000


def stream(seed):
    return np.random.default_rng(seed).bytes


def mass(sigma_bits):
    """The exact probabilities of -reach..reach, up to what doubles can say, and the reach."""
    sigma = 2**sigma_bits
    reach = 12 * sigma
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x**2) / (2.0 * sigma * sigma))
    return x, weights / weights.sum()


@pytest.mark.parametrize("sigma_bits", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("seed", [1, 2])
def test_draws_have_the_probabilities_of_the_distribution(sigma_bits, seed):
    drawn = discrete_gaussian(DRAWS, sigma_bits, stream(seed))
    x, probability = mass(sigma_bits)
    expected = probability * DRAWS
    # What is too rare to be counted by itself is counted together, a tail at a time.
    usual = expected >= 10.0
    low, high = x[usual][0], x[usual][-1]
    places = np.clip(drawn, low - 1, high + 1) - (low - 1)
    counted = np.bincount(places, minlength=high - low + 3)
    tails = expected[x < low].sum(), expected[x > high].sum()
    found = stats.chisquare(counted, [tails[0], *expected[usual], tails[1]])
    assert found.pvalue > 1e-3


@pytest.mark.parametrize("sigma_bits", [0, 4, MAX_SIGMA_BITS])
@pytest.mark.parametrize("sigmas", [1.0, 2.0, 3.0, 4.0])
def test_the_tails_are_as_heavy_as_they_should_be(sigma_bits, sigmas):
    drawn = discrete_gaussian(DRAWS, sigma_bits, stream(3))
    beyond = int(np.count_nonzero(np.abs(drawn) > sigmas * 2.0**sigma_bits))
    if sigma_bits == MAX_SIGMA_BITS:
        probability = 2.0 * stats.norm.sf(sigmas)
    else:
        x, probabilities = mass(sigma_bits)
        probability = probabilities[np.abs(x) > sigmas * 2**sigma_bits].sum()
    assert stats.binomtest(beyond, DRAWS, probability).pvalue > 1e-3


def test_wide_noise_is_normal_and_even_and_odd_alike():
    drawn = discrete_gaussian(DRAWS, MAX_SIGMA_BITS, stream(4))
    assert stats.kstest(drawn / 2.0**MAX_SIGMA_BITS, "norm").pvalue > 1e-3
    for bit in range(20):
        ones = int(np.count_nonzero(drawn >> bit & 1))
        assert stats.binomtest(ones, DRAWS, 0.5).pvalue > 1e-4


def test_a_draw_depends_on_the_bits_of_its_entropy_alone():
    same, other = (discrete_gaussian(500, 8, stream(seed)) for seed in (5, 6))
    assert discrete_gaussian(500, 8, stream(5)).tolist() == same.tolist() != other.tolist()


def test_the_coins_take_each_word_for_what_it_is_worth():
    """All words of three bits, once each for each of all fractions of 8; then words that no coin survives."""
    fractions = np.repeat(np.arange(8, dtype=np.uint64), 8)
    every_word = np.tile(np.arange(8, dtype=np.uint64) << np.uint64(61), 8)
    answers = iter([every_word.tobytes()])

    def entropy(count):
        return next(answers, b"\xff" * count)

    # The first failure is at an odd place where it is the first toss, and at an even one where the second.
    odd = _Coins(entropy).exp_minus(fractions, 3)
    assert odd.reshape(8, 8).sum(axis=1).tolist() == [8 - fraction for fraction in range(8)]


def test_entropy_is_the_operating_systems():
    assert inspect.signature(discrete_gaussian).parameters["entropy"].default is os.urandom


def test_none_and_one_and_wrong_input():
    assert discrete_gaussian(0, 5).tolist() == []
    assert discrete_gaussian(1, 0).dtype == np.int64
    with pytest.raises(ValueError, match="count"):
        discrete_gaussian(-1, 5)
    for bits in (-1, MAX_SIGMA_BITS + 1):
        with pytest.raises(ValueError, match="sigma_bits"):
            discrete_gaussian(1, bits)
