"""What a budget would mean for so many sites, said before it is put in force."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fmi_server.privacy.budget import BudgetPlan

__all__ = ["PlanReport", "report_plan"]

USEFUL_STDERR = 0.1
"""A tenth of half the width between the bounds: with more noise a mean tells little that they do not."""

LARGE_EPSILON = 10.0
"""At this epsilon what is released may be e^10 = 22,000 times as likely with a site as without it."""


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


def report_plan(plan: BudgetPlan, sites: int, *, min_sites: int = 3) -> PlanReport:
    """Say what a budget means for so many sites that send every signal at full weight.

    Args:
        plan: the budget.
        sites: how many, at least one.
        min_sites: weight below which a signal never has a value.
    """
    if sites < 1:
        raise ValueError(f"sites must be at least 1, got {sites}")
    noise, least = plan.noise_stderr(sites), plan.least_weight(min_sites)
    advice = []
    if sites < least:
        advice.append(
            f"a signal has a value only from a noisy weight of {least:.4g} sites on, and there are {sites}"
        )
    if noise > USEFUL_STDERR:
        excess = noise / USEFUL_STDERR
        ways = [f"{math.ceil(sites * excess)} sites"]
        epsilon = plan.epsilon_of(plan.rho * excess**2)
        if epsilon <= LARGE_EPSILON:
            ways.append(f"an epsilon of about {epsilon:.3g}")
        for number, noun in ((plan.epochs, "release"), (plan.sums.signals, "signal")):
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
    return PlanReport(noise, plan.noise_stderr(sites, 1.0), least, tuple(advice))
