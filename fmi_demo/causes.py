"""Causal discovery at a site: which settings move what, from an experiment on its own data.

The site draws settings at random, trains with each, and looks at the columns (the settings, the norm of
the model's weights, the accuracy) with DirectLiNGAM (Shimizu et al., JMLR 12, 2011), as `lingam`
implements it. That nothing causes the settings is known, because they were drawn at random; it is given
to the algorithm as prior knowledge. The rest is found. LiNGAM is linear: it sees the trend of an effect
over the whole box and not its peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fmi_demo.data import SitePart
from fmi_demo.learner import from_unit, measure
from fmi_demo.scenario import BOX

__all__ = ["COLUMNS", "Cause", "Causes", "experiment", "find_causes"]

COLUMNS: Final = (*BOX, "weight_norm", "accuracy")
"""The variables: settings on a log scale, then the outcomes."""

_MIN_WEIGHT: Final = 0.1  # in standard deviations; weaker relations are not told from noise here
_MIN_SHARE: Final = 0.6  # of the bootstrap samples in which a relation must be found


@dataclass(frozen=True, slots=True)
class Cause:
    """One relation that was found.

    Attributes:
        source: The cause.
        target: The effect.
        weight: Standard deviations of the effect per standard deviation of the cause, the mean over
            the bootstrap samples.
        stderr: Its standard deviation over the bootstrap samples; greater than 0.
        share: Share of the bootstrap samples in which the relation was found.
    """

    source: str
    target: str
    weight: float
    stderr: float
    share: float


@dataclass(frozen=True, slots=True)
class Causes:
    """What a site found. `trust` is the mean `share` of the relations reported, 0 for none."""

    found: tuple[Cause, ...]
    trust: float


def experiment(part: SitePart, *, rows: int, seed: int, split_seed: int) -> NDArray[np.float64]:
    """Train once for each of `rows` settings drawn from the whole box.

    Returns:
        Shape (rows, len(COLUMNS)), in the order of `COLUMNS`; settings as shares of the box.
    """
    units = np.random.default_rng(seed).random((rows, len(BOX)))
    outcomes = []
    for unit in units:
        measured = measure(part, from_unit(tuple(unit)), split_seed=split_seed)
        outcomes.append((measured.weight_norm, measured.accuracy))
    return np.column_stack([units, np.asarray(outcomes)])


def find_causes(table: NDArray[np.float64], *, seed: int, bootstraps: int = 20) -> Causes:
    """Find relations among the columns of an experiment.

    Args:
        table: Shape (rows, len(COLUMNS)).
        seed: Of the bootstrap.
        bootstraps: Samples of the rows, with replacement, that the algorithm is run on.
    """
    import lingam  # noqa: PLC0415 - it takes seconds, and whoever does not come here does not need it

    rng = np.random.default_rng(seed)
    scaled = (table - table.mean(axis=0)) / table.std(axis=0)
    unknown = -np.ones((len(COLUMNS), len(COLUMNS)), dtype=int)
    unknown[: len(BOX), :] = 0  # row = effect: nothing has an effect on a setting
    weights = np.empty((bootstraps, len(COLUMNS), len(COLUMNS)))
    for sample in range(bootstraps):
        model = lingam.DirectLiNGAM(random_state=0, prior_knowledge=unknown)
        model.fit(scaled[rng.integers(0, len(scaled), len(scaled))])
        weights[sample] = np.nan_to_num(model.adjacency_matrix_)
    share = (np.abs(weights) >= _MIN_WEIGHT).mean(axis=0)
    mean = weights.mean(axis=0)
    spread = weights.std(axis=0, ddof=1)
    found = tuple(
        Cause(
            source=COLUMNS[source],
            target=COLUMNS[target],
            weight=float(mean[target, source]),
            stderr=float(spread[target, source]),
            share=float(share[target, source]),
        )
        for target, source in np.argwhere((share >= _MIN_SHARE) & (spread > 0.0))
    )
    return Causes(found, float(np.mean([c.share for c in found])) if found else 0.0)
