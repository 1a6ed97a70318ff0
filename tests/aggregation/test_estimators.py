from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import mstats

from fmi_server.aggregation import (
    BELOW_QUORUM,
    MAX_MAGNITUDE,
    EstimatorSettings,
    estimate,
    trim_count,
)
from fmi_server.aggregation.certainty import (
    natural_tolerance,
    sign_test_coverage,
    sign_test_rank,
)

DEFAULT = EstimatorSettings()
NUMBER = st.floats(-1e6, 1e6, allow_subnormal=False)
ANY_NUMBER = st.floats(-MAX_MAGNITUDE, MAX_MAGNITUDE)
WEIGHT = st.floats(0.0, 1.0)


def one(values, weights=None, rules=DEFAULT, tolerance=natural_tolerance):
    row = None if weights is None else np.array([weights], dtype=float)
    return estimate(np.array([values], dtype=float), row, rules, tolerance).row(0)


def same(left, right, *, rel=1e-9, slack=0.0):
    if left is None or right is None:
        return left is right
    return left == pytest.approx(right, rel=rel, abs=slack)


# --- trimming count -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "expected"),
    [(0, 0), (1, 1), (2, 1), (3, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3), (30, 3)],
)
def test_trim_count_at_alpha_a_tenth(sites, expected):
    assert trim_count(np.array([sites]), DEFAULT)[0] == expected


def test_trim_count_is_not_fooled_by_rounding():
    sites = np.arange(1, 2001)
    exact = [math.ceil(Fraction(3, 10) * int(n)) for n in sites]
    rules = EstimatorSettings(trim_alpha=0.3, max_byzantine=0)
    assert trim_count(sites, rules).tolist() == exact


def test_trim_count_follows_max_byzantine():
    assert trim_count(np.array([9]), EstimatorSettings(max_byzantine=3))[0] == 3
    assert trim_count(np.array([100]), EstimatorSettings(max_byzantine=3))[0] == 10
    assert trim_count(np.array([9]), EstimatorSettings(trim_alpha=0.0, max_byzantine=0))[0] == 0


@pytest.mark.parametrize("sites", range(3, 10))
def test_one_liar_below_ten_sites_moves_nothing(sites):
    honest = np.linspace(0.8, 0.9, sites - 1)
    assert stats.trim_mean([*honest, 1e9], 0.1) > 1e7  # the usual formula
    found = one([*honest, 1e9])
    assert 0.8 <= found.value <= 0.9


# --- the trimmed mean against others' formulas ------------------------------------------------


@pytest.mark.parametrize("sites", [10, 20, 50, 200])
def test_value_agrees_with_scipy_where_the_counts_agree(sites):
    values = np.random.default_rng(sites).normal(size=sites)
    assert one(values).value == pytest.approx(stats.trim_mean(values, 0.1), rel=1e-12)


@given(st.lists(NUMBER, min_size=5, max_size=30), st.integers(0, 2))
def test_value_agrees_with_exact_fractions(values, cut):
    rules = EstimatorSettings(trim_alpha=0.0, max_byzantine=cut)
    kept = sorted(Fraction(v) for v in values)[cut : len(values) - cut]
    exact = float(sum(kept) / len(kept))
    scale = max(abs(v) for v in values) + 1e-300
    assert one(values, rules=rules).value == pytest.approx(exact, rel=1e-9, abs=1e-12 * scale)


@pytest.mark.parametrize("sites", [4, 5, 9, 10, 23, 100, 400])
def test_standard_error_and_interval_agree_with_scipy(sites):
    values = np.random.default_rng(sites).normal(3.0, 2.0, size=sites)
    cut = int(trim_count(np.array([sites]), DEFAULT)[0])
    limits = (cut / sites + 1e-12, cut / sites + 1e-12)
    found = one(values)
    stderr = mstats.trimmed_stde(values, limits=limits)
    lower, upper = mstats.trimmed_mean_ci(values, limits=limits, alpha=0.05)
    assert found.trimmed == 2 * cut
    assert found.stderr == pytest.approx(float(stderr), rel=1e-10)
    assert (found.lower, found.upper) == pytest.approx((float(lower), float(upper)), rel=1e-9)


