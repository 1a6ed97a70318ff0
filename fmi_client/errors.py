"""Everything that the SDK raises, as one tree of exceptions.

* FMIError
    - PacketRefusedError              a packet was refused; nothing of it was stored
        - ContractError               a rule of the contract is broken
            - ContractRevisionError   the packet's contract revision is too new or too old
        - CohortRuleError             a rule of the cohort's vocabulary is broken
        - PacketPolicyError           stale, from the future, norm too large, privacy not declared
        - SchemaMismatchError         built against another version of the cohort spec
        - PacketTooLargeError
        - PacketIdReusedError         the id was used before for other content
    - EnvelopeError                   an envelope of packets cannot be decoded or is too large
        - DictionaryUnknownError
    - NotFoundError                   no such site, packet, dictionary
        - UpdateNotFoundError         no such update yet
        - CohortUnknownError
    - SubscriptionError
        - InvalidFilterError          the filter, the start or the resume token is wrong
        - CompactedError              the revision asked for is no longer kept
        - SupersededError             the same subscriber and instance opened a newer stream
    - SpecError                       a cohort spec is not valid, or a dictionary is none
        - SpecChangeUnsafeError       the change would break sites, and was not forced
    - SettingUnsupportedError
    - TemporaryError                  the same call can succeed later; the SDK's own retries are used up
        - OverloadedError
        - StoreUnavailableError
        - ServerDrainingError
        - ConnectionFailedError       no connection, or it broke
        - DeadlineError               no answer in time; whether the call had an effect is not known
    - AccessDeniedError               the credentials are missing, wrong, or do not allow this
    - ServerInternalError             something is broken inside the server
        - StoreCorruptError
    - ProtocolError                   the peer does not speak this contract
    - ConfigurationError              the client was set up wrongly; nothing was sent
    - ClientClosedError               the client was closed, or belongs to another process
        - ForkedError                 this process was forked from one that made the client, or used gRPC
    - OutboxError                     the site's outbox cannot do it; nothing was sent
        - OutboxFullError             it holds as much as it may
        - OutboxLockedError           its file is in use
        - OutboxCorruptError          its file is damaged, or is no outbox
        - OutboxUnavailableError      its file cannot be read or written now

Each carries its `reason`, a name from the contract's catalogue (`fmi.v1.ErrorReason`, one section each
in docs/errors.md), all broken rules in `violations`, and says whether a retry can help. One table maps
reasons to classes. A `grpc.RpcError` never leaves the SDK.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from fmi.plain import PlainDataError
from fmi.v1 import error_pb2
from fmi_client._causes import connection_cause

if TYPE_CHECKING:
    from fmi.v1 import packet_pb2
    from fmi_client.receipts import Receipt

__all__ = [
    "REASON_CLASSES",
    "AccessDeniedError",
    "ClientClosedError",
    "CohortRuleError",
    "CohortUnknownError",
    "CompactedError",
    "ConfigurationError",
    "ConnectionFailedError",
    "ContractError",
    "ContractRevisionError",
    "DeadlineError",
    "DictionaryUnknownError",
    "EnvelopeError",
    "FMIError",
    "ForkedError",
    "InvalidFilterError",
    "NotFoundError",
    "OutboxCorruptError",
    "OutboxError",
    "OutboxFullError",
    "OutboxLockedError",
    "OutboxUnavailableError",
    "OverloadedError",
    "PacketIdReusedError",
    "PacketPolicyError",
    "PacketRefusedError",
    "PacketTooLargeError",
    "ProtocolError",
    "SchemaMismatchError",
    "ServerDrainingError",
    "ServerInternalError",
    "SettingUnsupportedError",
    "SpecChangeUnsafeError",
    "SpecError",
    "StoreCorruptError",
    "StoreUnavailableError",
    "SubscriptionError",
    "SupersededError",
    "TemporaryError",
    "UpdateNotFoundError",
    "Violation",
    "error_from_plain_data",
    "error_from_refusal",
    "error_from_rpc",
    "error_from_violations",
    "reason_name",
]

_DETAILS_KEY: Final = "grpc-status-details-bin"
_REQUEST_ID_KEY: Final = "fmi-request-id"
_PREFIX: Final = "ERROR_REASON_"


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule.

    Attributes:
        field: Path of the field, for example ``msp.controller["tau"]``.
        rule_id: Id of the rule, for example ``double.finite``.
        description: What is wrong and what to do.
    """

    field: str
    rule_id: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description} [{self.rule_id}]"


