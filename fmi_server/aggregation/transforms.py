"""Signal rules, and the scale on which a signal is averaged.

A learning rate is averaged on its logarithm, a probability on its log-odds. Values are clipped to
the declared bounds and transformed when they arrive; estimates are transformed back when they
leave. All three transforms rise, so that ranks, trimming and the guarantee ROBUST carry over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation.certainty import SHARE_OF_DEVIATION, SHARE_OF_MAGNITUDE, Tolerance
from fmi_server.aggregation.estimates import EstimateTable
from fmi_server.aggregation.estimators import MAX_MAGNITUDE

__all__ = ["LOGIT_MARGIN", "SignalRule", "TransformName", "TransformTable"]

TransformName = Literal["linear", "log", "logit"]

LOGIT_MARGIN = 1e-6
"""What a logit signal is moved away from its bounds, in shares of its width, so that they stay finite.

A share p is averaged as that of `m + (1 - 2m) p`: a map that rises and has an inverse, so that sites that
all stand at a bound give the bound.
"""

_LINEAR, _LOG, _LOGIT = range(3)
_KINDS: dict[TransformName, int] = {"linear": _LINEAR, "log": _LOG, "logit": _LOGIT}


@dataclass(frozen=True, slots=True)
class SignalRule:
    """Declare one signal of a cohort.

    Attributes:
        name: the signal, unique in the cohort.
        section: where it stands in a packet (`metrics`, `controller`, ...).
        lower: smallest value; smaller ones are clipped. None means unbounded.
        upper: largest value.
        transform: scale on which it is averaged. `log` takes positive values only; `logit` needs
            both bounds or takes 0 and 1.
        direction: +1 higher is better, -1 lower is better, None not scored.
        scale: size of a difference that matters, in the unit of the signal: policy deltas are
            divided by it, and the confidence of an estimate is about it. None where it is not
            declared: deltas are then told in the unit, and bounds and spread decide what matters.
        unit: for people.
    """

    name: str
    section: str = "metrics"
    lower: float | None = None
    upper: float | None = None
    transform: TransformName = "linear"
    direction: Literal[1, -1] | None = None
    scale: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        if self.transform not in get_args(TransformName):
            raise ValueError(f"signal {self.name!r}: unknown transform {self.transform!r}")
        if self.direction not in (None, 1, -1):
            raise ValueError(f"signal {self.name!r}: direction must be 1, -1 or None")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0.0):
            raise ValueError(f"signal {self.name!r}: scale must be positive, got {self.scale}")
        for bound in (self.lower, self.upper):
            if bound is not None and not abs(bound) <= MAX_MAGNITUDE:
                raise ValueError(f"signal {self.name!r}: bound {bound} is not usable")
        if self.lower is not None and self.upper is not None and not self.lower < self.upper:
            raise ValueError(f"signal {self.name!r}: lower must be below upper")
        if self.transform == "log" and self.lower is not None and self.lower <= 0.0:
            raise ValueError(f"signal {self.name!r}: a log signal needs a positive lower bound")
        if self.transform == "log" and self.upper is not None and self.upper <= 0.0:
            raise ValueError(f"signal {self.name!r}: a log signal needs a positive upper bound")
        if self.transform == "logit" and (self.lower is None) != (self.upper is None):
            raise ValueError(f"signal {self.name!r}: a logit signal needs both bounds or neither")


class TransformTable:
    """Hold the transforms of many signals as arrays, one entry per signal, growing at the end."""

    def __init__(self, rules: Sequence[SignalRule] = ()) -> None:
        self._kind: NDArray[np.int8] = np.zeros(0, dtype=np.int8)
        self._lower: NDArray[np.float64] = np.zeros(0)
        self._upper: NDArray[np.float64] = np.zeros(0)
        self._scale: NDArray[np.float64] = np.zeros(0)
        self._count = 0
        for rule in rules:
            self.append(rule)

    def __len__(self) -> int:
        return self._count

    def append(self, rule: SignalRule) -> None:
        """Add one signal behind the others."""
        if self._count == len(self._kind):
            extra = max(16, self._count)
            self._kind = np.concatenate([self._kind, np.zeros(extra, dtype=np.int8)])
            self._lower = np.concatenate([self._lower, np.zeros(extra)])
            self._upper = np.concatenate([self._upper, np.zeros(extra)])
            self._scale = np.concatenate([self._scale, np.zeros(extra)])
        lower = -math.inf if rule.lower is None else rule.lower
        upper = math.inf if rule.upper is None else rule.upper
        if rule.transform == "logit" and rule.lower is None:
            lower, upper = 0.0, 1.0
        self._kind[self._count] = _KINDS[rule.transform]
        self._lower[self._count] = lower
        self._upper[self._count] = upper
        self._scale[self._count] = math.nan if rule.scale is None else rule.scale
        self._count += 1

    def forward(self, rows: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Clip to the bounds and transform.

        Args:
            rows: which signal each value belongs to.
            values: finite values, same length.

        Returns:
            Transformed values; NaN where a log signal is not positive.
        """
        kind, lower, upper = self._kind[rows], self._lower[rows], self._upper[rows]
        clipped = np.clip(values, lower, upper) + 0.0  # there is one zero
        log, logit = kind == _LOG, kind == _LOGIT
        if log.any():
            positive = np.where(clipped[log] > 0.0, clipped[log], np.nan)
            clipped[log] = np.log(positive)
        if logit.any():
            share = (clipped[logit] - lower[logit]) / (upper[logit] - lower[logit])
            clipped[logit] = _log_odds(share)
        return clipped

    def takes(self, row: int, value: float) -> bool:
        """Return whether a finite value lies in the domain of a signal's transform, once it is clipped."""
        return bool(self._kind[row] != _LOG or value > 0.0 or self._lower[row] > 0.0)

    def to_unit(self, rows: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move transformed values of bounded signals to -1..1: their bounds to the ends.

        Args:
            rows: signals, with both bounds.
            values: transformed, rows x sites; `+inf` where missing, which becomes NaN.
        """
        low, half = self._unit_scale(rows)
        moved = (values - low[:, None]) / half[:, None] - 1.0
        return np.where(np.isposinf(values), np.nan, moved)

    def from_unit(
        self, rows: NDArray[np.int64], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return numbers in -1..1 on the signals' own scales; the inverse of `to_unit` and the transform."""
        low, half = self._unit_scale(rows)
        inverse, _ = self._inverse(rows, low + (values + 1.0) * half)
        own: NDArray[np.float64] = np.clip(inverse, self._lower[rows], self._upper[rows])
        return own

    def unit_slope(
        self, rows: NDArray[np.int64], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return by how much of its own unit a signal rises per unit of -1..1, at numbers there."""
        low, half = self._unit_scale(rows)
        _, slope = self._inverse(rows, low + (values + 1.0) * half)
        per_unit: NDArray[np.float64] = slope * half
        return per_unit

    def unit_difference(
        self, rows: NDArray[np.int64], values: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the difference that matters at numbers in -1..1, in that unit; see `difference`."""
        low, half = self._unit_scale(rows)
        there: NDArray[np.float64] = self.difference(rows, low + (values + 1.0) * half) / half
        return there

    def _unit_scale(
        self, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        low = self.forward(rows, self._lower[rows])
        return low, (self.forward(rows, self._upper[rows]) - low) / 2.0

    def tolerance(self, rows: NDArray[np.int64]) -> Tolerance:
        """Return what tells how large a difference matters, on the transformed scale.

        It is the declared `scale`, else the larger of half the deviation between the sites and
        `difference`.
        """
        declared = ~np.isnan(self._scale[rows])

        def matters(
            value: NDArray[np.float64], deviation: NDArray[np.float64]
        ) -> NDArray[np.float64]:
            least = self.difference(rows, value)
            larger: NDArray[np.float64] = np.fmax(SHARE_OF_DEVIATION * deviation, least)
            return np.where(declared, least, larger)

        return matters

    def difference(self, rows: NDArray[np.int64], at: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the difference that matters at a transformed value, whatever the sites' spread.

        It is the declared `scale` by the slope at the value, else a tenth of what the signal
        measures: half the width between its bounds, a factor e, one unit of log-odds, or without
        any of these the value itself.

        Args:
            rows: signals.
            at: one value for each, or as many as there are in a second axis.
        """
        shape = at.shape
        rows = np.broadcast_to(rows.reshape(-1, *[1] * (at.ndim - 1)), shape).ravel()
        at = at.ravel()
        scale = self._scale[rows]
        half_width = (self._upper[rows] - self._lower[rows]) / 2.0
        size = np.where(np.isfinite(half_width), half_width, np.abs(at))
        size = np.where(self._kind[rows] == _LINEAR, size, 1.0)
        with np.errstate(over="ignore"):
            declared = np.minimum(scale / self._inverse(rows, at)[1], MAX_MAGNITUDE)
        found: NDArray[np.float64] = np.where(np.isnan(scale), SHARE_OF_MAGNITUDE * size, declared)
        return found.reshape(shape)

    def back(self, rows: NDArray[np.int64], table: EstimateTable) -> EstimateTable:
        """Return the estimates on the signals' own scales.

        Value and interval ends are mapped, standard error and tolerance are multiplied by the slope
        at the value (delta method). Value and ends are clipped to the bounds: every value counted
        lies inside them, so the part of an interval outside can hold no truth, and its coverage
        stays.
        """
        value, slope = self._inverse(rows, table.value)
        least, most = self._lower[rows], self._upper[rows]
        lower, upper = (
            np.clip(self._inverse(rows, end)[0], least, most) for end in (table.lower, table.upper)
        )
        # exp(log(x)) may leave the bounds by an ulp.
        value = np.clip(value, least, most)
        return replace(
            table,
            value=value,
            stderr=table.stderr * slope,
            lower=lower,
            upper=upper,
            tolerance=np.where(
                np.isnan(self._scale[rows]) | np.isnan(value),
                table.tolerance * slope,
                self._scale[rows],
            ),
        )

    def _inverse(
        self, rows: NDArray[np.int64], values: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        kind, lower, upper = self._kind[rows], self._lower[rows], self._upper[rows]
        result, slope = values.copy(), np.ones_like(values)
        log, logit = kind == _LOG, kind == _LOGIT
        if log.any():
            # An interval end may be so far out that exp would overflow.
            result[log] = slope[log] = np.exp(np.minimum(values[log], math.log(MAX_MAGNITUDE)))
        if logit.any():
            width = upper[logit] - lower[logit]
            moved = _logistic(values[logit])
            share = (moved - LOGIT_MARGIN) / (1.0 - 2.0 * LOGIT_MARGIN)
            # Rounding must not keep those who all stand at a bound away from it.
            share = np.where(values[logit] <= _AT_LOWER, 0.0, np.clip(share, 0.0, 1.0))
            inside = lower[logit] + width * share
            result[logit] = np.where(values[logit] >= _AT_UPPER, upper[logit], inside)
            slope[logit] = width * moved * (1.0 - moved) / (1.0 - 2.0 * LOGIT_MARGIN)
        return result, slope


def _log_odds(share: NDArray[np.float64]) -> NDArray[np.float64]:
    moved = LOGIT_MARGIN + (1.0 - 2.0 * LOGIT_MARGIN) * share
    odds: NDArray[np.float64] = np.log(moved) - np.log1p(-moved)
    return odds


def _logistic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    small = np.exp(-np.abs(values))
    return np.where(values >= 0.0, 1.0 / (1.0 + small), small / (1.0 + small))


_AT_LOWER, _AT_UPPER = _log_odds(np.array([0.0, 1.0]))