def test_equal_weights_change_nothing():
    values = np.random.default_rng(5).normal(size=(20, 40))
    values[values > 1.5] = np.inf
    plain, weighted = estimate(values), estimate(values, np.full(values.shape, 0.3))
    for name in ("value", "stderr", "lower", "upper", "effective_sites", "confidence"):
        np.testing.assert_allclose(getattr(plain, name), getattr(weighted, name), rtol=1e-10)


def test_weighted_value_agrees_with_exact_fractions():
    rng = np.random.default_rng(11)
    values, weights = rng.normal(size=30), rng.uniform(0.5, 1.0, size=30)
    order = np.argsort(values)[3:27]
    total = sum(Fraction(w) for w in weights[order])
    shares = [Fraction(w) / total for w in weights[order]]
    exact = sum(s * Fraction(v) for s, v in zip(shares, values[order], strict=True))
    found = one(values, weights)
    assert found.value == pytest.approx(float(exact), rel=1e-12)
    kish = 1 / sum(s * s for s in shares)
    assert found.effective_sites == pytest.approx(float(kish), rel=1e-12)
    winsorised = np.var(mstats.winsorize(values, (0.1, 0.1)), ddof=1)
    stderr = math.sqrt(float(winsorised) * 30 / 24 / float(kish))
    assert found.stderr == pytest.approx(stderr, rel=1e-10)


def test_interval_covers_what_it_says():
    # 4,000 rows of 12 sites; binomial standard deviation 0.0034.
    values = np.random.default_rng(2).standard_normal((4000, 12))
    table = estimate(values)
    covered = ((table.lower <= 0.0) & (table.upper >= 0.0)).mean()
    assert 0.93 <= covered <= 0.97


def test_interval_of_the_median_covers_what_it_says():
    for sites in (3, 5, 25):
        values = np.random.default_rng(sites).standard_normal((4000, sites))
        table = estimate(values, settings=EstimatorSettings(name="median"))
        covered = ((table.lower <= 0.0) & (table.upper >= 0.0)).mean()
        assert 0.92 <= covered <= 0.985, sites


# --- few sites ---------------------------------------------------------------------------------


def test_below_quorum_there_is_no_value_but_a_reason():
    found = one([1.0, 2.0, np.inf])
    assert (found.value, found.used, found.reason) == (None, None, BELOW_QUORUM)
    assert (found.stderr, found.lower, found.upper) == (None, None, None)
    assert (found.sites, found.confidence) == (2, 0.0)


def test_three_sites_give_the_median():
    found = one([5.0, 1.0, 1e12])
    assert (found.value, found.used, found.trimmed, found.tolerated) == (5.0, "median", 2, 1)


def test_four_sites_give_a_trimmed_mean():
    found = one([5.0, 1.0, 7.0, 1e12])
    assert (found.value, found.used, found.trimmed, found.tolerated) == (6.0, "trimmed_mean", 2, 1)


def test_more_liars_than_can_be_withstood_are_admitted():
    found = one([1.0, 2.0, 3.0, 4.0], rules=EstimatorSettings(max_byzantine=2))
    assert (found.used, found.value, found.tolerated) == ("median", 2.5, 1)


@pytest.mark.parametrize("sites", [2, 3, 4, 7, 8, 30, 101])
def test_standard_error_of_the_median_agrees_with_price_and_bonett(sites):
    values = np.sort(np.random.default_rng(sites).normal(size=sites))
    rank = max(1, round((sites + 1) / 2 - math.sqrt(sites)))
    z = stats.norm.ppf(1 - stats.binom.cdf(rank - 1, sites, 0.5))
    expected = (values[sites - rank] - values[rank - 1]) / (2 * z)
    found = one(values, rules=EstimatorSettings(name="median", min_sites=1))
    assert found.value == pytest.approx(np.median(values))
    assert found.stderr == pytest.approx(expected, rel=1e-9)
    half = stats.t.ppf(0.975, sites - 1) * expected
    assert found.upper - found.value == pytest.approx(half, rel=1e-9)


def test_the_normal_limit_of_the_median_meets_the_binomial():
    # Above 1,000 sites the binomial tail is replaced; the widths must meet within a per cent.
    for sites in (1001, 5000):
        values = np.arange(sites, dtype=float)
        rank = round((sites + 1) / 2 - math.sqrt(sites))
        z = stats.norm.ppf(1 - stats.binom.cdf(rank - 1, sites, 0.5))
        expected = (sites - 2 * rank + 1) / (2 * z)
        found = one(values, rules=EstimatorSettings(name="median"))
        assert found.stderr == pytest.approx(expected, rel=0.01)


