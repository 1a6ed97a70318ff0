"""What a budget would mean for so many sites, said before it is put in force."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fmi_server.privacy.budget import BudgetPlan, natural_sensitivity, number_of
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
            units of half the width between them; with a clip norm, where every value of a site is there.
        noise_stderr_at_bound: the same of a mean at a bound, and of sites that are there in every signal.
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
        ways = [f"{math.ceil(sites * excess)} sites", *_other_ways(plan, sent, excess)]
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
    advice += _sensitivity_advice(plan, noise)
    advice += _clip_advice(plan, sent, noise)
    at_bound = plan.noise_stderr(behind * plan.sums.counted(sent, 1.0), 1.0)
    return PlanReport(noise, at_bound, least, tuple(advice))


def _other_ways(plan: BudgetPlan, sent: int, excess: float) -> Iterator[str]:
    """Say what takes so much off the noise, but for sites."""
    sigma, signals = plan.settings.dp_noise_sigma, plan.sums.signals
    # The budget that is stated; with a declared sensitivity less of it is spent.
    epsilon = plan.epsilon_of(plan.rho * (excess * (1.0 if sigma else plan.stretch)) ** 2)
    if epsilon <= LARGE_EPSILON:
        stated = f"an epsilon of about {epsilon:.3g}"
        releases = number_of(plan.epochs, "release")
        noise = f"a dp_noise_sigma of {sigma / excess:.3g} ({stated} over {releases})"
        yield noise if sigma else stated
    counts = []
    # Noise that was asked for stays as it is however often it is drawn.
    if not sigma:
        counts.append((plan.epochs, "release"))
    if sent == signals and plan.sums.clip_norm is None and not _stretched(plan):
        counts.append((signals, "signal"))
    for number, noun in counts:
        if fewer := math.floor(number / excess**2):
            yield f"{number_of(fewer, noun)} instead of {number}"


def _stretched(plan: BudgetPlan) -> bool:
    """Say whether the noise is for a declared sensitivity that is larger than the natural one."""
    return plan.stretch > 1.001


def _sensitivity_advice(plan: BudgetPlan, noise: float) -> Iterator[str]:
    """Say what a declared sensitivity costs."""
    if noise > USEFUL_STDERR and _stretched(plan):
        yield (
            f"dp_sensitivity {plan.settings.dp_sensitivity:g} makes the noise {plan.stretch:.3g} times what "
            f"vectors need; without it the noise alone moves a mean by {noise / plan.stretch:.2g}"
        )


def _clip_advice(plan: BudgetPlan, sent: int, noise: float) -> Iterator[str]:
    """Say what a clip norm would do, or that the one that is set does too much."""
    middle, declared = math.sqrt(sent * WEIGHT_SHARE), plan.settings.dp_sensitivity
    if plan.sums.clip_norm is None:
        # Where the noise is for a declared sensitivity, a norm takes nothing off it.
        if noise > USEFUL_STDERR and not _stretched(plan):
            norm = math.sqrt(sent * (TYPICAL_SQUARE + WEIGHT_SHARE))
            gain = 1.0 - norm / natural_sensitivity(plan.sums.signals)
            yield (
                f"a dp_clip_norm of {norm:.4g} takes {gain:.0%} off the noise; sites whose values lie far "
                "from the middle of their bounds count for less then"
            )
    elif (share := plan.sums.counted(sent)) < 0.995:  # what is told in four digits leaves all
        end = ""
        if declared is None:
            end = f"; up to {middle:.4g} the error is the same"
        elif _stretched(plan):
            end = (
                f"; up to {min(middle, declared):g} the error shrinks, because the noise is for "
                f"dp_sensitivity {declared:g}"
            )
        yield (
            f"dp_clip_norm {plan.sums.clip_norm:g} leaves each site that sends {sent} signals {share:.2g} of "
            f"its weight at most{end}"
        )
