"""Policy hints: which bundle of changes helped, site by site, and whether that can be trusted.

The evidence is observational: sites chose what they tried. `PolicyHint.reason` says so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from fmi_server.aggregation.certainty import sign_test_coverage
from fmi_server.aggregation.estimates import EstimateTable
from fmi_server.aggregation.estimators import MAX_MAGNITUDE, EstimatorSettings, estimate
from fmi_server.aggregation.quantiles import t_central_probability
from fmi_server.aggregation.transforms import SignalRule
from fmi_server.aggregation.weights import site_weights

__all__ = [
    "BundleAssessment",
    "BundleKey",
    "ParamValue",
    "PolicyDecision",
    "PolicyHint",
    "PolicyOutcome",
    "PolicySettings",
    "bundle_key",
    "decide_policy",
    "outcome_deltas",
]

_DIGITS = 14

ParamValue = float | str | bool
BundleKey = tuple[tuple[str, str, str], ...]
"""Canonical bundle: (name, kind, canonical text) in order of the names."""


@dataclass(frozen=True, slots=True)
class PolicyOutcome:
    """Describe what a policy change did at one site.

    Attributes:
        site_id: authenticated site.
        bundle: parameters that changed and their new values.
        before: metrics before the change.
        after: metrics after it.
        confidence: declared confidence, 0..1.
        control_delta: per metric, what changed without the policy (after - before); subtracted.
    """

    site_id: str
    bundle: Mapping[str, ParamValue]
    before: Mapping[str, float]
    after: Mapping[str, float]
    confidence: float = 1.0
    control_delta: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Hold the rules of a policy decision.

    Attributes:
        estimator: pools the sites; its `min_sites` is the quorum of a bundle.
        steps: quantisation step per numeric parameter; others keep six significant digits.
        agreement: share of the sites whose own score must be positive.
        guardrails: metrics that must not fall at all in the mean, and must have been observed.
        prior_sites: strength of the shrinkage, in sites that saw no effect.
    """

    estimator: EstimatorSettings = field(default_factory=EstimatorSettings)
    steps: Mapping[str, float] = field(default_factory=dict)
    agreement: float = 2.0 / 3.0
    guardrails: frozenset[str] = frozenset()
    prior_sites: float = 2.0

    def __post_init__(self) -> None:
        for name, step in self.steps.items():
            if not (math.isfinite(step) and step > 0.0):
                raise ValueError(f"step of {name!r} must be positive, got {step}")
        if not 0.0 <= self.agreement <= 1.0:
            raise ValueError(f"agreement must lie in 0..1, got {self.agreement}")
        if not self.prior_sites >= 0.0:
            raise ValueError(f"prior_sites must not be negative, got {self.prior_sites}")


@dataclass(frozen=True, slots=True)
class BundleAssessment:
    """Say how one bundle did and, when it does not qualify, why.

    Attributes:
        key: canonical bundle.
        sites: sites with a scored outcome.
        effect: trimmed mean score, shrunk toward zero; None below quorum.
        lower_bound: shrunk effect minus the margin of the (unshrunk) interval; None without one.
        agreement: share of the sites with a positive score.
        harmed: guardrail metrics that fell, or that too few sites observed.
        confidence: one-sided: how surely the shrunk effect is above zero, 0..1.
        refused: None when it qualifies, else `below_quorum`, `no_agreement`, `guardrail_harmed`,
            `guardrail_unobserved`, `certainty_unknown` (too few sites for an interval, or too alike)
            or `not_better_than_nothing`.
    """

    key: BundleKey
    sites: int
    effect: float | None
    lower_bound: float | None
    agreement: float
    harmed: tuple[str, ...]
    confidence: float
    refused: str | None


