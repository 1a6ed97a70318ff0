"""When and how long to wait before trying again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final

from fmi_client._arguments import check_number, check_whole
from fmi_client.errors import ConfigurationError, FMIError

__all__ = ["NO_RETRY", "Backoff", "RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter: uniform in [0, min(max_s, initial_s * multiplier^n)].

    Only what can succeed later is tried again, and every attempt sends the same packet ids, so that a
    packet counts once however often it is sent. So a packet without an answer in time is sent again;
    other calls end with `DeadlineError` at once. Where the server says how long to wait, that time
    comes on top of the jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Attributes:
        initial_s: Upper bound of the first wait, in seconds.
        max_s: Upper bound of every wait, in seconds.
        multiplier: Growth of the bound from one wait to the next; at least 1.
        max_attempts: Attempts in all, the first included. 1 means no retry.
        deadline_s: Seconds from the first attempt after which no further one begins. None means no
            limit. Of a long batch or a subscription the time counts from the last progress.

    Raises:
        ConfigurationError: One is no number, or out of range.
    """

    initial_s: float = 0.1
    max_s: float = 10.0
    multiplier: float = 2.0
    max_attempts: int = 8
    deadline_s: float | None = 60.0

    def __post_init__(self) -> None:
        for name in ("initial_s", "max_s", "multiplier"):
            check_number(f"RetryPolicy: {name}", getattr(self, name))
        check_whole("RetryPolicy: max_attempts", self.max_attempts)
        check_number("RetryPolicy: deadline_s", self.deadline_s, optional=True)
        if not 0 < self.initial_s <= self.max_s:
            raise ConfigurationError("RetryPolicy: initial_s must be above 0 and at most max_s")
        if self.multiplier < 1:
            raise ConfigurationError("RetryPolicy: multiplier must be at least 1")
        if self.max_attempts < 1:
            raise ConfigurationError("RetryPolicy: max_attempts must be at least 1")
        if self.deadline_s is not None and self.deadline_s <= 0:
            raise ConfigurationError("RetryPolicy: deadline_s must be above 0, or None")

    def bound_s(self, failures: int) -> float:
        """Return the upper bound of the wait after `failures` failures in a row, in seconds."""
        growth = min(failures - 1, 1024)  # beyond it a float overflows, and max_s has long won
        try:
            return min(self.max_s, self.initial_s * self.multiplier**growth)
        except OverflowError:
            return self.max_s


NO_RETRY: Final = RetryPolicy(max_attempts=1)
"""One attempt only."""


class Backoff:
    """Counts failures in a row and waits between attempts.

    Args:
        policy: The bounds.
        endless: Whether attempts and time are not bounded, only the waits.
        uniform: Draws from [0, 1); the jitter.
        clock: Seconds, monotonic.
        sleep: Waits for a number of seconds.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        endless: bool = False,
        uniform: Callable[[], float] = random.random,
        clock: Callable[[], float] = monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._policy = policy
        self.endless = endless
        self._uniform = uniform
        self._clock = clock
        self._sleep = sleep
        self._failures = 0
        self._since = clock()

    @property
    def failures(self) -> int:
        """Failures since the last progress."""
        return self._failures

    def progressed(self) -> None:
        """Forget the failures: something went well."""
        self._failures = 0
        self._since = self._clock()

    def delay_s(self, error: FMIError) -> float:
        """Count a failure and return the seconds to wait before the next attempt.

        Raises:
            FMIError: `error` itself, where a retry cannot help or the policy is used up.
        """
        delay_s = self.next_delay_s(error)
        if not error.retryable or not (self.endless or self._allows(delay_s)):
            raise error
        return delay_s

    def next_delay_s(self, error: FMIError) -> float:
        """Count a failure and return the seconds to wait, whatever the failure is."""
        self._failures += 1
        delay_s = self._uniform() * self._policy.bound_s(self._failures)
        return delay_s + (error.retry_after_s or 0.0)

    async def wait_or_raise(self, error: FMIError) -> None:
        """Count a failure and wait before the next attempt.

        Raises:
            FMIError: As `delay_s`.
        """
        await self._sleep(self.delay_s(error))

    def _allows(self, delay_s: float) -> bool:
        if self._failures >= self._policy.max_attempts:
            return False
        deadline_s = self._policy.deadline_s
        return deadline_s is None or self._clock() - self._since + delay_s <= deadline_s