def test_a_single_site_has_no_error():
    found = one([2.0, np.inf], rules=EstimatorSettings(min_sites=1))
    assert (found.value, found.stderr, found.lower, found.confidence) == (2.0, None, None, 0.0)


def test_empty_shapes_are_answered():
    assert len(estimate(np.zeros((0, 5)))) == 0
    assert estimate(np.zeros((3, 0))).reason.tolist() == [BELOW_QUORUM] * 3
    assert estimate(np.full((2, 4), np.inf), np.ones((2, 4))).sites.tolist() == [0, 0]


# --- weights --------------------------------------------------------------------------------


def test_no_share_exceeds_the_cap():
    values, weights = np.arange(12.0), np.full(12, 0.01)
    weights[6] = 1.0
    rules = EstimatorSettings(max_byzantine=1, trim_alpha=0.0, weight_cap=0.25)
    # Site 6 has a quarter, the nine others share the rest.
    others = [v for v in range(1, 11) if v != 6]
    expected = Fraction(6, 4) + Fraction(3, 4) * Fraction(sum(others), 9)
    assert one(values, weights, rules).value == pytest.approx(float(expected), rel=1e-12)


def test_weights_of_zero_count_all_alike():
    values = [1.0, 2.0, 3.0, 4.0, 9.0]
    assert one(values, [0.0] * 5) == one(values, [1.0] * 5)


def test_tied_sites_at_the_edge_share_their_part():
    # One of the three ones is trimmed; whichever it is, its weight must not decide.
    values = [1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    weights = [1.0, 0.4, 0.1, 0.5, 0.5, 0.5, 0.5]
    rules = EstimatorSettings(weight_cap=1.0, max_byzantine=1, trim_alpha=0.0)
    mass = Fraction(2, 3) * Fraction(3, 2)
    expected = (mass * 1 + Fraction(2 + 3 + 4, 2)) / (mass + Fraction(3, 2))
    assert one(values, weights, rules).value == pytest.approx(float(expected), rel=1e-12)


def test_liar_with_full_confidence_does_not_hold_the_pen():
    honest, liar = list(np.linspace(0.0, 1.0, 12)), 0.999
    weights = [0.05] * 12 + [1.0]
    plain = one(honest).value
    assert abs(one([*honest, liar], weights).value - plain) < 0.2


def test_weights_per_site_are_those_of_every_row():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(4, 15)), rng.uniform(size=15)
    wide = estimate(values, np.tile(weights, (4, 1)))
    np.testing.assert_array_equal(estimate(values, weights).value, wide.value)


# --- properties --------------------------------------------------------------------------------

NAMES = ["trimmed_mean", "weighted_mean", "mean", "median", "mean_of_median"]


