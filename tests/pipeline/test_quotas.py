"""Quotas: what an account is admitted for, held against the definition of its rate."""

import asyncio
import contextlib
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.errors import QuotaExceededError
from fmi_server.quotas import (
    BURST_S,
    LONGEST_RETRY_S,
    MAX_ACCOUNTS,
    MAX_STALLED,
    MAX_TOLD,
    STALL_S,
    TURN_S,
    Quota,
    Quotas,
    account_of_host,
)
from fmi_server.transport.identity import account_of_address


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def admit(quotas, account="site", *, calls=0, packets=0, size=0):
    for _ in range(calls):
        quotas.admit_call(account)
    if packets or size:
        quotas.admit_packets(account, packets, size)


def admitted(quotas, account="site", **amounts):
    try:
        admit(quotas, account, **amounts)
    except QuotaExceededError:
        return False
    return True


@given(
    rate=st.sampled_from([0.5, 1.0, 8.0, 100.0]),
    calls=st.lists(
        st.tuples(st.sampled_from([0.0, 0.01, 0.5, 3.0, 40.0]), st.integers(0, 300)), max_size=60
    ),
)
def test_in_any_time_an_account_gets_its_rate_a_burst_and_one_call_at_most(rate, calls):
    clock = Clock()
    quotas = Quotas(Quota(packets_per_s=rate), clock=clock)
    taken = []
    for pause, packets in calls:
        clock.now += pause
        with contextlib.suppress(QuotaExceededError):
            quotas.admit_packets("site", packets, 0)
            taken.append((clock.now, packets))
    for first, (begin, _) in enumerate(taken):
        total = 0
        for end, packets in taken[first:]:
            allowed = rate * (end - begin + BURST_S)
            assert total <= allowed + 1e-6  # before the last call, which may owe
            total += packets


@given(calls=st.lists(st.tuples(st.sampled_from([0.1, 1.0, 5.0]), st.integers(0, 50)), max_size=60))
def test_who_keeps_to_the_time_that_is_told_is_admitted_then(calls):
    clock = Clock()
    quotas = Quotas(Quota(packets_per_s=10.0, bytes_per_s=100.0), clock=clock)
    for pause, packets in calls:
        clock.now += pause
        try:
            quotas.admit_packets("site", packets, 7 * packets)
        except QuotaExceededError:
            clock.now += quotas.owed_s("site") + 1e-6
            quotas.admit_packets("site", packets, 7 * packets)


def test_an_account_that_stays_within_its_rate_is_never_refused():
    clock = Clock()
    quotas = Quotas(Quota(calls_per_s=10.0, packets_per_s=20.0), clock=clock)
    for _ in range(1000):
        clock.now += 0.1001
        admit(quotas, calls=1, packets=2)


def test_no_call_is_too_large_to_be_admitted_and_all_of_it_is_paid():
    clock = Clock()
    quotas = Quotas(Quota(packets_per_s=10.0), clock=clock)
    admit(quotas, packets=10_000)
    with pytest.raises(QuotaExceededError) as caught:
        admit(quotas, packets=1)
    assert caught.value.retry_after_s == LONGEST_RETRY_S  # of the 990 s that are owed
    assert caught.value.metadata == {"resource": "packets", "limit": "10 per second"}
    clock.now += 989.9
    assert not admitted(quotas, packets=1)
    clock.now += 0.2
    assert admitted(quotas, packets=1)


def test_what_is_refused_is_not_charged():
    clock = Clock()
    quotas = Quotas(Quota(packets_per_s=10.0), clock=clock)
    admit(quotas, packets=110)
    for _ in range(1000):
        assert not admitted(quotas, packets=100)
    clock.now += 1.001
    assert admitted(quotas, packets=100)


def test_packets_wait_for_bytes_and_calls_for_calls():
    clock = Clock()
    quotas = Quotas(Quota(1.0, 1000.0, 100.0), clock=clock)
    admit(quotas, size=1001)
    with pytest.raises(QuotaExceededError, match="quota of bytes"):
        admit(quotas, packets=1)
    admit(quotas, calls=11)
    with pytest.raises(QuotaExceededError, match="quota of calls"):
        admit(quotas, calls=1)
    clock.now += 0.02
    admit(quotas, packets=1)  # calls are owed still: the call that brings packets is one of them


def test_packets_that_are_counted_late_are_charged():
    clock = Clock()
    quotas = Quotas(Quota(packets_per_s=1.0), clock=clock)
    admit(quotas, size=10_000)
    quotas.admit_counted("site", 60)
    assert quotas.owed_s("site") == pytest.approx(50.0)
    assert not admitted(quotas, size=1)


def test_one_account_takes_nothing_from_another():
    quotas = Quotas(Quota(packets_per_s=1.0, streams=1, cohorts=1), clock=Clock())
    admit(quotas, "loud", packets=1000)
    assert not admitted(quotas, "loud", packets=1)
    with quotas.stream("loud"):
        quotas.opened("loud")
        assert not quotas.may_open("loud")
        assert admitted(quotas, "quiet", packets=1)
        assert quotas.may_open("quiet")
        with quotas.stream("quiet"):
            pass


