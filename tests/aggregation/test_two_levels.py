"""What regions under a parent lose against one flat cohort; docs/aggregation.md has the figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.aggregation import CohortMatrix, EstimatorSettings, estimate

COHORTS = 4_000


def flat_and_two_levels(sites):
    """Both estimates of cohorts x regions x sites."""
    cohorts, regions, members = sites.shape
    flat = estimate(sites.reshape(cohorts, regions * members)).value
    below = estimate(sites.reshape(cohorts * regions, members)).value
    return flat, estimate(below.reshape(cohorts, regions)).value


def rms(errors):
    return float(np.sqrt(np.mean(errors**2)))


@pytest.mark.parametrize("between", [0.0, 1.0])
@pytest.mark.parametrize(
    ("regions", "members", "most"),
    [(3, 5, 1.25), (3, 20, 1.25), (5, 10, 1.12), (10, 10, 1.06), (20, 20, 1.06)],
)
def test_what_two_levels_lose_in_precision(regions, members, between, most):
    rng = np.random.default_rng(regions * members)
    sites = rng.normal(size=(COHORTS, regions, members))
    sites += between * rng.normal(size=(COHORTS, regions, 1))
    flat, two = flat_and_two_levels(sites)
    assert 0.98 < rms(two) / rms(flat) < most
    # They answer the same question: what they differ by is less than either's own error.
    assert rms(two - flat) < rms(flat)


@pytest.mark.parametrize(
    ("sizes", "alike", "unlike"),
    [
        ((4, 8, 12, 16, 20, 24, 28, 32), 1.10, 0.97),
        ((5, 10, 20, 40, 80), 1.36, 0.83),
        ((5, 5, 5, 5, 5, 5, 5, 5, 5, 100), 1.68, 0.47),
    ],
)
def test_what_two_levels_lose_and_gain_where_regions_differ_in_size(sizes, alike, unlike):
    for between, expected in ((0.0, alike), (1.0, unlike)):
        rng = np.random.default_rng(sum(sizes))
        regions = [
            rng.normal(size=(COHORTS, members)) + between * rng.normal(size=(COHORTS, 1))
            for members in sizes
        ]
        flat = estimate(np.concatenate(regions, axis=1)).value
        parent = CohortMatrix(max_signals=COHORTS, max_new_per_site=COHORTS)
        for number, region in enumerate(regions):
            below = estimate(region)
            # As a server sends them up: each value with its confidence, and the mean of effective sites.
            parent.put(
                f"region-{number}",
                {"metrics": named(below.value)},
                now=0.0,
                signal_confidence=named(below.confidence),
                size=float(below.effective_sites.mean()),
            )
        two = parent.release(EstimatorSettings(), None, 0.0).table.value
        assert rms(two) / rms(flat) == pytest.approx(expected, rel=0.05)


def named(values):
    return {f"x{number}": value for number, value in enumerate(values.tolist())}


HONEST = st.lists(st.floats(-10, 10), min_size=5, max_size=5)
ANYTHING = st.lists(st.floats(-1e150, 1e150), min_size=5, max_size=5)


@given(st.lists(HONEST, min_size=2, max_size=6), ANYTHING)
def test_a_region_of_liars_is_one_liar(honest, liars):
    below = [estimate(np.array([region])).value[0] for region in (*honest, liars)]
    above = estimate(np.array([below])).row(0)
    regions = below[:-1]
    assert min(regions) <= above.value <= max(regions)


@given(
    st.lists(HONEST, min_size=3, max_size=6),
    st.lists(st.floats(-1e150, 1e150), min_size=3, max_size=6),
)
def test_a_liar_in_each_region_is_withstood_below(honest, lies):
    regions = [[*sites, lie] for sites, lie in zip(honest, lies, strict=False)]
    below = [estimate(np.array([region])).value[0] for region in regions]
    found = estimate(np.array([below]), settings=EstimatorSettings()).row(0)
    told = [value for sites in honest[: len(regions)] for value in sites]
    assert min(told) <= found.value <= max(told)