@given(
    st.lists(
        st.tuples(st.one_of(NUMBER, st.integers(0, 3).map(float)), WEIGHT),
        min_size=1,
        max_size=25,
    ),
    st.sampled_from(NAMES),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_sites_does_not_matter(sites, name, random):
    rules = EstimatorSettings(name=name)
    mixed = list(sites)
    random.shuffle(mixed)
    before = one([v for v, _ in sites], [w for _, w in sites], rules)
    after = one([v for v, _ in mixed], [w for _, w in mixed], rules)
    scale = max(abs(v) for v, _ in sites) + 1e-12
    assert (before.used, before.trimmed, before.reason) == (after.used, after.trimmed, after.reason)
    assert same(before.value, after.value, slack=1e-9 * scale)
    assert same(before.stderr, after.stderr, rel=1e-6, slack=1e-9 * scale)
    assert before.effective_sites == pytest.approx(after.effective_sites, rel=1e-9)


@settings(max_examples=300)
@given(
    liars=st.integers(0, 3),
    alpha=st.sampled_from([0.0, 0.1, 0.25, 0.4]),
    name=st.sampled_from(["trimmed_mean", "median"]),
    data=st.data(),
)
def test_robust_liars_cannot_leave_the_honest_range(liars, alpha, name, data):
    minimum = max(3, liars + 1)
    honest = data.draw(st.lists(st.tuples(NUMBER, WEIGHT), min_size=minimum, max_size=20))
    lies = data.draw(
        st.lists(st.tuples(ANY_NUMBER, st.floats(0, 1e6)), min_size=liars, max_size=liars)
    )
    rules = EstimatorSettings(name=name, trim_alpha=alpha, max_byzantine=liars)
    sites = [*honest, *lies]
    found = one([v for v, _ in sites], [w for _, w in sites], rules)
    assert found.tolerated >= liars
    low, high = min(v for v, _ in honest), max(v for v, _ in honest)
    assert low <= found.value <= high
    assert 0.0 <= found.confidence <= 1.0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_many_sites_at_the_ends_of_what_is_taken_overflow_nothing(name, weighted):
    sites, rules = 100_000, EstimatorSettings(name=name)
    values = np.where(np.arange(sites) % 3 == 0, -1.0, 1.0)[None, :]
    weights = np.linspace(0.1, 1.0, sites) if weighted else None
    small, large = (estimate(values * scale, weights, rules).row(0) for scale in (1, MAX_MAGNITUDE))
    for field in ("value", "stderr", "lower", "upper"):
        expected = getattr(small, field) * MAX_MAGNITUDE
        assert getattr(large, field) == pytest.approx(expected, rel=1e-9)


def test_mean_of_median_does_not_promise_that():
    # Why `tolerated` is 0 for it: a liar near the median is averaged in.
    rules = EstimatorSettings(name="mean_of_median")
    found = one([0.0, 1.0, 1.0, 1.0, 1.01], rules=rules)
    assert found.tolerated == 0
    assert found.value > 1.0


@given(NUMBER, st.integers(3, 40), st.sampled_from(NAMES))
def test_equal_values_agree(value, sites, name):
    found = one([value] * sites, list(np.linspace(0.1, 1.0, sites)), EstimatorSettings(name=name))
    sure = sites >= (6 if name == "mean" or "weighted" in name else 7)
    assert (found.value, found.stderr) == (value, 0.0 if sure else None)
    assert (found.lower, found.upper) == ((value, value) if sure else (None, None))


@pytest.mark.parametrize(
    ("values", "sure"),
    [
        ([0.4, 0.4, 0.4], False),
        ([0.4, 0.4, 0.4, 0.9], False),
        ([0.3, 0.4, 0.4, 0.5], False),
        ([0.4] * 5 + [0.9], False),
        ([0.4] * 6 + [0.9], True),  # the one that differs is taken for the liar
        ([0.4] * 7 + [0.9], True),
        ([0.3] + [0.4] * 7 + [0.9], True),
        ([0.4] * 9 + [0.9], True),
        ([0.4] * 4 + [0.5], False),
    ],
)
def test_certainty_is_claimed_only_where_the_sign_test_carries_it(values, sure):
    found = one(values)
    assert found.value == 0.4
    expected = (0.0, 0.4, 0.4) if sure else (None, None, None)
    assert (found.stderr, found.lower, found.upper) == expected


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("sites", [*range(1, 40), 200, 999, 1001, 5000])
def test_the_rank_of_the_sign_test_is_the_largest_that_covers(sites, level):
    rank = sign_test_rank(sites, level)
    coverage = [1.0 - 2.0 * stats.binom.cdf(c - 1, sites, 0.5) for c in (rank, rank + 1)]
    assert sign_test_coverage(sites, rank + 1) == pytest.approx(max(0.0, coverage[1]), abs=1e-3)
    assert rank == 0 or coverage[0] >= level - 1e-3 * (sites > 1000)
    assert coverage[1] < level + 1e-3 * (sites > 1000) or rank == sites // 2


@given(st.lists(NUMBER, min_size=3, max_size=20), st.data())
def test_raising_a_value_never_lowers_the_estimate(values, data):
    # With equal weights; with unequal ones a raised site may be trimmed and take its weight along.
    index = data.draw(st.integers(0, len(values) - 1))
    raised = list(values)
    raised[index] += data.draw(st.floats(0.0, 1e6))
    for name in ("trimmed_mean", "median", "mean"):
        rules = EstimatorSettings(name=name)
        slack = 1e-9 * (1.0 + max(abs(v) for v in raised))
        assert one(raised, rules=rules).value >= one(values, rules=rules).value - slack


def test_with_weights_it_may_fall_where_one_value_passes_another():
    weights = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.01]
    before = one([0.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.01], weights)
    after = one([0.0, 1.0, 2.0, 2.0, 2.0, 3.02, 3.01], weights)
    assert (before.value, before.used) == (pytest.approx(2.0), "trimmed_mean")
    # Of the two at the top the one that weighs is left out now.
    assert after.value == pytest.approx((1.0 + 3 * 2.0 + 0.01 * 3.01) / 4.01)


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=20), st.floats(-100, 100))
def test_shifting_all_values_shifts_the_estimate(values, shift):
    before, after = one(values), one([v + shift for v in values])
    assert after.value == pytest.approx(before.value + shift, abs=1e-9)
    # A shift may round two values that differ by less than an ulp to the same.
    assert after.stderr is None or after.stderr == pytest.approx(before.stderr or 0.0, abs=1e-6)


