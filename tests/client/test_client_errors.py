"""The error tree: one class per reason, and nothing of gRPC comes through."""

from __future__ import annotations

import inspect
import re

import grpc
import pytest
from google.protobuf import duration_pb2
from scripted_server import aborts, status

import fmi_client
from fmi.plain import PlainDataError, Problem
from fmi.v1 import error_pb2
from fmi_client import AsyncFMIClient, FMIClient, errors
from fmi_client._translation import (
    REASON_CLASSES,
    error_from_plain_data,
    error_from_refusal,
    error_from_rpc,
)
from fmi_client.errors import FMIError, Violation

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, FMIError)
}

# What is not in the catalogue: groups, and what goes wrong without the server's saying so.
WITHOUT_REASON = {
    "ForkedError",
    "OutboxCorruptError",
    "OutboxError",
    "OutboxFullError",
    "OutboxLockedError",
    "OutboxUnavailableError",
    "ClientClosedError",
    "ConfigurationError",
    "ConnectionFailedError",
    "DeadlineError",
    "FMIError",
    "LocalPrivacyError",
    "PacketRefusedError",
    "PrivacyAccountError",
    "PrivacyBudgetError",
    "PrivacyCoverageError",
    "ProtocolError",
    "SubscriptionError",
    "TemporaryError",
}

# The server's own table, written out: reason, status code, whether RetryInfo comes with it.
STATUSES = {
    "PRIVACY_BUDGET_EXHAUSTED": "FAILED_PRECONDITION",
    "RELEASE_SCHEDULED": "FAILED_PRECONDITION",
    "CONTRACT_VIOLATION": "INVALID_ARGUMENT",
    "CONTRACT_REVISION_UNSUPPORTED": "FAILED_PRECONDITION",
    "SCHEMA_HASH_MISMATCH": "FAILED_PRECONDITION",
    "COHORT_UNKNOWN": "NOT_FOUND",
    "COHORT_RULE_VIOLATION": "INVALID_ARGUMENT",
    "PACKET_TOO_LARGE": "RESOURCE_EXHAUSTED",
    "PACKET_STALE": "INVALID_ARGUMENT",
    "PACKET_FROM_FUTURE": "INVALID_ARGUMENT",
    "NORM_EXCEEDED": "INVALID_ARGUMENT",
    "PRIVACY_REQUIRED": "FAILED_PRECONDITION",
    "PACKET_ID_REUSED": "ALREADY_EXISTS",
    "ENVELOPE_MALFORMED": "INVALID_ARGUMENT",
    "ENVELOPE_TOO_LARGE": "RESOURCE_EXHAUSTED",
    "DICTIONARY_UNKNOWN": "FAILED_PRECONDITION",
    "OVERLOADED": "RESOURCE_EXHAUSTED+",
    "STORE_UNAVAILABLE": "UNAVAILABLE+",
    "STORE_CORRUPT": "DATA_LOSS",
    "SERVER_DRAINING": "UNAVAILABLE+",
    "UPDATE_NOT_FOUND": "NOT_FOUND",
    "COMPACTED": "OUT_OF_RANGE",
    "INVALID_FILTER": "INVALID_ARGUMENT",
    "UNAUTHENTICATED": "UNAUTHENTICATED",
    "ACCESS_DENIED": "PERMISSION_DENIED",
    "DOMAIN_ID_MISMATCH": "PERMISSION_DENIED",
    "UNAUTHORIZED": "PERMISSION_DENIED",
    "SPEC_INVALID": "INVALID_ARGUMENT",
    "SPEC_CHANGE_UNSAFE": "FAILED_PRECONDITION",
    "SETTING_UNSUPPORTED": "FAILED_PRECONDITION",
    "NOT_FOUND": "NOT_FOUND",
    "INTERNAL": "INTERNAL",
    "SUPERSEDED": "ABORTED",
    "QUOTA_EXCEEDED": "RESOURCE_EXHAUSTED+",
}


def rpc_error(refusal):
    trailing = grpc.aio.Metadata(*(tuple(pair) for pair in refusal.trailing_metadata))
    return bare_error(refusal.code, trailing, details=refusal.details)


