"""Errors as statuses: one table from reasons to codes, and the details that go with each.

A refusal carries `google.rpc.ErrorInfo` (reason and domain `fmi`), `BadRequest` with every violation,
`RetryInfo` where trying again can help, and `RequestInfo`, so that a client never has to read the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from fmi.v1 import error_pb2
from fmi_server.errors import FMIError, Reason, reason_name

__all__ = ["DOMAIN", "STATUS_CODES", "refusal_message", "status_message"]

DOMAIN: Final = "fmi"

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
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=reason_name(known.reason), domain=DOMAIN, metadata=known.metadata
        ),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if known.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field,
                        description=violation.description,
                        reason=violation.rule_id,
                    )
                    for violation in known.violations
                ]
            )
        )
    if known.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(known.retry_after_s)))
    status = status_pb2.Status(
        code=STATUS_CODES[known.reason].value[0], message=known.public_message
    )
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def refusal_message(error: FMIError) -> error_pb2.Refusal:
    """Write an error as a refusal inside an answer."""
    return error_pb2.Refusal(
        reason=error.reason,
        message=error.public_message,
        violations=[
            error_pb2.Violation(
                field=violation.field,
                rule_id=violation.rule_id,
                description=violation.description,
                reason=violation.reason,
            )
            for violation in error.violations
        ],
        retry_delay=None if error.retry_after_s is None else _duration(error.retry_after_s),
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
