"""Reputation: the server's own record of how far a site stands from the others.

It supplements trimming and never replaces it. Sites that collude inside the honest range are not
caught, and nothing here claims that they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "START_REPUTATION",
    "ReputationBook",
    "TrustSettings",
    "leave_one_out_z",
    "site_scores",
]

START_REPUTATION = 0.5
"""Reputation of a site nobody has judged yet."""

_MAD_TO_SIGMA = 1.4826022185056018


@dataclass(frozen=True, slots=True)
class TrustSettings:
    """Hold the rules of reputation.

    Attributes:
        up: step towards a better score, in (0, 1].
        down: step towards a worse score.
        start: reputation of a new site.
        floor: smallest reputation, above 0, so that a site can come back.
        tolerance_z: distances up to this z cost nothing.
        min_sites: signals with fewer sites are not judged; the others are then too few to say.
        relative_floor: smallest spread, as a share of the leave-one-out median. It keeps a site
            from being condemned for a last digit where all others agree.
    """

    up: float = 0.1
    down: float = 0.3
    start: float = START_REPUTATION
    floor: float = 0.01
    tolerance_z: float = 2.5
    min_sites: int = 5
    relative_floor: float = 0.01

    def __post_init__(self) -> None:
        for name in ("up", "down", "start", "floor"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if not self.tolerance_z > 0.0:
            raise ValueError(f"tolerance_z must be positive, got {self.tolerance_z}")
        if self.min_sites < 3:
            raise ValueError(f"min_sites must be at least 3, got {self.min_sites}")
        if not self.relative_floor >= 0.0:
            raise ValueError(f"relative_floor must not be negative, got {self.relative_floor}")


def leave_one_out_z(
    values: NDArray[np.float64], settings: TrustSettings | None = None
) -> NDArray[np.float64]:
    """Return each value's distance from the median of the *others*, in robust sigmas.

    `z = |x - med| / max(1.4826 * MAD, relative_floor * |med|)`, with median and MAD of the other
    sites. The leave-one-out median of a row takes at most three values, so three sorts answer
    all sites of a row exactly. A spread of zero gives 0 where the value agrees and
    `inf` where it does not.

    Args:
        values: signals x sites, `+inf` where missing, on the scale they are averaged on.
        settings: rules; None for the defaults.

    Returns:
        Same shape; NaN where missing or where a signal has fewer than `min_sites` sites.
    """
    settings = settings or TrustSettings()
    result = np.full(values.shape, np.nan)
    sites = np.count_nonzero(values < np.inf, axis=1)
    rows = np.flatnonzero(sites >= settings.min_sites)
    if not rows.size:
        return result
    values, sites = values[rows], sites[rows]
    ordered = np.sort(values, axis=1)
    others = _median_of_others(values, ordered, sites)
    mad = np.full(values.shape, np.nan)
    for candidate in _possible_medians(ordered, sites):
        distance = np.abs(values - candidate[:, None])
        spread = _median_of_others(distance, np.sort(distance, axis=1), sites)
        mad = np.where(others == candidate[:, None], spread, mad)
    gap = np.abs(values - others)
    sigma = np.maximum(_MAD_TO_SIGMA * mad, settings.relative_floor * np.abs(others))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        z = np.where(gap == 0.0, 0.0, gap / sigma)
    result[rows] = np.where(values < np.inf, z, np.nan)
    return result


def site_scores(
    values: NDArray[np.float64], settings: TrustSettings | None = None
) -> NDArray[np.float64]:
    """Return per site the mean over its signals of min(1, (2.5 / z)^2); NaN where unjudged."""
    settings = settings or TrustSettings()
    z = leave_one_out_z(values, settings)
    with np.errstate(divide="ignore", over="ignore"):
        fit = np.minimum(1.0, (settings.tolerance_z / z) ** 2)
    judged = np.count_nonzero(~np.isnan(fit), axis=0)
    total = np.where(np.isnan(fit), 0.0, fit).sum(axis=0)
    return np.where(judged > 0, total / np.maximum(judged, 1), np.nan)


class ReputationBook:
    """Keep one reputation per site of a cohort: slow up, fast down.

    `r += up * (s - r)` when the score s is above r, `r += down * (s - r)` when below.
    """

    def __init__(
        self,
        settings: TrustSettings | None = None,
        reputation: Mapping[str, float] | None = None,
    ) -> None:
        """Start from a saved mapping, or empty.

        Raises:
            ValueError: a saved reputation lies outside 0..1.
        """
        self._settings = settings or TrustSettings()
        self._reputation = dict(reputation or {})
        for site_id, value in self._reputation.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"reputation of {site_id!r} must lie in 0..1, got {value}")

    def of(self, site_id: str) -> float:
        """Return the reputation of a site, the start value when it was never judged."""
        return self._reputation.get(site_id, self._settings.start)

    def update(self, scores: Mapping[str, float]) -> None:
        """Move reputations towards the scores; a NaN score (unjudged) moves nothing.

        Pass the sites that sent something new since the last call, each once: a score counts as
        one observation.
        """
        rules = self._settings
        for site_id, score in scores.items():
            if math.isnan(score):
                continue
            held = self.of(site_id)
            moved = held + (rules.up if score > held else rules.down) * (score - held)
            self._reputation[site_id] = min(1.0, max(rules.floor, moved))

    def forget(self, site_id: str) -> None:
        """Forget a site that left the cohort for good."""
        self._reputation.pop(site_id, None)

    def snapshot(self) -> dict[str, float]:
        """Return all reputations that differ from never judged, to save or to weigh with."""
        return dict(self._reputation)


def _median_of_others(
    values: NDArray[np.float64], ordered: NDArray[np.float64], sites: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return per cell the median of the row's other values; any number where missing."""
    line = np.arange(len(ordered))
    remaining = sites - 1
    low, high = (remaining - 1) // 2, remaining // 2
    # Without a value at or below a rank, the rank's place is taken by the next larger value.
    picks: list[NDArray[np.float64]] = []
    for rank in (low, high):
        here, after = ordered[line, rank][:, None], ordered[line, rank + 1][:, None]
        picks.append(np.where(values > here, here, after))
    low_pick, high_pick = picks
    return low_pick + (high_pick - low_pick) / 2.0


def _possible_medians(
    ordered: NDArray[np.float64], sites: NDArray[np.int64]
) -> list[NDArray[np.float64]]:
    """Return the values that a leave-one-out median of the row can take."""
    line = np.arange(len(ordered))
    remaining = sites - 1
    low, high = (remaining - 1) // 2, remaining // 2
    a, b = ordered[line, low], ordered[line, low + 1]
    c, d = ordered[line, high], ordered[line, high + 1]
    return [first + (second - first) / 2.0 for first, second in ((a, c), (a, d), (b, d))]
