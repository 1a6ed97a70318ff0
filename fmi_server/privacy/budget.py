"""Budgets: what is asked of the privacy of a cohort, and what each of its releases may cost.

A budget is (epsilon, delta) for all releases together. It is turned into zero-concentrated privacy (rho), in
which releases add up, divided over the epochs that it must last for, and turned into noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final

from fmi_server.privacy.accounting import zcdp_epsilon, zcdp_of_noise, zcdp_rho
from fmi_server.privacy.noisy_means import PrivateSums

__all__ = [
    "PRIVACY_SETTINGS",
    "BudgetError",
    "BudgetPlan",
    "PrivacySettings",
    "budget_faults",
    "natural_sensitivity",
    "number_of",
    "plan_budget",
    "rounded_up",
]

_ROUNDING = 1e-9

MAX_EPSILON = 1e4
MAX_DELTA = 0.01
MAX_EPOCHS = 2**32 - 1
MIN_CLIP_NORM = 0.01

NOISE_OF_WEIGHT = 3.0
"""A noisy weight below so many standard deviations of its noise may be no weight at all: it is no divisor."""


class BudgetError(ValueError):
    """Settings of privacy contradict each other.

    Attributes:
        setting: what to change, for example `dp_noise_sigma`.
        advice: what is wrong, and to what it can be changed.
    """

    def __init__(self, setting: str, advice: str) -> None:
        super().__init__(f"{setting}: {advice}")
        self.setting = setting
        self.advice = advice


@dataclass(frozen=True, slots=True)
class PrivacySettings:
    """What is asked of the privacy of a cohort.

    Attributes:
        dp_epsilon: budget over all epochs; 0 leaves it to follow from the noise.
        dp_delta: the same.
        dp_noise_sigma: standard deviation of the noise by the sensitivity; 0 derives it from the budget.
        dp_sensitivity: most that a site may move the sums in L2, in units of half the width between the
            bounds of a signal; None takes the natural one. A larger one asks for more noise.
        dp_epochs: releases that the budget must last for; 0 lets it follow from the noise.
        dp_clip_norm: the L2 norm to which the vector of a site is scaled down, in the same units; it is the
            natural sensitivity where it is smaller than that of the bounds. None scales nothing.
    """

    dp_epsilon: float = 0.0
    dp_delta: float = 0.0
    dp_noise_sigma: float = 0.0
    dp_sensitivity: float | None = None
    dp_epochs: int = 0
    dp_clip_norm: float | None = None

    @property
    def stated(self) -> bool:
        """Return whether anything is asked, be it by contradictory settings."""
        return self != PrivacySettings()

    @property
    def private(self) -> bool:
        """Return whether privacy is asked for at all."""
        return self.dp_epsilon > 0.0 or self.dp_noise_sigma > 0.0

    def check(self) -> None:
        """Check all that does not depend on the number of signals.

        Raises:
            BudgetError: The settings contradict each other, or say too little to promise anything.
        """
        if self.private:
            plan_budget(self, 1)
            return
        for name in ("dp_delta", "dp_sensitivity", "dp_clip_norm"):
            if getattr(self, name):
                raise BudgetError(
                    name,
                    f"is {getattr(self, name):g}, but neither dp_epsilon nor dp_noise_sigma asks for "
                    "privacy: set one, or leave it out",
                )


PRIVACY_SETTINGS: Final = tuple(field.name for field in fields(PrivacySettings))
"""Names that ask for privacy. They belong to a cohort, because privacy needs the bounds of its signals."""


@dataclass(frozen=True, slots=True)
class BudgetPlan:
    """What a budget means.

    Attributes:
        epsilon: of all epochs together.
        delta: the same.
        epochs: releases that it lasts for.
        rho: of all epochs together, in zero-concentrated differential privacy: what one release is charged so
            many times, and the share of a rounding more, so that a sum of charges does not pass it.
        noise_multiplier: standard deviation of the noise by the natural sensitivity.
        sums: the mechanism with that noise.
        settings: what was asked.
    """

    epsilon: float
    delta: float
    epochs: int
    rho: float
    noise_multiplier: float
    sums: PrivateSums
    settings: PrivacySettings

    @property
    def stretch(self) -> float:
        """Return how much more noise there is than the natural sensitivity needs, by a declared one."""
        return _stretch(self.settings, self.sums.signals)

    @property
    def rho_per_release(self) -> float:
        """Return what one release is charged: no less than the mechanism costs by its own account.

        On its grid it costs a little less than its multiplier says, and how much less changes with the clip
        norm and the number of signals. A charge by the multiplier is the same on every grid, so that such a
        change of a cohort that runs leaves it the releases that it had.
        """
        return _charge(self.sums, self.noise_multiplier)

    def spent(self, releases: int) -> float:
        """Return the epsilon that so many releases spent, at the plan's delta."""
        return self.epsilon_of(releases * self.rho_per_release)

    def epsilon_of(self, rho: float) -> float:
        """Return the epsilon of a cost in zero-concentrated differential privacy, at the plan's delta."""
        return zcdp_epsilon(rho, self.delta) if rho else 0.0

    def least_weight(self, min_sites: int) -> float:
        """Return the noisy weight, in sites, below which a signal has no value.

        Args:
            min_sites: fewer never have one.
        """
        noise = 2.0**self.sums.sigma_bits / self.sums.weight_bound
        return max(float(min_sites), NOISE_OF_WEIGHT * noise)

    def noise_stderr(self, sites: float, value: float = 0.0) -> float:
        """Return the standard error that the noise alone gives a mean.

        Args:
            sites: full weight behind it.
            value: the mean, in -1..1 between its bounds.

        Returns:
            In units of half the width between the bounds.
        """
        sigma = 2.0**self.sums.sigma_bits
        of_values, of_weights = sigma / self.sums.value_bound, sigma / self.sums.weight_bound
        return math.hypot(of_values, value * of_weights) / sites