def bare_error(code, trailing=None, details=None):
    """Older versions of grpcio want both kinds of metadata, newer ones make do without."""
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, empty, trailing or empty, details=details)


def test_every_reason_has_a_class():
    assert set(REASON_CLASSES) == set(error_pb2.ErrorReason.values()) - {0}


def test_every_class_has_a_reason_or_is_known_to_have_none():
    with_reason = {kind.__name__ for kind in REASON_CLASSES.values()}
    assert with_reason | WITHOUT_REASON == set(CLASSES)
    assert not with_reason & WITHOUT_REASON


def test_every_class_is_public():
    assert set(CLASSES) <= set(errors.__all__)
    assert set(CLASSES) <= set(fmi_client.__all__)


def test_the_docstring_is_the_tree():
    depths: dict[int, str] = {}
    told = {}
    for line in (errors.__doc__ or "").splitlines():
        entry = re.match(r"( *)[*-] (\w+)", line)
        if entry:
            depth = len(entry[1]) // 4
            depths[depth] = entry[2]
            told[entry[2]] = depths.get(depth - 1, "Exception")
    assert told == {name: kind.__base__.__name__ for name, kind in CLASSES.items()}


@pytest.mark.parametrize(
    "reason", [name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.keys()[1:]]
)
async def test_every_status_of_the_server_becomes_its_class(server, connect, reason):
    """Over the wire: reason, code, violations, retry, request id and metadata all arrive."""
    code = STATUSES[reason]
    retryable = code.endswith("+")
    refusal = status(
        grpc.StatusCode[code.rstrip("+")],
        reason,
        f"text of {reason}",
        violations=[("msp.x", "rule.id", "what to do")],
        retry_after_s=0.0 if retryable else None,
        request_id="req-1",
        metadata={"key": "value"},
    )
    server.script("GetContract", *[aborts(refusal)] * 5)
    client = await connect()
    with pytest.raises(FMIError) as caught:
        await client.contract()
    error = caught.value
    assert type(error) is REASON_CLASSES[error_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}")]
    assert error.reason == reason
    assert error.message == f"text of {reason}"
    assert error.retryable is retryable
    assert error.retry_after_s == (0.0 if retryable else None)
    assert error.request_id == "req-1"
    assert error.metadata == {"key": "value"}
    assert error.code is grpc.StatusCode[code.rstrip("+")]
    assert [(v.field, v.rule_id, v.description) for v in error.violations] == [
        ("msp.x", "rule.id", "what to do")
    ]
    assert len(server.seen("GetContract")) == (5 if retryable else 1)
    assert "req-1" in str(error)


@pytest.mark.parametrize(
    ("code", "kind", "retryable"),
    [
        ("CANCELLED", errors.ConnectionFailedError, True),
        ("UNKNOWN", errors.ServerInternalError, False),
        ("INVALID_ARGUMENT", errors.ContractError, False),
        ("DEADLINE_EXCEEDED", errors.DeadlineError, True),
        ("NOT_FOUND", errors.NotFoundError, False),
        ("ALREADY_EXISTS", FMIError, False),
        ("PERMISSION_DENIED", errors.AccessDeniedError, False),
        ("RESOURCE_EXHAUSTED", errors.OverloadedError, False),
        ("FAILED_PRECONDITION", FMIError, False),
        ("ABORTED", FMIError, False),
        ("OUT_OF_RANGE", FMIError, False),
        ("UNIMPLEMENTED", errors.ProtocolError, False),
        ("INTERNAL", errors.ServerInternalError, False),
        ("UNAVAILABLE", errors.ConnectionFailedError, True),
        ("DATA_LOSS", errors.ServerInternalError, False),
        ("UNAUTHENTICATED", errors.AccessDeniedError, False),
    ],
)
def test_bare_status(code, kind, retryable):
    error = error_from_rpc(bare_error(grpc.StatusCode[code]))
    assert type(error) is kind
    assert (error.retryable, error.reason, error.violations) == (retryable, "", ())


