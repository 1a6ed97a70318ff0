"""Robust location estimates for many signals at once.

All estimators work on a signals x sites matrix in which a missing value is `+inf`: sorting a
row then puts its values first and no mask is needed (sorting NaN indirectly is five times
slower). One call answers every row.

The guarantee ROBUST holds for `trimmed_mean` and `median`: while at most `tolerated` sites of a
row lie, about values, weights or both, the value stays inside the range of the honest values.
`mean`, `weighted_mean` and `mean_of_median` are there for those who ask and tolerate no liar in
that strict sense.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.certainty import Tolerance, assess, natural_tolerance
from fmi_server.aggregation.estimates import EstimateTable
from fmi_server.aggregation.order_free import order_free_sums
from fmi_server.aggregation.quantiles import normal_quantile
from fmi_server.aggregation.selection import Window, select_nearest_median, select_window
from fmi_server.aggregation.shares import capped_shares

__all__ = [
    "BELOW_QUORUM",
    "MAX_MAGNITUDE",
    "EstimatorName",
    "EstimatorSettings",
    "estimate",
    "trim_count",
]

EstimatorName = Literal["trimmed_mean", "weighted_mean", "mean", "median", "mean_of_median"]

BELOW_QUORUM = "below_quorum"
"""Reason of a row without a value: fewer sites than `min_sites`."""

MAX_MAGNITUDE = 1e150
"""Largest absolute value an estimator takes; the square of a larger one overflows."""

_MEDIAN_EFFICIENCY = 2.0 / math.pi
_EXACT_BINOMIAL_SITES = 1000
# Its square is still a normal number.
_TINY_WEIGHT = 1e-140


@dataclass(frozen=True, slots=True)
class EstimatorSettings:
    """Hold the rules of one estimate.

    Attributes:
        name: the estimator asked for.
        trim_alpha: share of the sites trimmed per tail, in [0, 0.5).
        min_sites: fewer sites give no value.
        max_byzantine: lying sites to withstand per signal; None means 1 from 3 sites on, else 0.
        weight_cap: largest share of one site in (0, 1]; never below 1 / survivors.
        interval_level: coverage of the two-sided interval, in (0, 1).
    """

    name: EstimatorName = "trimmed_mean"
    trim_alpha: float = 0.1
    min_sites: int = 3
    max_byzantine: int | None = None
    weight_cap: float = 0.25
    interval_level: float = 0.95

    def __post_init__(self) -> None:
        if self.name not in get_args(EstimatorName):
            raise ValueError(f"unknown estimator {self.name!r}; known: {get_args(EstimatorName)}")
        if not 0.0 <= self.trim_alpha < 0.5:
            raise ValueError(f"trim_alpha must lie in [0, 0.5), got {self.trim_alpha}")
        if self.min_sites < 1:
            raise ValueError(f"min_sites must be at least 1, got {self.min_sites}")
        if self.max_byzantine is not None and self.max_byzantine < 0:
            raise ValueError(f"max_byzantine must not be negative, got {self.max_byzantine}")
        if not 0.0 < self.weight_cap <= 1.0:
            raise ValueError(f"weight_cap must lie in (0, 1], got {self.weight_cap}")
        if not 0.0 < self.interval_level < 1.0:
            raise ValueError(f"interval_level must lie in (0, 1), got {self.interval_level}")


def trim_count(sites: NDArray[np.int64], settings: EstimatorSettings) -> NDArray[np.int64]:
    """Return how many values are trimmed per tail: max(ceil(alpha * n - 1e-9), max_byzantine).

    The usual `int(alpha * n)` trims nothing below 10 sites at alpha 0.1; this one always
    protects from 3 sites on.
    """
    by_share: NDArray[np.int64] = np.ceil(settings.trim_alpha * sites - 1e-9).astype(np.int64)
    cut: NDArray[np.int64] = np.maximum(by_share, _liars(sites, settings))
    return cut


def _liars(sites: NDArray[np.int64], settings: EstimatorSettings) -> NDArray[np.int64]:
    """Return how many lying sites are reckoned with."""
    if settings.max_byzantine is not None:
        return np.full_like(sites, settings.max_byzantine)
    one: NDArray[np.int64] = (sites >= 3).astype(np.int64)
    return one


def estimate(
    values: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    settings: EstimatorSettings | None = None,
    tolerance: Tolerance = natural_tolerance,
) -> EstimateTable:
    """Estimate the location of every row.

    `trimmed_mean`: the k largest and k smallest values are left out *by count*, so that weights
    never decide who is trimmed; sites tied at the edge survive in equal parts, so that the order
    of the sites does not matter. The survivors are averaged with capped shares (`shares.py`).
    With `n <= 2k + 1` at most the middle is left and the median is used.

    Standard error (Tukey and McLaughlin, Sankhya A 25, 1963), for shares p of h = n - 2k
    survivors: `s_w * sqrt(n / h * sum(p^2))`, where s_w^2 is the winsorised sum of squares over
    n - 1. With equal shares it is the usual `s_w * sqrt(n) / h`. It assumes independent sites
    of equal variance and weights that do not depend on the values. The interval is Student's
    with h - 1 degrees of freedom. The median has the order-statistic standard error
    `(x[n-c+1] - x[c]) / (2 z)`, c = (n+1)/2 - sqrt(n), z exact from the binomial (Price and
    Bonett, J. Stat. Comput. Simul. 68, 2001), with n - 1 degrees of freedom.
    `mean_of_median` (Xie et al., 2018) averages the n - k values nearest to the median and is
    winsorised at their ends.

    Interval and confidence are told in `certainty.py`.

    Args:
        values: signals x sites, finite up to `MAX_MAGNITUDE`; `+inf` where a site sent nothing.
        weights: same shape, or one weight per site, finite and not negative (whatever stands at
            a missing value is ignored); None counts all sites alike.
        settings: rules; None for the defaults.
        tolerance: the difference that matters, which the confidence is about.

    Raises:
        ValueError: NaN, `-inf` or too large values, bad weights, shapes that do not fit.
    """
    settings = settings or EstimatorSettings()
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"values must be signals x sites, got shape {values.shape}")
    if settings.name in ("mean", "median"):
        weights = None
    weights = None if weights is None else _checked_weights(values, weights)
    ordered = np.sort(values, axis=1)
    sites = _checked_sites(ordered)
    trusting = settings.name in ("mean", "weighted_mean")
    cut = np.zeros_like(sites) if trusting else trim_count(sites, settings)
    table = EstimateTable.empty(sites)
    deviation = np.full(len(sites), np.nan)
    quorum = sites >= settings.min_sites
    table.reason[~quorum] = BELOW_QUORUM
    by_median = quorum & ((settings.name == "median") | ((sites <= 2 * cut + 1) & (cut > 0)))
    by_mean = quorum & ~by_median
    if by_mean.any():
        rows = np.flatnonzero(by_mean)
        select = select_nearest_median if settings.name == "mean_of_median" else select_window
        if len(rows) == len(sites):
            # The usual case: nothing is copied.
            window = select(values, weights, ordered, sites, cut)
        else:
            row_weights = None if weights is None else weights[rows]
            window = select(values[rows], row_weights, ordered[rows], sites[rows], cut[rows])
        deviation[rows] = _fill_mean(table, rows, window, settings)
    if by_median.any():
        rows = np.flatnonzero(by_median)
        deviation[rows] = _fill_median(table, rows, ordered[rows], sites[rows])
    liars = np.zeros_like(sites) if trusting else _liars(sites, settings)
    assess(table, ordered, deviation, liars, settings.interval_level, tolerance)
    return table


def _checked_weights(
    values: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape not in (values.shape, values.shape[1:]):
        raise ValueError(f"weights have shape {weights.shape}, values {values.shape}")
    least, most = weights.min(initial=0.0), weights.max(initial=0.0)
    if not (least >= 0.0 and most <= MAX_MAGNITUDE):
        raise ValueError(f"weights must lie in 0..{MAX_MAGNITUDE:g}")
    return np.broadcast_to(weights, values.shape)


def _checked_sites(ordered: NDArray[np.float64]) -> NDArray[np.int64]:
    if not ordered.size:
        return np.zeros(len(ordered), dtype=np.int64)
    # NaN sorts behind +inf, so the ends of the sorted rows show everything that is wrong.
    if np.isnan(ordered[:, -1]).any() or (ordered[:, 0] < -MAX_MAGNITUDE).any():
        raise ValueError(f"values must be finite up to {MAX_MAGNITUDE:g}, or +inf for missing")
    sites: NDArray[np.int64] = np.count_nonzero(ordered < np.inf, axis=1).astype(np.int64)
    largest = ordered[np.arange(len(ordered)), np.maximum(sites - 1, 0)]
    if ((largest > MAX_MAGNITUDE) & (sites > 0)).any():
        raise ValueError(f"values must be finite up to {MAX_MAGNITUDE:g}, or +inf for missing")
    return sites


def _fill_mean(
    table: EstimateTable,
    rows: NDArray[np.int64],
    window: Window,
    settings: EstimatorSettings,
) -> NDArray[np.float64]:
    sites, kept = window.sites, window.kept
    table.used[rows] = settings.name
    if settings.name == "trimmed_mean":
        table.tolerated[rows] = (sites - kept) // 2
    total, weighted, squares = window.total, window.weighted, window.squares
    value, square_share = window.mean, 1.0 / kept
    if weighted is not None and total is not None and squares is not None:
        plain = np.where(total > _TINY_WEIGHT, total, 1.0)
        value, square_share = window.low + weighted / plain, squares / (plain * plain)
        limit = np.maximum(settings.weight_cap, 1.0 / kept)
        # Exact shares cost several passes: only rows with a tie at the edge, with a dominant
        # site or without weight need them.
        hard = window.tied | (window.peak > limit * total) | (total <= _TINY_WEIGHT)
        # Of one weight is of none, to the last digit: whether others weigh alike decides nothing here.
        value = np.where(window.even, window.mean, value)
        square_share = np.where(window.even, 1.0 / kept, square_share)
        hard &= ~window.even
        index = np.flatnonzero(hard)
        if index.size:
            values, row_weights, part = window.survivors(index)
            shares = part * capped_shares(row_weights, part, settings.weight_cap)
            low, high = window.low[index], window.high[index]
            above = np.where(part > 0.0, shares * (values - low[:, None]), 0.0)
            value[index] = low + order_free_sums(above, 2.0 * (high - low))
            unit = np.divide(shares, part, out=np.zeros_like(shares), where=part > 0.0)
            square_share[index] = order_free_sums(shares * unit, np.full(index.size, 2.0))
    # Rounding may leave the range of the survivors by an ulp; the guarantee may not.
    table.value[rows] = np.clip(value, window.low, window.high)
    with np.errstate(divide="ignore", invalid="ignore"):
        deviation = np.sqrt(window.winsorised_squares / (sites - 1))
        stderr = deviation * np.sqrt(sites / kept * square_share)
    table.stderr[rows] = np.where(kept > 1, stderr, np.nan)
    table.effective_sites[rows] = 1.0 / square_share
    table.trimmed[rows] = sites - kept
    return deviation


def _fill_median(
    table: EstimateTable,
    rows: NDArray[np.int64],
    ordered: NDArray[np.float64],
    sites: NDArray[np.int64],
) -> NDArray[np.float64]:
    line = np.arange(len(rows))
    low, high = ordered[line, (sites - 1) // 2], ordered[line, sites // 2]
    table.value[rows] = np.clip(low + (high - low) / 2.0, low, high)
    known, inverse = np.unique(sites, return_inverse=True)
    ranks = np.array([_median_ranks(int(n))[0] for n in known])[inverse]
    widths = np.array([_median_ranks(int(n))[1] for n in known])[inverse]
    spread = ordered[line, sites - ranks] - ordered[line, ranks - 1]
    table.stderr[rows] = spread / widths
    table.effective_sites[rows] = np.where(sites > 1, sites * _MEDIAN_EFFICIENCY, 1.0)
    table.trimmed[rows] = sites - np.where(sites % 2 == 1, 1, 2)
    table.tolerated[rows] = (sites - 1) // 2
    table.used[rows] = "median"
    deviation: NDArray[np.float64] = table.stderr[rows] * np.sqrt(sites * _MEDIAN_EFFICIENCY)
    return deviation


@lru_cache(maxsize=65_536)
def _median_ranks(sites: int) -> tuple[int, float]:
    """Return the rank c and the width 2 z of Price and Bonett's interval for the median."""
    rank = max(1, round((sites + 1) / 2 - math.sqrt(sites)))
    if sites == 1:
        return 1, math.nan
    if sites <= _EXACT_BINOMIAL_SITES:
        tail = sum(math.comb(sites, i) for i in range(rank)) / 2**sites
        return rank, 2.0 * -normal_quantile(tail)
    return rank, 2.0 * (sites + 1 - 2 * rank) / math.sqrt(sites)
