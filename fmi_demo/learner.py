"""A learner that a site tunes: random Fourier features (RBF kernel) under a linear classifier by SGD.

It is what a small device can run online, and unlike a support vector machine its library defaults do
not work on these images, so that there is something to tune. Labels are dear: unless a policy says
otherwise it is trained on a third of a site's images and tested on the other two thirds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import sklearn
from numpy.typing import NDArray
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import StratifiedKFold

from fmi_demo.data import SitePart
from fmi_demo.scenario import BOX, Settings

__all__ = [
    "Measurement",
    "Policy",
    "Trial",
    "best_of",
    "from_unit",
    "measure",
    "to_unit",
    "tune",
]

_THIRDS: Final = 3
_EPOCHS: Final = 10
_LOCAL_STEP: Final = 0.1  # standard deviation of a step, as a share of the box
_LOW: Final = np.log10([low for low, _ in BOX.values()])
_SPAN: Final = np.log10([high for _, high in BOX.values()]) - _LOW


@dataclass(frozen=True, slots=True)
class Policy:
    """How the learner is run, beside its settings. The defaults are what every site starts with.

    Attributes:
        labelled_thirds: Thirds of the images that are labelled for training, 1 or 2.
        n_components: Random features.
        averaging: Whether the weights are averaged over the steps of SGD.
        augment: `none`, or `shift` for four more images of each, moved by a pixel.
    """

    labelled_thirds: int = 1
    n_components: int = 64
    averaging: bool = False
    augment: str = "none"


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one evaluation measured.

    Attributes:
        accuracies: Share of right answers on the images left out, per split.
        weight_norm: Mean over the splits of log10 of the Euclidean norm of the model's weights.
        tested: Answers counted, over all splits.
    """

    accuracies: tuple[float, ...]
    weight_norm: float
    tested: int

    @property
    def accuracy(self) -> float:
        """The mean over the splits."""
        return math.fsum(self.accuracies) / len(self.accuracies)


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluated candidate: where in the unit cube, and how well it did."""

    unit: tuple[float, ...]
    accuracy: float


def to_unit(settings: Settings) -> tuple[float, ...]:
    """Place settings in the unit cube, on a log scale; what lies outside the box is clipped to it."""
    logs = np.log10([settings[name] for name in BOX])
    return tuple(float(u) for u in np.clip((logs - _LOW) / _SPAN, 0.0, 1.0))


def from_unit(unit: tuple[float, ...]) -> dict[str, float]:
    """Read settings off a point of the unit cube; the inverse of `to_unit` inside the box."""
    values = 10.0 ** (_LOW + np.clip(unit, 0.0, 1.0) * _SPAN)
    return {
        name: float(np.clip(value, *bounds))
        for (name, bounds), value in zip(BOX.items(), values, strict=True)
    }


def measure(
    part: SitePart,
    settings: Settings,
    *,
    split_seed: int,
    repeats: int = 1,
    policy: Policy = Policy(),
) -> Measurement:
    """Train on one part of a site's images and test on the rest, with each third in turn.

    Args:
        part: The site's data.
        settings: Of the learner.
        split_seed: Decides the thirds; the same seed gives the same thirds, so that differences are
            paired.
        repeats: How often the images are split anew.
        policy: How the learner is run.
    """
    accuracies: list[float] = []
    norms: list[float] = []
    tested = 0
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        for one, two in _splits(part, split_seed, repeats):
            train, test = (one, two) if policy.labelled_thirds == 1 else (two, one)
            images, labels = part.images[train], part.labels[train]
            if policy.augment == "shift":
                images, labels = _shifted(images, labels)
            features = RBFSampler(
                gamma=settings["gamma"], n_components=policy.n_components, random_state=0
            )
            model = SGDClassifier(
                loss="log_loss",
                alpha=settings["alpha"],
                learning_rate="constant",
                eta0=settings["eta0"],
                max_iter=_EPOCHS,
                tol=None,
                average=policy.averaging,
                random_state=0,
            )
            model.fit(features.fit_transform(images), labels)
            answers = model.predict(features.transform(part.images[test]))
            accuracies.append(float(np.mean(answers == part.labels[test])))
            norms.append(math.log10(float(np.linalg.norm(model.coef_))))
            tested += len(test)
    return Measurement(tuple(accuracies), math.fsum(norms) / len(norms), tested)


def tune(
    evaluate: Callable[[Settings], float],
    *,
    seed: int,
    budget: int,
    start: Settings | None = None,
) -> Iterator[Trial]:
    """Search the box: every other candidate is drawn from all of it, the others are near the best.

    The first candidate is `start`, or a random one where there is none. All that is random depends on
    `seed` alone, so that searches that differ in their start are paired.

    Args:
        evaluate: Gives the accuracy of settings.
        seed: Of the candidates.
        budget: Evaluations.
        start: The first candidate.
    """
    rng = np.random.default_rng(seed)
    anywhere = rng.random((budget, len(BOX)))
    steps = rng.standard_normal((budget, len(BOX))) * _LOCAL_STEP
    best: Trial | None = None
    for i in range(budget):
        if best is None:
            unit = _point(anywhere[i]) if start is None else to_unit(start)
        elif i % 2:
            unit = _point(np.clip(best.unit + steps[i], 0.0, 1.0))
        else:
            unit = _point(anywhere[i])
        trial = Trial(unit, evaluate(from_unit(unit)))
        if best is None or trial.accuracy > best.accuracy:
            best = trial
        yield trial


def best_of(trials: list[Trial]) -> Trial:
    """Return the trial with the highest accuracy, the earliest among equals."""
    return max(trials, key=lambda trial: trial.accuracy)


def _point(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _splits(
    part: SitePart, split_seed: int, repeats: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    for repeat in range(repeats):
        folds = StratifiedKFold(_THIRDS, shuffle=True, random_state=split_seed + repeat)
        for most, third in folds.split(part.images, part.labels):
            yield third, most


def _shifted(
    images: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Add each image four times, moved by a pixel up, down, left and right."""
    square = images.reshape(-1, 8, 8)
    moved = [square] + [np.roll(square, step, axis) for axis in (1, 2) for step in (-1, 1)]
    return np.concatenate(moved).reshape(-1, images.shape[1]), np.tile(labels, len(moved))
