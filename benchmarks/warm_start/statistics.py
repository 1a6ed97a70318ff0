"""Evaluations to a target, ratios of them with their bootstrap, and where warm is worse than cold.

The data sets are the units: intervals resample them, and within each its repetitions, the same for both
arms of a ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

TARGET_AT: Final = 25
CHECKPOINTS: Final = (5, 10, 25, 50)
RESAMPLES: Final = 4000

_TAILS: Final = (2.5, 97.5)  # per cent


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    lower: float
    upper: float


@dataclass(frozen=True, slots=True)
class Loss:
    """A data set on which an arm is worse than its reference by more than chance.

    Attributes:
        data_set: Its name.
        evaluations: After which both were compared.
        difference: Mean paired difference of the error, with its interval; above 0.
        noise: Standard error of an entry of the table, to judge the size by.
    """

    data_set: str
    evaluations: int
    difference: Interval
    noise: float


def target_of(traces: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median best error after 25 evaluations, per data set."""
    return np.asarray(np.median(traces[:, :, TARGET_AT - 1], axis=1), dtype=np.float64)


def evaluations_to(traces: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median evaluations to the target, per data set."""
    return np.asarray(np.median(first_hits(traces, target), axis=1), dtype=np.float64)


def first_hits(traces: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each search's evaluations to the target, shape (data sets, repetitions).

    A search that does not get there counts as its budget, which is too few: a ratio against it
    understates what the target costs it.
    """
    reached = traces <= target[:, None, None]
    return np.where(reached.any(axis=2), reached.argmax(axis=2) + 1, traces.shape[2])


def share_reached(traces: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of all searches that have reached the target, by evaluations."""
    return np.asarray((traces <= target[:, None, None]).mean(axis=(0, 1)), dtype=np.float64)


def speed_up(
    cold: NDArray[np.float64], warm: NDArray[np.float64], target: NDArray[np.float64]
) -> tuple[Interval, Interval]:
    """Return how many times fewer evaluations `warm` needs than `cold`, by two means over data sets.

    The first is the ratio of the mean evaluations, which is what all data sets together save; the second
    the geometric mean of the ratios per data set, in which each counts alike.
    """
    hits = np.stack([first_hits(cold, target), first_hits(warm, target)])
    rng = np.random.default_rng(0)
    sets, repetitions = hits.shape[1:]
    chosen = rng.integers(sets, size=(RESAMPLES, sets, 1))
    within = rng.integers(repetitions, size=(RESAMPLES, sets, repetitions))
    drawn = np.median(hits[:, chosen, within], axis=3)  # (arm, resample, data set)
    observed = np.median(hits, axis=2)
    return (
        _interval(float(_ratio_of_means(observed)), _ratio_of_means(drawn)),
        _interval(float(_mean_ratio(observed)), _mean_ratio(drawn)),
    )


def losses(
    data_sets: Sequence[str],
    noise: Mapping[str, float],
    cold: NDArray[np.float64],
    warm: NDArray[np.float64],
) -> list[Loss]:
    """Return where the whole interval of the paired difference of errors is above 0.

    One in forty of all comparisons of equals ends up here by chance.
    """
    found = []
    for row, name in enumerate(data_sets):
        for evaluations in CHECKPOINTS:
            if evaluations <= cold.shape[2]:
                paired = (warm - cold)[row, :, evaluations - 1]
                difference = mean_interval(paired)
                if difference.lower > 0.0:
                    found.append(Loss(name, evaluations, difference, noise[name]))
    return found


def mean_interval(values: NDArray[np.float64]) -> Interval:
    """Return the mean of paired differences with its bootstrap interval over repetitions."""
    rng = np.random.default_rng(0)
    picked = rng.integers(len(values), size=(RESAMPLES, len(values)))
    return _interval(float(values.mean()), values[picked].mean(axis=1))


def _ratio_of_means(hits: NDArray[np.float64]) -> NDArray[np.float64]:
    cold, warm = hits.mean(axis=-1)
    return np.asarray(cold / warm)


def _mean_ratio(hits: NDArray[np.float64]) -> NDArray[np.float64]:
    cold, warm = np.log(hits).mean(axis=-1)
    return np.asarray(np.exp(cold - warm))


def _interval(value: float, resampled: NDArray[np.float64]) -> Interval:
    lower, upper = np.percentile(resampled, _TAILS)
    return Interval(value, float(lower), float(upper))
