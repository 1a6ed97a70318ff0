"""What a run of the demo gives: every figure, computed from what the sites and the server said."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from fmi.v1 import update_pb2
from fmi_demo.events import Curve, HintTried, SiteFinished, WarmStarted
from fmi_demo.scenario import ARMS, BOX

__all__ = [
    "ArmResult",
    "DemoResult",
    "Edge",
    "PriorValue",
    "best_so_far",
    "compare_arms",
    "edges_of",
    "evaluations_to",
    "prior_values",
    "write_results",
]


@dataclass(frozen=True, slots=True)
class ArmResult:
    """What one start was worth, over the paired repetitions.

    Attributes:
        arm: Name from `ARMS`.
        first: Median accuracy of the first candidate.
        final: Median accuracy of the best candidate of a whole search.
        evaluations: Median evaluations until the target was reached; None where fewer than half of the
            searches reached it.
        reached: Searches that reached it.
        sooner: Searches that reached it in fewer evaluations than the cold search they are paired with.
        searches: All searches.
    """

    arm: str
    first: float
    final: float
    evaluations: int | None
    reached: int
    sooner: int
    searches: int


@dataclass(frozen=True, slots=True)
class PriorValue:
    """A setting in a cohort's last prior, with its 95 % interval where there is one."""

    value: float
    lower: float | None
    upper: float | None
    sites: int
    trimmed: int


@dataclass(frozen=True, slots=True)
class Edge:
    """A relation in the first cohort's causal consensus; every count includes the sites that lie."""

    source: str
    target: str
    weight: float
    lower: float | None
    upper: float | None
    estimator: str
    sites: int
    testing_sites: int
    opposite_sites: int
    sign_conflict: bool
    direction_conflict: bool


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Everything that a run of the demo found.

    Attributes:
        seed: Of the run.
        sites: The sites that emitted, in order.
        late_budget: Evaluations of each search of the late site.
        target_accuracy: What has to be reached: the median of the cold searches at their end.
        arms: What each start was worth, in the order of `ARMS`.
        warm_starts: What the cohorts gave the late site.
        hints: What became of the policy hints.
        priors: The last prior of each cohort, by cohort and setting.
        edges: The causal consensus, strongest support first.
        below_quorum: Relations that are not in it, because too few sites found them.
        packets: Packets that were emitted.
        revisions: The last revision of each cohort and kind, as `cohort/kind`.
        seconds: How long it took.
        chart: The PNG file.
        results: The JSON file of all this.
        commands: What to try next, ready for a shell.
    """

    seed: int
    sites: tuple[SiteFinished, ...]
    late_budget: int
    target_accuracy: float
    arms: tuple[ArmResult, ...]
    warm_starts: tuple[WarmStarted, ...]
    hints: tuple[HintTried, ...]
    priors: dict[str, dict[str, PriorValue]]
    edges: tuple[Edge, ...]
    below_quorum: int
    packets: int
    revisions: dict[str, int]
    seconds: float
    chart: Path
    results: Path
    commands: tuple[str, ...]


def best_so_far(accuracies: Sequence[float]) -> list[float]:
    """Return the best accuracy up to each evaluation."""
    return list(accumulate(accuracies, max))


def evaluations_to(target: float, accuracies: Sequence[float]) -> int | None:
    """Return how many evaluations it took to reach `target`; None where it was not reached."""
    return next((i for i, value in enumerate(accuracies, start=1) if value >= target), None)


def compare_arms(curves: Sequence[Curve], budget: int) -> tuple[float, tuple[ArmResult, ...]]:
    """Compare the starts by the evaluations that they needed.

    The target is the median over the cold searches of the best accuracy at their end. A search that did
    not reach it counts as one evaluation more than the budget in medians, and none is left out.

    Args:
        curves: Every arm with the same repetitions.
        budget: Evaluations of each search.
    """
    by_arm = {
        arm: [c.accuracies for c in sorted(curves, key=lambda c: c.repetition) if c.arm == arm]
        for arm in ARMS
    }
    target = statistics.median(max(accuracies) for accuracies in by_arm["cold"])
    needed = {
        arm: [evaluations_to(target, accuracies) or budget + 1 for accuracies in searches]
        for arm, searches in by_arm.items()
    }
    arms = []
    for arm, searches in by_arm.items():
        median = statistics.median_high(needed[arm])
        arms.append(
            ArmResult(
                arm=arm,
                first=statistics.median(accuracies[0] for accuracies in searches),
                final=statistics.median(max(accuracies) for accuracies in searches),
                evaluations=median if median <= budget else None,
                reached=sum(count <= budget for count in needed[arm]),
                sooner=sum(
                    ours < cold for ours, cold in zip(needed[arm], needed["cold"], strict=True)
                ),
                searches=len(searches),
            )
        )
    return target, tuple(arms)


def prior_values(prior: update_pb2.MetaPriorUpdate) -> dict[str, PriorValue]:
    """Read the learner's settings from a prior; those without a value are left out."""
    values = {}
    for name in BOX:
        estimate = prior.estimates.get(name)
        if estimate is not None and estimate.HasField("value"):
            values[name] = PriorValue(
                value=estimate.value,
                lower=estimate.lower if estimate.HasField("lower") else None,
                upper=estimate.upper if estimate.HasField("upper") else None,
                sites=estimate.sites,
                trimmed=estimate.trimmed,
            )
    return values


def edges_of(consensus: update_pb2.CausalConsensus) -> tuple[Edge, ...]:
    """Read the relations of a consensus."""
    return tuple(
        Edge(
            source=edge.source,
            target=edge.target,
            weight=edge.weight,
            lower=edge.lower if edge.HasField("lower") else None,
            upper=edge.upper if edge.HasField("upper") else None,
            estimator=edge.estimator,
            sites=edge.sites,
            testing_sites=edge.testing_sites,
            opposite_sites=edge.negative_sites if edge.weight > 0.0 else edge.positive_sites,
            sign_conflict=edge.sign_conflict,
            direction_conflict=edge.direction_conflict,
        )
        for edge in consensus.edges
    )


def write_results(result: DemoResult, curves: Sequence[Curve]) -> str:
    """Write a result and the curves behind it to `result.results`; return the text."""
    plain: dict[str, Any] = dataclasses.asdict(result)
    plain["curves"] = [dataclasses.asdict(curve) for curve in curves]
    text = json.dumps(plain, indent=2, default=str) + "\n"
    result.results.write_text(text, encoding="utf-8")
    return text
