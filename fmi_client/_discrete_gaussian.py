"""Integer noise of the discrete Gaussian distribution, exact.

Canonne, Kamath and Steinke (NeurIPS 2020, Algorithms 1 to 3) sample it by rejection with nothing but whole
numbers and uniform draws. No floating-point number is rounded on the way, so that a sample tells nothing
that the distribution does not (Mironov, CCS 2012, reads the secret from the last bits of rounded noise).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Below", "discrete_gaussian"]

Below: TypeAlias = Callable[[int], int]
"""Draws uniformly from 0, 1 ... up to and without its argument, like `secrets.randbelow`."""


def discrete_gaussian(sigma: int, below: Below = secrets.randbelow) -> int:
    """Draw an integer x with P(x) proportional to exp(-x^2 / (2 sigma^2)).

    Args:
        sigma: At least 1.
        below: Where randomness comes from: the operating system, but in tests.

    Raises:
        ValueError: `sigma` is below 1.
    """
    if sigma < 1:
        raise ValueError(f"sigma must be at least 1, got {sigma}")
    scale = sigma + 1
    denominator = 2 * sigma * sigma * scale * scale
    while True:
        drawn = _discrete_laplace(scale, below)
        # Taken with exp(-(|x| - sigma^2 / scale)^2 / (2 sigma^2)).
        distance = abs(drawn) * scale - sigma * sigma
        if _exp_minus(distance * distance, denominator, below):
            return drawn


def _discrete_laplace(scale: int, below: Below) -> int:
    """Draw an integer x with P(x) proportional to exp(-|x| / scale)."""
    while True:
        low = below(scale)
        if not _exp_minus(low, scale, below):
            continue
        whole = 0
        while _exp_minus(1, 1, below):
            whole += 1
        size = whole * scale + low
        if not below(2):
            return size
        if size:  # zero has one sign
            return -size


def _exp_minus(numerator: int, denominator: int, below: Below) -> bool:
    """Toss a coin that comes true with exp(-numerator / denominator)."""
    whole, rest = divmod(numerator, denominator)
    return all(_exp_minus_share(1, 1, below) for _ in range(whole)) and _exp_minus_share(
        rest, denominator, below
    )


def _exp_minus_share(numerator: int, denominator: int, below: Below) -> bool:
    """The same for at most 1: the first k at which a coin of share / k fails is odd with that chance."""
    number = 1
    while below(denominator * number) < numerator:
        number += 1
    return number % 2 == 1
