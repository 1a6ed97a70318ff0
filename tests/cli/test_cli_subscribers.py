"""`fmi subscribers`: readable, honest about what is not known, and safe with what sites write."""

from __future__ import annotations

import json
import time

import pytest

from fmi.v1 import admin_service_pb2, interchange_service_pb2

EVERY = interchange_service_pb2.DELIVERY_MODE_EVERY


def connected(**fields) -> admin_service_pb2.SubscriberStatus:
    status = admin_service_pb2.SubscriberStatus(
        **{"subscriber": "site_001", "cohorts": ["care"], "sent": 7, **fields}
    )
    status.connected_at.FromSeconds(int(time.time()) - 3 * 3600)
    return status


def applied(**fields) -> admin_service_pb2.AppliedStatus:
    status = admin_service_pb2.AppliedStatus(
        **{
            "subscriber": "site_001", "cohort": "care", "kind": 1,
            "applied_revision": 11, "newest_revision": 12, **fields,
        }
    )  # fmt: skip
    if status.applied_revision:
        status.applied_at.FromSeconds(int(time.time()) - 60)
    return status


@pytest.fixture
def answers(script):
    def set_answers(subscribers=(), reports=()) -> None:
        script["ListSubscribers"] = admin_service_pb2.ListSubscribersResponse(
            subscribers=subscribers
        )
        script["ListApplied"] = admin_service_pb2.ListAppliedResponse(applied=reports)

    return set_answers


def test_who_is_there_and_who_applied_what(ask, answers, script):
    failure = interchange_service_pb2.ApplyFailure(code=9, message="tau out of range")
    answers(
        [connected(), connected(subscriber="", mode=EVERY, kinds=[1], behind=41, conflated=5)],
        [
            applied(),
            applied(subscriber="site_002", applied_revision=0, failed_revision=12, failure=failure),
        ],
    )
    told = ask("subscribers", "care")
    assert told.exit_code == 0
    lines = told.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first = next(line for line in lines if line.startswith("site_001"))
    assert first.split()[1:] == ["care", "latest", "3", "h", "ago", "7", "0", "0"]
    assert any("(no name)" in line and "every" in line and "41" in line for line in lines)
    assert any(
        "site_001" in line and "prior" in line and "11" in line and "12" in line for line in lines
    )
    assert "site_002 failed on care prior revision 12 (code 9)" in told.stdout
    assert "tau out of range" in told.stdout
    assert [request.cohort for request in script.requests["ListSubscribers"]] == ["care"]
    assert [request.cohort for request in script.requests["ListApplied"]] == ["care"]


def test_nobody_and_nothing_is_said_in_words(ask, answers):
    answers()
    told = ask("subscribers")
    assert told.stdout == "nobody is connected\nnobody reported what it applied\n"


def test_json_has_the_contract_s_names(ask, answers):
    answers([connected()], [applied()])
    data = json.loads(ask("subscribers", "--json").stdout)
    assert data["subscribers"][0]["subscriber"] == "site_001"
    assert data["subscribers"][0]["sent"] == 7
    assert data["applied"][0]["applied_revision"] == 11
    assert data["applied"][0]["kind"] == "UPDATE_KIND_PRIOR"


def test_what_a_site_writes_cannot_write_to_the_terminal(ask, answers):
    nasty = interchange_service_pb2.ApplyFailure(code=2, message="\x1b[2J[bold]gone[/bold]")
    answers([connected(subscriber="\x1b[31mred")], [applied(failed_revision=3, failure=nasty)])
    told = ask("subscribers")
    assert told.exit_code == 0
    assert "\x1b" not in told.stdout
    assert "[bold]gone[/bold]" in told.stdout
