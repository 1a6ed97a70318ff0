"""Which values of a row survive, decided by value and count alone, never by weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.order_free import order_free_sums

__all__ = ["Window", "select_nearest_median", "select_window"]

_BLOCK_CELLS = 32_768


@dataclass(frozen=True, slots=True)
class Window:
    """Describe the survivors of every row, and the sums that need no second look.

    Attributes:
        values: signals x sites, `+inf` where missing.
        weights: same shape, or None when all sites count alike.
        sites: values per row.
        kept: survivors per row.
        low: smallest survivor.
        high: largest survivor.
        mean: mean of the survivors, all alike.
        winsorised_squares: sum of squares around their mean of all values of the row, each moved
            into [low, high].
        part: explicit survival of each cell in 0..1, or None when `low` and `high` say it.
        total: sum of the survivors' weights; None without weights, like the three below.
        weighted: weighted sum of the survivors, each above `low`.
        squares: sum of the squared weights.
        peak: largest weight.
        even: rows whose survivors all have one weight.
        tied: rows in which equal values stand on both sides of an edge.
    """

    values: NDArray[np.float64]
    weights: NDArray[np.float64] | None
    sites: NDArray[np.int64]
    kept: NDArray[np.int64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    mean: NDArray[np.float64]
    winsorised_squares: NDArray[np.float64]
    part: NDArray[np.float64] | None
    total: NDArray[np.float64] | None
    weighted: NDArray[np.float64] | None
    squares: NDArray[np.float64] | None
    peak: NDArray[np.float64]
    even: NDArray[np.bool_]
    tied: NDArray[np.bool_]

    def survivors(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return values (0 where out), weights and survival parts of some rows."""
        values = self.values[rows]
        weights = np.ones_like(values) if self.weights is None else self.weights[rows]
        if self.part is not None:
            part = self.part[rows]
        else:
            part = _edge_parts(values, self.low[rows], self.high[rows], self.kept[rows])
        return np.where(part > 0.0, values, 0.0), weights, part


