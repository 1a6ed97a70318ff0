"""Errors as statuses: one table from reasons to codes, and the details that go with each.

A refusal carries `google.rpc.ErrorInfo` (reason and domain `fmi`), `BadRequest` with every violation,
`RetryInfo` where trying again can help, and `RequestInfo`, so that a client never has to read the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from fmi.v1 import error_pb2
from fmi_server.errors import FMIError, Reason, Violation, reason_name

__all__ = ["DOMAIN", "STATUS_CODES", "refusal_message", "status_message"]

DOMAIN: Final = "fmi"

# A status and its details travel as metadata, of which a client takes 8 KiB before it may drop the call
# with a bare RESOURCE_EXHAUSTED. Binary details grow by a third on the wire, the message comes twice.
MAX_MESSAGE_BYTES: Final = 1024
MAX_VALUE_BYTES: Final = 160
MAX_BAD_REQUEST_BYTES: Final = 3200

STATUS_CODES: Final[Mapping[error_pb2.ErrorReason.ValueType, grpc.StatusCode]] = {
    Reason.CONTRACT_VIOLATION: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CONTRACT_REVISION_UNSUPPORTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.SCHEMA_HASH_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.COHORT_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Reason.COHORT_RULE_VIOLATION: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.PACKET_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.PACKET_STALE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.PACKET_FROM_FUTURE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NORM_EXCEEDED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.PRIVACY_REQUIRED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.PACKET_ID_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    Reason.ENVELOPE_MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.ENVELOPE_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DICTIONARY_UNKNOWN: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.STORE_CORRUPT: grpc.StatusCode.DATA_LOSS,
    Reason.SERVER_DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.UPDATE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.COMPACTED: grpc.StatusCode.OUT_OF_RANGE,
    Reason.INVALID_FILTER: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.SPEC_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.SPEC_CHANGE_UNSAFE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.SETTING_UNSUPPORTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    Reason.SUPERSEDED: grpc.StatusCode.ABORTED,
    Reason.PRIVACY_BUDGET_EXHAUSTED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.RELEASE_SCHEDULED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.ACCESS_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.DOMAIN_ID_MISMATCH: grpc.StatusCode.PERMISSION_DENIED,
    Reason.UNAUTHORIZED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.QUOTA_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def status_message(error: Exception, *, request_id: str) -> status_pb2.Status:
    """Write an error as a status with its details.

    An exception that is no `FMIError` becomes INTERNAL; what it says stays in the log, where the request
    id finds it.

    Args:
        error: The error.
        request_id: The id of the call.
    """
    known = (
        error
        if isinstance(error, FMIError)
        else FMIError(
            f"something went wrong inside the server; request {request_id} in its log tells what"
        )
    )
    info = error_details_pb2.ErrorInfo(
        reason=reason_name(known.reason),
        domain=DOMAIN,
        metadata={name: _fitting(value, MAX_VALUE_BYTES) for name, value in known.metadata.items()},
    )
    details: list[Message] = [info, error_details_pb2.RequestInfo(request_id=request_id)]
    if known.violations:
        bad = _bad_request(known.violations)
        if len(bad.field_violations) < len(known.violations):
            info.metadata["violations"] = str(len(known.violations))
        details.append(bad)
    if known.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(known.retry_after_s)))
    status = status_pb2.Status(
        code=STATUS_CODES[known.reason].value[0],
        message=_fitting(known.public_message, MAX_MESSAGE_BYTES),
    )
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def refusal_message(error: FMIError, *, most: int | None = None) -> error_pb2.Refusal:
    """Write an error as a refusal inside an answer.

    Args:
        error: The error.
        most: The most violations to tell; all where it is not given. The message says when there are
            more.
    """
    return error_pb2.Refusal(
        reason=error.reason,
        message=_fitting(error.public_message, MAX_MESSAGE_BYTES),
        violations=[
            error_pb2.Violation(
                field=violation.field,
                rule_id=violation.rule_id,
                description=violation.description,
                reason=violation.reason,
            )
            for violation in error.violations[:most]
        ],
        retry_delay=None if error.retry_after_s is None else _duration(error.retry_after_s),
    )


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    """Tell as many violations as fit, at least one."""
    bad = error_details_pb2.BadRequest()
    size = 0
    for violation in violations:
        told = error_details_pb2.BadRequest.FieldViolation(
            field=_fitting(violation.field, MAX_MESSAGE_BYTES),
            description=_fitting(violation.description, MAX_MESSAGE_BYTES),
            reason=violation.rule_id,
        )
        size += told.ByteSize() + 3
        if bad.field_violations and size > MAX_BAD_REQUEST_BYTES:
            break
        bad.field_violations.append(told)
    return bad


def _fitting(text: str, limit: int) -> str:
    """Cut a text so that it takes at most so many bytes, percent-encoded as in `grpc-message`."""
    if 9 * len(text) <= limit:
        return text
    size = 0
    for place, character in enumerate(text):
        plain = " " <= character <= "~" and character != "%"
        size += 1 if plain else 3 * len(character.encode())
        if size > limit:
            return text[: max(0, place - 3)] + "..."
    return text


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