def natural_sensitivity(signals: int, clip_norm: float | None = None) -> float:
    """Return the most that one site moves the sums of so many signals, as `PrivacySettings` measures it."""
    sums = PrivateSums(signals, 1.0, clip_norm)
    return math.sqrt(sums.sensitivity_squared) / sums.value_bound


def plan_budget(settings: PrivacySettings, signals: int) -> BudgetPlan:
    """Turn what is asked into a budget for each release.

    Args:
        settings: what is asked.
        signals: that are released together.

    Raises:
        BudgetError: The settings contradict each other, or say too little to promise anything.
    """
    for fault in _measure_faults(settings, signals):
        raise fault
    stretch = _stretch(settings, signals)
    if settings.dp_noise_sigma:
        _mechanism(settings, signals, settings.dp_noise_sigma * stretch, "dp_noise_sigma")
    rho = 0.0
    if settings.dp_epsilon > 0.0:
        rho = zcdp_rho(settings.dp_epsilon, settings.dp_delta)
    multiplier, epochs = settings.dp_noise_sigma * stretch, settings.dp_epochs
    if multiplier == 0.0:
        # A rounding more, so that the budget is kept to the last digit.
        multiplier = math.sqrt(epochs / (2.0 * rho)) * stretch * (1.0 + 2.0 * _ROUNDING)
    elif rho:
        epochs = _checked_epochs(settings, rho, multiplier)
    field = "dp_noise_sigma" if settings.dp_noise_sigma else "dp_epsilon"
    sums = _mechanism(settings, signals, multiplier, field)
    rho = epochs * _charge(sums, multiplier) * (1.0 + _ROUNDING)
    epsilon = settings.dp_epsilon or zcdp_epsilon(rho, settings.dp_delta)
    if epsilon > MAX_EPSILON:
        raise BudgetError(
            "dp_noise_sigma",
            f"is {settings.dp_noise_sigma:g}, which over {number_of(epochs, 'release')} is an epsilon of "
            f"{epsilon:.3g} and promises nothing: raise it, or say a dp_epsilon and leave it out",
        )
    return BudgetPlan(epsilon, settings.dp_delta, epochs, rho, multiplier, sums, settings)


def budget_faults(settings: PrivacySettings, signals: int) -> tuple[BudgetError, ...]:
    """Return all that is wrong with what is asked; nothing where `plan_budget` makes a plan of it.

    Args:
        settings: what is asked.
        signals: that are released together.
    """
    if faults := tuple(_measure_faults(settings, signals)):
        return faults
    try:
        plan_budget(settings, signals)
    except BudgetError as fault:
        return (fault,)
    return ()


