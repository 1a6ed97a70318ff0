"""What is measured: matrices with gaps, and cohorts that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fmi_server.aggregation import CohortMatrix

FILLED = 0.6
SEED = 12


def matrix(signals: int, sites: int) -> NDArray[np.float64]:
    """Make values, signals x sites, 60 % of them there, the others `+inf`."""
    random = np.random.default_rng(SEED)
    values = random.normal(1.0, 0.1, (signals, sites))
    values[random.random(values.shape) >= FILLED] = np.inf
    return values


@lru_cache
def names(signals: int) -> list[str]:
    """Name signals."""
    return [f"signal_{number:03}" for number in range(signals)]


def sites_of(count: int) -> list[str]:
    """Name sites."""
    return [f"site_{number:06}" for number in range(count)]


def packet(values: Sequence[float], chosen: Sequence[int]) -> dict[str, dict[str, float]]:
    """Make what a packet says of some signals."""
    known = names(len(values))
    return {"controller": {known[row]: values[row] for row in chosen}}


def cohort(values: NDArray[np.float64], confidence: Sequence[float] | None = None) -> CohortMatrix:
    """Make a cohort of a matrix, one packet a site."""
    held = CohortMatrix()
    for number, site in enumerate(sites_of(values.shape[1])):
        column = values[:, number]
        said = packet(column.tolist(), np.flatnonzero(column < np.inf).tolist())
        held.put(site, said, now=0.0, confidence=confidence[number] if confidence else 1.0)
    return held


def reputations(sites: int) -> dict[str, float]:
    """Make a reputation for each site, no two classes alike."""
    random = np.random.default_rng(SEED)
    return dict(zip(sites_of(sites), random.uniform(0.3, 1.0, sites).tolist(), strict=True))
