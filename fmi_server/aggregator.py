"""FMIAggregator: packets to aggregates, in the contract's types."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fmi.plain import DEFAULT_PROFILE_CLASS
from fmi.v1 import packet_pb2, update_pb2
from fmi_server.aggregation import Estimate, ParamValue, SignalInUse, WarmStart, WarmStartRequest
from fmi_server.cohort_state import CohortState, ReleasedStatistics
from fmi_server.cohorts import CohortRegistry, CohortRules
from fmi_server.config import AggregationConfig
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import PacketRefusedError

__all__ = ["AggregationResult", "FMIAggregator"]

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


@dataclass(frozen=True, slots=True)
class AggregationResult:
    """The aggregates of one cohort.

    Attributes:
        prior_update: Prior knowledge; `prior_update.prior` is flat, for example `{"tau": 0.91}`.
        warm_start: Where a new site should begin: the profile of the class with most sites.
        warm_starts: The profiles of the classes that have one, largest classes first where all would
            not fit into one update.
        policy_hint: Which policy change to try. Where there is none, `hint_id` is empty and `reason`
            says why.
        causal_consensus: Which causes the sites agree on.
    """

    prior_update: update_pb2.MetaPriorUpdate
    warm_start: update_pb2.WarmStartProfile
    warm_starts: update_pb2.WarmStartSet
    policy_hint: update_pb2.MetaPolicyHint
    causal_consensus: update_pb2.CausalConsensus


class FMIAggregator:
    """Aggregates the packets of cohorts.

    `aggregate` takes packets and keeps nothing. `state` gives the resident state of a cohort, which the
    server feeds packet by packet, and `release` its aggregates.

    Args:
        config: How packets become one aggregate, where a cohort's spec does not say.
        registry: The contract.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        config: AggregationConfig | None = None,
        *,
        registry: FMIContractRegistry | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config or AggregationConfig()
        self._registry = registry or FMIContractRegistry()
        self._clock = clock
        self._states: dict[str, CohortState] = {}

    def aggregate(
        self, cohort: str, packets: Iterable[packet_pb2.Packet | Mapping[str, Any]]
    ) -> AggregationResult:
        """Aggregate packets as one cohort, with the default rules of a cohort.

        Args:
            cohort: The name that the result carries.
            packets: Typed packets, or plain ones in any form that the registry takes. A site counts
                once per signal, with its newest value.

        Returns:
            The aggregates, with revision 0: nothing is published.

        Raises:
            PacketRefusedError: A packet breaks the contract.
        """
        rules = CohortRegistry(self._registry, defaults=self.config).rules(cohort)
        state = CohortState(rules)
        newest = -math.inf
        for item in packets:
            packet = self._registry.coerce(item)
            found = self._registry.violations(packet)
            if found:
                raise PacketRefusedError(found)
            emitted_at = packet.header.emitted_at
            newest = max(newest, emitted_at.seconds + emitted_at.nanos / 1e9)
            state.count(packet)
        # Packets that are given are all to count: time stands at the newest of them.
        return self.result(state, now=newest if math.isfinite(newest) else self._clock())

    def state(
        self,
        rules: CohortRules,
        *,
        reputations: dict[str, float] | None = None,
        packets: Mapping[str, int] | None = None,
    ) -> CohortState:
        """Return the resident state of a cohort, made new where there is none.

        Args:
            rules: The cohort's rules.
            reputations: Of its sites, from an earlier life of the server; used for a new state.
            packets: Packets counted by type, in the same way.
        """
        state = self._states.get(rules.name)
        if state is None:
            state = CohortState(rules, reputations=reputations, packets=packets)
            self._states[rules.name] = state
        return state

    def signals_in_use(self, cohort: str) -> dict[str, SignalInUse]:
        """Return the signals that sites of a cohort have values of."""
        state = self._states.get(cohort)
        return {} if state is None else state.signals_in_use()

    def replace(self, state: CohortState) -> None:
        """Put another state in the place of a cohort's present one."""
        self._states[state.rules.name] = state

    def warm_start(
        self, state: CohortState, request: WarmStartRequest
    ) -> update_pb2.WarmStartProfile:
        """Find the warm start for a site in a resident state."""
        profile = _warm_start_message(state.warm_start(request))
        sites, window = state.signals_held()
        profile.lineage.CopyFrom(_signals_lineage(state.packets["msp"], sites, window, state.rules))
        return profile

    def result(self, state: CohortState, *, now: float) -> AggregationResult:
        """Compute the aggregates of a resident state.

        Args:
            state: The state.
            now: Unix seconds.
        """
        statistics = state.release(now)
        rules = state.rules
        profiles = {
            name: _warm_start_message(found) for name, found in statistics.warm_starts.items()
        }
        for profile in profiles.values():
            profile.lineage.CopyFrom(_prior_lineage(statistics, rules))
        told = _within_budget(
            {statistics.main_class, DEFAULT_PROFILE_CLASS},
            {name: len(profile.init) for name, profile in profiles.items()},
            statistics.class_sites,
        )
        return AggregationResult(
            prior_update=_prior_message(statistics, rules),
            warm_start=profiles[statistics.main_class],
            warm_starts=update_pb2.WarmStartSet(
                profiles=[profile for name, profile in profiles.items() if name in told]
            ),
            policy_hint=_hint_message(statistics, rules),
            causal_consensus=_causes_message(statistics, rules),
        )


def _warm_start_message(found: WarmStart) -> update_pb2.WarmStartProfile:
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


def _prior_lineage(statistics: ReleasedStatistics, rules: CohortRules) -> update_pb2.Lineage:
    prior = statistics.prior
    window = (prior.oldest, prior.newest)
    lineage = _signals_lineage(statistics.packets["msp"], prior.sites, window, rules)
    lineage.trimmed = int(prior.table.trimmed.sum())
    return lineage


def _signals_lineage(
    packets: int, sites: int, window: tuple[float | None, float | None], rules: CohortRules
) -> update_pb2.Lineage:
    lineage = update_pb2.Lineage(
        packets=packets, sites=sites, estimator=rules.aggregation.metrics_aggregation
    )
    oldest, newest = window
    if oldest is not None and newest is not None:
        lineage.window.FromNanoseconds(round((newest - oldest) * 1e9))
    return lineage


def _prior_message(
    statistics: ReleasedStatistics, rules: CohortRules
) -> update_pb2.MetaPriorUpdate:
    release = statistics.prior
    update = update_pb2.MetaPriorUpdate(
        cohorts=[rules.name],
        lineage=_prior_lineage(statistics, rules),
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
    told = _within_budget(
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


def _within_budget(
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


def _hint_message(statistics: ReleasedStatistics, rules: CohortRules) -> update_pb2.MetaPolicyHint:
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


def _causes_message(
    statistics: ReleasedStatistics, rules: CohortRules
) -> update_pb2.CausalConsensus:
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