@dataclass(frozen=True, slots=True)
class PolicyHint:
    """Recommend one bundle.

    Attributes:
        hint_id: content hash of cohort and canonical bundle; the same advice keeps its id.
        bundle: parameters; numbers are medians over the winning sites.
        bounds: per numeric parameter, the 10 % and 90 % quantiles over the winning sites.
        reason: the evidence in words.
        confidence: how surely the effect is above zero, 0..1.
        sites: sites that tried it.
        effect: shrunk mean score, in units of the metrics' scales.
        lower_bound: lower confidence bound of the effect, above zero.
        assessment: all of it.
    """

    hint_id: str
    bundle: Mapping[str, ParamValue]
    bounds: Mapping[str, tuple[float, float]]
    reason: str
    confidence: float
    sites: int
    effect: float
    lower_bound: float
    assessment: BundleAssessment


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """Hold a hint or the reason why there is none, and how each bundle did."""

    hint: PolicyHint | None
    reason: str
    assessments: tuple[BundleAssessment, ...]
    unscored: int


def bundle_key(bundle: Mapping[str, ParamValue], steps: Mapping[str, float]) -> BundleKey:
    """Return the canonical form under which equal bundles meet.

    Numbers are rounded to a whole multiple of their step, or to six significant digits; 1 and
    1.0 are the same, a flag is never a number, a text is itself.

    Raises:
        ValueError: a value is not a finite number, a text or a flag.
    """
    parts = []
    for name in sorted(bundle):
        value = bundle[name]
        if isinstance(value, bool):
            parts.append((name, "flag", "true" if value else "false"))
        elif isinstance(value, str):
            parts.append((name, "text", value))
        elif math.isfinite(value):
            step = steps.get(name)
            # Adding 0.0 turns -0.0 into 0.0.
            plain = value + 0.0
            number = f"{plain:.6g}" if step is None else f"{_multiple(plain, step)}x{step:.6g}"
            parts.append((name, "number", number))
        else:
            raise ValueError(f"bundle parameter {name!r} must be finite, got {value}")
    return tuple(parts)


def outcome_deltas(outcome: PolicyOutcome, rules: Mapping[str, SignalRule]) -> dict[str, float]:
    """Return `direction * (after - before - control_delta) / scale` per directed metric.

    A metric without a direction, or missing before or after, is not scored. A delta beyond
    `MAX_MAGNITUDE` is moved there: the numbers of an outcome may each be legal and their difference,
    or its quotient by a small scale, larger than an estimator takes.
    """
    deltas = {}
    for name, after in outcome.after.items():
        rule = rules.get(name)
        if rule is None or rule.direction is None or name not in outcome.before:
            continue
        change = after - outcome.before[name] - outcome.control_delta.get(name, 0.0)
        largest = max(abs(after), abs(outcome.before[name]))
        delta = rule.direction * _unrounded(change, largest)
        delta /= 1.0 if rule.scale is None else rule.scale
        if math.isfinite(change):
            delta = min(max(delta, -MAX_MAGNITUDE), MAX_MAGNITUDE)
        deltas[name] = delta
    return deltas


def _unrounded(change: float, largest: float) -> float:
    """Take the rounding of binary numbers out of a difference: 0.55 - 0.45 is 0.1, as 0.3 - 0.2 is."""
    if not math.isfinite(change) or largest == 0.0:
        return change
    return round(change, _DIGITS - math.ceil(math.log10(largest)))


def _multiple(value: float, step: float) -> int:
    quotient = value / step
    # Exact where a tiny step makes the quotient larger than the largest float.
    return round(quotient) if math.isfinite(quotient) else round(Fraction(value) / Fraction(step))