def test_streams_are_given_back_however_they_end():
    quotas = Quotas(Quota(streams=2))
    with contextlib.suppress(KeyError), quotas.stream("site"):
        raise KeyError
    with quotas.stream("site"), quotas.stream("site"):
        with pytest.raises(QuotaExceededError, match="2 at once"), quotas.stream("site"):
            pass
        with quotas.stream("other"):
            pass
    with quotas.stream("site"):
        pass


def test_nobody_has_limits_by_default_nor_without_an_account():
    free, limited = Quotas(), Quotas(Quota(1.0, 1.0, 1.0, 1, 1))
    assert not free.limited
    assert limited.limited
    for quotas, account in ((free, "site"), (limited, "")):
        for _ in range(100):
            admit(quotas, account, calls=100, packets=100, size=10**9)
            quotas.opened(account)
        assert quotas.may_open(account)
        assert quotas.owed_s(account) == 0.0
        with quotas.stream(account), quotas.stream(account):
            pass


def test_an_exception_says_what_is_other_and_the_rest_holds():
    quota = Quota(calls_per_s=5.0, packets_per_s=10.0, streams=3)
    quotas = Quotas(quota, {"region": Quota(packets_per_s=500.0, streams=0)}, clock=Clock())
    assert quotas.of("region") == Quota(5.0, 500.0, None, 0, None)
    assert quotas.of("site") == quota
    admit(quotas, "region", packets=5000)
    assert admitted(quotas, "region", packets=1)
    with contextlib.ExitStack() as open_streams:
        for _ in range(10):
            open_streams.enter_context(quotas.stream("region"))


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan")])
def test_a_quota_that_is_no_number_from_0_is_refused(value):
    with pytest.raises(ValueError, match="packets_per_s must be a number from 0"):
        Quota(packets_per_s=value)


def test_accounts_that_anybody_can_make_do_not_fill_memory():
    quotas = Quotas(Quota(calls_per_s=1.0), clock=Clock())
    for number in range(MAX_ACCOUNTS + 1000):
        admit(quotas, f"address {number}", calls=1)
    assert len(quotas._accounts) == MAX_ACCOUNTS
    assert not quotas._streams


def test_the_log_tells_of_an_account_once_a_minute(caplog):
    clock = Clock()
    quotas = Quotas(Quota(calls_per_s=1.0), clock=clock)
    with caplog.at_level(logging.WARNING):
        admit(quotas, calls=11)
        for _ in range(500):
            admitted(quotas, calls=1)
        clock.now += 61.0
        admitted(quotas, calls=100)
    assert [record.getMessage() for record in caplog.records] == [
        "site takes more than its quota of calls: 1 refused",
        "site takes more than its quota of calls: 500 refused",
    ]


def test_accounts_that_anybody_can_make_do_not_fill_the_log(caplog):
    clock = Clock()
    quotas = Quotas(Quota(calls_per_s=1.0), clock=clock)
    with caplog.at_level(logging.WARNING):
        for number in range(500):
            admit(quotas, f"address {number}", calls=11)
            assert not admitted(quotas, f"address {number}", calls=1)
        assert len(caplog.records) == MAX_TOLD
        clock.now += 61.0
        admitted(quotas, "address 400", calls=100)
    assert caplog.records[-1].getMessage().endswith("of calls: 2 refused")


@pytest.mark.parametrize(
    ("peer", "account"),
    [
        ("ipv4:10.0.0.7:40112", "10.0.0.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:40112", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::1]:9", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:40112", "fe80::/64"),
        ("ipv6:[::ffff:10.0.0.7]:40112", "10.0.0.7"),
        ("unix:", "unix"),
        ("unix:/run/fmi.sock", "unix"),
    ],
)
def test_an_address_is_one_account_whatever_its_port(peer, account):
    assert account_of_address(peer) == account


class Sleeps:
    """What was slept, in the place of sleeping."""

    def __init__(self, monkeypatch):
        self.seconds = []
        monkeypatch.setattr(asyncio, "sleep", self)

    async def __call__(self, seconds):
        self.seconds.append(seconds)


async def refused(quotas, account="site"):
    with pytest.raises(QuotaExceededError) as caught:
        quotas.admit_packets(account, 1, 1)
    await quotas.stall(account, caught.value)


async def test_refusals_of_who_does_not_wait_are_held_back_longer_and_longer(monkeypatch):
    sleeps, clock = Sleeps(monkeypatch), Clock()
    quotas = Quotas(Quota(packets_per_s=10.0), clock=clock)
    quotas.admit_packets("site", 101, 1)
    for _ in range(12):
        await refused(quotas)
    assert sleeps.seconds[:5] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0])
    assert sleeps.seconds[5:] == pytest.approx([1.0 + TURN_S * turn for turn in range(1, 8)])


