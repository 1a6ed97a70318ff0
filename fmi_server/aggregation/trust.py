"""Reputation: the server's own record of how far a site stands from the others.

It supplements trimming and never replaces it. Sites that collude inside the honest range are not
caught, and nothing here claims that they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.certainty import SHARE_OF_MAGNITUDE

__all__ = [
    "START_REPUTATION",
    "ReputationBook",
    "TrustSettings",
    "in_steps",
    "leave_one_out_z",
    "site_scores",
]

Difference: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.float64]]
"""Of rows, and values of each in a second axis: the differences that do not matter there."""

START_REPUTATION = 0.5
"""Reputation of a site nobody has judged yet."""

_MAD_TO_SIGMA = 1.4826022185056018

# Cells taken at once: the temporaries of a block stay in the cache.
_BLOCK_CELLS = 65_536


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
    """

    up: float = 0.1
    down: float = 0.3
    start: float = START_REPUTATION
    floor: float = 0.01
    tolerance_z: float = 2.5
    min_sites: int = 5

    def __post_init__(self) -> None:
        for name in ("up", "down", "start", "floor"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if not self.tolerance_z > 0.0:
            raise ValueError(f"tolerance_z must be positive, got {self.tolerance_z}")
        if self.min_sites < 3:
            raise ValueError(f"min_sites must be at least 3, got {self.min_sites}")


def leave_one_out_z(
    values: NDArray[np.float64],
    settings: TrustSettings | None = None,
    difference: Difference | None = None,
) -> NDArray[np.float64]:
    """Return each value's distance from the median of the *others*, in robust sigmas.

    `z = |x - med| / max(1.4826 * MAD, d / tolerance_z)`, with median and MAD of the other sites and d
    the difference that does not matter there, so that nobody is condemned for a last digit where all
    others agree. The leave-one-out median of a row takes at most three values and its MAD three for each
    of them, so one sort answers all sites of a row exactly. A spread of zero gives 0 where the
    value agrees and `inf` where it does not.

    Args:
        values: signals x sites, `+inf` where missing, on the scale they are averaged on.
        settings: rules; None for the defaults.
        difference: of rows and medians, the difference that does not matter; None for a tenth of the
            median.

    Returns:
        Same shape; NaN where missing or where a signal has fewer than `min_sites` sites.
    """
    result = np.full(values.shape, np.nan)
    rows = np.arange(len(values))
    for part, z in _z_by_blocks(
        values, settings or TrustSettings(), rows, slice(None), difference or _tenth
    ):
        result[part] = z
    return result


def site_scores(
    values: NDArray[np.float64],
    settings: TrustSettings | None = None,
    *,
    rows: NDArray[np.int64] | None = None,
    columns: NDArray[np.int64] | None = None,
    difference: Difference | None = None,
) -> NDArray[np.float64]:
    """Return per site the mean over its signals of min(1, (2.5 / z)^2); NaN where unjudged.

    The rows are taken in blocks, so that the memory needed does not grow with their number.

    Args:
        values: as in `leave_one_out_z`.
        settings: rules; None for the defaults.
        rows: signals that count; None for all.
        columns: sites to judge, each against all; None judges every site.
        difference: as in `leave_one_out_z`.
    """
    settings = settings or TrustSettings()
    rows = np.arange(len(values)) if rows is None else rows
    count = values.shape[1] if columns is None else columns.size
    judged: NDArray[np.int64] = np.zeros(count, dtype=np.int64)
    total = np.zeros(count)
    chosen = slice(None) if columns is None else columns
    for _, z in _z_by_blocks(values, settings, rows, chosen, difference or _tenth):
        with np.errstate(divide="ignore", over="ignore"):
            fit = np.minimum(1.0, (settings.tolerance_z / z) ** 2)
        known = ~np.isnan(fit)
        judged += np.count_nonzero(known, axis=0)
        # Row by row: the sum then depends neither on the blocks nor on who else is judged.
        for row in np.where(known, fit, 0.0):
            total += row
    return np.where(judged > 0, total / np.maximum(judged, 1), np.nan)


def in_steps(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return weights of sites in steps of 0.01, none below one step.

    A smaller move of a weight changes nothing, so that nothing is computed anew for it.
    """
    rounded: NDArray[np.float64] = np.maximum(np.round(weights, 2), 0.01)
    return rounded


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

    def counted(self, site_ids: Collection[str]) -> dict[str, float]:
        """Return the reputations of the sites of a cohort as they count: in steps, none above their median.

        A reputation rises with each release in which its site sent something. Were there no median, who
        sends most often would count for more than most.

        Args:
            site_ids: all sites of the cohort, each once.
        """
        held = in_steps(np.fromiter(map(self.of, site_ids), dtype=np.float64))
        if held.size:
            held = in_steps(np.minimum(held, np.median(held)))
        return dict(zip(site_ids, held.tolist(), strict=True))

    def snapshot(self) -> dict[str, float]:
        """Return the reputations of all sites that were judged, to save."""
        return dict(self._reputation)


@dataclass(frozen=True, slots=True)
class _Others:
    """What the others of a site say, for every row and place of the site.

    The place is 0, 1 or 2: how many of two values of the row are smaller than the site's. Median and
    spread of the others depend on nothing else, nor do the places of its distance.

    Attributes:
        edges: rows x 2, the two values.
        centre: rows x 3, median of the others by place.
        gap_edges: rows x 3 x 2, the two distances from that median by place.
        sigma: rows x 3 x 3, spread of the others by place of the value, then of its distance.
    """

    edges: NDArray[np.float64]
    centre: NDArray[np.float64]
    gap_edges: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        ordered: NDArray[np.float64],
        sites: NDArray[np.int64],
        least_sigma: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    ) -> _Others:
        """Read them off sorted rows of at least three sites each."""
        low, high = (sites - 2) // 2, (sites - 1) // 2
        ranks = np.stack([low, low + 1, high, high + 1], axis=1)
        middle = np.take_along_axis(ordered, ranks, axis=1)
        centre = _medians_without_one(middle)
        gaps = _nearest_distances(ordered, sites, centre, ranks)
        sigma = _MAD_TO_SIGMA * _medians_without_one(gaps)
        sigma = np.maximum(sigma, least_sigma(centre)[:, :, None])
        return cls(middle[:, ::2], centre, gaps[:, :, ::2], sigma)

    def z(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the distances of values of these rows; NaN where missing."""
        place = np.add(values > self.edges[:, :1], values > self.edges[:, 1:], dtype=np.intp)
        place += 3 * np.arange(len(values))[:, None]
        gap = np.abs(values - self.centre.take(place))
        near, far = (self.gap_edges[:, :, side].take(place) for side in (0, 1))
        place *= 3
        place += gap > near
        place += gap > far
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            z = gap / self.sigma.take(place)
        z[gap == 0.0] = 0.0
        z[np.isposinf(values)] = np.nan
        return z


def _z_by_blocks(
    values: NDArray[np.float64],
    settings: TrustSettings,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64] | slice,
    difference: Difference,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Yield some of the rows with the z of the asked sites, in turn."""
    height = max(1, _BLOCK_CELLS // max(1, values.shape[1]))
    for start in range(0, rows.size, height):
        part = rows[start : start + height]
        block = values[part]
        ordered = np.sort(block, axis=1)
        sites = np.count_nonzero(ordered < np.inf, axis=1)
        enough = np.flatnonzero(sites >= settings.min_sites)
        if enough.size < part.size:
            part, block = part[enough], block[enough]
            ordered, sites = ordered[enough], sites[enough]
        if part.size:
            least = partial(_least_sigma, part, settings.tolerance_z, difference)
            yield part, _Others.of(ordered, sites, least).z(block[:, columns])


def _least_sigma(
    rows: NDArray[np.int64],
    tolerance_z: float,
    difference: Difference,
    centre: NDArray[np.float64],
) -> NDArray[np.float64]:
    return difference(rows, centre) / tolerance_z


def _tenth(rows: NDArray[np.int64], centre: NDArray[np.float64]) -> NDArray[np.float64]:
    del rows
    return SHARE_OF_MAGNITUDE * np.abs(centre)


def _medians_without_one(middle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the medians that are left when one value goes, by the place of that value.

    Args:
        middle: ... x 4, of `n` sorted values those of ranks l, l + 1, h and h + 1, where l and h are the
            middle ranks of `n - 1` values.

    Returns:
        ... x 3: without a value up to rank l, one up to rank h, one above.
    """
    a, b, c, d = np.moveaxis(middle, -1, 0)
    return np.stack(
        [first + (second - first) / 2.0 for first, second in ((b, d), (a, d), (a, c))], -1
    )


def _nearest_distances(
    ordered: NDArray[np.float64],
    sites: NDArray[np.int64],
    centre: NDArray[np.float64],
    ranks: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return some order statistics of the distances from each centre, without sorting distances.

    The m nearest values stand side by side in a sorted row, and the m-th smallest distance is the smaller
    one of the largest distances in two neighbouring windows of m values: the first one that reaches as far
    above the centre as below, found by bisection, and the one before it.

    Args:
        ordered: sorted rows, `+inf` where missing.
        sites: values per row.
        centre: rows x centres, each between smallest and largest value of the row.
        ranks: rows x ranks wanted, from 0.

    Returns:
        rows x centres x ranks.
    """
    line = np.arange(len(ordered))[:, None, None]
    middle, reach = centre[:, :, None], ranks[:, None, :]
    last = sites[:, None, None] - 1 - reach
    shape = np.broadcast_shapes(middle.shape, reach.shape)
    first: NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
    stop = np.broadcast_to(last + 1, shape).copy()
    for _ in range(int(stop.max()).bit_length()):
        start = np.minimum((first + stop) // 2, last)
        far_enough = ordered[line, start + reach] - middle >= middle - ordered[line, start]
        open_ = first < stop
        stop = np.where(open_ & far_enough, start, stop)
        first = np.where(open_ & ~far_enough, start + 1, first)
    above = ordered[line, np.minimum(first, last) + reach] - middle
    below = middle - ordered[line, np.maximum(first - 1, 0)]
    return np.where(first > last, below, np.where(first > 0, np.minimum(above, below), above))