def decide_policy(
    outcomes: Iterable[PolicyOutcome],
    rules: Iterable[SignalRule],
    settings: PolicySettings,
    *,
    cohort: str = "",
    reputation: Mapping[str, float] | None = None,
) -> PolicyDecision:
    """Choose the bundle with the best lower confidence bound, or say why there is none.

    One site has one vote per bundle: its outcomes with that bundle are averaged per metric; its
    score is the mean over its directed metrics. Scores are pooled over the sites by
    `settings.estimator`. The effect is shrunk toward zero by `n / (n + prior_sites)`: the mean
    after adding `prior_sites` sites that saw nothing. That answers the luck of the winner among
    many bundles; the margin is not shrunk with it.

    A bundle qualifies with `min_sites` sites, `agreement` of them positive, no guardrail harmed
    and a lower bound above zero. A directed metric is harmed when its own interval lies below
    zero, or its mean where there is no interval; one named in `guardrails` already when its mean is negative.

    Args:
        outcomes: of the window, in any order.
        rules: the cohort's signals; those with a direction are scored.
        settings: rules.
        cohort: goes into `hint_id`.
        reputation: per site; None counts all alike.

    Raises:
        ValueError: a number in an outcome is not finite, or a confidence is outside 0..1.
    """
    directed = {rule.name: rule for rule in rules if rule.direction is not None}
    groups: dict[BundleKey, list[tuple[PolicyOutcome, dict[str, float]]]] = defaultdict(list)
    unscored = 0
    for outcome in outcomes:
        deltas = outcome_deltas(outcome, directed)
        if not all(math.isfinite(delta) for delta in deltas.values()):
            raise ValueError(f"outcome of site {outcome.site_id!r}: metrics must be finite")
        if deltas:
            groups[bundle_key(outcome.bundle, settings.steps)].append((outcome, deltas))
        else:
            unscored += 1
    if not groups:
        reason = "no_scored_outcome" if unscored else "no_outcome"
        return PolicyDecision(None, reason, (), unscored)
    assessed = {key: _assess(key, groups[key], settings, reputation) for key in sorted(groups)}
    ranked = sorted(
        assessed.values(),
        key=lambda a: (a.refused is not None, -(a.lower_bound or 0.0), -a.sites, a.key),
    )
    best = ranked[0]
    if best.refused is not None or best.effect is None or best.lower_bound is None:
        return PolicyDecision(None, _why_none(ranked), tuple(ranked), unscored)
    hint = _hint(best, best.effect, best.lower_bound, groups[best.key], cohort)
    return PolicyDecision(hint, "hint", tuple(ranked), unscored)


