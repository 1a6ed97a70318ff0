"""Statistics of a release as messages of the contract."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Final

from fmi.v1 import packet_pb2, update_pb2
from fmi_server.aggregation import Estimate, ParamValue, WarmStart
from fmi_server.cohort_state import ReleasedStatistics
from fmi_server.cohorts import CohortRules

__all__ = [
    "MAX_EDGES_TOLD",
    "MAX_REPUTATIONS_TOLD",
    "MAX_VALUES_TOLD",
    "SETTINGS_SECTIONS",
    "causes_message",
    "hint_message",
    "prior_lineage",
    "prior_message",
    "signals_lineage",
    "warm_start_message",
    "within_budget",
]

SETTINGS_SECTIONS: Final = frozenset({"controller", "evaluator", "operators"})
"""The sections whose signals are settings, which a consumer can apply. Metrics can only be watched."""

MAX_REPUTATIONS_TOLD: Final = 1000
"""Sites up to which a prior tells the reputation of each."""

MAX_EDGES_TOLD: Final = 2000
"""Causal edges that a consensus tells, strongest support first; the others are counted."""

MAX_VALUES_TOLD: Final = 32_768
"""Values that all warm starts of an update hold together, and all regimes of another. Those of most sites
are told first. A value and its origin take up to 0.4 kB, so that an update stays below the 16 MiB that a
client takes."""


def warm_start_message(found: WarmStart) -> update_pb2.WarmStartProfile:
    """Tell a warm start; its lineage is left to who knows what it was made from."""
    profile = update_pb2.WarmStartProfile(
        profile_class=found.profile_class,
        context_selector=update_pb2.ContextSelector(
            source=_SOURCES[found.source],
            regime=found.regime or "",
            distance=found.regime_distance,
            shared_concepts=found.shared_concepts,
        ),
    )
    for name, value in found.init.items():
        profile.init[name] = value.value
        profile.origins[name].CopyFrom(
            update_pb2.InitOrigin(
                source=_SOURCES[value.source],
                sites=value.sites,
                lower=value.lower,
                upper=value.upper,
                confidence=value.confidence,
            )
        )
    if found.init:
        profile.confidence = math.fsum(v.confidence for v in found.init.values()) / len(found.init)
    return profile


def prior_lineage(statistics: ReleasedStatistics, rules: CohortRules) -> update_pb2.Lineage:
    """Tell what a prior was made from."""
    prior = statistics.prior
    window = (prior.oldest, prior.newest)
    lineage = signals_lineage(statistics.packets["msp"], prior.sites, window, rules)
    lineage.trimmed = int(prior.table.trimmed.sum())
    return lineage


def signals_lineage(
    packets: int, sites: int, window: tuple[float | None, float | None], rules: CohortRules
) -> update_pb2.Lineage:
    """Tell what aggregates of signals were made from."""
    lineage = update_pb2.Lineage(
        packets=packets, sites=sites, estimator=rules.aggregation.metrics_aggregation
    )
    oldest, newest = window
    if oldest is not None and newest is not None:
        lineage.window.FromNanoseconds(round((newest - oldest) * 1e9))
    return lineage


def prior_message(statistics: ReleasedStatistics, rules: CohortRules) -> update_pb2.MetaPriorUpdate:
    """Tell a prior."""
    release = statistics.prior
    update = update_pb2.MetaPriorUpdate(
        cohorts=[rules.name],
        lineage=prior_lineage(statistics, rules),
        untagged_sites=statistics.contexts.untagged_sites,
    )
    update.lineage.confidence_cap = release.confidence_cap
    if len(statistics.reputations) <= MAX_REPUTATIONS_TOLD:
        update.lineage.reputations.update(statistics.reputations)
        update.lineage.relative_sizes.update(statistics.relative_sizes)
    confidences = []
    for (name, found), section in zip(release.estimates().items(), release.sections, strict=True):
        update.estimates[name].CopyFrom(_estimate_message(found, section))
        if found.value is not None and section in SETTINGS_SECTIONS:
            update.prior[name] = found.value
            confidences.append(found.confidence)
    if confidences:
        update.confidence = math.fsum(confidences) / len(confidences)
    # A regime below the quorum is not named: its name may be the doing of a single site.
    regimes = {
        regime.name: regime for regime in statistics.contexts.regimes if regime.withheld is None
    }
    told = within_budget(
        (),
        {name: len(r.settings) + len(r.concepts) for name, r in regimes.items()},
        {name: regime.sites for name, regime in regimes.items()},
    )
    for regime in regimes.values():
        if regime.name not in told:
            continue
        update.contexts.add(
            regime=regime.name,
            sites=regime.sites,
            concepts=regime.concepts,
            settings={
                name: value
                for name, value in regime.settings.items()
                if update.estimates[name].section in SETTINGS_SECTIONS
            },
        )
    return update


def within_budget(
    first: Collection[str], values: Mapping[str, int], sites: Mapping[str, int]
) -> set[str]:
    """Choose what is told: `first`, then by number of sites while the values fit together."""
    told: set[str] = set()
    left = MAX_VALUES_TOLD
    for name in sorted(values, key=lambda name: (name not in first, -sites.get(name, 0), name)):
        if values[name] <= left:
            left -= values[name]
            told.add(name)
    return told


def _estimate_message(found: Estimate, section: str) -> update_pb2.SignalEstimate:
    return update_pb2.SignalEstimate(
        section=section,
        value=found.value,
        stderr=found.stderr,
        lower=found.lower,
        upper=found.upper,
        sites=found.sites,
        effective_sites=found.effective_sites,
        trimmed=found.trimmed,
        confidence=found.confidence,
        estimator=found.used or "",
        reason=found.reason or "",
        tolerated=found.tolerated,
        tolerance=found.tolerance,
    )


def hint_message(statistics: ReleasedStatistics, rules: CohortRules) -> update_pb2.MetaPolicyHint:
    """Tell a hint, or why there is none."""
    decision = statistics.policy
    message = update_pb2.MetaPolicyHint(
        reason=_NO_HINT.get(decision.reason, decision.reason),
        lineage=update_pb2.Lineage(
            packets=statistics.packets["pop"],
            sites=statistics.outcome_sites,
            estimator=rules.aggregation.metrics_aggregation,
        ),
    )
    hint = decision.hint
    if hint is None:
        return message
    message.hint_id = hint.hint_id
    message.reason = hint.reason
    message.confidence = hint.confidence
    message.effect = hint.effect
    message.effect_lower = hint.lower_bound
    message.sites = hint.sites
    for name, value in hint.bundle.items():
        message.bundle[name].CopyFrom(_param_message(value))
    for name, (lower, upper) in hint.bounds.items():
        message.bounds[name].CopyFrom(update_pb2.ParamBounds(lower=lower, upper=upper))
    return message


def _param_message(value: ParamValue) -> packet_pb2.ParamValue:
    if isinstance(value, bool):
        return packet_pb2.ParamValue(flag=value)
    if isinstance(value, str):
        return packet_pb2.ParamValue(text=value)
    return packet_pb2.ParamValue(number=value)


def causes_message(
    statistics: ReleasedStatistics, rules: CohortRules
) -> update_pb2.CausalConsensus:
    """Tell a causal consensus."""
    causes = statistics.causes
    message = update_pb2.CausalConsensus(
        unpooled=causes.left_out,
        lineage=update_pb2.Lineage(
            packets=statistics.packets["ccs"],
            sites=causes.sites,
            estimator=rules.aggregation.metrics_aggregation,
        ),
    )
    if len(causes.edges) > MAX_EDGES_TOLD:
        message.unpooled["not_told"] = len(causes.edges) - MAX_EDGES_TOLD
    strongest = sorted(causes.edges, key=lambda edge: (-edge.support, edge.key))
    for edge in strongest[:MAX_EDGES_TOLD]:
        message.edges.add(
            source=edge.source,
            target=edge.target,
            type=edge.type,
            weight=edge.weight,
            stderr=edge.stderr,
            lower=edge.lower,
            upper=edge.upper,
            sites=edge.sites,
            testing_sites=edge.testable,
            support=edge.support,
            positive_sites=edge.positive,
            negative_sites=edge.negative,
            estimator=edge.method,
            pooled_sites=edge.pooled_sites,
            i_squared=edge.i_squared,
            tau_squared=edge.tau_squared,
            sign_conflict=edge.sign_conflict,
            direction_conflict=edge.direction_conflict,
            in_cycle=edge.in_cycle,
        )
    for cycle in causes.cycles:
        source, target, kind = cycle.weakest
        message.cycles.add(
            nodes=cycle.nodes, weakest_source=source, weakest_target=target, weakest_type=kind
        )
    return message


_SOURCES: Final[Mapping[str, update_pb2.WarmStartSource.ValueType]] = {
    "profile_and_regime": update_pb2.WARM_START_SOURCE_PROFILE_AND_REGIME,
    "regime": update_pb2.WARM_START_SOURCE_REGIME,
    "profile_class": update_pb2.WARM_START_SOURCE_PROFILE_CLASS,
    "cohort": update_pb2.WARM_START_SOURCE_COHORT,
    "none": update_pb2.WARM_START_SOURCE_NONE,
}

_NO_HINT: Final = {
    "no_outcome": "no hint: no site has sent a policy outcome",
    "no_scored_outcome": (
        "no hint: none of the outcomes has a metric before and after for which the cohort spec gives a "
        "direction"
    ),
    "below_quorum": "no hint: no bundle was tried by enough sites",
    "no_agreement": "no hint: of every bundle with enough sites, too few found that it helps",
    "guardrail_harmed": "no hint: every bundle that helps harms a guardrail metric",
    "guardrail_unobserved": "no hint: too few sites observed the guardrail metrics",
    "certainty_unknown": (
        "no hint: the sites that tried the best bundle are too few, or too alike, to say how certain its "
        "effect is"
    ),
    "not_better_than_nothing": "no hint: no bundle is better than no change with enough certainty",
}
