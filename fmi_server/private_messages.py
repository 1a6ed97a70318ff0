"""What a private cohort tells, as messages of the contract: its noisy means, and why there is nothing else.

Counts, windows, regimes, classes, reputations and names of sites are left out. Each would be a release of its
own, and the budget pays for one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from fmi.plain import DEFAULT_PROFILE_CLASS
from fmi.v1 import update_pb2
from fmi_server.cohorts import CohortRules
from fmi_server.private_prior import PrivateEstimate
from fmi_server.update_messages import SETTINGS_SECTIONS

__all__ = [
    "NO_HINT",
    "PRIVATE_KINDS",
    "private_lineage",
    "private_prior_message",
    "private_warm_start",
]

PRIVATE_KINDS: Final = frozenset({update_pb2.UPDATE_KIND_PRIOR, update_pb2.UPDATE_KIND_WARM_START})
"""What a private cohort releases."""

NO_HINT: Final = "no hint: the cohort is private, and its budget is kept for its prior"


def private_lineage(rules: CohortRules, epsilon_spent: float) -> update_pb2.Lineage:
    """Tell what a private aggregate was made from, as far as that may be told."""
    return update_pb2.Lineage(
        estimator=rules.aggregation.metrics_aggregation,
        epsilon_spent=epsilon_spent,
        delta=0.0 if rules.privacy is None else rules.privacy.delta,
    )


def private_prior_message(
    estimates: Mapping[str, PrivateEstimate], rules: CohortRules, epsilon_spent: float
) -> update_pb2.MetaPriorUpdate:
    """Tell a private prior."""
    update = update_pb2.MetaPriorUpdate(
        cohorts=[rules.name], lineage=private_lineage(rules, epsilon_spent)
    )
    confidences = []
    for name, found in estimates.items():
        update.estimates[name].CopyFrom(_estimate_message(found, rules))
        if found.value is not None and found.section in SETTINGS_SECTIONS:
            update.prior[name] = found.value
            confidences.append(found.confidence)
    if confidences:
        update.confidence = math.fsum(confidences) / len(confidences)
    return update


def _estimate_message(found: PrivateEstimate, rules: CohortRules) -> update_pb2.SignalEstimate:
    return update_pb2.SignalEstimate(
        section=found.section,
        value=found.value,
        stderr=found.stderr,
        lower=found.lower,
        upper=found.upper,
        effective_sites=found.weight,
        confidence=found.confidence,
        estimator="" if found.value is None else rules.aggregation.metrics_aggregation,
        reason=found.reason,
        tolerance=found.tolerance,
    )


def private_warm_start(
    prior: update_pb2.MetaPriorUpdate, profile_class: str = DEFAULT_PROFILE_CLASS
) -> update_pb2.WarmStartProfile:
    """Make the warm start of any class from a private prior: there is one for all.

    Args:
        prior: The prior; an empty one where nothing was released yet.
        profile_class: The class that the profile is asked for.
    """
    source = (
        update_pb2.WARM_START_SOURCE_COHORT if prior.prior else update_pb2.WARM_START_SOURCE_NONE
    )
    profile = update_pb2.WarmStartProfile(
        profile_class=profile_class,
        context_selector=update_pb2.ContextSelector(source=source),
        confidence=prior.confidence,
        lineage=prior.lineage,
    )
    for name, value in prior.prior.items():
        found = prior.estimates[name]
        profile.init[name] = value
        profile.origins[name].CopyFrom(
            update_pb2.InitOrigin(
                source=source, lower=found.lower, upper=found.upper, confidence=found.confidence
            )
        )
    return profile
