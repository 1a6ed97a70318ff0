"""Integer noise of the discrete Gaussian distribution, exact, many at once.

Canonne, Kamath and Steinke (J. Priv. Confid. 12, 2022) sample it by rejection from a discrete Laplace
distribution, with nothing but integers and fair bits: no floating-point number is rounded on the way, so
that the samples tell nothing that the distribution does not (Mironov, CCS 2012, shows what rounded noise
tells). Here the standard deviation is a power of two. Then every probability that decides anything is the
exponential of a fraction with a power of two below it, compared with random bits, and whole arrays of
64-bit integers are decided at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_SIGMA_BITS", "Entropy", "discrete_gaussian"]

Entropy: TypeAlias = Callable[[int], bytes]
"""Gives so many random bytes, like `os.urandom`."""

MAX_SIGMA_BITS: Final = 30
"""The largest s for which 2 sigma^2 = 2^(2 s + 1) fits beside the words that it is compared with."""

_WORD_BITS = 64


def discrete_gaussian(
    count: int, sigma_bits: int, entropy: Entropy = os.urandom
) -> NDArray[np.int64]:
    """Draw integers x with P(x) proportional to exp(-x^2 / (2 sigma^2)), sigma = 2^sigma_bits.

    Args:
        count: how many.
        sigma_bits: binary logarithm of sigma, 0 to `MAX_SIGMA_BITS`.
        entropy: where random bytes come from; the operating system's, but in tests.

    Raises:
        ValueError: `count` is negative or `sigma_bits` out of range.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if not 0 <= sigma_bits <= MAX_SIGMA_BITS:
        raise ValueError(f"sigma_bits must lie in 0..{MAX_SIGMA_BITS}, got {sigma_bits}")
    coins = _Coins(entropy)
    drawn: list[NDArray[np.int64]] = []
    missing = count
    while missing > 0:
        # Somewhat less than half of the tries come through both steps.
        candidates = _discrete_laplace(2 * missing + 8, sigma_bits, coins)
        taken = candidates[_accepted(np.abs(candidates), sigma_bits, coins)]
        drawn.append(taken[:missing])
        missing -= len(drawn[-1])
    return np.concatenate([np.zeros(0, dtype=np.int64), *drawn])


def _discrete_laplace(tries: int, scale_bits: int, coins: _Coins) -> NDArray[np.int64]:
    """Return those of some tries that gave an x with P(x) proportional to exp(-|x| / 2^scale_bits)."""
    low = coins.words(tries, scale_bits)
    low = low[coins.exp_minus(low, scale_bits)]
    # How often exp(-1) comes true in a row.
    whole: NDArray[np.int64] = np.zeros(low.size, dtype=np.int64)
    going: NDArray[np.int64] = np.arange(low.size)
    while going.size:
        going = going[coins.exp_minus_one(going.size)]
        whole[going] += 1
    size = (whole << scale_bits) + low.astype(np.int64)
    negative = coins.words(size.size, 1).astype(bool)
    once = ~(negative & (size == 0))  # zero has one sign
    drawn: NDArray[np.int64] = np.where(negative, -size, size)[once]
    return drawn


def _accepted(size: NDArray[np.int64], sigma_bits: int, coins: _Coins) -> NDArray[np.bool_]:
    """Say of candidates of a size |x| which are taken: each with exp(-(|x| - sigma)^2 / (2 sigma^2)).

    With |x| - sigma = q sigma + r up to its sign, that is exp(-1/2)^(q^2) * exp(-r / sigma)^q *
    exp(-r^2 / (2 sigma^2)).
    """
    distance = np.abs(size - (1 << sigma_bits))
    whole = distance >> sigma_bits
    rest = (distance & ((1 << sigma_bits) - 1)).astype(np.uint64)
    taken = coins.exp_minus(rest * rest, 2 * sigma_bits + 1)
    for factor, bits, times in ((np.ones_like(rest), 1, whole * whole), (rest, sigma_bits, whole)):
        going = np.flatnonzero(taken & (times > 0))
        step = 0
        while going.size:
            held = coins.exp_minus(factor[going], bits)
            taken[going[~held]] = False
            step += 1
            going = going[held & (times[going] > step)]
    return taken


class _Coins:
    """Random words, and coins that are exactly as biased as is asked."""

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy

    def words(self, count: int, bits: int) -> NDArray[np.uint64]:
        """Return uniform integers of some bits, at most 64."""
        if bits == 0:
            return np.zeros(count, dtype=np.uint64)
        words = np.frombuffer(self._entropy(8 * count), dtype=np.uint64)
        return words >> np.uint64(_WORD_BITS - bits)

    def exp_minus(self, numerators: NDArray[np.uint64], bits: int) -> NDArray[np.bool_]:
        """Toss coins that come true with exp(-a / 2^bits), 0 <= a < 2^bits.

        The first k at which a coin of probability (a / 2^bits) / k fails is odd with that probability: the
        exponential series. A coin of a product is two coins.
        """
        return self._first_failure_is_odd(
            numerators.size,
            lambda going: self.words(going.size, bits) < numerators[going],
        )

    def exp_minus_one(self, count: int) -> NDArray[np.bool_]:
        """Toss coins that come true with exp(-1)."""
        return self._first_failure_is_odd(count, lambda going: np.ones(going.size, dtype=bool))

    def _first_failure_is_odd(
        self, count: int, toss: Callable[[NDArray[np.int64]], NDArray[np.bool_]]
    ) -> NDArray[np.bool_]:
        odd = np.ones(count, dtype=bool)
        going: NDArray[np.int64] = np.arange(count)
        number = 1
        while going.size:
            going = going[toss(going)]
            if number > 1:
                going = going[self._one_in(number, going.size)]
            number += 1
            odd[going] = number % 2 == 1
        return odd

    def _one_in(self, number: int, count: int) -> NDArray[np.bool_]:
        """Toss coins that come true with 1 / number."""
        # Of words past the last whole multiple another one is drawn: else the remainder is not uniform.
        most = np.uint64((1 << _WORD_BITS) // number * number - 1)
        words = self.words(count, _WORD_BITS).copy()
        while (beyond := np.flatnonzero(words > most)).size:
            words[beyond] = self.words(beyond.size, _WORD_BITS)
        chosen: NDArray[np.bool_] = words % np.uint64(number) == 0
        return chosen
