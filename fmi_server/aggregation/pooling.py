"""Random-effects pooling of one effect over sites: DerSimonian-Laird, HKSJ, trimmed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.quantiles import t_quantile

__all__ = ["PooledEffect", "pool_random_effects"]

_STDERR_FLOOR = 0.5

# Of the spread of the effects, and of the median error: what lies outside is nothing, or everything.
_NEGLIGIBLE = 1e-70


@dataclass(frozen=True, slots=True)
class PooledEffect:
    """Hold a pooled effect, its HKSJ interval and its heterogeneity.

    Attributes:
        value: pooled effect.
        stderr: HKSJ standard error, at least the one of the declared errors.
        lower: lower end of the t interval.
        upper: upper end of the t interval.
        tau_squared: variance between sites (DerSimonian-Laird), at least 0.
        i_squared: share of the variance that lies between sites, 0..1.
    """

    value: float
    stderr: float
    lower: float
    upper: float
    tau_squared: float
    i_squared: float


def pool_random_effects(
    effects: NDArray[np.float64],
    stderrs: NDArray[np.float64],
    cut: int,
    level: float,
) -> PooledEffect:
    """Pool effects with known standard errors after trimming `cut` sites per tail by count.

    Heterogeneity is DerSimonian and Laird's (Control. Clin. Trials 7, 1986), the interval that of
    Hartung, Knapp, Sidik and Jonkman (Stat. Med. 20, 2001) with Student's t. Both are taken from
    the winsorised effects of all n sites, because the trimmed ones alone would look more alike
    than they are; the standard error is multiplied by n / h and the interval has h - 1 degrees
    of freedom for h survivors, which for equal standard errors is the Tukey-McLaughlin interval.
    With `cut` 0 it is the DL-HKSJ estimate. The value is the weighted mean of the
    survivors, so it lies in the range of the honest effects while at most `cut` sites lie. Sites
    tied at an edge survive in equal parts.

    The standard error is never below the one that the declared errors and the heterogeneity alone
    give, as Roever, Knapp and Friede (BMC Med. Res. Methodol. 15, 2015) advise for few sites: effects
    that agree by chance claim no certainty.

    A declared standard error below half the median of all is raised to that, so that nobody buys
    the consensus with a claim of precision. All sums are taken in units of the median standard error
    (but at least 1e-70 of the spread of the effects), so that no number is too large or too small.

    Args:
        effects: one per site, finite, up to 1e150.
        stderrs: same length, positive.
        cut: sites left out per tail; at least two must survive.
        level: coverage of the interval.

    Raises:
        ValueError: fewer than two survivors, or a standard error that is not positive.
    """
    sites = len(effects)
    kept = sites - 2 * cut
    if kept < 2:
        raise ValueError(f"{sites} sites with {cut} trimmed per tail leave fewer than two")
    if not (np.isfinite(stderrs).all() and (stderrs > 0.0).all() and np.isfinite(effects).all()):
        raise ValueError("effects must be finite and standard errors positive")
    ordered = np.sort(effects)
    low, high = ordered[cut], ordered[sites - cut - 1]
    unit = max(float(np.median(stderrs)), float(high - low) * _NEGLIGIBLE)
    with np.errstate(over="ignore"):
        errors = np.clip(stderrs / unit, _STDERR_FLOOR, 1.0 / _NEGLIGIBLE)
    variance = errors * errors
    moved = (np.clip(effects, low, high) - low) / unit
    precision = 1.0 / variance
    total = precision.sum()
    fixed = float(precision @ moved / total)
    cochran = float(precision @ (moved - fixed) ** 2)
    spread = float(precision @ (total - precision)) / total
    tau_squared = max(0.0, float((cochran - (sites - 1)) / spread))
    weights = 1.0 / (variance + tau_squared)
    part = _survival(effects, low, high, cut)
    value = float(low) + float((part * weights) @ moved / (part @ weights)) * unit
    centre = float(weights @ moved / weights.sum())
    hksj = float(weights @ (moved - centre) ** 2 / ((sites - 1) * weights.sum()))
    stderr = math.sqrt(max(hksj, 1.0 / float(weights.sum()))) * unit * sites / kept
    margin = t_quantile(kept - 1, level) * stderr
    value = min(max(value, float(low)), float(high))
    return PooledEffect(
        value=value,
        stderr=stderr,
        lower=value - margin,
        upper=value + margin,
        tau_squared=tau_squared * unit * unit,
        i_squared=max(0.0, (cochran - (sites - 1)) / cochran) if cochran > 0.0 else 0.0,
    )


def _survival(
    effects: NDArray[np.float64], low: np.float64, high: np.float64, cut: int
) -> NDArray[np.float64]:
    at_low, at_high = effects == low, effects == high
    if low == high:
        return np.where(at_low, (len(effects) - 2 * cut) / at_low.sum(), 0.0)
    inside = ((effects > low) & (effects < high)).astype(np.float64)
    low_left = at_low.sum() - (cut - (effects < low).sum())
    high_left = at_high.sum() - (cut - (effects > high).sum())
    edges = np.where(at_low, low_left / at_low.sum(), 0.0)
    edges += np.where(at_high, high_left / at_high.sum(), 0.0)
    part: NDArray[np.float64] = np.add(inside, edges)
    return part
