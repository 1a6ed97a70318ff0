"""Estimates of groups of sites, computed anew only where something changed that they rest on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.estimates import EstimateTable
from fmi_server.aggregation.estimators import EstimatorSettings, estimate
from fmi_server.aggregation.resident import ResidentMatrix
from fmi_server.aggregation.transforms import TransformTable

__all__ = ["GroupEstimates", "WeighedSites"]

MAX_ROWS_KEPT: Final = 1 << 18
"""Rows of all tables that are kept together, 0.1 kB each; groups past it are computed each time."""

_BLOCK_CELLS = 1 << 20


@dataclass(frozen=True, slots=True)
class WeighedSites:
    """The sites of a group, and how they count.

    Attributes:
        columns: of the sites.
        trust: by site, the factor that its confidences are multiplied with.
        cap: no confidence counts for more.
    """

    columns: NDArray[np.int64]
    trust: NDArray[np.float64]
    cap: float


@dataclass(frozen=True, slots=True)
class _Kept:
    """The estimates of all rows, and what they were computed from."""

    table: EstimateTable
    sites: WeighedSites
    version: int


class GroupEstimates:
    """Estimate every row of a matrix from some of its sites, on the signals' own scales.

    The result depends on what is held alone, to the last digit, and never on the way there: no sum depends
    on the order of the columns or on empty ones (`order_free.py`), and each row is estimated by itself.

    Args:
        cells: the matrix; its transforms are those of its rows.
        transforms: as many as the matrix has rows.
    """

    def __init__(self, cells: ResidentMatrix, transforms: TransformTable) -> None:
        self._cells = cells
        self._transforms = transforms
        self._kept: dict[Hashable, _Kept] = {}
        self._before: dict[Hashable, _Kept] = {}
        self._rows_kept = 0

    def start_release(self) -> None:
        """Let go of the groups that nobody asked about since the last time."""
        self._before, self._kept, self._rows_kept = self._kept, {}, 0

    def estimate(
        self, group: Hashable | None, sites: WeighedSites, settings: EstimatorSettings
    ) -> tuple[EstimateTable, int]:
        """Return the estimates of all rows from some sites, and how many rows were computed anew.

        Args:
            group: under which the result is kept for the next time; None keeps nothing.
            sites: of the group.
            settings: estimator rules.
        """
        key = None if group is None else (group, settings)
        last = self._kept.get(key) or self._before.get(key)
        count = len(self._transforms)
        rows = np.arange(count) if last is None else self._stale_rows(last, sites)
        if last is None or rows.size == count:
            table = self._computed(rows, sites, settings)
        elif rows.size:
            table = last.table.replaced(rows, self._computed(rows, sites, settings), count)
        else:
            table = last.table
        if key is not None:
            self._keep(key, _Kept(table, sites, self._cells.version))
        return table, int(rows.size)

    def _keep(self, key: Hashable, found: _Kept) -> None:
        held = self._kept.get(key)
        more = len(found.table) - (0 if held is None else len(held.table))
        if held is not None or self._rows_kept + more <= MAX_ROWS_KEPT:
            self._kept[key] = found
            self._rows_kept += more

    def _stale_rows(self, last: _Kept, sites: WeighedSites) -> NDArray[np.int64]:
        """Return the rows that are new, or in which a site of the group changed, came, went or reweighed."""
        cells = self._cells
        if sites.cap != last.sites.cap:
            return np.arange(len(cells.row_changed))
        stale = np.zeros(len(cells.row_changed), dtype=bool)
        stale[len(last.table) :] = True
        if any(
            (cells.column_changed[columns] > last.version).any()
            for columns in (sites.columns, last.sites.columns)
        ):
            stale |= cells.row_changed > last.version
        moved = _moved(last.sites, sites, len(cells.column_changed))
        if moved.size:
            for row in np.flatnonzero(~stale):
                stale[row] = bool((cells.values[row, moved] < np.inf).any())
        return np.flatnonzero(stale)

    def _computed(
        self, rows: NDArray[np.int64], sites: WeighedSites, settings: EstimatorSettings
    ) -> EstimateTable:
        cells, trust = self._cells, sites.trust
        alike = cells.lowest_confidence >= sites.cap and (
            not trust.size or trust.min() == trust.max()
        )
        columns: NDArray[np.int64] | slice = sites.columns
        if sites.columns.size == len(cells.column_of):
            columns = slice(None)  # a view: nothing is copied
            trust = np.zeros(len(cells.column_changed))
            trust[sites.columns] = sites.trust
        # In blocks, so that temporaries stay small beside the matrix.
        height = max(1, _BLOCK_CELLS // max(1, sites.columns.size))
        tables = []
        for start in range(0, max(1, rows.size), height):
            part = rows[start : start + height]
            span = _span(part)
            values = cells.values[span][:, columns]
            weights = None
            if not alike:
                weights = np.minimum(cells.confidence[span][:, columns], sites.cap)
                weights *= trust
            table = estimate(values, weights, settings, self._transforms.tolerance(part))
            tables.append(self._transforms.back(part, table))
        return EstimateTable.stacked(tables)


def _moved(before: WeighedSites, now: WeighedSites, width: int) -> NDArray[np.int64]:
    """Return the columns that are in one of two groups only, or weigh otherwise in them."""
    if np.array_equal(before.columns, now.columns):
        reweighed: NDArray[np.int64] = now.columns[before.trust != now.trust]
        return reweighed
    weight_before, weight_now = np.full((2, width), -1.0)
    weight_before[before.columns] = before.trust
    weight_now[now.columns] = now.trust
    return np.flatnonzero(weight_before != weight_now)


def _span(rows: NDArray[np.int64]) -> NDArray[np.int64] | slice:
    """Return rising rows as a slice where they follow each other, which spares a copy of them."""
    if rows.size and rows[-1] - rows[0] == rows.size - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
