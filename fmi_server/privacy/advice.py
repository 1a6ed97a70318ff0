"""What a budget would mean for so many sites, said before it is put in force."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fmi_server.privacy.budget import BudgetPlan, natural_sensitivity
from fmi_server.privacy.noisy_means import WEIGHT_SHARE

__all__ = ["PlanReport", "report_plan"]

USEFUL_STDERR: Final = 0.1
"""A tenth of half the width between the bounds: with more noise a mean tells little that they do not."""

LARGE_EPSILON: Final = 10.0
"""At this epsilon what is released may be e^10 = 22,000 times as likely with a site as without it."""

TYPICAL_SQUARE: Final = 1.0 / 3.0
"""Mean square of values that are spread evenly between their bounds, in half widths."""


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a budget means.

    Attributes:
        noise_stderr: standard error that the noise of a release gives a mean in the middle of its bounds, in
            units of half the width between them.
        noise_stderr_at_bound: the same of a mean at a bound.
        least_weight: in sites; a signal of less has no value.
        advice: what to do about it, in sentences.
    """

    noise_stderr: float
    noise_stderr_at_bound: float
    least_weight: float
    advice: tuple[str, ...]


def report_plan(
    plan: BudgetPlan, sites: int, *, min_sites: int = 3, signals_per_site: int | None = None
) -> PlanReport:
    """Say what a budget means for so many sites at full weight.

    Args:
        plan: the budget.
        sites: how many, at least one.
        min_sites: weight below which a signal never has a value.
        signals_per_site: how many signals each of them sends, so that each signal comes from an equal share
            of the sites; None means all.
    """
    signals = plan.sums.signals
    sent = signals if signals_per_site is None else signals_per_site
    if sites < 1:
        raise ValueError(f"sites must be at least 1, got {sites}")
    if not 1 <= sent <= signals:
        raise ValueError(f"signals_per_site must lie in 1..{signals}, got {sent}")
    behind = sites * sent / signals
    weight = behind * plan.sums.counted(sent)
    noise, least = plan.noise_stderr(weight), plan.least_weight(min_sites)
    advice = []
    if weight < least:
        there = f"{sites}" if weight == sites else f"{weight:.4g} behind each signal"
        advice.append(
            f"a signal has a value only from a noisy weight of {least:.4g} sites on, and there are {there}"
        )
    if noise > USEFUL_STDERR:
        excess = noise / USEFUL_STDERR
        ways = [f"{math.ceil(sites * excess)} sites"]
        epsilon = plan.epsilon_of(plan.rho * excess**2)
        if epsilon <= LARGE_EPSILON and plan.noise_asked:
            ways.append(
                f"a dp_noise_sigma of {plan.noise_asked / excess:.3g} (an epsilon of about {epsilon:.3g} "
                f"over {plan.epochs} releases)"
            )
        elif epsilon <= LARGE_EPSILON:
            ways.append(f"an epsilon of about {epsilon:.3g}")
        # Noise that was asked for stays as it is however often it is drawn.
        counts = [] if plan.noise_asked else [(plan.epochs, "release")]
        if sent == signals and plan.sums.clip_norm is None:
            counts.append((signals, "signal"))
        for number, noun in counts:
            if fewer := math.floor(number / excess**2):
                ways.append(f"{fewer} {noun}{'' if fewer == 1 else 's'} instead of {number}")
        advice.append(
            f"the noise alone moves a mean by {noise:.2g} of half the width between its bounds; for "
            f"{USEFUL_STDERR:g} choose one of: {', '.join(ways)}; narrower bounds help in the same way"
        )
    if plan.delta * sites >= 1.0:
        advice.append(
            f"delta {plan.delta:g} is not below 1 over {sites} sites: it would allow to publish all that one "
            "of them sent; choose 1e-6 or less"
        )
    if plan.epsilon > LARGE_EPSILON:
        advice.append(
            f"epsilon {plan.epsilon:g} promises little: what is released may be e^{plan.epsilon:.3g} times "
            "as likely with a site as without it"
        )
    advice += _clip_advice(plan, sent, noise)
    at_bound = plan.noise_stderr(behind * plan.sums.counted(sent, 1.0), 1.0)
    return PlanReport(noise, at_bound, least, tuple(advice))


def _clip_advice(plan: BudgetPlan, sent: int, noise: float) -> Iterator[str]:
    """Say what a clip norm would do, or that the one that is set does too much."""
    if plan.sums.clip_norm is None:
        if noise > USEFUL_STDERR:
            norm = math.sqrt(sent * (TYPICAL_SQUARE + WEIGHT_SHARE))
            gain = 1.0 - norm / natural_sensitivity(plan.sums.signals)
            yield (
                f"a dp_clip_norm of {norm:.4g} takes {gain:.0%} off the noise; sites whose values lie far "
                "from the middle of their bounds count for less then"
            )
    elif (share := plan.sums.counted(sent)) < 1.0:
        yield (
            f"dp_clip_norm {plan.sums.clip_norm:g} leaves each site that sends {sent} signals {share:.2g} of "
            f"its weight at most; up to {math.sqrt(sent * WEIGHT_SHARE):.4g} the error is the same"
        )
