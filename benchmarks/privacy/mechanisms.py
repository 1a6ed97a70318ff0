"""What is attacked: the server's own mechanism, what a cohort publishes, and mechanisms with a planted fault.

Every draw is one of `PrivateSums.noisy` of the exact `PrivateSums.sums` of the world at hand. A fault is a
subclass that a plan is given in its place; the attacker never knows of it.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fmi.v1 import cohort_pb2, packet_pb2, update_pb2
from fmi_server.aggregator import FMIAggregator
from fmi_server.cohort_state import CohortState
from fmi_server.cohorts import CohortRules, compile_spec
from fmi_server.config import AggregationConfig
from fmi_server.contracts import FMIContractRegistry
from fmi_server.privacy.budget import BudgetPlan, PrivacySettings, plan_budget
from fmi_server.privacy.discrete_gaussian import Entropy
from fmi_server.privacy.noisy_means import NoisySums, PrivateSums

__all__ = [
    "CLIP_NORM",
    "DELTA",
    "EPSILON",
    "HEAVY",
    "REPEATS",
    "SIGNALS",
    "NoiseForOneSignal",
    "NoiselessWeights",
    "Seen",
    "UnboundedValues",
    "UncutWeights",
    "UnscaledVectors",
    "WholeBudgetEachTime",
    "moved_by",
    "noisy_sums_seen",
    "planned",
    "published_seen",
]

SIGNALS, SITES = 25, 50
PUBLISHED_SITES = 400
"""Enough for every signal to have a value."""
EPSILON, DELTA = 1.0, 1e-5
REPEATS = 10
HEAVY = 25.0
"""The weight that the site claims; 1 is the most that may count."""
BEYOND = 4.0
"""The value that it sends of each signal; 1 is the bound."""
CLIP_NORM = 2.0
"""Of a mechanism that scales vectors to a norm; without it they are up to 6.1 long."""
NOW = 1_800_000_000.0

Seen = Callable[[bool, int], NDArray[np.float64]]
"""Of whether the site is there, and a number of trials: what the attacker saw, trials x (values, weights)."""


class NoiseForOneSignal(PrivateSums):
    """The noise that one signal needs, on each of many: (U - L) / n, signal by signal."""

    def __init__(
        self, signals: int, noise_multiplier: float, clip_norm: float | None = None
    ) -> None:
        super().__init__(1, noise_multiplier, clip_norm)
        self.signals = signals


class WholeBudgetEachTime(PrivateSums):
    """The noise of a single release in each of `REPEATS` that share the budget."""

    def __init__(
        self, signals: int, noise_multiplier: float, clip_norm: float | None = None
    ) -> None:
        super().__init__(signals, noise_multiplier / math.sqrt(REPEATS), clip_norm)


class UncutWeights(PrivateSums):
    """A site counts for as much as it says."""

    def sums(self, values: NDArray[np.float64], weights: NDArray[np.float64]) -> NoisySums:
        """Sum without a look at the weights."""
        light = super().sums(values, np.minimum(weights, 1.0))
        for site in np.flatnonzero(weights > 1.0):
            alone = super().sums(values[:, [site]], np.ones(1))
            more = round(weights[site]) - 1
            light = NoisySums(
                light.values + more * alone.values, light.weights + more * alone.weights
            )
        return light


class UnboundedValues(PrivateSums):
    """Values are not moved into their bounds."""

    def sums(self, values: NDArray[np.float64], weights: NDArray[np.float64]) -> NoisySums:
        """Sum as if the bounds were `BEYOND` times as far apart."""
        inside = super().sums(values / BEYOND, weights)
        return NoisySums(inside.values * round(BEYOND), inside.weights)


class UnscaledVectors(PrivateSums):
    """The noise of a clip norm, and vectors that are longer: each coordinate is bounded by itself alone."""

    def scales(
        self, weighted: NDArray[np.float64], _counted: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Scale nothing."""
        return np.ones(weighted.shape[1])


class NoiselessWeights(PrivateSums):
    """Noise on the values, and the exact weights beside them."""

    def noisy(self, sums: NoisySums, entropy: Entropy = os.urandom) -> NoisySums:
        """Add noise to the values."""
        return NoisySums(super().noisy(sums, entropy).values, sums.weights)


