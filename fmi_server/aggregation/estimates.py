"""What an estimate says: one row, and a table of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "EstimateTable"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Describe one row of an `EstimateTable` with None where the table holds NaN."""

    value: float | None
    stderr: float | None
    lower: float | None
    upper: float | None
    sites: int
    effective_sites: float
    trimmed: int
    tolerated: int
    used: str | None
    tolerance: float | None
    confidence: float
    reason: str | None


@dataclass(frozen=True, slots=True)
class EstimateTable:
    """Hold one estimate per row, column by column; NaN marks what cannot be said.

    Attributes:
        value: location estimate; NaN when there is a `reason`.
        stderr: standard error of `value`; NaN below two sites, and where the values agree so well that
            it would be 0 although they are too few to say so (`certainty.py`).
        lower: lower end of the t interval; NaN where `stderr` is.
        upper: upper end of the t interval.
        sites: sites that sent a value.
        effective_sites: 1 / sum of squared shares (Kish); for the median sites * 2 / pi.
        trimmed: values left out, both tails together.
        tolerated: lying sites under which `value` still lies in the range of the honest values.
        used: estimator that was really applied, or None.
        tolerance: the difference that `confidence` is about; NaN where there is no value.
        confidence: probability that `value` lies within `tolerance` of the centre of the sites.
        reason: None, or why there is no value.
    """

    value: NDArray[np.float64]
    stderr: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    sites: NDArray[np.int64]
    effective_sites: NDArray[np.float64]
    trimmed: NDArray[np.int64]
    tolerated: NDArray[np.int64]
    used: NDArray[np.object_]
    tolerance: NDArray[np.float64]
    confidence: NDArray[np.float64]
    reason: NDArray[np.object_]

    @classmethod
    def empty(cls, sites: NDArray[np.int64]) -> Self:
        """Return a table that says of every row how many sites there are, and nothing else."""
        rows = len(sites)
        return cls(
            value=np.full(rows, np.nan),
            stderr=np.full(rows, np.nan),
            lower=np.full(rows, np.nan),
            upper=np.full(rows, np.nan),
            sites=sites,
            effective_sites=np.zeros(rows),
            trimmed=np.zeros(rows, dtype=np.int64),
            tolerated=np.zeros(rows, dtype=np.int64),
            used=np.full(rows, None, dtype=object),
            tolerance=np.full(rows, np.nan),
            confidence=np.zeros(rows),
            reason=np.full(rows, None, dtype=object),
        )

    @classmethod
    def stacked(cls, tables: Sequence[Self]) -> Self:
        """Return one table of the rows of several, at least one."""
        if len(tables) == 1:
            return tables[0]
        columns = {
            field.name: np.concatenate([getattr(table, field.name) for table in tables])
            for field in fields(cls)
        }
        return cls(**columns)

    def __len__(self) -> int:
        return len(self.value)

    def selected(self, rows: NDArray[np.int64]) -> Self:
        """Return some of the rows."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def replaced(self, rows: NDArray[np.int64], fresh: Self, count: int) -> Self:
        """Return a table of `count` rows in which some stand anew.

        This one stays as it is, because releases share it. Rows that it does not have must be anew.
        """
        columns: dict[str, NDArray[np.generic]] = {}
        for field in fields(self):
            old = getattr(self, field.name)
            column = np.empty(count, dtype=old.dtype)
            column[: len(old)] = old
            column[rows] = getattr(fresh, field.name)
            columns[field.name] = column
        return type(self)(**columns)  # type: ignore[arg-type]

    def degrees_of_freedom(self) -> NDArray[np.int64]:
        """Return those of Student's t per row; below 1 there is no interval."""
        df: NDArray[np.int64] = self.sites - np.where(self.used == "median", 0, self.trimmed) - 1
        return df

    def row(self, index: int) -> Estimate:
        """Return one row as plain Python values."""
        return Estimate(
            value=_or_none(self.value[index]),
            stderr=_or_none(self.stderr[index]),
            lower=_or_none(self.lower[index]),
            upper=_or_none(self.upper[index]),
            sites=int(self.sites[index]),
            effective_sites=float(self.effective_sites[index]),
            trimmed=int(self.trimmed[index]),
            tolerated=int(self.tolerated[index]),
            used=self.used[index],
            tolerance=_or_none(self.tolerance[index]),
            confidence=float(self.confidence[index]),
            reason=self.reason[index],
        )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