async def test_who_waits_is_held_back_no_longer_than_told(monkeypatch):
    sleeps, clock = Sleeps(monkeypatch), Clock()
    quotas = Quotas(Quota(packets_per_s=10.0), clock=clock)
    quotas.admit_packets("site", 101, 1)
    for _ in range(20):
        await refused(quotas)
        clock.now += 0.101
        quotas.admit_packets("site", 1, 1)
    assert max(sleeps.seconds) == pytest.approx(0.1, abs=0.005)


async def test_refusals_of_an_account_are_told_one_after_the_other(monkeypatch):
    """Told all at once they would hold up everybody else."""
    sleeps, clock = Sleeps(monkeypatch), Clock()
    quotas = Quotas(Quota(packets_per_s=10.0), clock=clock)
    for account in ("site", "other"):
        quotas.admit_packets(account, 201, 1)
    await asyncio.gather(*(refused(quotas) for _ in range(60)), refused(quotas, "other"))
    *told, first_of_other = sleeps.seconds
    assert first_of_other == told[0] == pytest.approx(1.0)
    assert told == pytest.approx([1.0 + TURN_S * turn for turn in range(60)])
    clock.now += 0.5  # who comes later waits behind them
    await refused(quotas)
    assert sleeps.seconds[-1] == pytest.approx(0.5 + TURN_S * 60)


async def test_as_many_refusals_are_held_back_as_may_be_and_the_rest_are_told_at_once():
    quotas = Quotas(Quota(packets_per_s=0.001))
    quotas.admit_packets("site", 1, 1)
    held = [asyncio.ensure_future(refused(quotas)) for _ in range(MAX_STALLED + 7)]
    done, waiting = await asyncio.wait(held, timeout=0.3)
    assert (len(done), len(waiting)) == (7, MAX_STALLED)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert not quotas._stalled


async def test_who_hangs_up_gives_its_turn_back():
    """Else whoever shares the account would wait for hours: a hundred calls cost the loud one nothing."""
    quotas = Quotas(Quota(packets_per_s=10.0))
    quotas.admit_packets("site", 100_000, 1)
    for _ in range(10):
        held = [asyncio.ensure_future(refused(quotas)) for _ in range(MAX_STALLED)]
        await asyncio.sleep(0)
        for task in held:
            task.cancel()
        await asyncio.wait(held)
    assert not quotas._stalled
    assert quotas._accounts["site"].next_turn <= 0.0, "nobody's turn was used"
    async with asyncio.timeout(STALL_S + TURN_S * MAX_STALLED):  # and not 51 s
        await refused(quotas)


async def test_who_was_held_back_is_told_what_is_left_of_the_time(monkeypatch):
    clock = Clock()

    async def sleep(seconds):
        clock.now += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    quotas = Quotas(Quota(packets_per_s=10.0), clock=clock)
    quotas.admit_packets("site", 108, 1)
    with pytest.raises(QuotaExceededError) as caught:
        quotas.admit_packets("site", 1, 1)
    assert caught.value.retry_after_s == pytest.approx(0.8)
    told = await quotas.stall("site", caught.value)
    assert told.retry_after_s == pytest.approx(0.0)
    assert told.metadata == caught.value.metadata
    quotas.admit_packets("site", 30, 1)
    with pytest.raises(QuotaExceededError) as caught:
        quotas.admit_packets("site", 1, 1)
    told = await quotas.stall("site", caught.value)
    assert told.retry_after_s == pytest.approx(2.0)
    assert "try again in 2 s" in str(told)
    quotas.admit_packets("other", 10_000_000, 1)
    with pytest.raises(QuotaExceededError) as caught:
        quotas.admit_packets("other", 1, 1)
    told = await quotas.stall("other", caught.value)
    assert told.retry_after_s == LONGEST_RETRY_S


def test_batches_that_are_admitted_together_are_not_all_counted():
    quotas = Quotas(Quota(packets_per_s=10.0, bytes_per_s=100.0), clock=Clock())
    for _ in range(50):
        admit(quotas, size=20)
    quotas.admit_counted("site", 5000)
    for _ in range(49):
        with pytest.raises(QuotaExceededError, match="quota of packets"):
            quotas.admit_counted("site", 5000)
    assert quotas.owed_s("site") == pytest.approx(490.0)


def test_a_batch_does_not_owe_for_its_own_bytes_when_its_packets_are_counted():
    quotas = Quotas(Quota(packets_per_s=10.0, bytes_per_s=100.0), clock=Clock())
    admit(quotas, size=10_000)
    quotas.admit_counted("site", 5)


@pytest.mark.parametrize(
    ("host", "account"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:DB8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::/64", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
    ],
)
def test_a_host_has_the_account_of_its_address(host, account):
    assert account_of_host(host) == account


@pytest.mark.parametrize("host", ["site", "", "10.0.0.0/8", "2001:db8::/32", "10.0.0.7:40112"])
def test_what_is_no_address_has_no_account(host):
    with pytest.raises(ValueError, match="address"):
        account_of_host(host)