def planned(
    epochs: int = 1,
    mechanism: type[PrivateSums] = PrivateSums,
    clip_norm: float | None = None,
) -> BudgetPlan:
    """Return the plan that a claim is taken from, with the mechanism that is to keep it."""
    asked = PrivacySettings(EPSILON, DELTA, dp_epochs=epochs, dp_clip_norm=clip_norm)
    plan = plan_budget(asked, SIGNALS)
    return replace(plan, sums=mechanism(SIGNALS, plan.noise_multiplier, clip_norm))


def _exact_sums(sums: PrivateSums) -> dict[bool, NoisySums]:
    """Return the sums of some sites, and of them and one that moves them as much as it can."""
    others = np.random.default_rng(3).uniform(-1.0, 1.0, (SIGNALS, SITES))
    everybody = np.hstack([others, np.full((SIGNALS, 1), BEYOND)])
    return {
        False: sums.sums(others, np.ones(SITES)),
        True: sums.sums(everybody, np.array([*np.ones(SITES), HEAVY])),
    }


def moved_by(plan: BudgetPlan) -> NDArray[np.float64]:
    """Return what the site adds to the sums, which the attacker knows: values, then weights."""
    exact = _exact_sums(plan.sums)
    with_it, without = exact[True], exact[False]
    moved: NDArray[np.int64] = np.concatenate(
        [with_it.values - without.values, with_it.weights - without.weights]
    )
    return moved.astype(np.float64)


def noisy_sums_seen(plan: BudgetPlan) -> Seen:
    """Let the attacker see the noisy sums, averaged over the releases that the plan pays for.

    Many trials are drawn as one release of many more signals with the same grid and the same noise: `noisy`
    treats each alike, and calls would cost more than draws.
    """
    exact = _exact_sums(plan.sums)

    def seen(present: bool, trials: int) -> NDArray[np.float64]:
        wide = copy.copy(plan.sums)
        wide.signals = SIGNALS * trials
        one = exact[present]
        many = NoisySums(np.tile(one.values, trials), np.tile(one.weights, trials))
        total = np.zeros((trials, 2 * SIGNALS))
        for _ in range(plan.epochs):
            drawn = wide.noisy(many)
            total += np.hstack(
                [drawn.values.reshape(trials, SIGNALS), drawn.weights.reshape(trials, SIGNALS)]
            )
        return total / plan.epochs

    return seen


def published_seen(plan: BudgetPlan) -> tuple[Seen, NDArray[np.float64]]:
    """Let the attacker see what a cohort would publish, a release of its state in each trial.

    Returns:
        What is seen: of each signal the value times its weight, and the weight; and what the site adds to it.
    """
    rules = replace(_rules(), privacy=plan)
    aggregator = FMIAggregator(clock=lambda: NOW)
    others = np.random.default_rng(4).uniform(-0.5, 0.5, (PUBLISHED_SITES, SIGNALS))
    states = {False: _state(rules, others)}
    states[True] = _state(rules, np.vstack([others, np.ones(SIGNALS)]))

    def seen(present: bool, trials: int) -> NDArray[np.float64]:
        rows = np.empty((trials, 2 * SIGNALS))
        for row in rows:
            told = aggregator.result(states[present], now=NOW).prior_update
            row[:] = _told(told)
        return rows

    return seen, np.ones(2 * SIGNALS)


def _rules() -> CohortRules:
    spec = cohort_pb2.CohortSpec(name="audited")
    for number in range(SIGNALS):
        spec.signals.add(
            name=f"s{number:02d}",
            section=cohort_pb2.SIGNAL_SECTION_CONTROLLER,
            lower=-1.0,
            upper=1.0,
        )
    spec.privacy.dp_epsilon, spec.privacy.dp_delta, spec.privacy.dp_epochs = EPSILON, DELTA, 1
    return compile_spec(spec, FMIContractRegistry(), defaults=AggregationConfig())


def _state(rules: CohortRules, values: NDArray[np.float64]) -> CohortState:
    state = CohortState(rules)
    for site, row in enumerate(values):
        packet = packet_pb2.Packet()
        packet.header.domain_id, packet.header.cohort = f"site-{site}", rules.name
        packet.header.emitted_at.FromSeconds(int(NOW))
        packet.msp.controller.update(zip(rules.signals, row.tolist(), strict=True))
        state.count(packet)
    return state


def _told(prior: update_pb2.MetaPriorUpdate) -> NDArray[np.float64]:
    """Return what stands in a prior; a signal without a value tells its weight alone."""
    told = [prior.estimates[f"s{number:02d}"] for number in range(SIGNALS)]
    weights = np.array([estimate.effective_sites for estimate in told])
    return np.concatenate([weights * np.array([estimate.value for estimate in told]), weights])
