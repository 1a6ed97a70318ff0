"""What regions under a parent lose against one flat cohort; docs/aggregation.md has the figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.aggregation import EstimatorSettings, estimate

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
