"""Noisy means of many signals, private for a whole site.

Each site is one vector: of every signal its value, moved to -1..1 and multiplied with the site's weight, and
the weight once more where the site has the signal. A vector is scaled down where it is longer than a norm
that may be asked for, and rounded toward zero to integers within a box; neither depends on the data. Vectors
are summed exactly, and the discrete Gaussian is added to every sum. Whatever a site sends, and whether it is
there at all, no more than that norm, or the half diagonal of the box, separates the sums. All that is told of
them afterwards is computed from the noisy sums alone, and costs nothing more.

Nothing is trimmed, and no site's weight depends on what others sent: both would let one site move the sums
by more than its own vector.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fmi_server.privacy.discrete_gaussian import MAX_SIGMA_BITS, Entropy, discrete_gaussian

__all__ = ["MAX_SITES", "PRIVATE_ESTIMATORS", "NoisyMeans", "NoisySums", "PrivateSums"]

PRIVATE_ESTIMATORS: Final = ("mean", "weighted_mean")
"""Estimators under which a site moves the sums by no more than its own vector."""

MAX_SITES: Final = 1 << 26
"""Sites whose sums are sure to fit into 64 bits. Of more they may wrap, which is useless, and as private."""

WEIGHT_SHARE: Final = 0.5
"""Half the squared diagonal that a signal's weight takes beside its value.

