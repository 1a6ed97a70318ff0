"""The searches that are compared. Each evaluates a configuration at most once.

The local search is that of `make demo`, on a grid. It was chosen, with its step and its share of random
candidates, before any arm was measured; cold and warm run the very same one and differ in the first
candidate alone. TPE is Optuna's with its default settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.warm_start.tables import Point, Space, Table

_STEP: Final = 1.0  # standard deviation of a local step, in levels of the grid
_STEP_TRIES: Final = (
    32  # steps that may lead to where the search has been, before it goes elsewhere
)
_TPE_TRIES: Final = (
    4  # trials per evaluation; Optuna may suggest what is known, which costs nothing
)


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated configuration."""

    point: Point
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """All that is random in a search, so that searches with equal draws are paired.

    Attributes:
        anywhere: Configurations in random order, without repetition.
        steps: Local steps in levels, shape (budget, tries, parameters).
    """

    anywhere: tuple[Point, ...]
    steps: NDArray[np.int64]


def draws_of(space: Space, *, seed: Sequence[int], budget: int) -> Draws:
    """Draw what a search of `budget` evaluations needs."""
    rng = np.random.default_rng(list(seed))
    size = int(np.prod(space.shape))
    # A candidate may have been visited already, so that up to as many more are needed.
    indices = rng.choice(size, min(size, 2 * budget), replace=False)
    anywhere = np.array(np.unravel_index(indices, space.shape)).T
    steps = np.rint(_STEP * rng.standard_normal((budget, _STEP_TRIES, len(space.shape))))
    return Draws(tuple(tuple(map(int, point)) for point in anywhere), steps.astype(np.int64))


def random_search(table: Table, draws: Draws, budget: int) -> list[Trial]:
    """Evaluate configurations at random."""
    return [Trial(point, float(table.errors[point])) for point in draws.anywhere[:budget]]


def local_search(table: Table, draws: Draws, budget: int, start: Point) -> list[Trial]:
    """Evaluate `start`, then in turn a neighbour of the best so far and a configuration at random."""
    anywhere = iter(draws.anywhere)
    trials = [Trial(start, float(table.errors[start]))]
    seen, best = {start}, trials[0]
    for turn in range(1, budget):
        point = _neighbour(table.space, best.point, draws.steps[turn], seen) if turn % 2 else None
        if point is None:
            point = next(candidate for candidate in anywhere if candidate not in seen)
        seen.add(point)
        trials.append(Trial(point, float(table.errors[point])))
        best = min(best, trials[-1], key=lambda trial: trial.error)
    return trials


def tpe_search(table: Table, *, seed: int, budget: int, start: Point | None = None) -> list[Trial]:
    """Run Optuna's TPE, from `start` where one is given."""
    import optuna  # noqa: PLC0415  the extra `bench` has it, tests do not

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parameters = table.space.parameters
    levels = {
        p.name: optuna.distributions.IntDistribution(0, len(p.levels) - 1) for p in parameters
    }
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    if start is not None:
        study.enqueue_trial({p.name: i for p, i in zip(parameters, start, strict=True)})
    found: dict[Point, Trial] = {}
    for _ in range(_TPE_TRIES * budget):
        asked = study.ask(levels)
        point = tuple(int(asked.params[p.name]) for p in parameters)
        found.setdefault(point, Trial(point, float(table.errors[point])))
        study.tell(asked, found[point].error)
        if len(found) == budget:
            break
    return list(found.values())


def best_of(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the smallest error, the earliest among equals."""
    return min(trials, key=lambda trial: trial.error)


def best_so_far(trials: Sequence[Trial], budget: int) -> NDArray[np.float64]:
    """Return the smallest error after each evaluation; a search that ended early stays where it was."""
    errors = np.minimum.accumulate([trial.error for trial in trials])
    return np.pad(errors, (0, budget - len(errors)), mode="edge")


def _neighbour(
    space: Space, best: Point, steps: NDArray[np.int64], seen: set[Point]
) -> Point | None:
    """Return the first place that the steps lead to and that was not visited, if there is one."""
    reached = np.clip(np.array(best) + steps, 0, np.array(space.shape) - 1)
    places = (tuple(map(int, place)) for place in reached)
    return next((place for place in places if place not in seen), None)
