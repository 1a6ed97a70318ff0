"""From traces to the numbers that are reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.warm_start.experiment import (
    COLD,
    CONDITIONS,
    ESTIMATORS,
    NO_ATTACK,
    Outcome,
    tpe_arm,
    warm_arm,
    worst_attack,
)
from benchmarks.warm_start.statistics import (
    Interval,
    Loss,
    evaluations_to,
    first_hits,
    losses,
    speed_up,
    target_of,
)

GOAL: Final = 2.5
"""Times fewer evaluations to the cold median at 25, with two sites lying."""


@dataclass(frozen=True, slots=True)
class Row:
    """An arm against the median of one cold search after 25 evaluations.

    Attributes:
        evaluations: Median evaluations to it, by data set.
        unreached: Searches that did not get there, as a share.
        mean: Of `evaluations`.
        fewer: Ratio of the cold mean to the arm's.
        fewer_geometric: Geometric mean over the data sets of the ratio.
    """

    evaluations: dict[str, float]
    unreached: float
    mean: float
    fewer: Interval
    fewer_geometric: Interval


@dataclass(frozen=True, slots=True)
class Summary:
    """All that is reported.

    Attributes:
        rows: By the cold search that sets the target, then by arm.
        worst: The worst attack, by estimator.
        losses: Of our warm starts, by arm, then by the cold search that it is compared with.
    """

    rows: Mapping[str, Mapping[str, Row]]
    worst: Mapping[str, str]
    losses: Mapping[str, Mapping[str, tuple[Loss, ...]]]

    def headline(self) -> Row:
        """Return the row of our warm start under its worst attack, against random search."""
        return self.rows["cold random"][warm_arm("ours", self.worst["ours"])]

    def as_json(self, outcome: Outcome) -> dict[str, Any]:
        """Return everything in plain types."""
        return {"effort": asdict(outcome.effort), "noise": dict(outcome.noise), **asdict(self)}


def summarise(outcome: Outcome) -> Summary:
    """Compute what is reported."""
    rows = {cold: {arm: _row(outcome, cold, arm) for arm in outcome.traces} for cold in COLD}
    worst = {estimator: worst_attack(outcome.traces, estimator) for estimator in ESTIMATORS}
    lost = {
        arm: {cold: _losses(outcome, cold, arm) for cold in colds}
        for arm, colds in _compared(outcome).items()
    }
    return Summary(rows, worst, lost)


def _compared(outcome: Outcome) -> dict[str, tuple[str, ...]]:
    """Return the cold searches that each of our warm arms is compared with: all, and TPE with TPE."""
    ours = {warm_arm("ours", condition): COLD for condition in CONDITIONS}
    tpe = {tpe_arm(condition): ("cold TPE",) for condition in CONDITIONS}
    return {arm: colds for arm, colds in (ours | tpe).items() if arm in outcome.traces}


def _losses(outcome: Outcome, cold: str, arm: str) -> tuple[Loss, ...]:
    traces = outcome.traces
    return tuple(losses(outcome.data_sets, outcome.noise, traces[cold], traces[arm]))


def _row(outcome: Outcome, cold: str, arm: str) -> Row:
    traces = outcome.traces[arm]
    target = target_of(outcome.traces[cold])
    evaluations = evaluations_to(traces, target)
    fewer, fewer_geometric = speed_up(outcome.traces[cold], traces, target)
    hits = first_hits(traces, target)
    missed = (hits == traces.shape[2]) & (traces[:, :, -1] > target[:, None])
    return Row(
        evaluations=dict(zip(outcome.data_sets, map(float, evaluations), strict=True)),
        unreached=float(missed.mean()),
        mean=float(evaluations.mean()),
        fewer=fewer,
        fewer_geometric=fewer_geometric,
    )


def shown_arms(summary: Summary) -> list[str]:
    """Return the arms of the short tables: cold, and warm without an attack and under the worst."""
    arms = list(COLD)
    for estimator, worst in summary.worst.items():
        arms += [warm_arm(estimator, condition) for condition in (NO_ATTACK, worst)]
    return arms