@given(st.lists(st.tuples(NUMBER, WEIGHT), min_size=1, max_size=15), st.integers(1, 10))
def test_missing_sites_are_as_if_they_were_not_there(sites, missing):
    values, weights = [v for v, _ in sites], [w for _, w in sites]
    for name in NAMES:
        rules = EstimatorSettings(name=name)
        short = one(values, weights, rules)
        long = one([*values, *[np.inf] * missing], [*weights, *[1.0] * missing], rules)
        assert same(short.value, long.value, rel=1e-12, slack=1e-12)
        assert (short.sites, short.trimmed, short.used) == (long.sites, long.trimmed, long.used)


def test_a_row_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(3)
    values, weights = rng.normal(size=(60, 25)), rng.uniform(size=(60, 25))
    values[rng.random(values.shape) < rng.random((60, 1))] = np.inf
    values[::7] = np.round(values[::7])
    table = estimate(values, weights)
    for index in range(60):
        alone = estimate(values[index : index + 1], weights[index : index + 1]).row(0)
        row = table.row(index)
        assert (row.used, row.sites, row.trimmed) == (alone.used, alone.sites, alone.trimmed)
        assert same(row.value, alone.value, rel=1e-12)
        assert same(row.stderr, alone.stderr)


# --- the other estimators ---------------------------------------------------------------------


def test_mean_and_weighted_mean_agree_with_numpy():
    rng = np.random.default_rng(8)
    values, weights = rng.normal(size=20), rng.uniform(0.5, 1.0, size=20)
    plain = one(values, weights, EstimatorSettings(name="mean"))
    assert plain.value == pytest.approx(values.mean())
    assert plain.stderr == pytest.approx(stats.sem(values))
    assert (plain.trimmed, plain.tolerated, plain.used) == (0, 0, "mean")
    weighted = one(values, weights, EstimatorSettings(name="weighted_mean"))
    assert weighted.value == pytest.approx(np.average(values, weights=weights))


def test_mean_of_median_averages_the_nearest():
    rules = EstimatorSettings(name="mean_of_median", max_byzantine=2)
    found = one([1.0, 2.0, 3.0, 4.0, 100.0, 200.0, -50.0], rules=rules)
    # The median is 3; 200 and 100 lie farthest.
    assert found.value == pytest.approx((1 + 2 + 3 + 4 - 50) / 5)
    assert (found.trimmed, found.used) == (2, "mean_of_median")


def test_mean_of_median_splits_an_equal_distance():
    rules = EstimatorSettings(name="mean_of_median", max_byzantine=1)
    assert one([0.0, 4.0, 5.0, 6.0, 10.0], rules=rules).value == pytest.approx(5.0)


# --- confidence --------------------------------------------------------------------------------


def test_confidence_rises_with_sites_and_falls_with_spread():
    rng = np.random.default_rng(4)
    few, many = one(rng.normal(5, 1, size=5)), one(rng.normal(5, 1, size=200))
    loose = one(rng.normal(5, 4, size=200))
    assert 0.0 < few.confidence < many.confidence < 1.0
    assert loose.confidence < many.confidence


def test_confidence_is_the_probability_of_students_t():
    values = np.random.default_rng(6).normal(size=30)
    found = one(values, tolerance=lambda value, _: np.full_like(value, 0.3))
    df = 30 - found.trimmed - 1
    expected = 2.0 * stats.t.cdf(0.3 / found.stderr, df) - 1.0
    assert (found.tolerance, found.confidence) == (0.3, pytest.approx(expected, abs=1e-7))


