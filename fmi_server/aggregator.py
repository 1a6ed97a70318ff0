"""FMIAggregator: packets to aggregates, in the contract's types."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fmi.plain import DEFAULT_PROFILE_CLASS
from fmi.v1 import cohort_pb2, packet_pb2, update_pb2
from fmi_server.aggregation import SignalInUse, WarmStartRequest
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRules, compile_spec
from fmi_server.config import AggregationConfig
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import PacketRefusedError
from fmi_server.privacy.budget import BudgetPlan
from fmi_server.private_messages import (
    NO_HINT,
    private_lineage,
    private_prior_message,
    private_warm_start,
)
from fmi_server.private_prior import private_prior
from fmi_server.update_messages import (
    causes_message,
    hint_message,
    prior_lineage,
    prior_message,
    signals_lineage,
    warm_start_message,
    within_budget,
)

__all__ = ["AggregationResult", "FMIAggregator"]


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
        self,
        cohort: str,
        packets: Iterable[packet_pb2.Packet | Mapping[str, Any]],
        *,
        spec: cohort_pb2.CohortSpec | None = None,
    ) -> AggregationResult:
        """Aggregate packets as one cohort.

        With privacy each call is a release of its own: it costs one of `dp_epochs`, and nobody keeps count
        but the caller.

        Args:
            cohort: The name that the result carries.
            packets: Typed packets, or plain ones in any form that the registry takes. A site counts
                once per signal, with its newest value.
            spec: The rules of the cohort, whose name is not looked at; the defaults where it is not given.
                Privacy needs one, because it needs the bounds of the signals.

        Returns:
            The aggregates, with revision 0: nothing is published.

        Raises:
            PacketRefusedError: A packet breaks the contract.
            SpecInvalidError: The spec breaks rules, or privacy is asked for without one.
        """
        named = cohort_pb2.CohortSpec()
        if spec is not None:
            named.CopyFrom(spec)
        named.name = cohort
        rules = compile_spec(named, self._registry, defaults=self.config, declared=spec is not None)
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
        if rules.privacy is not None:
            # The time must not be a site's to choose: it decides whose values are past theirs.
            return self.result(state, now=self._clock(), epsilon_spent=rules.privacy.spent(1))
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
        profile = warm_start_message(state.warm_start(request))
        sites, window = state.signals_held()
        profile.lineage.CopyFrom(signals_lineage(state.packets["msp"], sites, window, state.rules))
        return profile

    def result(
        self, state: CohortState, *, now: float, epsilon_spent: float = 0.0
    ) -> AggregationResult:
        """Compute the aggregates of a resident state.

        Of a private cohort each call draws noise, and so is a release: what it costs is to be paid before.

        Args:
            state: The state.
            now: Unix seconds.
            epsilon_spent: By a private cohort, with this release; the lineage tells it.
        """
        rules = state.rules
        if rules.privacy is not None:
            return self._private_result(state, rules.privacy, now, epsilon_spent)
        statistics = state.release(now)
        profiles = {
            name: warm_start_message(found) for name, found in statistics.warm_starts.items()
        }
        for profile in profiles.values():
            profile.lineage.CopyFrom(prior_lineage(statistics, rules))
        told = within_budget(
            {statistics.main_class, DEFAULT_PROFILE_CLASS},
            {name: len(profile.init) for name, profile in profiles.items()},
            statistics.class_sites,
        )
        return AggregationResult(
            prior_update=prior_message(statistics, rules),
            warm_start=profiles[statistics.main_class],
            warm_starts=update_pb2.WarmStartSet(
                profiles=[profile for name, profile in profiles.items() if name in told]
            ),
            policy_hint=hint_message(statistics, rules),
            causal_consensus=causes_message(statistics, rules),
        )

    def _private_result(
        self, state: CohortState, plan: BudgetPlan, now: float, epsilon_spent: float
    ) -> AggregationResult:
        state.expire(now)
        rules = state.rules
        estimates = private_prior(
            state.unit_cells(),
            plan,
            estimator=rules.aggregation.metrics_aggregation,
            min_sites=state.min_sites,
        )
        prior = private_prior_message(estimates, rules, epsilon_spent)
        warm_start = private_warm_start(prior)
        return AggregationResult(
            prior_update=prior,
            warm_start=warm_start,
            warm_starts=update_pb2.WarmStartSet(profiles=[warm_start]),
            policy_hint=update_pb2.MetaPolicyHint(
                reason=NO_HINT, lineage=private_lineage(rules, epsilon_spent)
            ),
            causal_consensus=update_pb2.CausalConsensus(
                lineage=private_lineage(rules, epsilon_spent)
            ),
        )