class FMIError(Exception):
    """Root of everything that the SDK raises.

    Attributes:
        message: What is wrong, where, and what to do.
        reason: Name from `fmi.v1.ErrorReason` without its prefix, for example ``PACKET_STALE``; empty
            where the failure is not one of the catalogue, for example a broken connection.
        violations: Every rule that was broken.
        retryable: Whether the same call can succeed later.
        retry_after_s: Seconds that the server asks to wait before the next attempt, if it said so.
        request_id: Finds the call in the server's log, if the server was reached.
        code: The gRPC status, where a call failed; None where it is local or of one item of a batch.
        metadata: What a program needs to act on the error, as texts by name.
        packet: What `emit` tried to send; None elsewhere. ``client.emit(error.packet)`` counts once.
        receipts: Of an `emit_many` that ended early: of each packet taken from the source its receipt,
            None where there is no answer.
        unanswered: The packets of these None; ``client.emit_many(error.unanswered)`` counts once.
    """

    retryable_by_nature: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: Sequence[Violation] = (),
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.violations = tuple(violations)
        self.retryable = self.retryable_by_nature if retryable is None else retryable
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.code = code
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.packet: packet_pb2.Packet | None = None
        self.receipts: tuple[Receipt | None, ...] = ()
        self.unanswered: tuple[packet_pb2.Packet, ...] = ()

    @property
    def packet_id(self) -> str:
        """The id of `packet`; empty where there is none."""
        return "" if self.packet is None else self.packet.header.packet_id

    def __str__(self) -> str:
        name = f"{self.reason}: " if self.reason else ""
        request = f" (request {self.request_id})" if self.request_id else ""
        return f"{name}{self.message}{request}"


class PacketRefusedError(FMIError):
    """A packet was refused; nothing of it was stored."""


class ContractError(PacketRefusedError):
    """A rule of the contract is broken; `violations` has all of them."""


class ContractRevisionError(ContractError):
    """The contract revision of the packet is too new or too old for the server."""


class CohortRuleError(PacketRefusedError):
    """A signal is not in the cohort's vocabulary, in the wrong section, or out of its bounds."""


class PacketPolicyError(PacketRefusedError):
    """The packet is stale, from the future, too large in norm, or declares no privacy applied."""


class SchemaMismatchError(PacketRefusedError):
    """The packet was built against another version of the cohort spec."""


class PacketTooLargeError(PacketRefusedError):
    """The packet is larger than the cohort or the server takes."""


class PacketIdReusedError(PacketRefusedError):
    """The packet id was used before for other content."""


class EnvelopeError(FMIError):
    """An envelope of packets cannot be decoded, or is too large."""


class DictionaryUnknownError(EnvelopeError):
    """The envelope names a compression dictionary that is not known."""


class NotFoundError(FMIError):
    """There is no such site, packet, dictionary or other thing."""


class UpdateNotFoundError(NotFoundError):
    """There is no such update (yet)."""


class CohortUnknownError(NotFoundError):
    """The cohort does not exist, and the server does not open cohorts on demand."""


class SubscriptionError(FMIError):
    """A subscription cannot start or go on as it was asked for."""


class InvalidFilterError(SubscriptionError):
    """The filter, the start or the resume token of a subscription is wrong."""


class CompactedError(SubscriptionError):
    """The revision asked for is no longer kept."""

    @property
    def oldest_revision(self) -> int | None:
        """The oldest revision that is kept, if the server said so."""
        told = self.metadata.get("oldest_revision", "")
        return int(told) if told.isdecimal() else None


class SupersededError(SubscriptionError):
    """The same subscriber opened a newer stream under the same instance id."""


class SpecError(FMIError):
    """A cohort spec is not valid, or a dictionary is none; `violations` has every rule that is broken."""


class SpecChangeUnsafeError(SpecError):
    """The change of a cohort spec would break sites that are built against it."""


class SettingUnsupportedError(FMIError):
    """A setting asks for something that this version of the server does not have."""


class TemporaryError(FMIError):
    """The same call can succeed later; the SDK's own retries are used up."""

    retryable_by_nature = True


class OverloadedError(TemporaryError):
    """The server has as much under way as it can bear."""


class StoreUnavailableError(TemporaryError):
    """The store cannot take writes now."""


class ServerDrainingError(TemporaryError):
    """The server is going down in good order."""


class ConnectionFailedError(TemporaryError):
    """There is no connection to the server, or it broke."""


class DeadlineError(TemporaryError):
    """No answer came in time. Whether the call had an effect is not known."""


class AccessDeniedError(FMIError):
    """The credentials are missing, wrong, or do not allow this."""


class ServerInternalError(FMIError):
    """Something went wrong inside the server; the request id finds it in the server's log."""


class StoreCorruptError(ServerInternalError):
    """The server's store is damaged, or is not a store of this server."""


class ProtocolError(FMIError):
    """The peer does not speak this contract, or broke it."""


class ConfigurationError(FMIError):
    """The client was set up or used wrongly; nothing was sent."""


class ClientClosedError(FMIError):
    """The client was closed, or it was made in another process."""


class ForkedError(ClientClosedError):
    """This process was forked from one that made the client, or that used gRPC."""


class OutboxError(FMIError):
    """The outbox of the site cannot do it."""


class OutboxFullError(OutboxError):
    """The outbox holds as much as it may; what was sent frees room."""

    retryable_by_nature = True


class OutboxLockedError(OutboxError):
    """Another process uses the outbox's file, or this one opened it twice."""

    @property
    def pid(self) -> int | None:
        """The process that holds the file, if it can be told."""
        told = self.metadata.get("pid", "")
        return int(told) if told.isdecimal() else None


class OutboxCorruptError(OutboxError):
    """The outbox's file is damaged, or is no outbox. It is left as it is."""


class OutboxUnavailableError(OutboxError):
    """The outbox's file cannot be read or written now, for example because the disk is full."""

    retryable_by_nature = True


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