def test_what_matters_is_half_the_deviation_or_a_tenth_of_the_value():
    near_zero, far_off = one([-1.0, 0.0, 1.0, 2.0]), one([99.0, 100.0, 101.0, 100.5])
    # Of the four the middle half, three, spans 2.
    assert near_zero.tolerance == pytest.approx(0.5 * 2 / (2 * stats.norm.ppf(0.75)))
    assert far_off.tolerance == pytest.approx(0.1 * far_off.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.4] * 3, 0.5),  # one may lie, so two agree
        ([0.4] * 3 + [0.9], 0.75),  # the one that differs is taken for the liar
        ([0.4] * 7, 1 - 2 * 0.5**6),
        ([0.4] * 9 + [0.9], 1 - 2 * 0.5**9),
        ([0.3] + [0.4] * 8 + [0.9], 1 - 2 * 0.5**9),
    ],
)
def test_confidence_of_equal_values_is_that_of_the_sign_test(values, expected):
    assert one(values).confidence == pytest.approx(expected)


@pytest.mark.parametrize("sites", [3, 5, 7, 10, 13, 20, 50])
@pytest.mark.parametrize("shape", ["normal", "heavy", "skewed"])
@pytest.mark.parametrize("name", ["trimmed_mean", "median", "mean"])
def test_confidence_is_calibrated(sites, shape, name):
    rng = np.random.default_rng(sites)
    draws = {
        "normal": lambda size: rng.normal(size=size),
        "heavy": lambda size: rng.standard_t(3, size=size),
        "skewed": lambda size: rng.exponential(size=size),
    }
    rules = EstimatorSettings(name=name)
    # The centre of a skewed distribution is what the estimator gives in the mean.
    centre = estimate(draws[shape]((40_000, sites)), settings=rules).value.mean()
    table = estimate(draws[shape]((6_000, sites)), settings=rules)
    inside = np.abs(table.value - centre) <= table.tolerance
    assert inside.mean() == pytest.approx(table.confidence.mean(), abs=0.19)
    # It claims hardly more than it holds.
    assert inside.mean() > table.confidence.mean() - 0.1


@given(st.integers(3, 12), st.lists(st.integers(-4, 4), min_size=12, max_size=12))
def test_a_rounded_digit_makes_nobody_surer(sites, steps):
    exact = 0.3
    near = [exact + step * np.spacing(exact) for step in steps[:sites]]
    equal, nearly = one([exact] * sites), one(near)
    assert nearly.confidence == equal.confidence
    assert (nearly.stderr is None) == (equal.stderr is None)


@given(st.lists(st.floats(0.39, 0.41), min_size=3, max_size=40), st.sampled_from(NAMES))
def test_few_sites_cannot_know_more_than_few(values, name):
    honest = len(values) - (name not in ("mean", "weighted_mean"))
    found = one(values, rules=EstimatorSettings(name=name))
    assert found.confidence <= 1.0 - 2.0 ** (1 - honest) + 1e-12


@pytest.mark.parametrize("lie", [1e9, -1e9, 0.9])
def test_liars_do_not_widen_what_the_confidence_is_about(lie):
    honest = list(np.random.default_rng(2).normal(0.0, 1.0, size=11))
    alone, pulled = one(honest), one([*honest, lie, lie], rules=EstimatorSettings(name="mean"))
    assert pulled.tolerance < 2.0 * max(alone.tolerance, 0.1 * abs(pulled.value))


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e200, -1e200])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_values_that_are_not_numbers_are_refused(bad, place):
    values = [1.0, 2.0, 3.0, np.inf, 4.0]
    values[place] = bad
    with pytest.raises(ValueError, match="values must be finite"):
        one(values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_bad_weights_are_refused(bad):
    with pytest.raises(ValueError, match="weights must lie"):
        one([1.0, 2.0, 3.0], [1.0, bad, 1.0])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="signals x sites"):
        estimate(np.zeros(3))
    with pytest.raises(ValueError, match="weights have shape"):
        estimate(np.zeros((2, 3)), np.ones((3, 2)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "average"},
        {"trim_alpha": 0.5},
        {"trim_alpha": -0.1},
        {"min_sites": 0},
        {"max_byzantine": -1},
        {"weight_cap": 0.0},
        {"interval_level": 1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("name", "estimator")):
        EstimatorSettings(**wrong)
