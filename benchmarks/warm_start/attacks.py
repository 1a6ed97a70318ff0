"""How sites lie. All liars know what every honest site says and what is worst for the newcomer.

Every lie stands inside the bounds of the cohort spec (others are refused), with confidence 1, a billion
samples and an error of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.warm_start.sites import Report
from benchmarks.warm_start.tables import Settings, Space

_SAMPLES: Final = 10**9
_DRIFT_PACKETS: Final = 20


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What liars know.

    Attributes:
        space: The grid.
        honest: What the honest sites say, in the unit cube, shape (sites, parameters).
        worst: The newcomer's worst configuration, likewise, shape (parameters,).
    """

    space: Space
    honest: NDArray[np.float64]
    worst: NDArray[np.float64]

    @property
    def centre(self) -> NDArray[np.float64]:
        return np.asarray(self.honest.mean(axis=0), dtype=np.float64)


Attack: TypeAlias = Callable[[Scene, np.random.Generator], list[NDArray[np.float64]]]
"""Gives the claims of one liar in the unit cube, a packet each, in the order they are sent."""


def scene_of(space: Space, honest: Sequence[Settings], worst: Settings) -> Scene:
    return Scene(space, np.array([space.to_unit(s) for s in honest]), space.to_unit(worst))


def lies(attack: Attack, scene: Scene, rng: np.random.Generator) -> list[Report]:
    """Return the packets of one liar."""
    certain = {parameter.name: 1.0 for parameter in scene.space.parameters}
    return [
        Report(scene.space.from_unit(claim), 0.0, certain, _SAMPLES) for claim in attack(scene, rng)
    ]


def far_corner(scene: Scene, _rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Each setting at the bound that is farther from the honest centre: the hardest pull on a mean."""
    return [np.where(scene.centre < 0.5, 1.0, 0.0)]


def mirror(scene: Scene, _rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """The honest centre, mirrored at the middle of the box."""
    return [1.0 - scene.centre]


def worst_settings(scene: Scene, _rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """The newcomer's worst configuration: a plausible report, and a collusion."""
    return [scene.worst]


def noise(scene: Scene, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Settings at random, each liar its own."""
    return [rng.random(scene.honest.shape[1])]


def just_inside(scene: Scene, _rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Each setting at the outermost honest value on the way to the worst: nothing to tell it by."""
    low, high = scene.honest.min(axis=0), scene.honest.max(axis=0)
    return [np.where(scene.worst < scene.centre, low, high)]


def drift(scene: Scene, rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """From the honest centre to the far corner in many small packets, against a record of trust."""
    (corner,) = far_corner(scene, rng)
    shares = np.linspace(0.0, 1.0, _DRIFT_PACKETS)
    return [(1.0 - share) * scene.centre + share * corner for share in shares]


ATTACKS: Final[Mapping[str, Attack]] = {
    "far corner": far_corner,
    "mirror": mirror,
    "worst settings": worst_settings,
    "noise": noise,
    "just inside": just_inside,
    "drift": drift,
}
