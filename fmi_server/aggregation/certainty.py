"""How sure an estimate is: its interval, and its confidence.

Both come from Student's t, as long as the values that the estimate rests on differ, with a ceiling that
assumes no distribution: of `n` sites, `f` of them liars, the values of rank c and n - c + 1 enclose the
median of the population with probability `1 - 2 P(Binomial(n - f, 1/2) < c)` (the sign test), because
however the liars place themselves, the honest value of rank c lies at the value of rank c or above. With
c = 1 that is the most that so few sites can know. Where the values are all equal, normal theory would
claim certainty; there the sign test speaks alone.

Chance is all that this is about. Liars that `tolerated` allows for cannot move a value out of the honest
range, but they can move it within, and no confidence knows of that.
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

__all__ = [
    "Tolerance",
    "assess",
    "natural_tolerance",
    "robust_deviation",
    "sign_test_coverage",
    "sign_test_rank",
]

Tolerance: TypeAlias = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""Of values and the deviations between their sites: the differences that matter, not negative."""

SHARE_OF_DEVIATION = 0.5
"""A difference of half the standard deviation between the sites never matters, unless declared."""

SHARE_OF_MAGNITUDE = 0.1
"""Nor does a tenth of what the signal measures."""

_EXACT_BINOMIAL_SITES = 1000

_HALF_TO_SIGMA = 0.7413011092528009
"""Of a normal distribution: standard deviation by the width of its middle half."""

_ROUNDING = 1e-12
"""Values that differ by less than this share of themselves, or of the difference that matters, differ by
the rounding of their sources. (A logarithm near 0 is no smaller for being near 0.)"""


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
    lies within the tolerance of the centre that the sites vary about. It is at most
    `1 - 2^(1 - honest sites)`. A single site has none. Rows without spread keep their standard error
    only where the sign-test interval has no width either (from 7 sites on at level 0.95 with one
    liar), those that differ being taken for the liars; their confidence is the sign test's.

    Args:
        table: estimates; its interval, tolerance and confidence are written, its `stderr` corrected.
        ordered: signals x sites, each row sorted, `+inf` where missing.
        deviation: per row, the standard deviation that the standard error was taken from.
        liars: lying sites that each row withstands.
        level: coverage of the interval.
        tolerance: the difference that matters, of values and robust deviations between the sites.
    """
    valued = np.isfinite(table.value)
    df = table.degrees_of_freedom()
    usable = np.isfinite(table.stderr) & (df >= 1)
    df = np.where(usable, df, 1)
    known, inverse = np.unique(df, return_inverse=True)
    factor = np.array([t_quantile(int(n), level) for n in known])[inverse]
    margin = np.where(usable, factor * table.stderr, np.nan)
    table.lower[:] = table.value - margin
    table.upper[:] = table.value + margin
    matters = tolerance(table.value, robust_deviation(ordered, table.sites))
    table.tolerance[:] = np.where(valued, matters, np.nan)
    rounding = _ROUNDING * np.fmax(np.abs(table.value), table.tolerance)
    equal = usable & (deviation <= rounding)
    spread = np.flatnonzero(usable & ~equal)
    with np.errstate(divide="ignore", over="ignore"):
        distance = table.tolerance[spread] / table.stderr[spread]
    honest = table.sites - liars
    counts, inverse = np.unique(honest[spread], return_inverse=True)
    ceiling = np.array([sign_test_coverage(int(n), 1) for n in counts])[inverse]
    central = t_central_probability(distance, df[spread])
    table.confidence[spread] = np.minimum(central, ceiling)
    for row in np.flatnonzero(equal):
        slack = float(rounding[row]) * math.sqrt(table.sites[row])
        _assess_equal(table, int(row), ordered[row], int(honest[row]), level, slack)


def _assess_equal(
    table: EstimateTable,
    row: int,
    ordered: NDArray[np.float64],
    honest: int,
    level: float,
    slack: float,
) -> None:
    """Let the sign test speak for a row in which the values that count are all equal."""
    sites, value = int(table.sites[row]), float(table.value[row])
    below = int(np.searchsorted(ordered[:sites], value - slack))
    above = sites - int(np.searchsorted(ordered[:sites], value + slack, side="right"))
    differ = max(0, max(below, above) - (sites - honest))
    table.confidence[row] = sign_test_coverage(honest, differ + 1)
    if differ >= sign_test_rank(honest, level):
        table.stderr[row] = table.lower[row] = table.upper[row] = np.nan


def robust_deviation(ordered: NDArray[np.float64], sites: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the standard deviation between the sites, by the width of the middle half of each row.

    Fewer than a quarter of the sites cannot make it large, nor can one of three or four. Where the
    middle is between two places, the narrower counts. Rows with fewer than two values have 0.

    Args:
        ordered: signals x sites, each row sorted, `+inf` where missing.
        sites: values per row.
    """
    widths = np.zeros(len(sites))
    rows = np.flatnonzero(sites > 1)
    spare = (sites[rows] - 1) // 2
    half = sites[rows] - spare
    places = [
        ordered[rows, left + half - 1] - ordered[rows, left]
        for left in (spare // 2, -(-spare // 2))
    ]
    widths[rows] = np.minimum(*places)
    return _HALF_TO_SIGMA * widths


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
