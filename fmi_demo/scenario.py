"""What the demo is about: its cohorts, its settings and their bounds, its sizes. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

__all__ = [
    "ARMS",
    "BOX",
    "CHECK_SPLITS",
    "COHORTS",
    "FULL",
    "LIARS",
    "LIBRARY_DEFAULTS",
    "MAX_SITES",
    "MIN_SITES",
    "PROFILE_CLASS",
    "QUICK",
    "REGIME",
    "TUNING_SPLITS",
    "WARM_ARMS",
    "Effort",
    "Settings",
]

Settings: TypeAlias = Mapping[str, float]
"""`gamma` of the kernel, `eta0` (learning rate) and `alpha` (regularisation) of SGD."""

BOX: Final[Mapping[str, tuple[float, float]]] = {
    "gamma": (3e-5, 8.0),
    "eta0": (1e-4, 1e2),
    "alpha": (1e-7, 1e-1),
}
"""Lower and upper bound of each setting; all are searched on a log scale. The cohorts have the same."""

LIBRARY_DEFAULTS: Final[Settings] = {"gamma": 1.0, "eta0": 0.01, "alpha": 1e-4}
"""What scikit-learn's `RBFSampler` and `SGDClassifier` use when they are told nothing."""

COHORTS: Final = ("digits", "digits-plain-mean")
"""Both get every packet; they differ in their estimator alone."""

PROFILE_CLASS: Final = "fourier-sgd"
REGIME: Final = "scanned-forms"  # all sites scanned the same form; the hands on it differ

ARMS: Final = ("cold", "library", "warm_trimmed_mean", "warm_plain_mean")
"""A random start, scikit-learn's defaults, and the warm starts of the two cohorts."""

WARM_ARMS: Final[Mapping[str, str]] = dict(zip(ARMS[2:], COHORTS, strict=True))
"""The cohort of each arm that starts warm."""

LIARS: Final = 2
"""The last of the sites; which writers they are depends on the seed."""

MIN_SITES: Final = 6  # more than twice the liars, with a quorum left when both tails are trimmed
MAX_SITES: Final = 13  # the data has 14 forms, and one is kept for the late site

TUNING_SPLITS: Final = 0
"""Seed of the splits that settings are tuned on."""

CHECK_SPLITS: Final = 1000
"""Seed of the splits that policies are judged on, which no tuning has seen."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is computed.

    Attributes:
        site_budget: Evaluations of each site's tuner.
        experiments: Rows of each site's causal experiment.
        late_budget: Evaluations of each search of the late site.
        repetitions: Paired searches of the late site; odd, so that a median is one of them.
    """

    site_budget: int
    experiments: int
    late_budget: int
    repetitions: int


FULL: Final = Effort(site_budget=40, experiments=80, late_budget=25, repetitions=15)
QUICK: Final = Effort(site_budget=14, experiments=30, late_budget=12, repetitions=5)
