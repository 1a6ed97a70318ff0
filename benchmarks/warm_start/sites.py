"""What an honest site says: the best settings that its own search found, and how sure it is of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks.warm_start.searches import Trial, best_of, draws_of, local_search
from benchmarks.warm_start.tables import LIBRARY_DEFAULTS, Settings, Space, Table

_GOOD_SHARE: Final = 0.1  # of the evaluations; their spread says what a site is sure of
_UNIFORM_SPREAD: Final = 1.0 / np.sqrt(12.0)  # standard deviation of a uniform draw
_LEAST_CONFIDENCE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Report:
    """One Meta Signal Pack, before it is a packet.

    Attributes:
        settings: Controller signals.
        error: Validation error that the site says it has.
        confidence: By setting.
        samples: Evaluations behind it.
    """

    settings: Settings
    error: float
    confidence: Settings
    samples: int

    def body(self) -> dict[str, Any]:
        """Return the packet in plain form, without its header."""
        signals = {name: {"confidence": value} for name, value in self.confidence.items()}
        return {
            "msp": {
                "window_span": [0, max(0, self.samples - 1)],
                "metrics": {"error": self.error},
                "controller": dict(self.settings),
                "evidence": {"samples": self.samples, "signals": signals},
            }
        }


def honest_report(
    table: Table, *, seed: Sequence[int], budget: int, start: Settings = LIBRARY_DEFAULTS
) -> Report:
    """Tune from the library's defaults, as a site would that was there first."""
    draws = draws_of(table.space, seed=seed, budget=budget)
    return report_of(table.space, local_search(table, draws, budget, table.space.nearest(start)))


def report_of(space: Space, trials: Sequence[Trial]) -> Report:
    """Say what a search found. Confidence is 1 minus the spread of the best tenth over a blind draw's."""
    best = best_of(trials)
    good = sorted(trials, key=lambda trial: trial.error)[: max(2, round(_GOOD_SHARE * len(trials)))]
    units = np.array([space.to_unit(space.settings(trial.point)) for trial in good])
    sure = np.clip(1.0 - units.std(axis=0, ddof=1) / _UNIFORM_SPREAD, _LEAST_CONFIDENCE, 1.0)
    names = [parameter.name for parameter in space.parameters]
    confidence = {name: float(value) for name, value in zip(names, sure, strict=True)}
    return Report(space.settings(best.point), best.error, confidence, len(trials))
