"""What a site says: its findings as the bodies of packets, in plain form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from fmi_demo.causes import COLUMNS, Causes
from fmi_demo.learner import Measurement, Policy, Trial, best_of, from_unit
from fmi_demo.scenario import BOX

__all__ = ["POLICIES", "Body", "ccs_body", "msp_body", "pop_body", "smallest_gain"]

Body: TypeAlias = dict[str, dict[str, Any]]
"""A packet in plain form, without its header: the name of the type and the fields."""

POLICIES: Final[tuple[tuple[dict[str, Any], Policy], ...]] = (
    ({"labelled_thirds": 2}, Policy(labelled_thirds=2)),
    ({"n_components": 256}, Policy(n_components=256)),
    ({"augment": "shift"}, Policy(augment="shift")),
    ({"averaging": True}, Policy(averaging=True)),
)
"""Changes that every site tries: what is said of them, and how the learner runs under them."""

_FEWEST_CANDIDATES: Final = 5  # that the spread of good settings is taken over
_UNIFORM_SPREAD: Final = 1.0 / math.sqrt(12.0)  # standard deviation of a uniform draw from the box


def smallest_gain(accuracy: float, images: int) -> float:
    """Return the smallest gain that a site can tell from chance: one binomial standard error."""
    return math.sqrt(max(accuracy * (1.0 - accuracy), 0.25 / images) / images)


def msp_body(
    trials: Sequence[Trial], best: Measurement, default: Measurement, *, images: int
) -> Body:
    """Describe the state of a site's tuning.

    The confidence in a setting is 1 minus the spread of the good candidates along it, in units of the
    spread of a blind draw: a setting that hardly matters is one that a site is not sure of. Good are
    the candidates within `smallest_gain` of the best, and at least five.

    Args:
        trials: All that were evaluated.
        best: The best of them.
        default: The library's defaults at this site, on the same splits.
        images: Images that the site has.
    """
    top = best_of(list(trials))
    g_min = smallest_gain(best.accuracy, images)
    ranked = sorted(trials, key=lambda trial: -trial.accuracy)
    good = [t for t in ranked if t.accuracy >= top.accuracy - g_min]
    good = ranked[: max(len(good), _FEWEST_CANDIDATES)]
    spread = np.std([t.unit for t in good], axis=0, ddof=1) if len(good) > 1 else np.ones(len(BOX))
    settings = from_unit(top.unit)
    evidence = {
        name: {
            "confidence": float(np.clip(1.0 - spread[i] / _UNIFORM_SPREAD, 0.05, 1.0)),
            "samples": len(good),
            # The spread is of shares of the box on a log scale; the error is in the setting's unit.
            "stderr": float(
                settings[name]
                * spread[i]
                * math.log(BOX[name][1] / BOX[name][0])
                / math.sqrt(len(good))
            ),
        }
        for i, name in enumerate(BOX)
    }
    gains = [b - d for b, d in zip(best.accuracies, default.accuracies, strict=True)]
    return {
        "msp": {
            "window_span": [0, len(trials) - 1],
            "metrics": {"accuracy": best.accuracy, "gain_p50": float(np.median(gains))},
            "controller": settings,
            "evaluator": {"g_min": g_min},
            "evidence": {
                "confidence": 1.0 - g_min,
                "samples": best.tested,
                "signals": {**evidence, "accuracy": {"stderr": g_min}},
            },
        }
    }


def pop_body(bundle: dict[str, Any], before: Measurement, after: Measurement) -> Body:
    """Describe a policy change by what was measured before and after it, in the same thirds.

    The confidence is the share of the effect in effect and standard error together, the error being
    that of the mean of the paired differences.
    """
    gains = np.subtract(after.accuracies, before.accuracies)
    effect = abs(float(gains.mean()))
    stderr = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    return {
        "pop": {
            "bundle": bundle,
            "before": {"accuracy": before.accuracy},
            "after": {"accuracy": after.accuracy},
            "windows": len(gains),
            "confidence": effect / (effect + stderr) if effect else 0.0,
        }
    }


def ccs_body(causes: Causes, concepts: dict[str, float]) -> Body:
    """Describe the causes that a site found, and its handwriting as concepts."""
    return {
        "ccs": {
            "causal_pairs": [
                (c.source, c.target, c.weight, "direct", c.stderr) for c in causes.found
            ],
            "concepts": [{"id": name, "score": score} for name, score in concepts.items()],
            "tested_nodes": list(COLUMNS),
            "trust": causes.trust,
        }
    }
