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
        - LocalPrivacyError           the site's own local privacy does not let it out; nothing was sent
            - PrivacyBudgetError      the budget does not pay for another packet
            - PrivacyCoverageError    it says what local privacy does not cover, or lacks what it must say
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
    - ReleaseRefusedError             a private cohort releases at fixed times only
        - PrivacyBudgetExhaustedError its budget is spent: it releases nothing more
    - TemporaryError                  the same call can succeed later; the SDK's own retries are used up
        - OverloadedError
            - QuotaExceededError
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
    - PrivacyAccountError             the file of local privacy's account cannot be used; nothing was sent

Each carries its `reason`, a name from the contract's catalogue (`fmi.v1.ErrorReason`, one section each
in docs/errors.md), all broken rules in `violations`, and says whether a retry can help. One table, in
`_translation`, maps reasons to classes. A `grpc.RpcError` never leaves the SDK.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

import grpc

if TYPE_CHECKING:
    from fmi.v1 import packet_pb2
    from fmi_client.receipts import Receipt

__all__ = [
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
    "LocalPrivacyError",
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
    "PrivacyAccountError",
    "PrivacyBudgetError",
    "PrivacyBudgetExhaustedError",
    "PrivacyCoverageError",
    "ProtocolError",
    "QuotaExceededError",
    "ReleaseRefusedError",
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
]


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
        violations: The rules that were broken, as many as the answer held.
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
    def untold(self) -> int:
        """How many more rules were broken than `violations` has, where the server said so; else 0."""
        told = self.metadata.get("violations", "")
        return max(0, int(told[:9]) - len(self.violations)) if told.isdecimal() else 0

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


class LocalPrivacyError(PacketRefusedError):
    """The site's own local privacy does not let the packet out; nothing was sent."""


class PrivacyBudgetError(LocalPrivacyError):
    """The budget of local privacy does not pay for another packet."""

    @property
    def spent(self) -> float:
        """The epsilon that was spent before, at the budget's delta."""
        return float(self.metadata["spent"])

    @property
    def epsilon(self) -> float:
        """The epsilon of the whole budget."""
        return float(self.metadata["epsilon"])


class PrivacyCoverageError(LocalPrivacyError):
    """The packet says what local privacy does not cover, or lacks what it must say; see `violations`."""


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


class ReleaseRefusedError(FMIError):
    """The cohort is private: it releases at fixed times, and not when somebody asks for it."""

    @property
    def next_release_at(self) -> str | None:
        """When it releases next, in RFC 3339, if the server said so."""
        return self.metadata.get("next_release_at")


class PrivacyBudgetExhaustedError(ReleaseRefusedError):
    """The privacy budget of the cohort is spent: it releases nothing more; its last release stays served."""


class TemporaryError(FMIError):
    """The same call can succeed later; the SDK's own retries are used up."""

    retryable_by_nature = True


class OverloadedError(TemporaryError):
    """The server has as much under way as it can bear."""


class QuotaExceededError(OverloadedError):
    """This site takes more than its quota: packets, bytes, calls, or streams at once."""

    @property
    def resource(self) -> str | None:
        """What it takes too much of, if the server said so."""
        return self.metadata.get("resource")


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


class PrivacyAccountError(FMIError):
    """The file of local privacy's account cannot be read or written, or is something else."""
