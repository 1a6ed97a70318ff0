"""What local privacy costs: the budget, one draw per packet, and the account in a file."""

from __future__ import annotations

import os
import sqlite3
import struct
import threading

import pytest
from private_packets import BOUNDS, build, private, wire

from fmi_client import (
    ForkedError,
    LocalPrivacy,
    PacketIdReusedError,
    PrivacyAccountError,
    PrivacyBudgetError,
)
from fmi_client._privacy_account import KEEP_PACKETS

# The budget


def test_by_default_the_whole_budget_is_for_one_packet():
    privacy = LocalPrivacy(BOUNDS, epsilon=1.0, delta=1e-6)
    assert privacy.emissions_left == 1
    privacy.apply(build())
    assert privacy.spent == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(PrivacyBudgetError) as caught:
        privacy.apply(build())
    assert caught.value.epsilon == 1.0
    assert caught.value.spent == privacy.spent <= 1.0
    assert not caught.value.retryable


@pytest.mark.parametrize("emissions", [1, 2, 7, 30])
def test_the_budget_lasts_for_just_so_many_packets(emissions):
    privacy = private(emissions=emissions, epsilon=1.0)
    for left in range(emissions, 0, -1):
        assert privacy.emissions_left == left
        privacy.apply(build())
    assert privacy.emissions_left == 0
    assert 0.99 < privacy.spent <= 1.0
    with pytest.raises(PrivacyBudgetError):
        privacy.apply(build())


def test_more_packets_mean_more_noise_in_each():
    assert private(emissions=16).noise_sigma == pytest.approx(4 * private(emissions=1).noise_sigma)


def test_threads_do_not_overdraw_it():
    privacy = private(emissions=20)
    done, refused = [], []

    def emit():
        for _ in range(10):
            try:
                done.append(privacy.apply(build()))
            except PrivacyBudgetError:
                refused.append(1)

    threads = [threading.Thread(target=emit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), len(refused)) == (20, 20)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_no_budget_of_its_own():
    privacy = private()
    child = os.fork()
    if not child:  # pragma: no cover - in another process
        try:
            privacy.apply(build())
        except ForkedError:
            os._exit(7)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert privacy.emissions_left == 8


# One packet, one draw


@pytest.fixture(params=["memory", "file"])
def accounted(request, tmp_path):
    account = None if request.param == "memory" else tmp_path / "account"
    return private(emissions=KEEP_PACKETS + 10, account=account)


def test_a_repeated_id_gives_the_same_packet_and_costs_nothing(accounted):
    packet = build()
    first = accounted.apply(packet)
    assert wire(accounted.apply(packet)) == wire(first)
    assert accounted.apply(first) is first
    assert accounted.emissions_left == KEEP_PACKETS + 9


def test_the_same_id_of_another_site_is_another_packet(accounted):
    packet = build()
    first = accounted.apply(packet)
    packet.header.domain_id = "site_002"
    assert wire(accounted.apply(packet).msp) != wire(first.msp)
    assert accounted.emissions_left == KEEP_PACKETS + 8


def test_an_id_is_not_used_for_other_content(accounted):
    packet = build()
    accounted.apply(packet)
    packet.msp.controller["tau"] = 0.6
    with pytest.raises(PacketIdReusedError, match="other content"):
        accounted.apply(packet)


def test_what_is_no_longer_kept_is_refused_and_not_drawn_again(accounted):
    packets = [build() for _ in range(KEEP_PACKETS + 1)]
    leaves = [accounted.apply(packet) for packet in packets]
    assert wire(accounted.apply(packets[1])) == wire(leaves[1])
    with pytest.raises(PacketIdReusedError, match="no longer kept"):
        accounted.apply(packets[0])
    assert accounted.emissions_left == 9


# The account in a file


def test_an_account_in_a_file_outlives_its_process(tmp_path):
    path = tmp_path / "account"
    packet = build()
    before = private(emissions=3, account=path)
    first = before.apply(packet)
    after = private(emissions=3, account=path)
    assert wire(after.apply(packet)) == wire(first)
    assert after.spent == before.spent > 0.0
    after.apply(build())
    before.apply(build())
    for privacy in (before, after):
        assert privacy.emissions_left == 0
        with pytest.raises(PrivacyBudgetError):
            privacy.apply(build())


def test_another_price_is_added_to_what_was_spent(tmp_path):
    path = tmp_path / "account"
    private(epsilon=1.0, emissions=1, account=path).apply(build())
    larger = private(epsilon=4.0, emissions=2, account=path)
    assert larger.spent == pytest.approx(1.0, rel=1e-6)
    assert larger.emissions_left == 1
    assert private(epsilon=0.5, emissions=1, account=path).emissions_left == 0


def test_the_file_has_nothing_of_what_packets_said_before(tmp_path):
    path = tmp_path / "account"
    leaves = private(account=path).apply(build(tau=0.8125))
    content = path.read_bytes()
    assert struct.pack("<d", leaves.msp.controller["tau"]) in content
    assert struct.pack("<d", 0.8125) not in content


def test_a_packet_that_was_not_paid_for_does_not_leave(tmp_path):
    path = tmp_path / "account"
    privacy = private(account=path)
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON packets BEGIN SELECT RAISE(ABORT, 'no room'); END"
        )
    connection.close()
    with pytest.raises(PrivacyAccountError, match="no room"):
        privacy.apply(build())
    assert privacy.emissions_left == 8


@pytest.mark.parametrize("content", [b"no database at all, but long enough" * 40, b""])
def test_other_files_are_left_as_they_are(tmp_path, content):
    path = tmp_path / "account"
    path.write_bytes(content)
    if not content:
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE other (x)")
        connection.close()
    before = path.read_bytes()
    with pytest.raises(PrivacyAccountError):
        private(account=path)
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_made_is_told_of(tmp_path):
    with pytest.raises(PrivacyAccountError, match="missing"):
        private(account=tmp_path / "missing" / "account")


def test_what_was_spent_is_no_number(tmp_path):
    path = tmp_path / "account"
    privacy = private(account=path)
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO spent VALUES ('lots', 1)")
    connection.close()
    with pytest.raises(PrivacyAccountError, match="no number"):
        privacy.apply(build())