@pytest.mark.parametrize(
    ("code", "text", "kind", "retryable"),
    [
        (
            "RESOURCE_EXHAUSTED",
            "Received message larger than max (5 vs. 4)",
            errors.PacketTooLargeError,
            False,
        ),
        (
            "INTERNAL",
            "Received RST_STREAM with error code 2",
            errors.ConnectionFailedError,
            True,
        ),
        ("UNKNOWN", "Stream removed", errors.ConnectionFailedError, True),
    ],
)
def test_what_grpc_itself_says(code, text, kind, retryable):
    error = error_from_rpc(bare_error(grpc.StatusCode[code], details=text))
    assert type(error) is kind
    assert error.retryable is retryable


def test_unknown_reason_of_a_newer_server_falls_back_to_the_code():
    error = error_from_rpc(rpc_error(status(grpc.StatusCode.NOT_FOUND, "BRAND_NEW")))
    assert type(error) is errors.NotFoundError
    assert error.reason == "BRAND_NEW"


def test_reason_of_another_domain_is_not_ours():
    refusal = status(grpc.StatusCode.UNAVAILABLE, "COMPACTED")
    raw = dict(refusal.trailing_metadata)["grpc-status-details-bin"].replace(b"fmi", b"xyz")
    trailing = grpc.aio.Metadata(("grpc-status-details-bin", raw))
    error = error_from_rpc(bare_error(grpc.StatusCode.UNAVAILABLE, trailing))
    assert type(error) is errors.ConnectionFailedError
    assert error.reason == ""


def test_unreadable_details_leave_the_code_and_the_request_id():
    trailing = grpc.aio.Metadata(
        ("grpc-status-details-bin", b"\xff\xff\xff"), ("fmi-request-id", "r9")
    )
    error = error_from_rpc(bare_error(grpc.StatusCode.NOT_FOUND, trailing))
    assert type(error) is errors.NotFoundError
    assert error.request_id == "r9"


def test_refusal_of_an_item():
    refusal = error_pb2.Refusal(
        reason=error_pb2.ERROR_REASON_OVERLOADED,
        message="later",
        violations=[error_pb2.Violation(field="f", rule_id="r", description="d")],
        retry_delay=duration_pb2.Duration(seconds=2),
    )
    error = error_from_refusal(refusal)
    assert type(error) is errors.OverloadedError
    assert (error.retryable, error.retry_after_s, error.code) == (True, 2.0, None)
    assert str(error.violations[0]) == "f: d [r]"
    final = error_from_refusal(error_pb2.Refusal(reason=error_pb2.ERROR_REASON_OVERLOADED))
    assert not final.retryable


def test_refusal_for_a_reason_that_is_newer_than_this_sdk():
    error = error_from_refusal(error_pb2.Refusal(reason=999, message="new"))
    assert type(error) is FMIError
    assert error.reason == "999"


def test_plain_data_error():
    error = error_from_plain_data(PlainDataError([Problem("f", "fmi.plain.number", "d")]))
    assert isinstance(error, errors.ContractError)
    assert error.violations[0].field == "f"


def test_compacted_tells_the_oldest_revision():
    assert errors.CompactedError("x", metadata={"oldest_revision": "40"}).oldest_revision == 40
    assert errors.CompactedError("x").oldest_revision is None


@pytest.mark.parametrize(
    ("said", "untold"),
    [("100", 98), ("2", 0), ("1", 0), ("", 0), ("-5", 0), ("many", 0), ("9" * 40, 999_999_997)],
)
def test_how_many_rules_more_were_broken_than_the_answer_held(said, untold):
    violations = [Violation("a", "r", "d"), Violation("b", "r", "d")]
    assert FMIError("no", violations=violations, metadata={"violations": said}).untold == untold
    assert FMIError("no", violations=violations).untold == 0


def test_a_server_that_is_another_is_told_as_such():
    error = error_from_rpc(bare_error(grpc.StatusCode.UNIMPLEMENTED), "example.org:443")
    assert "example.org:443 does not have this method" in str(error)
    assert "is it an FMI server" in str(error)


@pytest.mark.parametrize("client", [FMIClient, AsyncFMIClient])
def test_a_retry_that_is_none_is_refused_at_once(client):
    with pytest.raises(errors.ConfigurationError, match="retry must be a RetryPolicy"):
        client("127.0.0.1:1", domain_id="s", retry=None)