More makes the denominator of the mean surer and everything else less sure. At this share a mean in the middle
of its bounds has 1.22 times the noise that it would have with known counts, one half way to a bound 1.5.
"""

_VALUE_BITS = 62 - MAX_SITES.bit_length()

_SLACK: Final = 1e-9
"""What a scaled vector stays below its norm by: more than the rounding of a norm of 2^20 signals."""


@dataclass(frozen=True, slots=True)
class NoisySums:
    """Sums over the sites, noise included: of one kind per signal, in units of the grid.

    Attributes:
        values: of the weighted values.
        weights: of the weights.
    """

    values: NDArray[np.int64]
    weights: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class NoisyMeans:
    """What noisy sums say, per signal; NaN where the noisy weight is too small for a mean.

    Attributes:
        value: the mean, in -1..1.
        lower: lower end of an interval for the mean that the sites vary about, in -1..1.
        upper: upper end.
        stderr: half the interval by the quantile it was made with: that of the noise, and the most that the
            choice of sites can add to it for values within -1..1.
        noise_stderr: the part of the noise alone, to first order.
        weight: the noisy sum of the weights, in sites of full weight; may be negative.
    """

    value: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    stderr: NDArray[np.float64]
    noise_stderr: NDArray[np.float64]
    weight: NDArray[np.float64]


class PrivateSums:
    """Sum vectors of sites, add noise, and read means off the noisy sums.

    Args:
        signals: how many there are, at least one; what is released of all of them together is one release.
        noise_multiplier: standard deviation of the noise of each sum by the L2 sensitivity of all together.
        clip_norm: the L2 norm to which longer vectors are scaled down, values and weights by the same factor,
            in units of half the width between the bounds of a signal; None scales nothing.

    Attributes:
        clip_norm: the norm, or None where no vector is as long.
        sigma_bits: binary logarithm of the noise's standard deviation, in units of the grid.
        value_bound: the most that a site adds to the sum of a signal's values, in units of the grid.
        weight_bound: the same for weights.
        norm_bound: the most L2 norm of all that a site adds; None where that is the half diagonal of the box.

    Raises:
        ValueError: There is no signal, the multiplier is not between 1e-6 and 1e6, or the norm not positive.
    """

    def __init__(
        self, signals: int, noise_multiplier: float, clip_norm: float | None = None
    ) -> None:
        if signals < 1:
            raise ValueError(f"signals must be at least 1, got {signals}")
        if not 1e-6 <= noise_multiplier <= 1e6:
            raise ValueError(f"noise_multiplier must lie in 1e-6..1e6, got {noise_multiplier}")
        if clip_norm is not None and not clip_norm > 0.0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        self.signals = signals
        diagonal = math.sqrt(signals * (1.0 + WEIGHT_SHARE))
        self.clip_norm = clip_norm if clip_norm is not None and clip_norm < diagonal else None
        noise = (self.clip_norm or diagonal) * noise_multiplier
        # The finest grid on which neither the noise nor a sum of values leaves its bits.
        finest = _VALUE_BITS + math.floor(math.log2(noise))
        self.sigma_bits = max(0, min(MAX_SIGMA_BITS, finest))
        self.value_bound = math.floor(2.0**self.sigma_bits / noise)
        self.weight_bound = math.floor(2.0**self.sigma_bits / noise * math.sqrt(WEIGHT_SHARE))
        self.norm_bound: int | None = None
        if self.clip_norm is not None:
            self.norm_bound = math.floor(self.clip_norm * self.value_bound)
        if not self.weight_bound or self.norm_bound == 0:
            raise ValueError("the noise is coarser than what it hides; ask for less of it")

    @property
    def sensitivity_squared(self) -> int:
        """Return the square of the most that one site moves all sums in L2, in units of the grid; exact."""
        box = self.signals * (self.value_bound**2 + self.weight_bound**2)
        return box if self.norm_bound is None else min(box, self.norm_bound**2)

    @property
    def rho(self) -> Fraction:
        """Return what one release costs in zero-concentrated differential privacy; exact."""
        return Fraction(self.sensitivity_squared, 2 << (2 * self.sigma_bits))

    def sums(self, values: NDArray[np.float64], weights: NDArray[np.float64]) -> NoisySums:
        """Return the exact sums, without noise: they are as secret as what they are made of.

        Args:
            values: signals x sites in -1..1, whatever is beyond is moved there; NaN where a site has none.
            weights: of the sites, or signals x sites, in 0..1, whatever is beyond is moved there; NaN is 0.

        Nothing that a site sends makes it fail: that there is no release would be told by it.

        Raises:
            ValueError: Shapes do not fit.
        """
        if values.ndim != 2 or len(values) != self.signals:
            raise ValueError(f"values must be {self.signals} x sites, got {values.shape}")
        sites = values.shape[1]
        if weights.shape not in (values.shape, (sites,)):
            raise ValueError(f"weights have shape {weights.shape}, values {values.shape}")
        present = ~np.isnan(values)
        counted = np.where(present & ~np.isnan(weights), np.clip(weights, 0.0, 1.0), 0.0)
        weighted = np.clip(np.where(present, values, 0.0), -1.0, 1.0) * counted
        if self.norm_bound is not None:
            scales = self.scales(weighted, counted)
            weighted, counted = weighted * scales, counted * scales
        return NoisySums(
            values=_on_grid(weighted, self.value_bound).sum(axis=1),
            weights=_on_grid(counted, self.weight_bound).sum(axis=1),
        )

    def counted(self, signals: int, value: float = 0.0) -> float:
        """Return what a site counts for after its vector was scaled, as a share of full weight.

        Args:
            signals: how many it sends, at full weight.
            value: root mean square of its values, in 0..1.
        """
        if self.norm_bound is None:
            return 1.0
        norm = math.sqrt(signals * (value * value + WEIGHT_SHARE))
        return min(1.0, self.norm_bound / self.value_bound / norm)

    def scales(
        self, weighted: NDArray[np.float64], counted: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return what the vector of each site is multiplied with, so that it is no longer than the norm.

        A site's factor must not depend on who else is there, not in its last digit either: so rows are added
        one after the other, where a sum over an axis may take another order for another number of columns.

        Args:
            weighted: values by their weights, signals x sites in -1..1.
            counted: weights, signals x sites in 0..1.

        Returns:
            One per site, in (0, 1].
        """
        if self.norm_bound is None:
            return np.ones(weighted.shape[1])
        share, norm = (bound / self.value_bound for bound in (self.weight_bound, self.norm_bound))
        norm *= 1.0 - _SLACK
        squared = np.zeros(weighted.shape[1])
        for values, weights in zip(weighted, counted, strict=True):
            squared += values * values + (share * weights) * (share * weights)
        scales: NDArray[np.float64] = norm / np.maximum(np.sqrt(squared), norm)
        return scales

    def noisy(self, sums: NoisySums, entropy: Entropy = os.urandom) -> NoisySums:
        """Add noise, which is what `rho` is the price of. Call it once for each release."""
        noise = discrete_gaussian(2 * self.signals, self.sigma_bits, entropy)
        return NoisySums(
            values=sums.values + noise[: self.signals], weights=sums.weights + noise[self.signals :]
        )

    def means(self, noisy: NoisySums, least_weight: float, quantile: float = 1.96) -> NoisyMeans:
        """Read the means off noisy sums. Nothing else is looked at, so it costs nothing.

        The interval has every m for which the noisy sums `V - m W` lie within `quantile` of their standard
        deviations of 0, as they do for the true one (Fieller, J. R. Statist. Soc. B 16, 1954): the noise of
        both is known exactly, and values within -1..1 with a mean m have a variance of at most 1 - m^2
        (Bhatia and Davis, Amer. Math. Monthly 107, 2000). It holds at the bounds and for few sites, where a
        ratio is far from normal.

        Args:
            noisy: the sums.
            least_weight: signals of less noisy weight have no mean; in sites, positive.
            quantile: of the standard normal distribution, for the interval.
        """
        if not least_weight > 0.0:
            raise ValueError(f"least_weight must be positive, got {least_weight}")
        sigma = 2.0**self.sigma_bits
        weight = noisy.weights / self.weight_bound
        enough = weight >= least_weight
        safe = np.where(enough, weight, np.nan)
        ratio = noisy.values / self.value_bound / safe
        value = np.clip(ratio, -1.0, 1.0)
        of_values, of_weights = sigma / self.value_bound / safe, sigma / self.weight_bound / safe
        noise = np.hypot(of_values, value * of_weights)
        # A ratio beyond the bounds is moved to them first: within them that takes no m away.
        lower, upper = _fieller(value, of_values, of_weights, safe, quantile)
        return NoisyMeans(
            value,
            np.clip(lower, -1.0, 1.0),
            np.clip(upper, -1.0, 1.0),
            (upper - lower) / (2.0 * quantile),
            noise,
            weight,
        )