def select_window(
    values: NDArray[np.float64],
    weights: NDArray[np.float64] | None,
    ordered: NDArray[np.float64],
    sites: NDArray[np.int64],
    cut: NDArray[np.int64],
) -> Window:
    """Leave out the `cut` smallest and largest values of every row.

    Args:
        values: signals x sites, `+inf` where missing; every row has more than `2 * cut` values.
        weights: same shape or None.
        ordered: `values` with sorted rows.
        sites: values per row.
        cut: values to leave out per tail and row.
    """
    line = np.arange(len(ordered))
    kept = sites - 2 * cut
    low, high = ordered[line, cut], ordered[line, sites - cut - 1]
    centre = ordered[line, sites // 2]
    first, second = _rank_moments(ordered, centre, cut, sites - cut)
    below, above = low - centre, high - centre
    all_first = first + cut * (below + above)
    all_second = second + cut * (below * below + above * above)
    squares_sum = np.maximum(all_second - all_first * (all_first / sites), 0.0)
    total = weighted = squares = None
    peak: NDArray[np.float64] = np.zeros(len(ordered))
    even: NDArray[np.bool_] = np.ones(len(ordered), dtype=bool)
    tied: NDArray[np.bool_] = np.zeros(len(ordered), dtype=bool)
    if weights is not None:
        total, weighted, squares, peak, even = _weighted_sums(values, weights, low, high)
        trimmed = cut > 0
        tied = trimmed & (
            (ordered[line, cut - trimmed] == low)
            | (ordered[line, sites - cut - (~trimmed).astype(np.int64)] == high)
        )
    return Window(
        values=values,
        weights=weights,
        sites=sites,
        kept=kept,
        low=low,
        high=high,
        mean=centre + first / kept,
        winsorised_squares=squares_sum,
        part=None,
        total=total,
        weighted=weighted,
        squares=squares,
        peak=peak,
        even=even,
        tied=tied,
    )


def select_nearest_median(
    values: NDArray[np.float64],
    weights: NDArray[np.float64] | None,
    ordered: NDArray[np.float64],
    sites: NDArray[np.int64],
    cut: NDArray[np.int64],
) -> Window:
    """Leave out the `cut` values of every row that lie farthest from its median.

    Values equally far at the edge survive in equal parts. Arguments as in `select_window`.
    """
    line = np.arange(len(ordered))
    kept = sites - cut
    below, above = ordered[line, (sites - 1) // 2], ordered[line, sites // 2]
    median = below + (above - below) / 2.0
    # Twice the distance, without the rounding of the median: the two beside it are equally far.
    distance = np.abs((values - below[:, None]) + (values - above[:, None]))
    edge = np.sort(distance, axis=1)[line, kept - 1][:, None]
    inside, on_edge = distance < edge, distance == edge
    share = (kept - inside.sum(axis=1)) / on_edge.sum(axis=1)
    part = inside + on_edge * share[:, None]
    survives = part > 0.0
    low = np.where(survives, values, np.inf).min(axis=1)
    high = np.where(survives, values, -np.inf).max(axis=1)
    offset = np.where(survives, values - median[:, None], 0.0)
    moved = np.clip(values, low[:, None], high[:, None]) - median[:, None]
    moved[np.isposinf(values)] = 0.0
    farthest = np.maximum(np.abs(low - median), np.abs(high - median))
    most = sites * farthest
    second = order_free_sums(moved * moved, most * farthest)
    spread = order_free_sums(moved, most)
    squares_sum = second - spread * (spread / sites)
    nothing = None if weights is None else np.zeros(len(ordered))
    even: NDArray[np.bool_] = np.ones(len(ordered), dtype=bool)
    if weights is not None:
        least = np.where(survives, weights, np.inf).min(axis=1)
        even = least == np.where(survives, weights, -np.inf).max(axis=1)
    return Window(
        values=values,
        weights=weights,
        sites=sites,
        kept=kept,
        low=low,
        high=high,
        mean=median + order_free_sums(part * offset, most) / kept,
        winsorised_squares=np.maximum(squares_sum, 0.0),
        part=part,
        total=nothing,
        weighted=nothing,
        squares=nothing,
        peak=np.zeros(len(ordered)),
        even=even,
        tied=np.ones(len(ordered), dtype=bool),
    )


def _rank_moments(
    ordered: NDArray[np.float64],
    centre: NDArray[np.float64],
    start: NDArray[np.int64],
    stop: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sums of (x - centre) and its square over the ranks start <= rank < stop.

    Each row is summed by itself, so that its sums do not depend on the other rows to the last digit: what
    is computed in parts equals what is computed at once.
    """
    outer = int(start.min())
    within = ordered[:, outer : int(stop.max())]
    # One cell more, because the end of the last row must be a place too.
    offset = np.zeros(within.size + 1)
    np.subtract(within, centre[:, None], out=offset[:-1].reshape(within.shape))
    begin = np.arange(len(within)) * within.shape[1] - outer
    ends = np.stack([begin + start, begin + stop], axis=1).ravel()
    first = np.add.reduceat(offset, ends)[::2]
    np.multiply(offset, offset, out=offset)
    return first, np.add.reduceat(offset, ends)[::2]


def _weighted_sums(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> tuple[
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.float64],
    NDArray[np.bool_],
]:
    """Return per row sum(w), sum(w (x - low)), sum(w^2), max(w) and whether all w are one, in low..high."""
    rows, sites = values.shape
    total, weighted, squares, peak = (np.zeros(rows) for _ in range(4))
    even = np.zeros(rows, dtype=bool)
    # Scratch of one cache-sized block, used again and again: whole-matrix temporaries cost a
    # page fault per 4 kB, which is most of the time this function would take.
    block = min(rows, max(1, _BLOCK_CELLS // max(1, sites)))
    scratch = np.empty((2, block, sites))
    inside = np.empty((block, sites), dtype=bool)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        size = part.stop - start
        alive, moved, kept = scratch[0, :size], scratch[1, :size], inside[:size]
        # Moved into the window, missing values are finite: a weight of zero times inf would be NaN.
        np.minimum(values[part], high[part, None], out=moved)
        np.maximum(moved, low[part, None], out=moved)
        np.equal(values[part], moved, out=kept)
        np.multiply(weights[part], kept, out=alive)
        alive.max(axis=1, out=peak[part], initial=0.0)
        survivors = np.count_nonzero(kept, axis=1)
        most = survivors * peak[part]
        moved -= low[part, None]
        moved *= alive
        weighted[part] = order_free_sums(moved, most * (high[part] - low[part]))
        np.multiply(alive, alive, out=moved)
        squares[part] = order_free_sums(moved, most * peak[part])
        total[part] = order_free_sums(alive, most)
        # Of weights that are all one, all are the largest; both sums are exact.
        even[part] = total[part] == order_free_sums(peak[part, None].copy(), most) * survivors
    return total, weighted, squares, peak, even


def _edge_parts(
    values: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    kept: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the survival of each cell when values equal to an edge share what is left of it."""
    low, high = low[:, None], high[:, None]
    at_low, at_high = values == low, values == high
    inside = (values > low) & (values < high)
    held = values < np.inf
    cut = (held.sum(axis=1) - kept) // 2
    low_left = at_low.sum(axis=1) - (cut - (values < low).sum(axis=1))
    high_left = at_high.sum(axis=1) - (cut - (held & (values > high)).sum(axis=1))
    one_value = (low == high)[:, 0]
    low_left = np.where(one_value, kept, low_left)
    low_part = low_left / at_low.sum(axis=1)
    high_part = np.where(one_value, low_part, high_left / at_high.sum(axis=1))
    at_upper = at_high & (low != high)
    part: NDArray[np.float64] = inside + at_low * low_part[:, None] + at_upper * high_part[:, None]
    return part
