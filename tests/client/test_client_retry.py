"""RetryPolicy and Backoff, with a clock and a die of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_client import ConfigurationError, ConnectionFailedError, ContractError, RetryPolicy
from fmi_client.retry import NO_RETRY, Backoff


class Time:
    def __init__(self):
        self.now = 0.0
        self.slept = []

    def clock(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def backoff(policy, time, *, uniform=lambda: 1.0, endless=False):
    return Backoff(policy, endless=endless, uniform=uniform, clock=time.clock, sleep=time.sleep)


BROKEN = ConnectionFailedError("broken")


async def test_waits_grow_to_the_bound():
    time = Time()
    policy = RetryPolicy(initial_s=0.1, max_s=1.0, multiplier=2, max_attempts=7)
    waits = backoff(policy, time)
    for _ in range(6):
        await waits.wait_or_raise(BROKEN)
    assert time.slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    with pytest.raises(ConnectionFailedError):
        await waits.wait_or_raise(BROKEN)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 2000))
def test_jitter_is_full(uniform, failures):
    policy = RetryPolicy(initial_s=0.1, max_s=3.0, multiplier=3)
    waits = backoff(policy, Time(), uniform=lambda: uniform, endless=True)
    for _ in range(failures):
        delay_s = waits.delay_s(BROKEN)
    bound = min(3.0, 0.1 * 3.0 ** min(failures - 1, 10))
    assert delay_s == pytest.approx(uniform * bound)


async def test_the_servers_time_comes_on_top():
    time = Time()
    waits = backoff(RetryPolicy(initial_s=0.1, max_s=1), time)
    await waits.wait_or_raise(ConnectionFailedError("later", retry_after_s=5.0))
    assert time.slept == pytest.approx([5.1])


async def test_what_a_retry_cannot_help_is_raised_at_once():
    time = Time()
    error = ContractError("bad")
    with pytest.raises(ContractError) as caught:
        await backoff(RetryPolicy(), time, endless=True).wait_or_raise(error)
    assert caught.value is error
    assert time.slept == []


async def test_no_attempt_begins_after_the_deadline():
    time = Time()
    policy = RetryPolicy(initial_s=1, max_s=1, max_attempts=99, deadline_s=3.5)
    waits = backoff(policy, time)
    for _ in range(3):
        await waits.wait_or_raise(BROKEN)
    with pytest.raises(ConnectionFailedError):
        await waits.wait_or_raise(BROKEN)
    assert time.now == 3.0


async def test_progress_begins_anew():
    time = Time()
    waits = backoff(RetryPolicy(initial_s=1, max_s=8, max_attempts=3, deadline_s=4), time)
    for _ in range(4):
        await waits.wait_or_raise(BROKEN)
        await waits.wait_or_raise(BROKEN)
        assert waits.failures == 2
        waits.progressed()
    assert time.slept == [1, 2] * 4


async def test_one_attempt_only():
    with pytest.raises(ConnectionFailedError):
        await backoff(NO_RETRY, Time()).wait_or_raise(BROKEN)


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial_s": 0},
        {"initial_s": 2, "max_s": 1},
        {"multiplier": 0.5},
        {"max_attempts": 0},
        {"deadline_s": 0},
    ],
)
def test_wrong_policy_is_refused(wrong):
    with pytest.raises(ConfigurationError):
        RetryPolicy(**wrong)


def test_no_bound_overflows():
    assert RetryPolicy(multiplier=1e9).bound_s(10_000) == 10.0