def _fieller(
    ratio: NDArray[np.float64],
    of_values: NDArray[np.float64],
    of_weights: NDArray[np.float64],
    weight: NDArray[np.float64],
    quantile: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Solve `(ratio - m)^2 <= q^2 (of_values^2 + m^2 of_weights^2 + (1 - m^2) / weight)` for m.

    All standard deviations are by the weight. Where the weight is within `quantile` of its own noise, every m
    solves it.
    """
    squared = quantile * quantile
    a = 1.0 - squared * (of_weights * of_weights - 1.0 / weight)
    c = ratio * ratio - squared * (of_values * of_values + 1.0 / weight)
    bounded = a > 0.0
    safe = np.where(bounded, a, np.nan)
    root = np.sqrt(np.maximum(0.0, ratio * ratio - a * c)) / safe
    lower, upper = ratio / safe - root, ratio / safe + root
    nowhere = ~bounded & ~np.isnan(ratio)
    return np.where(nowhere, -1.0, lower), np.where(nowhere, 1.0, upper)


def _on_grid(shares: NDArray[np.float64], bound: int) -> NDArray[np.int64]:
    """Return shares of a bound in -1..1 as integers, rounded toward zero, so that none leaves the bound."""
    grid = np.trunc(shares * float(bound)).astype(np.int64)
    # A bound past 2^53 may round up on its way to a double.
    clipped: NDArray[np.int64] = np.clip(grid, -bound, bound)
    return clipped
