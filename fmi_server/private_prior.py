"""The prior of a private cohort: noisy means of its signals, and nothing that is not made of them.

What a private cohort tells is computed from one draw of noise on one set of sums (`privacy.noisy_means`).
Counts, lineage, regimes, profile classes, reputations, hints and causes would each be another release of its
own; they are not told.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation import UnitCells
from fmi_server.privacy.budget import BudgetPlan
from fmi_server.privacy.discrete_gaussian import Entropy
from fmi_server.privacy.noisy_means import PRIVATE_ESTIMATORS

__all__ = ["PrivateEstimate", "private_prior"]

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class PrivateEstimate:
    """What is told of one signal.

    Attributes:
        section: the signal's.
        value: in the signal's own unit; None where its noisy weight is too small to say.
        stderr: standard error, of the noise and of the choice of the sites; an upper bound of the latter.
        lower: lower end of the 95 % interval.
        upper: upper end.
        weight: noisy sum of the weights behind it, in sites; at least 0.
        tolerance: the difference that the confidence is about.
        confidence: the probability that the value lies within the tolerance of the centre of the sites.
        reason: why there is no value; empty where there is one.
    """

    section: str
    value: float | None
    stderr: float | None
    lower: float | None
    upper: float | None
    weight: float
    tolerance: float | None
    confidence: float
    reason: str


def private_prior(
    cells: UnitCells,
    plan: BudgetPlan,
    *,
    estimator: str,
    min_sites: int,
    level: float = 0.95,
    entropy: Entropy = os.urandom,
) -> dict[str, PrivateEstimate]:
    """Draw noise and say what may be said. Each call is a release: it costs what the plan says.

    Args:
        cells: what the sites sent.
        plan: the budget and its mechanism, for as many signals as `cells` has.
        estimator: one of `PRIVATE_ESTIMATORS`. The weighted one counts each value by its declared
            confidence, without regard to what others declare.
        min_sites: weight below which a signal has no value.
        level: coverage of the intervals.
        entropy: of the noise.

    Raises:
        ValueError: The estimator is not private, or the signals are not those of the plan.
    """
    if estimator not in PRIVATE_ESTIMATORS:
        raise ValueError(
            f"{estimator!r} is not private; these are: {', '.join(PRIVATE_ESTIMATORS)}"
        )
    sums = plan.sums
    weights = cells.confidence if estimator == "weighted_mean" else np.ones(cells.values.shape[1])
    noisy = sums.noisy(sums.sums(cells.values, weights), entropy)
    least = plan.least_weight(min_sites)
    means = sums.means(noisy, least, _NORMAL.inv_cdf(0.5 + level / 2.0))
    rows, scale = cells.rows, cells.transforms
    value, slope = scale.from_unit(rows, means.value), scale.unit_slope(rows, means.value)
    lower, upper = scale.from_unit(rows, means.lower), scale.from_unit(rows, means.upper)
    matters = scale.unit_difference(rows, means.value)
    return {
        name: PrivateEstimate(
            section=cells.sections[i],
            value=_or_none(value[i]),
            stderr=_or_none(means.stderr[i] * slope[i]),
            lower=_or_none(lower[i]),
            upper=_or_none(upper[i]),
            weight=max(0.0, float(means.weight[i])),
            tolerance=_or_none(matters[i] * slope[i]),
            confidence=_within(matters[i], means.stderr[i]),
            reason=(
                f"the noisy weight is below {least:.3g} sites: fewer are needed where there is less noise"
                if np.isnan(value[i])
                else ""
            ),
        )
        for i, name in enumerate(cells.names)
    }


def _within(tolerance: float, stderr: float) -> float:
    return 0.0 if math.isnan(stderr) else math.erf(tolerance / stderr / math.sqrt(2.0))


def _or_none(value: np.float64 | NDArray[np.float64]) -> float | None:
    return None if np.isnan(value) else float(value)
