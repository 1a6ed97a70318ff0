"""The resident signals x sites matrix: growth, columns, times; no statistics."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["ResidentMatrix"]

_LEAST_GROWTH = 16

_Cell = TypeVar("_Cell", bound=np.generic)


class ResidentMatrix:
    """Keep newest value, declared confidence and time of every (signal, site).

    Rows are signals and only grow; a site holds one column, and the column of a dropped site goes
    to the next new one. Both axes grow by an eighth: a write costs the same however many sites
    there are, and little memory stands idle. Empty cells hold value `+inf`, confidence 0 and time
    `+inf`.

    Attributes:
        column_of: the column of each site.
        version: rises with every change; each row and column keeps that of its last one.
        lowest_confidence: a lower bound on the confidences held.
    """

    def __init__(self) -> None:
        self.column_of: dict[str, int] = {}
        self.version = 0
        self.lowest_confidence = 1.0
        self._rows = 0
        self._width = 0
        self._free: list[int] = []
        self._values: NDArray[np.float64] = np.full((0, 0), np.inf)
        self._confidence: NDArray[np.float64] = np.zeros((0, 0))
        self._seen: NDArray[np.float64] = np.full((0, 0), np.inf)
        self._sites: tuple[list[str], NDArray[np.int64]] | None = None
        self._row_changed: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._column_changed: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._occupied: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._site_confidence: NDArray[np.float64] = np.zeros(0)
        self._site_size: NDArray[np.float64] = np.ones(0)
        self._site_seen: NDArray[np.float64] = np.full(0, -np.inf)
        # A lower bound on the oldest time of the site; spares `expire` the whole matrix.
        self._site_oldest: NDArray[np.float64] = np.full(0, np.inf)

    @property
    def values(self) -> NDArray[np.float64]:
        """Return the values, rows x columns, a view."""
        return self._values[: self._rows, : self._width]

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Return the declared confidences, rows x columns, a view."""
        return self._confidence[: self._rows, : self._width]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the three matrices, with what is kept free for growth."""
        return self._values.nbytes + self._confidence.nbytes + self._seen.nbytes

    @property
    def row_changed(self) -> NDArray[np.int64]:
        """Return per row the version of its last change, a view."""
        return self._row_changed[: self._rows]

    @property
    def column_changed(self) -> NDArray[np.int64]:
        """Return per column the version of its last change, a view."""
        return self._column_changed[: self._width]

    def sites(self) -> tuple[list[str], NDArray[np.int64]]:
        """Return the ids of the sites and their columns, as long as none comes or goes the same objects."""
        if self._sites is None:
            columns = np.fromiter(self.column_of.values(), dtype=np.int64)
            self._sites = list(self.column_of), columns
        return self._sites

    @property
    def occupied(self) -> NDArray[np.bool_]:
        """Return which columns belong to a site, a view."""
        return self._occupied[: self._width]

    @property
    def site_confidence(self) -> NDArray[np.float64]:
        """Return per column the mean declared confidence of the site's newest packet, a view."""
        return self._site_confidence[: self._width]

    @property
    def site_size(self) -> NDArray[np.float64]:
        """Return per column how many sites the site's newest packet stands for, a view."""
        return self._site_size[: self._width]

    def add_row(self) -> None:
        """Add an empty row, changed because nobody has seen it yet."""
        if self._rows == self._values.shape[0]:
            self._grow(_next_size(self._rows), self._values.shape[1])
        self._rows += 1
        self._note_change(self._rows - 1)

    def write(
        self,
        site_id: str,
        rows: NDArray[np.int64],
        values: NDArray[np.float64],
        confidence: NDArray[np.float64],
        now: float,
        size: float = 1.0,
    ) -> tuple[int, int]:
        """Write one site's cells unless newer ones stand there; return applied and changed."""
        column = self._column(site_id)
        held = self._seen[rows, column]
        # +inf marks an empty cell, which anything may fill.
        newer = ~((held > now) & (held < np.inf))
        rows, values, confidence = rows[newer], values[newer], confidence[newer]
        changed = self._values[rows, column] != values
        changed |= self._confidence[rows, column] != confidence
        self.lowest_confidence = min(self.lowest_confidence, float(confidence.min(initial=1.0)))
        self._values[rows, column] = values
        self._confidence[rows, column] = confidence
        self._seen[rows, column] = now
        if changed.any():
            self._note_change(rows[changed], column)
        if rows.size:
            self._site_oldest[column] = min(self._site_oldest[column], now)
            if now >= self._site_seen[column]:
                self._site_seen[column] = now
                self._site_confidence[column] = confidence.mean()
                self._site_size[column] = size
        return int(rows.size), int(np.count_nonzero(changed))

    def seen(self, site_id: str) -> NDArray[np.float64] | None:
        """Return the times of a site's cells by row, `+inf` where empty, a view; None without a column."""
        column = self.column_of.get(site_id)
        return None if column is None else self._seen[: self._rows, column]

    def drop(self, site_id: str) -> bool:
        """Empty the site's column and give it back; return whether the site was there."""
        column = self.column_of.pop(site_id, None)
        if column is None:
            return False
        self._sites = None
        self._note_change(np.flatnonzero(self._values[:, column] < np.inf), column)
        self._values[:, column] = np.inf
        self._confidence[:, column] = 0.0
        self._seen[:, column] = np.inf
        self._occupied[column] = False
        self._site_confidence[column] = 0.0
        self._site_size[column] = 1.0
        self._site_seen[column] = -np.inf
        self._site_oldest[column] = np.inf
        self._free.append(column)
        return True

    def holds_older(self, limit: float) -> bool:
        """Return whether a value may be older than `limit`."""
        return bool((self._site_oldest[: self._width] < limit).any())

    def expire(self, limit: float) -> tuple[str, ...]:
        """Empty the cells older than `limit`; return the sites that lost their last one."""
        gone = []
        stale = self._site_oldest[: self._width] < limit
        for site_id in [site for site, column in self.column_of.items() if stale[column]]:
            column = self.column_of[site_id]
            old = np.flatnonzero(self._seen[:, column] < limit)
            self._values[old, column] = np.inf
            self._confidence[old, column] = 0.0
            self._seen[old, column] = np.inf
            self._note_change(old, column)
            oldest = float(self._seen[:, column].min())
            self._site_oldest[column] = oldest
            if math.isinf(oldest):
                self.drop(site_id)
                gone.append(site_id)
        return tuple(gone)

    def window(self) -> tuple[float | None, float | None]:
        """Return a lower bound on the oldest time and the newest time, None when empty."""
        if not self.column_of:
            return None, None
        oldest = float(self._site_oldest[: self._width].min())
        return oldest, float(self._site_seen[: self._width].max())

    def _column(self, site_id: str) -> int:
        column = self.column_of.get(site_id)
        if column is not None:
            return column
        if self._free:
            column = self._free.pop()
        else:
            column = self._width
            if column == self._values.shape[1]:
                self._grow(self._values.shape[0], _next_size(column))
            self._width += 1
        self._sites = None
        self.column_of[site_id] = column
        self._occupied[column] = True
        return column

    def _note_change(self, rows: NDArray[np.int64] | int, column: int | None = None) -> None:
        self.version += 1
        self._row_changed[rows] = self.version
        if column is not None:
            self._column_changed[column] = self.version

    def _grow(self, rows: int, columns: int) -> None:
        self._values = _grown(self._values, (rows, columns), np.inf)
        self._confidence = _grown(self._confidence, (rows, columns), 0.0)
        self._seen = _grown(self._seen, (rows, columns), np.inf)
        self._site_confidence = _grown(self._site_confidence, (columns,), 0.0)
        self._site_size = _grown(self._site_size, (columns,), 1.0)
        self._site_seen = _grown(self._site_seen, (columns,), -np.inf)
        self._site_oldest = _grown(self._site_oldest, (columns,), np.inf)
        self._row_changed = _grown(self._row_changed, (rows,), 0)
        self._column_changed = _grown(self._column_changed, (columns,), 0)
        self._occupied = _grown(self._occupied, (columns,), fill=False)


def _next_size(size: int) -> int:
    return size + max(_LEAST_GROWTH, size // 8)


def _grown(held: NDArray[_Cell], shape: tuple[int, ...], fill: float) -> NDArray[_Cell]:
    grown = np.full(shape, fill, dtype=held.dtype)
    grown[tuple(slice(size) for size in held.shape)] = held
    return grown
