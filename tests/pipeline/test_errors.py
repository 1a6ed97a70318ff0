"""The catalogue of refusals: complete in both directions, typed, and without the server's paths."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from parts import NOW, Clock, msp

import fmi_server
from fmi.v1 import cohort_pb2, error_pb2
from fmi_server import errors
from fmi_server.cohorts import CohortRegistry
from fmi_server.contracts import FMIContractRegistry
from fmi_server.errors import FMIError, PacketRefusedError, Reason, Violation, reason_name
from fmi_server.storage import base
from fmi_server.storage.records import SpendRecord
from fmi_server.transport.status import STATUS_CODES, refusal_message, status_message
from fmi_server.validator import FMIValidator

REASONS = {value for value in error_pb2.ErrorReason.values() if value}
CONTRACT = FMIContractRegistry()


def details(status) -> dict:
    found = {}
    for packed in status.details:
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
            error_details_pb2.RequestInfo,
        ):
            message = kind()
            if packed.Unpack(message):
                assert kind not in found
                found[kind] = message
    assert len(found) == len(status.details)
    return found


PATH = "/var/lib/secret/fmi.sqlite3"

EXAMPLES = [
    errors.PacketRefusedError([Violation("a", "b", "c", Reason.PACKET_STALE)]),
    errors.RequestInvalidError([Violation("a", "b", "c")]),
    errors.PacketIdReusedError("site", "id"),
    errors.CohortUnknownError("care"),
    errors.EnvelopeMalformedError("garbage"),
    errors.EnvelopeTooLargeError(10, 5),
    errors.DictionaryUnknownError(7),
    errors.OverloadedError("calls at work"),
    errors.QuotaExceededError("packets", "50 per second", retry_after_s=2.5),
    errors.ServerDrainingError(),
    errors.UpdateNotFoundError("care", "prior", 3),
    errors.CompactedError("care", "prior", 3, 7),
    errors.InvalidFilterError("resume_token", "is wrong"),
    errors.SupersededError("site"),
    errors.UnauthenticatedError("this server wants a token"),
    errors.AccessDeniedError("site", "emit", "care"),
    errors.DomainIdMismatchError("site", "another", "subscriber"),
    errors.UnauthorizedError("the token was revoked"),
    errors.SpecInvalidError([Violation("a", "b", "c", Reason.SPEC_INVALID)]),
    errors.DictionaryInvalidError([Violation("a", "b", "c", Reason.SPEC_INVALID)]),
    errors.SpecChangeUnsafeError([Violation("a", "b", "c", Reason.SPEC_CHANGE_UNSAFE)]),
    errors.SettingUnsupportedError("access.emit", "is not there"),
    errors.PrivacyBudgetExhaustedError("care", epsilon=1.0, delta=1e-6),
    errors.ReleaseScheduledError("care", next_release_at=NOW),
    errors.ThingNotFoundError("site", "x"),
    errors.FMIError("inside"),
    base.StoreError(PATH),
    base.StoreUnavailableError("disk_full", detail=f"{PATH} is full", path=PATH),
    base.StoreBusyError(pending_records=5, pending_bytes=7, path=PATH),
    base.StoreLockedError(path=PATH, holder_pid=4711),
    base.StoreCorruptError(path=PATH, detail=f"{PATH} is damaged"),
    base.StoreBehindError(detail=f"{PATH} begins later", path=PATH),
    base.StoreStoppedError(detail="KeyError(1)", path=PATH),
    base.StoreVersionError(path=PATH, found=9, supported=1),
    base.EntryVersionError(path=PATH, found=9, supported=1),
    base.RevisionConflictError(
        cohort="care", kind=1, revision=1, expected_revision=2, sequence=1, expected_sequence=2
    ),
    base.LedgerConflictError(
        SpendRecord("care", 1, 7, 1_000, 0.5, "epoch"), last_number=1, last_period=7
    ),
    base.SpecChangedError(cohort="care"),
    base.DictionaryConflictError(dictionary_id=3),
    base.UnknownPacketError(packet=3),
]


def names(example) -> str:
    return type(example).__name__


def test_there_is_an_example_of_every_error():
    def tree(kind):
        return {kind, *(found for child in kind.__subclasses__() for found in tree(child))}

    public = {kind for kind in tree(FMIError) if not kind.__name__.startswith("_")}
    assert {type(example) for example in EXAMPLES} == {
        kind for kind in public if kind.__module__.startswith("fmi_server")
    }


def test_the_docstring_shows_the_whole_tree():
    told = set(re.findall(r"- (\w+Error)\b", errors.__doc__ or ""))
    public = {name for name in errors.__all__ if name.endswith("Error")} - {"FMIError"}
    assert told == public | {"StoreError"}


# Complete in both directions


def test_every_reason_has_a_status_and_nothing_else_has():
    assert set(STATUS_CODES) == REASONS
    assert grpc.StatusCode.OK not in STATUS_CODES.values()
    assert grpc.StatusCode.UNKNOWN not in STATUS_CODES.values()


def test_every_reason_has_its_short_name():
    short = {name: value for name, value in vars(Reason).items() if name.isupper()}
    assert set(short.values()) == REASONS
    for name, value in short.items():
        assert reason_name(value) == name
        assert error_pb2.ErrorReason.Name(value) == f"ERROR_REASON_{name}"


def test_every_reason_is_given_by_an_error_or_a_violation():
    given = {example.reason for example in EXAMPLES}
    cohorts = CohortRegistry(CONTRACT, open_cohorts=False)
    spec = cohort_pb2.CohortSpec(name="care")
    spec.signals.add(name="tau", section=cohort_pb2.SIGNAL_SECTION_CONTROLLER)
    spec.ingest.max_packet_bytes = 1
    spec.ingest.max_norm = 1
    spec.ingest.dp_required = True
    spec.ingest.schema_mismatch = cohort_pb2.SCHEMA_MISMATCH_REFUSE
    cohorts.declare(spec)
    validator = FMIValidator(CONTRACT, cohorts=cohorts, clock=Clock())
    for bad in (
        msp(controller={"x": 5.0}, schema_hash="0" * 64, at=NOW - 1e7),
        msp(controller={"x": 5.0}, at=NOW + 1e7),
        msp(controller={"x": math.nan}),
        msp(controller={"x": 1.0}, rev=9),
        msp(controller={"x": 1.0}, cohort="nowhere"),
    ):
        given |= {violation.reason for violation in validator.validate(bad)}
    assert given == REASONS


def test_every_reason_is_named_in_the_servers_source():
    folder = Path(inspect.getfile(fmi_server)).parent
    sources = [
        path.read_text(encoding="utf-8")
        for path in folder.rglob("*.py")
        if path.name != "status.py"
    ]
    used = {name for text in sources for name in re.findall(r"\bReason\.([A-Z_]+)", text)}
    assert {getattr(Reason, name) for name in used} >= REASONS - {Reason.INTERNAL}


# Details


@pytest.mark.parametrize("example", EXAMPLES, ids=names)
def test_a_status_says_what_a_program_needs(example):
    status = status_message(example, request_id="abc123")
    found = details(status)
    info = found[error_details_pb2.ErrorInfo]
    assert (info.domain, info.reason) == ("fmi", reason_name(example.reason))
    assert dict(info.metadata) == dict(example.metadata)
    assert found[error_details_pb2.RequestInfo].request_id == "abc123"
    assert status.code == STATUS_CODES[example.reason].value[0]
    assert status.message == example.public_message
    shown = [
        (item.field, item.reason, item.description)
        for item in found.get(
            error_details_pb2.BadRequest, error_details_pb2.BadRequest()
        ).field_violations
    ]
    assert shown == [(v.field, v.rule_id, v.description) for v in example.violations]
    retry = found.get(error_details_pb2.RetryInfo)
    assert (retry is None) == (example.retry_after_s is None)
    if retry is not None:
        assert retry.retry_delay.ToMilliseconds() == example.retry_after_s * 1000


@pytest.mark.parametrize("example", EXAMPLES, ids=names)
def test_a_refusal_inside_an_answer_says_the_same(example):
    refusal = refusal_message(example)
    assert refusal.reason == example.reason
    assert refusal.message == example.public_message
    assert [(v.field, v.rule_id) for v in refusal.violations] == [
        (v.field, v.rule_id) for v in example.violations
    ]
    assert refusal.HasField("retry_delay") == (example.retry_after_s is not None)


@pytest.mark.parametrize("example", EXAMPLES, ids=names)
def test_the_caller_never_reads_where_the_store_lies(example):
    told = str(status_message(example, request_id="1")) + str(refusal_message(example))
    assert "secret" not in told
    assert "4711" not in told
    assert "sqlite" not in told


def test_only_what_can_help_is_retried():
    retried = {names(example) for example in EXAMPLES if example.retry_after_s is not None}
    assert retried == {
        "OverloadedError",
        "QuotaExceededError",
        "ServerDrainingError",
        "StoreUnavailableError",
        "StoreBusyError",
        "StoreLockedError",
        "StoreBehindError",
        "StoreStoppedError",
        "StoreVersionError",
        "EntryVersionError",
    }
    codes = {
        STATUS_CODES[example.reason] for example in EXAMPLES if example.retry_after_s is not None
    }
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}


def test_what_nobody_foresaw_is_internal_and_says_nothing():
    status = status_message(KeyError(PATH), request_id="abc123")
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert "abc123" in status.message
    assert "secret" not in str(status)
    assert details(status)[error_details_pb2.ErrorInfo].reason == "INTERNAL"


# The reason of many


def violation(reason) -> Violation:
    return Violation("field", "rule", "text", reason)


def test_the_reason_of_many_is_what_makes_the_others_meaningless():
    error = PacketRefusedError([violation(Reason.PACKET_STALE), violation(Reason.PACKET_TOO_LARGE)])
    assert error.reason == Reason.PACKET_TOO_LARGE
    assert len(error.violations) == 2


@pytest.mark.parametrize("reason", sorted(errors._PRECEDENCE))
def test_every_reason_of_a_packet_can_stand_alone(reason):
    assert PacketRefusedError([violation(reason)]).reason == reason


def test_the_message_is_bounded_however_many_rules_are_broken():
    error = PacketRefusedError([violation(Reason.CONTRACT_VIOLATION)] * 100)
    assert str(error).endswith("; 95 more")
    assert len(str(error)) < 1000