def _site_deltas(
    group: Sequence[tuple[PolicyOutcome, dict[str, float]]],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return per site the mean delta of each metric, and the mean declared confidence."""
    by_site: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    confidence: dict[str, list[float]] = defaultdict(list)
    for outcome, deltas in group:
        confidence[outcome.site_id].append(outcome.confidence)
        for name, delta in deltas.items():
            by_site[outcome.site_id][name].append(delta)
    # fsum keeps the mean independent of the order in which outcomes came.
    means = {
        site: {name: math.fsum(found) / len(found) for name, found in metrics.items()}
        for site, metrics in by_site.items()
    }
    return means, {site: math.fsum(c) / len(c) for site, c in confidence.items()}


def _assess(
    key: BundleKey,
    group: Sequence[tuple[PolicyOutcome, dict[str, float]]],
    settings: PolicySettings,
    reputation: Mapping[str, float] | None,
) -> BundleAssessment:
    means, confidence = _site_deltas(group)
    sites = sorted(means)
    metrics = sorted({name for deltas in means.values() for name in deltas})
    matrix = np.full((1 + len(metrics), len(sites)), np.inf)
    for column, site in enumerate(sites):
        found = means[site]
        matrix[0, column] = math.fsum(found.values()) / len(found)
        for row, name in enumerate(metrics, start=1):
            matrix[row, column] = found.get(name, np.inf)
    weights = site_weights(sites, [confidence[site] for site in sites], reputation)
    table = estimate(matrix, weights, settings.estimator)
    score = table.row(0)
    agreement = float(np.count_nonzero(matrix[0] > 0.0) / len(sites))
    if score.value is None:
        return BundleAssessment(key, len(sites), None, None, agreement, (), 0.0, "below_quorum")
    shrink = len(sites) / (len(sites) + settings.prior_sites)
    effect = score.value * shrink
    lower = None if score.lower is None else effect - (score.value - score.lower)
    harmed, unobserved = _guardrails(metrics, table, settings.guardrails)
    refused = None
    if agreement < settings.agreement - 1e-9:
        refused = "no_agreement"
    elif harmed:
        refused = "guardrail_harmed"
    elif unobserved:
        refused = "guardrail_unobserved"
    elif lower is None:
        refused = "certainty_unknown"
    elif not lower > 0.0:
        refused = "not_better_than_nothing"
    return BundleAssessment(
        key=key,
        sites=len(sites),
        effect=effect,
        lower_bound=lower,
        agreement=agreement,
        harmed=harmed or unobserved,
        confidence=_confidence_of_gain(effect, table),
        refused=refused,
    )


def _confidence_of_gain(effect: float, table: EstimateTable) -> float:
    """Return how surely the effect of the first row, already shrunk, is above zero."""
    if not table.stderr[0] > 0.0:
        # Its confidence is then that of the sign test, whatever the tolerance.
        return 0.5 + math.copysign(float(table.confidence[0]), effect) / 2.0 if effect else 0.5
    distance = np.abs([effect]) / table.stderr[:1]
    central = float(t_central_probability(distance, table.degrees_of_freedom()[:1])[0])
    central = min(central, sign_test_coverage(int(table.sites[0]), 1))
    return 0.5 + math.copysign(central, effect) / 2.0


def _guardrails(
    metrics: Sequence[str], table: EstimateTable, declared: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    harmed, seen = [], set()
    for row, name in enumerate(metrics, start=1):
        found = table.row(row)
        if found.value is None:
            continue
        seen.add(name)
        # Sites that agree too exactly for an interval are believed when they tell of harm.
        may_be_luck = found.upper is not None and found.upper >= 0.0
        if found.value < 0.0 and (name in declared or not may_be_luck):
            harmed.append(name)
    return tuple(harmed), tuple(sorted(declared - seen))


def _why_none(ranked: Sequence[BundleAssessment]) -> str:
    """Return the refusal of the bundle that came farthest."""
    order = (
        "not_better_than_nothing",
        "certainty_unknown",
        "guardrail_harmed",
        "guardrail_unobserved",
        "no_agreement",
        "below_quorum",
    )
    refusals = {assessment.refused for assessment in ranked}
    return next(reason for reason in order if reason in refusals)


def _hint(
    best: BundleAssessment,
    effect: float,
    lower_bound: float,
    group: Sequence[tuple[PolicyOutcome, dict[str, float]]],
    cohort: str,
) -> PolicyHint:
    means, _ = _site_deltas(group)
    winners = {site for site, deltas in means.items() if math.fsum(deltas.values()) > 0.0}
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for outcome, _ in group:
        for name, value in outcome.bundle.items():
            if not isinstance(value, (bool, str)):
                values[name][outcome.site_id].append(float(value))
    bundle: dict[str, ParamValue] = {}
    bounds: dict[str, tuple[float, float]] = {}
    for name, kind, text in best.key:
        if kind != "number":
            bundle[name] = text if kind == "text" else text == "true"
            continue
        per_site = [math.fsum(v) / len(v) for s, v in values[name].items() if s in winners]
        low, middle, high = np.quantile(per_site, [0.1, 0.5, 0.9])
        bundle[name] = float(middle)
        bounds[name] = (float(low), float(high))
    content = json.dumps([cohort, best.key], ensure_ascii=True, separators=(",", ":"))
    return PolicyHint(
        hint_id=hashlib.sha256(content.encode()).hexdigest()[:32],
        bundle=bundle,
        bounds=bounds,
        reason=(
            f"Observational: {best.sites} sites chose this change themselves; "
            f"{best.agreement * 100:.0f} % of them improved, mean effect {effect:.3g} scale units "
            f"after shrinkage, lower bound {lower_bound:.3g}."
        ),
        confidence=best.confidence,
        sites=best.sites,
        effect=effect,
        lower_bound=lower_bound,
        assessment=best,
    )