def number_of(count: int, noun: str) -> str:
    """Tell so many of something."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def rounded_up(value: float) -> str:
    """Tell a least value in six digits, none of them too small: what is told is taken when it is set.

    Args:
        value: above 0.
    """
    exponent = math.floor(math.log10(value)) - 5
    return f"{math.ceil(value * (1.0 + _ROUNDING) / 10.0**exponent) * 10.0**exponent:.6g}"


def _measure_faults(settings: PrivacySettings, signals: int) -> Iterator[BudgetError]:
    """Tell of settings that promise nothing, each by itself."""
    if not settings.private:
        yield BudgetError(
            "dp_epsilon",
            "is not set, and neither is dp_noise_sigma, so that nothing is asked for: set one",
        )
        return
    endless = [name for name in _MEASURES if not math.isfinite(getattr(settings, name) or 0.0)]
    for name in endless:
        given = getattr(settings, name)
        yield BudgetError(
            name, f"is {given:g}, which nothing can be measured by: give a finite one"
        )
    if endless:
        return
    if settings.dp_epsilon > MAX_EPSILON:
        yield BudgetError(
            "dp_epsilon",
            f"is {settings.dp_epsilon:g}, which promises nothing: choose one below 10, or leave privacy out",
        )
    if not settings.dp_delta > 0.0:
        yield BudgetError(
            "dp_delta",
            f"is {settings.dp_delta:g}; Gaussian noise promises nothing without a delta above 0: choose one "
            "well below 1 / (number of sites), for example 1e-6",
        )
    elif settings.dp_delta > MAX_DELTA:
        yield BudgetError(
            "dp_delta",
            f"is {settings.dp_delta:g}, which promises nothing: choose one well below 1 / (number of sites), "
            "for example 1e-6",
        )
    if not settings.dp_epochs and not settings.dp_noise_sigma:
        yield BudgetError(
            "dp_epochs",
            "is not set; say how many releases dp_epsilon must last for, or how much noise each has "
            "(dp_noise_sigma)",
        )
    elif not settings.dp_epochs and not settings.dp_epsilon:
        yield BudgetError(
            "dp_epochs",
            "is not set; noise alone (dp_noise_sigma) promises nothing over releases without end: say how "
            "many there may be, or a dp_epsilon",
        )
    if settings.dp_clip_norm is not None and not settings.dp_clip_norm >= MIN_CLIP_NORM:
        yield BudgetError(
            "dp_clip_norm",
            f"is {settings.dp_clip_norm:g}, to which no vector can be scaled: choose one of at least "
            f"{MIN_CLIP_NORM:g}, or leave it out",
        )
    elif settings.dp_sensitivity is not None:
        natural = natural_sensitivity(signals, settings.dp_clip_norm)
        if settings.dp_sensitivity < natural * (1.0 - _ROUNDING):
            yield BudgetError(
                "dp_sensitivity",
                f"is {settings.dp_sensitivity:g}, but a site can move the sums of {signals} signals by "
                f"{rounded_up(natural)}: leave it out, declare fewer signals, or have vectors scaled to that "
                "norm (dp_clip_norm)",
            )


_MEASURES = ("dp_epsilon", "dp_delta", "dp_noise_sigma", "dp_sensitivity", "dp_clip_norm")


def _charge(sums: PrivateSums, multiplier: float) -> float:
    return max(float(sums.rho), zcdp_of_noise(1.0, multiplier))


def _mechanism(
    settings: PrivacySettings, signals: int, multiplier: float, setting: str
) -> PrivateSums:
    try:
        return PrivateSums(signals, multiplier, settings.dp_clip_norm)
    except ValueError:
        if settings.dp_sensitivity is not None and multiplier > 1.0:
            raise BudgetError(
                "dp_sensitivity",
                f"is {settings.dp_sensitivity:g}, which asks for noise of {multiplier:.3g} times what a site "
                "can do, and 1e-6 to 1e6 can be kept: declare a smaller one, or leave it out",
            ) from None
        way = "less" if multiplier > 1.0 else "more"
        raise BudgetError(
            setting,
            f"would need noise of {multiplier:.3g} times the sensitivity, and 1e-6 to 1e6 can be kept: ask "
            f"for {way} noise",
        ) from None


def _stretch(settings: PrivacySettings, signals: int) -> float:
    """Return how much more noise a declared sensitivity asks for than the natural one."""
    declared = settings.dp_sensitivity
    if declared is None:
        return 1.0
    return max(1.0, declared / natural_sensitivity(signals, settings.dp_clip_norm))


def _checked_epochs(settings: PrivacySettings, rho: float, multiplier: float) -> int:
    """Return how many releases with this noise a budget lasts for, where it lasts for those asked for."""
    lasts = math.floor(rho / zcdp_of_noise(1.0, multiplier) * (1.0 - 2.0 * _ROUNDING))
    lasts = min(lasts, MAX_EPOCHS)
    epochs = settings.dp_epochs or lasts
    if epochs <= lasts and epochs:
        return epochs
    needed = math.sqrt(max(1, settings.dp_epochs) / (2.0 * rho)) / (
        multiplier / settings.dp_noise_sigma
    )
    ways = [
        "raise it",
        "leave it out",
        *([f"plan {number_of(lasts, 'release')} (dp_epochs)"] if lasts else ()),
    ]
    raise BudgetError(
        "dp_noise_sigma",
        f"is {settings.dp_noise_sigma:g}, but dp_epsilon {settings.dp_epsilon:g} over "
        f"{number_of(max(1, settings.dp_epochs), 'release')} needs at least {rounded_up(needed)}: "
        f"{', '.join(ways[:-1])} or {ways[-1]}",
    )
