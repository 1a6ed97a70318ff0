"""How sure an estimate is: its interval, and its confidence.

Both come from Student's t, as long as the values that the estimate rests on differ. Where they are all
equal, normal theory would claim certainty; there the sign test decides, which assumes no distribution:
of `n` sites, `f` of them liars, the values of rank c and n - c + 1 enclose the median of the population
with probability `1 - 2 P(Binomial(n - f, 1/2) < c)`, because however the liars place themselves, the
honest value of rank c lies at the value of rank c or above.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.estimates import EstimateTable
from fmi_server.aggregation.quantiles import (
    normal_quantile,
    t_central_probability,
    t_quantile,
)

__all__ = ["Tolerance", "assess", "natural_tolerance", "sign_test_coverage", "sign_test_rank"]

Tolerance: TypeAlias = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""Of values and the deviations between their sites: the differences that matter, positive."""

SHARE_OF_DEVIATION = 0.5
"""A difference of half the standard deviation between the sites never matters, unless declared."""

SHARE_OF_MAGNITUDE = 0.1
"""Nor does a tenth of what the signal measures."""

_EXACT_BINOMIAL_SITES = 1000


def natural_tolerance(
    value: NDArray[np.float64], deviation: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the difference that matters where none is declared and no bounds say more."""
    natural: NDArray[np.float64] = np.fmax(
        SHARE_OF_DEVIATION * deviation, SHARE_OF_MAGNITUDE * np.abs(value)
    )
    return natural


def assess(
    table: EstimateTable,
    ordered: NDArray[np.float64],
    deviation: NDArray[np.float64],
    liars: NDArray[np.int64],
    level: float,
    tolerance: Tolerance,
) -> None:
    """Fill in interval, tolerance and confidence of a table that has values and standard errors.

    The confidence is `P(|T| <= tolerance / stderr)` with Student's t: the probability that the value
    lies within the tolerance of the centre that the sites vary about. A single site has none. Rows
    whose standard error comes out as 0 keep it only where the sign-test interval has no width either
    (from 7 sites on at level 0.95 with one liar); their confidence is the sign test's, with those that
    differ taken for the liars.

    Args:
        table: estimates; its interval, tolerance and confidence are written, its `stderr` corrected.
        ordered: signals x sites, each row sorted, `+inf` where missing.
        deviation: per row, the robust standard deviation between the sites.
        liars: lying sites that each row withstands.
        level: coverage of the interval.
        tolerance: the difference that matters.
    """
    df = table.degrees_of_freedom()
    usable = np.isfinite(table.stderr) & (df >= 1)
    df = np.where(usable, df, 1)
    known, inverse = np.unique(df, return_inverse=True)
    factor = np.array([t_quantile(int(n), level) for n in known])[inverse]
    margin = np.where(usable, factor * table.stderr, np.nan)
    table.lower[:] = table.value - margin
    table.upper[:] = table.value + margin
    table.tolerance[:] = tolerance(table.value, deviation)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        distance = np.where(usable, table.tolerance / table.stderr, 0.0)
    spread = usable & (table.stderr > 0.0)
    table.confidence[spread] = t_central_probability(distance[spread], df[spread])
    equal = np.flatnonzero(usable & (table.stderr == 0.0))
    if equal.size:
        _assess_equal(table, equal, ordered, liars[equal], level)


def _assess_equal(
    table: EstimateTable,
    rows: NDArray[np.int64],
    ordered: NDArray[np.float64],
    liars: NDArray[np.int64],
    level: float,
) -> None:
    """Let the sign test speak for rows in which the values that count are all equal."""
    sites, value = table.sites[rows], table.value[rows]
    honest = sites - liars
    outside = np.maximum(
        (ordered[rows] < value[:, None]).sum(axis=1),
        sites - (ordered[rows] <= value[:, None]).sum(axis=1),
    )
    for row, n, left_out in zip(rows, honest.tolist(), outside.tolist(), strict=True):
        differ = max(0, left_out - (int(table.sites[row]) - n))
        table.confidence[row] = sign_test_coverage(n, differ + 1)
        if left_out >= sign_test_rank(n, level):
            table.stderr[row] = table.lower[row] = table.upper[row] = np.nan


@lru_cache(maxsize=65_536)
def sign_test_rank(sites: int, level: float) -> int:
    """Return the largest c for which [x[c], x[n-c+1]] covers the median at `level`; 0 without any."""
    limit = (1.0 - level) / 2.0
    if sites > _EXACT_BINOMIAL_SITES:
        return int((sites + 1) / 2 + normal_quantile(limit) * math.sqrt(sites) / 2.0)
    rank, tail = 0, 0.0
    while rank < sites // 2:
        tail += math.comb(sites, rank) / (1 << sites)
        if tail > limit:
            break
        rank += 1
    return rank


@lru_cache(maxsize=65_536)
def sign_test_coverage(sites: int, rank: int) -> float:
    """Return the probability with which [x[rank], x[n-rank+1]] covers the median; at least 0."""
    if sites < 1 or 2 * rank > sites + 1:
        return 0.0
    if sites > _EXACT_BINOMIAL_SITES:
        z = (sites + 1 - 2 * rank) / math.sqrt(sites)
        return math.erf(z / math.sqrt(2.0))
    below: int = sum(math.comb(sites, i) for i in range(rank))
    return max(0.0, 1.0 - 2.0 * below / (1 << sites))
