"""Decisions about who may do what: a table, and properties that hold for all rules and callers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmi_server.access import ANYONE, TRUSTED, AccessRules, Action, Gate, Principal, View
from fmi_server.errors import (
    AccessDeniedError,
    CohortUnknownError,
    DomainIdMismatchError,
    Reason,
)

NAMES = ("ann", "ben", "cat", ANYONE)
lists = st.frozensets(st.sampled_from(NAMES), max_size=4)
rules_of_any = st.builds(AccessRules, lists, lists, lists)
actions = st.sampled_from(Action)
principals = st.builds(
    Principal,
    st.sampled_from(("ann", "ben", "cat", "dan")),
    st.frozensets(st.sampled_from(("ann", "ben", "site-1")), max_size=3),
    operator=st.booleans(),
)

LISTED = AccessRules.of(emit=["ann"], subscribe=["ben"], admin=["cat"])
OPEN = AccessRules.of(emit=[ANYONE], subscribe=[ANYONE], admin=[ANYONE])


def gate(**cohorts: AccessRules) -> Gate:
    return Gate(cohorts.get)


@pytest.mark.parametrize(
    ("name", "operator", "emit", "subscribe", "admin"),
    [
        ("ann", False, True, False, False),
        ("ben", False, False, True, False),
        ("cat", False, False, False, True),
        ("dan", False, False, False, False),
        ("dan", True, False, True, True),
        ("ann", True, True, True, True),
    ],
)
def test_who_is_listed_may(name, operator, emit, subscribe, admin):
    principal = Principal(name, operator=operator)
    allowed = {action: LISTED.allow(principal, action) for action in Action}
    assert allowed == {Action.EMIT: emit, Action.SUBSCRIBE: subscribe, Action.ADMIN: admin}
    assert LISTED.show(principal) == (emit or subscribe or admin)


@given(rules_of_any, principals, actions)
def test_what_is_allowed_is_listed_or_an_operators(rules, principal, action):
    listed = rules.listed(action)
    by_list = principal.name in listed or ANYONE in listed
    assert rules.allow(principal, action) == (
        by_list or (principal.operator and action is not Action.EMIT)
    )


@given(rules_of_any, principals, actions, st.sampled_from(NAMES))
def test_more_in_a_list_never_takes_a_right_away(rules, principal, action, name):
    more = replace(rules, **{action.value: rules.listed(action) | {name}})
    for other in Action:
        assert more.allow(principal, other) >= rules.allow(principal, other)


@given(principals, actions)
def test_empty_lists_mean_nobody_but_operators(principal, action):
    allowed = AccessRules().allow(principal, action)
    assert allowed == (principal.operator and action is not Action.EMIT)


@given(rules_of_any, principals, actions)
def test_a_cohort_is_hidden_exactly_from_who_may_do_nothing_in_it(rules, principal, action):
    door = gate(care=rules)
    error = door.refusal(principal, action, "care")
    shown = any(rules.allow(principal, each) for each in Action)
    assert door.shows(principal, "care") == shown
    if rules.allow(principal, action):
        assert error is None
    elif shown:
        assert isinstance(error, AccessDeniedError)
        assert error.metadata["cohort"] == "care"
    else:
        nobody = door.refusal(principal, action, "cave")
        assert isinstance(error, CohortUnknownError)
        assert str(error).replace("care", "cave") == str(nobody)


@given(rules_of_any, principals)
def test_a_packet_of_another_site_is_refused_before_its_cohort_is_looked_at(rules, principal):
    door = gate(care=rules)
    for site in ("ann", "ben", "site-1", "site-2"):
        for cohort in ("care", "cave"):
            found = door.violations(principal, site, cohort)
            if site not in principal.domain_ids:
                (mismatch,) = found
                assert mismatch.reason == Reason.DOMAIN_ID_MISMATCH
                assert cohort not in mismatch.description
            elif cohort == "care" and rules.allow(principal, Action.EMIT):
                assert found == []
            else:
                assert found[0].reason in (Reason.COHORT_UNKNOWN, Reason.ACCESS_DENIED)


@given(rules_of_any, actions)
def test_the_program_itself_may_do_everything(rules, action):
    door = gate(care=rules)
    for cohort in ("care", "cave"):
        assert door.refusal(TRUSTED, action, cohort) is None
        assert door.may(TRUSTED, action, cohort)
        assert door.violations(TRUSTED, "anybody", cohort) == []
    door.require_operator(TRUSTED, "do it")
    door.require_name(TRUSTED, "anybody", "subscriber")


def test_a_cohort_that_nobody_has_is_an_operators_to_ask_for_and_not_to_emit_to():
    boss = Principal("boss", frozenset({"boss"}), operator=True)
    door = gate()
    assert door.refusal(boss, Action.ADMIN, "cave") is None
    assert isinstance(door.refusal(boss, Action.EMIT, "cave"), CohortUnknownError)


def test_a_view_follows_the_rules():
    rules = {"care": AccessRules()}
    ann = Principal("ann")
    view = View(Gate(rules.get), ann)
    assert not view("care")
    rules["care"] = AccessRules.of(subscribe=["ann"])
    assert view("care")
    assert view == View(view.gate, Principal("ann"))


def test_refusals_name_who_and_what():
    ann = Principal("ann", frozenset({"ann"}))
    with pytest.raises(AccessDeniedError) as denied:
        gate().require_operator(ann, "register dictionaries")
    assert denied.value.metadata == {"principal": "ann", "action": "register dictionaries"}
    with pytest.raises(DomainIdMismatchError) as mismatch:
        gate().require_name(ann, "ben", "subscriber")
    assert [v.field for v in mismatch.value.violations] == ["subscriber"]
    assert mismatch.value.metadata == {"principal": "ann", "domain_id": "ben"}


@given(principals, principals)
def test_rights_are_the_same_whatever_credential_proves_them(one, other):
    assert one.same_rights(replace(one, credential="another"))
    same = (one.name, one.domain_ids, one.operator) == (
        other.name,
        other.domain_ids,
        other.operator,
    )
    assert one.same_rights(other) == same
    assert OPEN.show(one)
