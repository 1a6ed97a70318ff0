"""Failures of calls, refusals and broken rules, translated to the errors of `fmi_client.errors`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from fmi.plain import PlainDataError
from fmi.v1 import error_pb2
from fmi_client._causes import connection_cause
from fmi_client.errors import (
    AccessDeniedError,
    CohortRuleError,
    CohortUnknownError,
    CompactedError,
    ConnectionFailedError,
    ContractError,
    ContractRevisionError,
    DeadlineError,
    DictionaryUnknownError,
    EnvelopeError,
    FMIError,
    InvalidFilterError,
    NotFoundError,
    OverloadedError,
    PacketIdReusedError,
    PacketPolicyError,
    PacketTooLargeError,
    PrivacyBudgetExhaustedError,
    ProtocolError,
    QuotaExceededError,
    ReleaseRefusedError,
    SchemaMismatchError,
    ServerDrainingError,
    ServerInternalError,
    SettingUnsupportedError,
    SpecChangeUnsafeError,
    SpecError,
    StoreCorruptError,
    StoreUnavailableError,
    SupersededError,
    UpdateNotFoundError,
    Violation,
)

__all__ = [
    "REASON_CLASSES",
    "error_from_plain_data",
    "error_from_refusal",
    "error_from_rpc",
    "error_from_violations",
    "reason_name",
]

_DETAILS_KEY: Final = "grpc-status-details-bin"
_REQUEST_ID_KEY: Final = "fmi-request-id"
_PREFIX: Final = "ERROR_REASON_"

REASON_CLASSES: Final[Mapping[error_pb2.ErrorReason.ValueType, type[FMIError]]] = MappingProxyType(
    {
        error_pb2.ERROR_REASON_CONTRACT_VIOLATION: ContractError,
        error_pb2.ERROR_REASON_CONTRACT_REVISION_UNSUPPORTED: ContractRevisionError,
        error_pb2.ERROR_REASON_SCHEMA_HASH_MISMATCH: SchemaMismatchError,
        error_pb2.ERROR_REASON_COHORT_UNKNOWN: CohortUnknownError,
        error_pb2.ERROR_REASON_COHORT_RULE_VIOLATION: CohortRuleError,
        error_pb2.ERROR_REASON_PACKET_TOO_LARGE: PacketTooLargeError,
        error_pb2.ERROR_REASON_PACKET_STALE: PacketPolicyError,
        error_pb2.ERROR_REASON_PACKET_FROM_FUTURE: PacketPolicyError,
        error_pb2.ERROR_REASON_NORM_EXCEEDED: PacketPolicyError,
        error_pb2.ERROR_REASON_PRIVACY_REQUIRED: PacketPolicyError,
        error_pb2.ERROR_REASON_PACKET_ID_REUSED: PacketIdReusedError,
        error_pb2.ERROR_REASON_ENVELOPE_MALFORMED: EnvelopeError,
        error_pb2.ERROR_REASON_ENVELOPE_TOO_LARGE: EnvelopeError,
        error_pb2.ERROR_REASON_DICTIONARY_UNKNOWN: DictionaryUnknownError,
        error_pb2.ERROR_REASON_OVERLOADED: OverloadedError,
        error_pb2.ERROR_REASON_STORE_UNAVAILABLE: StoreUnavailableError,
        error_pb2.ERROR_REASON_STORE_CORRUPT: StoreCorruptError,
        error_pb2.ERROR_REASON_SERVER_DRAINING: ServerDrainingError,
        error_pb2.ERROR_REASON_UPDATE_NOT_FOUND: UpdateNotFoundError,
        error_pb2.ERROR_REASON_COMPACTED: CompactedError,
        error_pb2.ERROR_REASON_INVALID_FILTER: InvalidFilterError,
        error_pb2.ERROR_REASON_SPEC_INVALID: SpecError,
        error_pb2.ERROR_REASON_SPEC_CHANGE_UNSAFE: SpecChangeUnsafeError,
        error_pb2.ERROR_REASON_SETTING_UNSUPPORTED: SettingUnsupportedError,
        error_pb2.ERROR_REASON_NOT_FOUND: NotFoundError,
        error_pb2.ERROR_REASON_INTERNAL: ServerInternalError,
        error_pb2.ERROR_REASON_SUPERSEDED: SupersededError,
        error_pb2.ERROR_REASON_PRIVACY_BUDGET_EXHAUSTED: PrivacyBudgetExhaustedError,
        error_pb2.ERROR_REASON_RELEASE_SCHEDULED: ReleaseRefusedError,
        error_pb2.ERROR_REASON_UNAUTHENTICATED: AccessDeniedError,
        error_pb2.ERROR_REASON_ACCESS_DENIED: AccessDeniedError,
        error_pb2.ERROR_REASON_DOMAIN_ID_MISMATCH: AccessDeniedError,
        error_pb2.ERROR_REASON_UNAUTHORIZED: AccessDeniedError,
        error_pb2.ERROR_REASON_QUOTA_EXCEEDED: QuotaExceededError,
    }
)
"""The class of each reason of the contract's catalogue."""

_BY_NAME: Final = {
    error_pb2.ErrorReason.Name(reason).removeprefix(_PREFIX): kind
    for reason, kind in REASON_CLASSES.items()
}

