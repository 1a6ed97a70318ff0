"""Noisy means: no site moves the sums by more than is stated, and the stated errors are the errors."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmi_server.privacy.accounting import zcdp_of_noise
from fmi_server.privacy.discrete_gaussian import discrete_gaussian
from fmi_server.privacy.noisy_means import MAX_SITES, NoisySums, PrivateSums

ANYTHING = st.floats(allow_nan=True, allow_infinity=True)
WEIGHT = st.floats(allow_nan=False, allow_infinity=True)
SHAPES = st.tuples(st.integers(1, 5), st.floats(1e-3, 1e3))


def stream(seed):
    return np.random.default_rng(seed).bytes


def moved_squared(one: NoisySums, other: NoisySums) -> int:
    """The squared distance of two sums, in whole numbers of any size."""
    pairs = zip(
        [*one.values.tolist(), *one.weights.tolist()],
        [*other.values.tolist(), *other.weights.tolist()],
        strict=True,
    )
    return sum((a - b) ** 2 for a, b in pairs)


# What one site can do


@settings(max_examples=300)
@given(SHAPES, st.data())
def test_no_site_moves_the_sums_by_more_than_the_sensitivity(shape, data):
    signals, multiplier = shape
    mechanism = PrivateSums(signals, multiplier)
    column = st.lists(ANYTHING, min_size=signals, max_size=signals)
    others = data.draw(st.lists(st.tuples(column, WEIGHT), min_size=0, max_size=4))
    values, weight = data.draw(column), data.draw(WEIGHT)

    def sums(sites):
        matrix = np.array([values for values, _ in sites], dtype=float).reshape(len(sites), signals)
        return mechanism.sums(matrix.T, np.array([weight for _, weight in sites], dtype=float))

    moved = moved_squared(sums([*others, (values, weight)]), sums(others))
    assert moved <= mechanism.sensitivity_squared


@pytest.mark.parametrize("signals", [1, 3, 200])
@pytest.mark.parametrize("multiplier", [1e-3, 0.7, 4.4, 300.0])
def test_the_worst_site_moves_them_by_exactly_that(signals, multiplier):
    mechanism = PrivateSums(signals, multiplier)
    nobody = mechanism.sums(np.zeros((signals, 0)), np.zeros(0))
    worst = mechanism.sums(np.full((signals, 1), -math.inf), np.array([math.inf]))
    assert moved_squared(worst, nobody) == mechanism.sensitivity_squared


@given(SHAPES)
def test_a_release_costs_no_more_than_its_multiplier_says(shape):
    signals, multiplier = shape
    mechanism = PrivateSums(signals, multiplier)
    stated = zcdp_of_noise(1.0, multiplier)
    assert mechanism.rho <= Fraction(stated) * (1 + Fraction(1, 10**12))
    assert float(mechanism.rho) == pytest.approx(stated, rel=0.01)


# Vectors that are scaled to a norm


CLIPPED = st.tuples(st.integers(1, 6), st.floats(1e-3, 1e3), st.floats(0.01, 4.0))


@settings(max_examples=300)
@given(CLIPPED, st.data())
def test_no_site_moves_the_sums_by_more_than_the_norm(shape, data):
    """Whatever it sends, and whoever else is there: the sums differ by its own vector, to the last digit."""
    signals, multiplier, clip_norm = shape
    mechanism = PrivateSums(signals, multiplier, clip_norm)
    column = st.lists(ANYTHING | st.floats(-1.0, 1.0), min_size=signals, max_size=signals)
    sites = data.draw(st.lists(st.tuples(column, WEIGHT | st.floats(0, 1)), min_size=1, max_size=5))
    values = np.array([values for values, _ in sites], dtype=float).reshape(-1, signals).T
    weights = np.array([weight for _, weight in sites])
    everybody, others = mechanism.sums(values, weights), mechanism.sums(values[:, 1:], weights[1:])
    alone = mechanism.sums(values[:, :1], weights[:1])
    assert moved_squared(everybody, others) <= mechanism.sensitivity_squared
    assert (everybody.values - others.values).tolist() == alone.values.tolist()
    assert (everybody.weights - others.weights).tolist() == alone.weights.tolist()
    if mechanism.norm_bound is not None:
        assert mechanism.sensitivity_squared <= mechanism.norm_bound**2
        assert mechanism.norm_bound <= clip_norm * mechanism.value_bound


@pytest.mark.parametrize("clip_norm", [0.05, 0.7, 2.0, 5.4, 17.2])
@pytest.mark.parametrize("signals", [20, 200])
def test_an_adversary_comes_near_the_norm_and_not_beyond(signals, clip_norm):
    """Steps uphill from a corner and from many other places, over values and weights of each signal."""
    mechanism, rng = PrivateSums(signals, 0.7, clip_norm), np.random.default_rng(signals)
    nobody = mechanism.sums(np.zeros((signals, 0)), np.zeros(0))

    def moved(site):
        values, weights = site[:, :, None]
        return moved_squared(mechanism.sums(values, weights), nobody)

    most = moved(np.ones((2, signals)))
    for _ in range(8):
        site = rng.uniform(-2.0, 2.0, (2, signals))
        best = moved(site)
        for _ in range(60):
            step = rng.normal(0.0, 0.5, (2, signals)) * (rng.random((2, signals)) < 0.2)
            if (further := moved(site + step)) > best:
                site, best = site + step, further
        most = max(most, best)
    sensitivity_squared = mechanism.sensitivity_squared
    assert (1 - Fraction(1, 10**5)) * sensitivity_squared < most <= sensitivity_squared


def test_a_column_is_scaled_alike_in_every_company():
    """One after the other, two at a time, and all at once: numpy adds in another order for one column."""
    mechanism, rng = PrivateSums(200, 0.7, 2.0), np.random.default_rng(11)
    values, weights = rng.normal(size=(200, 64)), rng.random((200, 64))
    for layout in (np.ascontiguousarray, np.asfortranarray):
        there, counted = layout(values), layout(weights)
        all_at_once = mechanism.scales(there, counted)
        for width in (1, 2, 63):
            parts = [
                mechanism.scales(there[:, i : i + width], counted[:, i : i + width])
                for i in range(0, 64, width)
            ]
            assert np.concatenate(parts).tolist() == all_at_once.tolist()


def test_scaling_keeps_the_direction_of_long_vectors_and_leaves_short_ones_alone():
    plain, clipped = PrivateSums(3, 1e-3), PrivateSums(3, 1e-3, 1.5)
    long, short = np.array([[0.9], [-0.6], [0.3]]), np.array([[0.3], [np.nan], [np.nan]])
    for values, norm in ((long, math.sqrt(0.81 + 0.36 + 0.09 + 1.5)), (short, math.sqrt(0.59))):
        before, after = (of.sums(values, np.ones(1)) for of in (plain, clipped))
        factor = min(1.0, 1.5 / norm)
        for one, other in ((before.values, after.values), (before.weights, after.weights)):
            unit = other / clipped.value_bound
            assert unit == pytest.approx(factor * one / plain.value_bound, abs=1e-6)
    assert clipped.counted(3) == pytest.approx(1.0, abs=1e-6)
    assert clipped.counted(3, 1.0) == pytest.approx(1.5 / math.sqrt(4.5), rel=1e-6)
    assert plain.counted(3, 1.0) == 1.0


def test_the_mean_of_scaled_vectors_is_their_weighted_mean():
    mechanism, rng = PrivateSums(4, 1e-6, 1.2), np.random.default_rng(12)
    values = rng.uniform(-1, 1, size=(4, 300))
    values[:, ::2] = np.where(rng.random((4, 150)) < 0.5, np.nan, values[:, ::2])
    there = ~np.isnan(values)
    norms = np.sqrt((np.nan_to_num(values) ** 2 + 0.5 * there).sum(axis=0))
    shares = np.minimum(1.0, 1.2 / np.maximum(norms, 1e-9))
    noisy = mechanism.noisy(mechanism.sums(values, np.ones(300)), stream(13))
    found = mechanism.means(noisy, 1.0)
    for row in range(4):
        seen = there[row]
        expected = np.average(values[row, seen], weights=shares[seen])
        assert found.value[row] == pytest.approx(expected, abs=1e-6)
        assert found.weight[row] == pytest.approx(shares[seen].sum(), rel=1e-6)


def test_a_norm_that_no_vector_exceeds_changes_nothing():
    plain, roomy = PrivateSums(4, 0.7), PrivateSums(4, 0.7, math.sqrt(6.0) + 1e-9)
    values = np.random.default_rng(14).normal(size=(4, 50))
    assert roomy.clip_norm is None
    assert roomy.rho == plain.rho
    assert moved_squared(plain.sums(values, np.ones(50)), roomy.sums(values, np.ones(50))) == 0


@given(CLIPPED)
def test_a_scaled_release_costs_no_more_than_its_multiplier_says(shape):
    signals, multiplier, clip_norm = shape
    mechanism = PrivateSums(signals, multiplier, clip_norm)
    stated = zcdp_of_noise(1.0, multiplier)
    assert mechanism.rho <= Fraction(stated) * (1 + Fraction(1, 10**12))
    assert float(mechanism.rho) == pytest.approx(stated, rel=0.01)


# Sums


def test_sums_are_exact_whatever_the_order_of_the_sites():
    mechanism, rng = PrivateSums(3, 0.5), np.random.default_rng(1)
    values, weights = rng.normal(size=(3, 500)), rng.random(500)
    mixed = rng.permutation(500)
    one, other = mechanism.sums(values, weights), mechanism.sums(values[:, mixed], weights[mixed])
    assert moved_squared(one, other) == 0


def test_the_sums_of_the_most_sites_fit():
    for multiplier in (1e-6, 1.0):
        mechanism = PrivateSums(1, multiplier)
        assert mechanism.value_bound * MAX_SITES + 2 ** (mechanism.sigma_bits + 10) < 2**63


# The noise


@given(SHAPES, st.integers(0, 2**32))
def test_noise_of_the_stated_size_is_added_to_every_sum(shape, seed):
    """Values and weights alike, each with a draw of its own."""
    signals, multiplier = shape
    mechanism = PrivateSums(signals, multiplier)
    exact = mechanism.sums(np.zeros((signals, 7)), np.ones(7))
    noisy = mechanism.noisy(exact, stream(seed))
    drawn = discrete_gaussian(2 * signals, mechanism.sigma_bits, stream(seed))
    noise = np.concatenate([noisy.values - exact.values, noisy.weights - exact.weights])
    assert noise.tolist() == drawn.tolist()


def test_two_releases_have_noise_of_their_own():
    mechanism = PrivateSums(3, 1.0)
    exact = mechanism.sums(np.zeros((3, 1)), np.ones(1))
    one, other = mechanism.noisy(exact), mechanism.noisy(exact)
    assert moved_squared(one, other) > 0


# What is told


def test_without_noise_to_speak_of_the_means_are_the_weighted_means():
    mechanism, rng = PrivateSums(2, 1e-6), np.random.default_rng(2)
    values, weights = rng.uniform(-1, 1, size=(2, 300)), rng.uniform(0.1, 1, 300)
    values[0, ::3] = np.nan
    noisy = mechanism.noisy(mechanism.sums(values, weights), stream(3))
    found = mechanism.means(noisy, 1.0)
    for row in range(2):
        there = ~np.isnan(values[row])
        expected = np.average(values[row, there], weights=weights[there])
        assert found.value[row] == pytest.approx(expected, abs=1e-6)
        assert found.weight[row] == pytest.approx(weights[there].sum(), rel=1e-6)


@pytest.mark.parametrize("sites", [300, 3_000])
@pytest.mark.parametrize("centre", [0.0, 0.6])
def test_the_stated_error_of_the_noise_is_the_error(sites, centre):
    mechanism = PrivateSums(20, 4.4)
    rng = np.random.default_rng(sites)
    values = np.clip(rng.normal(centre, 0.2, (20, sites)), -1, 1)
    sums = mechanism.sums(values, np.ones(sites))
    bits, off, said = stream(4), [], []
    for _ in range(300):
        found = mechanism.means(mechanism.noisy(sums, bits), 10.0)
        off.append(found.value - values.mean(axis=1))
        said.append(found.noise_stderr)
    share = 0.05 if sites == 300 else 0.02  # a ratio's error is a little more than its first order
    found_rms, said_rms = np.sqrt(np.mean(np.square(off))), np.sqrt(np.mean(np.square(said)))
    assert found_rms == pytest.approx(said_rms, rel=share + 0.03)
    assert abs(np.mean(off)) < 0.1 * found_rms


def test_the_standard_error_covers_the_choice_of_the_sites_too():
    """The worst distribution there is: sites at both bounds."""
    mechanism, rng, covered = PrivateSums(1, 0.5), np.random.default_rng(5), 0
    bits = stream(6)
    for _ in range(1_000):
        values = np.where(rng.random((1, 200)) < 0.8, 1.0, -1.0)
        found = mechanism.means(mechanism.noisy(mechanism.sums(values, np.ones(200)), bits), 5.0)
        covered += abs(found.value[0] - 0.6) <= 1.96 * found.stderr[0]
    assert 0.92 < covered / 1_000 < 0.98


def test_too_little_weight_has_no_mean():
    mechanism = PrivateSums(2, 0.1)
    values = np.array([[0.5] * 40, [0.5] * 3 + [np.nan] * 37])
    noisy = mechanism.noisy(mechanism.sums(values, np.ones(40)), stream(7))
    found = mechanism.means(noisy, 20.0)
    assert found.value[0] == pytest.approx(0.5, abs=0.1)
    assert np.isnan([found.value[1], found.stderr[1], found.noise_stderr[1]]).all()


# Refusals


def test_nothing_that_a_site_sends_stops_a_release():
    mechanism = PrivateSums(2, 1.0)
    values = np.array([[0.5, np.nan, np.inf, -np.inf], [np.nan] * 4])
    found = mechanism.sums(values, np.array([np.nan, 1.0, np.inf, -np.inf]))
    assert found.values.tolist() == [mechanism.value_bound, 0]
    assert found.weights.tolist() == [mechanism.weight_bound, 0]


@pytest.mark.parametrize(
    ("multiplier", "sites", "at_one"),
    [
        (0.5, 20, 0.9),
        (0.5, 200, 0.98),
        (0.5, 200, 0.5),
        (2.0, 40, 0.7),
        (2.0, 20, 1.0),
        (2.0, 5, 1.0),
    ],
)
def test_of_all_signals_few_are_told_with_an_interval_that_misses(multiplier, sites, at_one):
    """Sites at the bounds, where values spread most, drawn anew each time; few of them, and many."""
    mechanism, rng = PrivateSums(400, multiplier / math.sqrt(400 * 1.5)), np.random.default_rng(1)
    least = 3.0 * 2.0**mechanism.sigma_bits / mechanism.weight_bound
    missed = told = 0
    for _ in range(10):
        values = np.where(rng.random((400, sites)) < at_one, 1.0, -1.0)
        means = mechanism.means(
            mechanism.noisy(mechanism.sums(values, np.ones(sites)), rng.bytes), least, 1.96
        )
        truth = 2.0 * at_one - 1.0
        shown = ~np.isnan(means.value)
        assert np.all(means.lower[shown] <= means.value[shown])
        assert np.all(means.value[shown] <= means.upper[shown])
        told += np.count_nonzero(shown)
        missed += np.count_nonzero(shown & ((means.lower > truth) | (means.upper < truth)))
    # 5 % and four standard errors of what 4,000 draws can show.
    assert missed / 4000 < 0.05 + 4.0 * math.sqrt(0.05 * 0.95 / 4000)
    if told == 4000:
        assert missed / 4000 > 0.02, "and they are not much wider than they need be"


def test_what_cannot_be_done_is_refused():
    for signals, multiplier in ((0, 1.0), (1, 0.0), (1, math.nan), (1, math.inf), (10**9, 1e6)):
        with pytest.raises(ValueError, match=r"signals|noise"):
            PrivateSums(signals, multiplier)
    for clip_norm in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clip_norm"):
            PrivateSums(1, 1.0, clip_norm)
    mechanism = PrivateSums(2, 1.0)
    for values, weights in (
        (np.zeros((3, 1)), np.ones(1)),
        (np.zeros((2, 2)), np.ones(1)),
    ):
        with pytest.raises(ValueError, match=r"values|weights"):
            mechanism.sums(values, weights)
    with pytest.raises(ValueError, match="least_weight"):
        mechanism.means(mechanism.sums(np.zeros((2, 1)), np.ones(1)), 0.0)
