"""The trimmed means of others, as far as they are installed.

They give a value and nothing else: no standard error, no interval, no weights, no reason. scipy and Flower
trim `int(alpha * n)` values per tail, which is nothing below 10 sites. Flower and ByzFL have no missing
values: on a matrix with gaps, each signal is a call of its own on the values that are there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.aggregation.side_by_side import Task

ALPHA = 0.1


def tasks(values: NDArray[np.float64]) -> list[Task]:
    """Return the trimmed means that are installed, on a matrix of signals x sites with gaps."""
    present = [row[row < np.inf] for row in values]
    filled = np.where(values < np.inf, values, 1.0)
    found = []
    for name, make in (("scipy", _scipy), ("flwr", _flower), ("byzfl", _byzfl)):
        if importlib.util.find_spec(name) is not None:
            found += make(present, filled)
    return found


def absent() -> str:
    """Say who could not be measured."""
    missing = [n for n in ("scipy", "flwr", "byzfl") if importlib.util.find_spec(n) is None]
    if not missing:
        return "scipy, Flower and ByzFL were measured"
    return f"not installed here, so not measured: {', '.join(missing)}"


def _each(
    call: Callable[[NDArray[np.float64]], object], present: Sequence[NDArray[np.float64]]
) -> Callable[[], object]:
    return lambda: [call(values) for values in present]


def _scipy(present: Sequence[NDArray[np.float64]], _filled: NDArray[np.float64]) -> list[Task]:
    stats: Any = importlib.import_module("scipy.stats")
    per_key = _each(lambda values: stats.trim_mean(values, ALPHA), present)
    return [Task("scipy.stats.trim_mean, per signal", per_key)]


def _flower(present: Sequence[NDArray[np.float64]], filled: NDArray[np.float64]) -> list[Task]:
    flower: Any = importlib.import_module("flwr.server.strategy.aggregate")
    trimmed = flower.aggregate_trimmed_avg
    results = [[([np.array(value)], 1) for value in values.tolist()] for values in present]
    whole = [([column], 1) for column in np.ascontiguousarray(filled.T)]
    return [
        Task("Flower's trimmed mean, per signal", lambda: [trimmed(r, ALPHA) for r in results]),
        Task("Flower's, one array a site, no gaps", lambda: trimmed(whole, ALPHA)),
    ]


def _byzfl(present: Sequence[NDArray[np.float64]], filled: NDArray[np.float64]) -> list[Task]:
    byzfl: Any = importlib.import_module("byzfl")
    whole, trimmed = np.ascontiguousarray(filled.T), byzfl.TrMean(int(ALPHA * filled.shape[1]))

    def one(values: NDArray[np.float64]) -> object:
        return byzfl.TrMean(int(ALPHA * values.size))(values[:, None])

    return [
        Task("ByzFL's trimmed mean, per signal", _each(one, present)),
        Task("ByzFL's, one array a site, no gaps", lambda: trimmed(whole)),
    ]