# Where a status comes without a reason of ours it is from gRPC itself, from a proxy, or from a server
# that is newer than this SDK: the status code is all there is.
_BY_CODE: Final[Mapping[grpc.StatusCode, type[FMIError]]] = MappingProxyType(
    {
        grpc.StatusCode.CANCELLED: ConnectionFailedError,
        grpc.StatusCode.UNKNOWN: ServerInternalError,
        grpc.StatusCode.INVALID_ARGUMENT: ContractError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
        grpc.StatusCode.NOT_FOUND: NotFoundError,
        grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
        grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
        grpc.StatusCode.INTERNAL: ServerInternalError,
        grpc.StatusCode.UNAVAILABLE: ConnectionFailedError,
        grpc.StatusCode.DATA_LOSS: ServerInternalError,
        grpc.StatusCode.UNAUTHENTICATED: AccessDeniedError,
    }
)

# How gRPC tells of a connection that was reset under a call.
_RESET_CODES: Final = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_RESET_MARKS: Final = ("RST_STREAM", "Stream removed", "Connection reset")


def error_from_rpc(error: grpc.aio.AioRpcError, target: str = "") -> FMIError:
    """Translate the failure of a call to `target` to a typed error.

    Details that are missing or cannot be read are left out: the status code then decides.
    """
    code = error.code()
    text = error.details() or code.name
    details = _Details.read(error.trailing_metadata())
    kind = _BY_NAME.get(details.reason, _BY_CODE.get(code, FMIError))
    retryable: bool | None = None
    if details.retry_after_s is not None:
        retryable = True
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        retryable = False  # oversize, or a quota that says nothing of when it ends
    if not details.reason:
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
            kind = PacketTooLargeError  # gRPC's own limit on messages
        elif code in _RESET_CODES and any(mark in text for mark in _RESET_MARKS):
            kind = ConnectionFailedError
        elif kind is ConnectionFailedError:
            text = connection_cause(text)
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            where = target or "the server"
            text = f"{where} does not have this method ({text}): is it an FMI server, and as new as this SDK?"
    if target and kind in (ConnectionFailedError, DeadlineError):
        text = f"{target}: {text}"
    return kind(
        text,
        reason=details.reason,
        violations=details.violations,
        retryable=retryable,
        retry_after_s=details.retry_after_s,
        request_id=details.request_id,
        code=code,
        metadata=details.metadata,
    )


def error_from_refusal(refusal: error_pb2.Refusal) -> FMIError:
    """Translate the refusal of one item of a batch, or of a dry run, to a typed error."""
    retry_after_s = (
        refusal.retry_delay.ToTimedelta().total_seconds()
        if refusal.HasField("retry_delay")
        else None
    )
    return REASON_CLASSES.get(refusal.reason, FMIError)(
        refusal.message,
        reason=reason_name(refusal.reason),
        violations=[Violation(v.field, v.rule_id, v.description) for v in refusal.violations],
        retryable=retry_after_s is not None,
        retry_after_s=retry_after_s,
    )


def error_from_violations(violations: Sequence[Violation], subject: str) -> ContractError:
    """Build the error for rules of the contract that were found broken before anything was sent."""
    return ContractError(
        f"{subject} breaks {len(violations)} rule{'s' if len(violations) > 1 else ''}: "
        + "; ".join(map(str, violations)),
        reason=reason_name(error_pb2.ERROR_REASON_CONTRACT_VIOLATION),
        violations=violations,
    )


def error_from_plain_data(error: PlainDataError, broken: Sequence[Violation] = ()) -> ContractError:
    """Build the error for plain data that cannot be translated to a packet.

    Args:
        error: What cannot be translated.
        broken: Rules that the rest breaks.
    """
    untranslated = [Violation(p.field, p.rule_id, p.description) for p in error.problems]
    return error_from_violations([*untranslated, *broken], "plain packet")


def reason_name(reason: error_pb2.ErrorReason.ValueType) -> str:
    """Return the short name of a reason, ``PACKET_STALE``; empty for none."""
    if not reason:
        return ""
    try:
        return error_pb2.ErrorReason.Name(reason).removeprefix(_PREFIX)
    except ValueError:  # a server that is newer than this SDK
        return str(int(reason))


@dataclass(frozen=True, slots=True)
class _Details:
    """What the details of a status say."""

    reason: str = ""
    violations: tuple[Violation, ...] = ()
    retry_after_s: float | None = None
    request_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, trailing: grpc.aio.Metadata | None) -> _Details:
        pairs = list(trailing or ())
        request_id = next((str(v) for k, v in pairs if k == _REQUEST_ID_KEY), None)
        status = status_pb2.Status()
        try:
            for key, value in pairs:
                if key == _DETAILS_KEY and isinstance(value, bytes):
                    status.ParseFromString(value)
        except DecodeError:
            return cls(request_id=request_id)
        info = next(
            (i for i in _unpacked(status, error_details_pb2.ErrorInfo) if i.domain == "fmi"), None
        )
        retry = next(_unpacked(status, error_details_pb2.RetryInfo), None)
        request = next(_unpacked(status, error_details_pb2.RequestInfo), None)
        return cls(
            reason=info.reason if info else "",
            violations=tuple(
                Violation(v.field, v.reason, v.description)
                for bad in _unpacked(status, error_details_pb2.BadRequest)
                for v in bad.field_violations
            ),
            retry_after_s=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
            request_id=request.request_id if request else request_id,
            metadata=dict(info.metadata) if info else {},
        )


_M = TypeVar("_M", bound=Message)


def _unpacked(status: status_pb2.Status, kind: type[_M]) -> Iterator[_M]:
    for detail in status.details:
        message = kind()
        try:
            if detail.Unpack(message):
                yield message
        except DecodeError:
            continue
