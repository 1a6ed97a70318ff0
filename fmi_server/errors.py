"""Everything that the server refuses, as one tree of exceptions.

* FMIError
    - PacketRefusedError          rules of the contract, the cohort or its policy are broken
    - RequestInvalidError         a request other than a packet breaks the contract
    - PacketIdReusedError
    - CohortUnknownError
    - EnvelopeMalformedError
    - EnvelopeTooLargeError
    - DictionaryUnknownError
    - OverloadedError             retry later
    - QuotaExceededError          retry later
    - StoreError                  of the store; its tree stands in `storage.base`
    - ServerDrainingError         retry elsewhere or later
    - UpdateNotFoundError
    - CompactedError
    - InvalidFilterError
    - SupersededError
    - UnauthenticatedError        there are no credentials, or they are not valid
    - AccessDeniedError           the caller is known, and may not do this
    - DomainIdMismatchError       the caller is known, and may not speak under this name
    - UnauthorizedError           a subscription lost what allowed it
    - SpecInvalidError
    - DictionaryInvalidError
    - SpecChangeUnsafeError
    - SettingUnsupportedError
    - PrivacyBudgetExhaustedError
    - ReleaseScheduledError
    - ThingNotFoundError

Each has a reason from the contract's catalogue (`fmi.v1.ErrorReason`) and says whether trying again can
help; `transport.status` turns them into statuses. Messages say what is wrong, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import ClassVar, Final

from fmi.v1 import error_pb2

__all__ = [
    "LAST_MOMENT_S",
    "REASONS",
    "AccessDeniedError",
    "CohortUnknownError",
    "CompactedError",
    "DictionaryInvalidError",
    "DictionaryUnknownError",
    "DomainIdMismatchError",
    "EnvelopeMalformedError",
    "EnvelopeTooLargeError",
    "FMIError",
    "InvalidFilterError",
    "OverloadedError",
    "PacketIdReusedError",
    "PacketRefusedError",
    "PrivacyBudgetExhaustedError",
    "QuotaExceededError",
    "Reason",
    "ReleaseScheduledError",
    "RequestInvalidError",
    "ServerDrainingError",
    "SettingUnsupportedError",
    "SpecChangeUnsafeError",
    "SpecInvalidError",
    "SupersededError",
    "ThingNotFoundError",
    "UnauthenticatedError",
    "UnauthorizedError",
    "UpdateNotFoundError",
    "Violation",
    "reason_name",
    "utc",
]


class Reason:
    """The catalogue of refusals, under short names; see docs/errors.md."""

    CONTRACT_VIOLATION: Final = error_pb2.ERROR_REASON_CONTRACT_VIOLATION
    CONTRACT_REVISION_UNSUPPORTED: Final = error_pb2.ERROR_REASON_CONTRACT_REVISION_UNSUPPORTED
    SCHEMA_HASH_MISMATCH: Final = error_pb2.ERROR_REASON_SCHEMA_HASH_MISMATCH
    COHORT_UNKNOWN: Final = error_pb2.ERROR_REASON_COHORT_UNKNOWN
    COHORT_RULE_VIOLATION: Final = error_pb2.ERROR_REASON_COHORT_RULE_VIOLATION
    PACKET_TOO_LARGE: Final = error_pb2.ERROR_REASON_PACKET_TOO_LARGE
    PACKET_STALE: Final = error_pb2.ERROR_REASON_PACKET_STALE
    PACKET_FROM_FUTURE: Final = error_pb2.ERROR_REASON_PACKET_FROM_FUTURE
    NORM_EXCEEDED: Final = error_pb2.ERROR_REASON_NORM_EXCEEDED
    PRIVACY_REQUIRED: Final = error_pb2.ERROR_REASON_PRIVACY_REQUIRED
    PACKET_ID_REUSED: Final = error_pb2.ERROR_REASON_PACKET_ID_REUSED
    ENVELOPE_MALFORMED: Final = error_pb2.ERROR_REASON_ENVELOPE_MALFORMED
    ENVELOPE_TOO_LARGE: Final = error_pb2.ERROR_REASON_ENVELOPE_TOO_LARGE
    DICTIONARY_UNKNOWN: Final = error_pb2.ERROR_REASON_DICTIONARY_UNKNOWN
    OVERLOADED: Final = error_pb2.ERROR_REASON_OVERLOADED
    STORE_UNAVAILABLE: Final = error_pb2.ERROR_REASON_STORE_UNAVAILABLE
    STORE_CORRUPT: Final = error_pb2.ERROR_REASON_STORE_CORRUPT
    SERVER_DRAINING: Final = error_pb2.ERROR_REASON_SERVER_DRAINING
    UPDATE_NOT_FOUND: Final = error_pb2.ERROR_REASON_UPDATE_NOT_FOUND
    COMPACTED: Final = error_pb2.ERROR_REASON_COMPACTED
    INVALID_FILTER: Final = error_pb2.ERROR_REASON_INVALID_FILTER
    SPEC_INVALID: Final = error_pb2.ERROR_REASON_SPEC_INVALID
    SPEC_CHANGE_UNSAFE: Final = error_pb2.ERROR_REASON_SPEC_CHANGE_UNSAFE
    SETTING_UNSUPPORTED: Final = error_pb2.ERROR_REASON_SETTING_UNSUPPORTED
    NOT_FOUND: Final = error_pb2.ERROR_REASON_NOT_FOUND
    INTERNAL: Final = error_pb2.ERROR_REASON_INTERNAL
    SUPERSEDED: Final = error_pb2.ERROR_REASON_SUPERSEDED
    PRIVACY_BUDGET_EXHAUSTED: Final = error_pb2.ERROR_REASON_PRIVACY_BUDGET_EXHAUSTED
    RELEASE_SCHEDULED: Final = error_pb2.ERROR_REASON_RELEASE_SCHEDULED
    UNAUTHENTICATED: Final = error_pb2.ERROR_REASON_UNAUTHENTICATED
    ACCESS_DENIED: Final = error_pb2.ERROR_REASON_ACCESS_DENIED
    DOMAIN_ID_MISMATCH: Final = error_pb2.ERROR_REASON_DOMAIN_ID_MISMATCH
    UNAUTHORIZED: Final = error_pb2.ERROR_REASON_UNAUTHORIZED
    QUOTA_EXCEEDED: Final = error_pb2.ERROR_REASON_QUOTA_EXCEEDED


REASONS: Final = tuple(error_pb2.ErrorReason.values()[1:])
"""All reasons that there are."""


def reason_name(reason: error_pb2.ErrorReason.ValueType) -> str:
    """Return the name that stands in `google.rpc.ErrorInfo.reason`, without the enum's prefix."""
    return error_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule.

    Attributes:
        field: Path of the field, for example ``msp.controller["tau"]``.
        rule_id: Id of the rule, for example ``double.finite``.
        description: What is wrong and what to do.
        reason: The reason that this violation alone would be refused for.
    """

    field: str
    rule_id: str
    description: str
    reason: error_pb2.ErrorReason.ValueType = Reason.CONTRACT_VIOLATION

    def __str__(self) -> str:
        return f"{self.field}: {self.description} [{self.rule_id}]"


class FMIError(Exception):
    """Root of everything that the server refuses.

    Attributes:
        reason: The catalogue's reason.
        retry_after_s: Seconds after which trying again can help; None where it cannot.
    """

    reason: error_pb2.ErrorReason.ValueType = Reason.INTERNAL
    retry_after_s: float | None = None

    @property
    def public_message(self) -> str:
        """What the caller may read; the server's own paths are not in it."""
        return str(self)

    @property
    def violations(self) -> Sequence[Violation]:
        """The broken rules, where the error is about rules."""
        return ()

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a program needs to act on the error, as texts by name."""
        return {}


class _ViolationsError(FMIError):
    """Carries broken rules; the message lists them."""

    subject: ClassVar[str] = "request"

    def __init__(self, violations: Sequence[Violation]) -> None:
        self._violations = tuple(violations)
        shown = "; ".join(str(violation) for violation in self._violations[:5])
        more = len(self._violations) - 5
        super().__init__(
            f"{self.subject} refused: {shown}" + (f"; {more} more" if more > 0 else "")
        )

    @property
    def violations(self) -> Sequence[Violation]:
        """The broken rules, all of them."""
        return self._violations


# Where several rules are broken, the reason of the whole is the first of these that occurs: what makes
# the other findings meaningless comes first.
_PRECEDENCE: Final = (
    Reason.CONTRACT_REVISION_UNSUPPORTED,
    Reason.PACKET_TOO_LARGE,
    Reason.CONTRACT_VIOLATION,
    Reason.DOMAIN_ID_MISMATCH,
    Reason.COHORT_UNKNOWN,
    Reason.ACCESS_DENIED,
    Reason.SCHEMA_HASH_MISMATCH,
    Reason.COHORT_RULE_VIOLATION,
    Reason.PRIVACY_REQUIRED,
    Reason.NORM_EXCEEDED,
    Reason.PACKET_FROM_FUTURE,
    Reason.PACKET_STALE,
)


class PacketRefusedError(_ViolationsError):
    """A packet breaks rules. `violations` has all of them; nothing was stored."""

    subject = "packet"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__(violations)
        reasons = {violation.reason for violation in violations}
        self.reason = next(reason for reason in _PRECEDENCE if reason in reasons)


class RequestInvalidError(_ViolationsError):
    """A request breaks the contract's rules."""

    def __init__(
        self,
        violations: Sequence[Violation],
        reason: error_pb2.ErrorReason.ValueType = Reason.CONTRACT_VIOLATION,
    ) -> None:
        super().__init__([replace(violation, reason=reason) for violation in violations])
        self.reason = reason


class SpecInvalidError(_ViolationsError):
    """A cohort spec breaks rules."""

    reason = Reason.SPEC_INVALID
    subject = "cohort spec"


class DictionaryInvalidError(_ViolationsError):
    """What should be registered as a dictionary is none, or is one too many."""

    reason = Reason.SPEC_INVALID
    subject = "dictionary"


class SpecChangeUnsafeError(_ViolationsError):
    """A change of a cohort spec would break sites that are built against it."""

    reason = Reason.SPEC_CHANGE_UNSAFE
    subject = "change of the cohort spec"


class PacketIdReusedError(FMIError):
    """The packet id was used before by this site, for other content."""

    reason = Reason.PACKET_ID_REUSED

    def __init__(self, domain_id: str, packet_id: str) -> None:
        self.domain_id = domain_id
        self.packet_id = packet_id
        super().__init__(
            f"packet id {packet_id} was used before by {domain_id} for other content; "
            "make a new id for each packet, and keep it only when sending the same packet again"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """The key that was used twice."""
        return {"domain_id": self.domain_id, "packet_id": self.packet_id}


class CohortUnknownError(FMIError):
    """There is no such cohort."""

    reason = Reason.COHORT_UNKNOWN

    def __init__(self, cohort: str) -> None:
        self.cohort = cohort
        super().__init__(f"cohort {cohort!r} is not known here; is the name mistyped?")

    @property
    def metadata(self) -> Mapping[str, str]:
        """The cohort."""
        return {"cohort": self.cohort}


class EnvelopeMalformedError(FMIError):
    """An envelope cannot be decoded.

    Attributes:
        detail: Why.
        packets: How many packets were counted in it until that was found.
    """

    reason = Reason.ENVELOPE_MALFORMED

    def __init__(self, detail: str, packets: int = 0) -> None:
        self.detail = detail
        self.packets = packets
        super().__init__(f"envelope cannot be decoded: {detail}")


class EnvelopeTooLargeError(FMIError):
    """An envelope would decode to more than is taken."""

    reason = Reason.ENVELOPE_TOO_LARGE

    def __init__(self, size: int, limit: int, unit: str = "bytes") -> None:
        self.size = size
        self.limit = limit
        self.unit = unit
        super().__init__(f"envelope has {size} {unit}, at most {limit} are taken; send it in parts")

    @property
    def packets(self) -> int:
        """How many packets were counted in it."""
        return self.size if self.unit == "packets" else 0

    @property
    def metadata(self) -> Mapping[str, str]:
        """The size and the limit."""
        return {"size": str(self.size), "limit": str(self.limit), "unit": self.unit}


class DictionaryUnknownError(FMIError):
    """An envelope names a dictionary that is not registered."""

    reason = Reason.DICTIONARY_UNKNOWN

    def __init__(self, dictionary_id: int) -> None:
        self.dictionary_id = dictionary_id
        super().__init__(
            f"dictionary {dictionary_id} is not registered here; register it (RegisterDictionary), use "
            "the newest one that is (GetDictionary), or encode without one"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """The dictionary."""
        return {"dictionary_id": str(self.dictionary_id)}


class OverloadedError(FMIError):
    """The server has as much under way as it can bear."""

    reason = Reason.OVERLOADED

    def __init__(self, resource: str, *, retry_after_s: float = 1.0) -> None:
        self.resource = resource
        self.retry_after_s = retry_after_s
        super().__init__(f"too much under way ({resource}); try again in {retry_after_s:g} s")

    @property
    def metadata(self) -> Mapping[str, str]:
        """What is exhausted."""
        return {"resource": self.resource}


class QuotaExceededError(FMIError):
    """The caller takes more than its quota."""

    reason = Reason.QUOTA_EXCEEDED

    retry_after_s: float

    def __init__(self, resource: str, limit: str, *, retry_after_s: float) -> None:
        self.resource = resource
        self.limit = limit
        self.retry_after_s = retry_after_s
        super().__init__(
            f"more than the quota of {resource}, which is {limit}; try again in {retry_after_s:.3g} s"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """What is exhausted, and how much of it a caller may take."""
        return {"resource": self.resource, "limit": self.limit}


class ServerDrainingError(FMIError):
    """The server is going down in good order."""

    reason = Reason.SERVER_DRAINING

    def __init__(self, *, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__("the server is going down in good order; connect again")


class UpdateNotFoundError(FMIError):
    """There is no such update (yet); where `private`, there will be none of its kind."""

    reason = Reason.UPDATE_NOT_FOUND

    def __init__(self, cohort: str, kind: str, revision: int, *, private: bool = False) -> None:
        self.cohort = cohort
        self.kind = kind
        self.revision = revision
        which = f"revision {revision} of {kind}" if revision else f"{kind}"
        super().__init__(
            f"cohort {cohort!r} is private, and releases priors and warm starts only: there is no {which}"
            if private
            else f"cohort {cohort!r} has released no {which} yet"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """What was asked for."""
        return {"cohort": self.cohort, "kind": self.kind, "revision": str(self.revision)}


class CompactedError(FMIError):
    """The revision asked for is no longer kept."""

    reason = Reason.COMPACTED

    def __init__(self, cohort: str, kind: str, revision: int, oldest: int) -> None:
        self.cohort = cohort
        self.kind = kind
        self.revision = revision
        self.oldest = oldest
        super().__init__(
            f"revision {revision} of {kind} in cohort {cohort!r} is no longer kept; "
            f"the oldest kept is {oldest}"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """What was asked for, and the oldest revision held."""
        return {
            "cohort": self.cohort,
            "kind": self.kind,
            "revision": str(self.revision),
            "oldest_revision": str(self.oldest),
        }


class InvalidFilterError(FMIError):
    """A subscription's filter, start or resume token is wrong."""

    reason = Reason.INVALID_FILTER

    def __init__(self, field: str, detail: str) -> None:
        self.field = field
        self.detail = detail
        super().__init__(f"{field}: {detail}")

    @property
    def violations(self) -> Sequence[Violation]:
        """The field that is wrong."""
        return (Violation(self.field, "fmi.subscribe.filter", self.detail, self.reason),)


class SupersededError(FMIError):
    """A subscription was replaced by a newer one of the same subscriber and instance."""

    reason = Reason.SUPERSEDED

    def __init__(self, subscriber: str) -> None:
        self.subscriber = subscriber
        super().__init__(
            f"{subscriber} opened a newer stream under the same instance id; go on with that one"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """Who subscribed again."""
        return {"subscriber": self.subscriber}


class UnauthenticatedError(FMIError):
    """A call has no credentials, or they are not valid. What exactly is wrong with a secret is not told."""

    reason = Reason.UNAUTHENTICATED

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__(f"not authenticated: {detail}")


class AccessDeniedError(FMIError):
    """The caller is known, and may not do this."""

    reason = Reason.ACCESS_DENIED

    def __init__(self, principal: str, action: str, cohort: str = "") -> None:
        self.principal = principal
        self.action = action
        self.cohort = cohort
        place = f" in cohort {cohort!r}" if cohort else ""
        super().__init__(
            f"{principal!r} may not {action}{place}; an operator of the server can allow it"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """Who may not do what."""
        told = {"principal": self.principal, "action": self.action}
        return {**told, "cohort": self.cohort} if self.cohort else told


class DomainIdMismatchError(FMIError):
    """The caller is known, and may not speak under this name of a site."""

    reason = Reason.DOMAIN_ID_MISMATCH

    def __init__(self, principal: str, domain_id: str, field: str) -> None:
        self.principal = principal
        self.domain_id = domain_id
        self.field = field
        super().__init__(f"{field}: {_not_for(principal, domain_id)}")

    @property
    def violations(self) -> Sequence[Violation]:
        """The field with the name."""
        text = _not_for(self.principal, self.domain_id)
        return (Violation(self.field, "fmi.access.domain_id", text, self.reason),)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Who may not use which name."""
        return {"principal": self.principal, "domain_id": self.domain_id}


def _not_for(principal: str, domain_id: str) -> str:
    return (
        f"is {domain_id!r}, which the credentials of {principal!r} are not for; use the name of the site "
        "that they are for"
    )


class UnauthorizedError(FMIError):
    """A subscription lost what allowed it: its credentials, or the right to see one of its cohorts."""

    reason = Reason.UNAUTHORIZED

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__(f"the subscription ended: {detail}")


class SettingUnsupportedError(FMIError):
    """A setting asks for something that this version does not have; it is refused, not ignored."""

    reason = Reason.SETTING_UNSUPPORTED

    def __init__(self, setting: str, detail: str) -> None:
        self.setting = setting
        self.detail = detail
        super().__init__(f"{setting}: {detail}")

    @property
    def metadata(self) -> Mapping[str, str]:
        """The setting."""
        return {"setting": self.setting}


class PrivacyBudgetExhaustedError(FMIError):
    """The privacy budget of a cohort is spent, so that it releases nothing more."""

    reason = Reason.PRIVACY_BUDGET_EXHAUSTED

    def __init__(self, cohort: str, *, epsilon: float, delta: float) -> None:
        self.cohort = cohort
        self.epsilon = epsilon
        self.delta = delta
        super().__init__(
            f"cohort {cohort!r} has spent its privacy budget (epsilon {epsilon:g}, delta {delta:g}): it "
            "releases nothing more, and its last release stays served; agree on a larger budget with its "
            "sites, or go on without new releases"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """The cohort and its budget."""
        return {
            "cohort": self.cohort,
            "dp_epsilon": f"{self.epsilon:g}",
            "dp_delta": f"{self.delta:g}",
        }


class ReleaseScheduledError(FMIError):
    """A private cohort releases at fixed times, and at no others."""

    reason = Reason.RELEASE_SCHEDULED

    def __init__(self, cohort: str, *, next_release_at: float) -> None:
        self.cohort = cohort
        self.next_release_at = next_release_at
        super().__init__(
            f"cohort {cohort!r} is private: it releases at fixed times, so that a release tells nothing of "
            f"who sent what; the next is due at {utc(next_release_at)}"
        )

    @property
    def metadata(self) -> Mapping[str, str]:
        """The cohort, and when it releases next."""
        return {"cohort": self.cohort, "next_release_at": utc(self.next_release_at)}


def utc(at: float) -> str:
    """Write Unix seconds as RFC 3339, to the second."""
    moment = min(max(at, 0.0), LAST_MOMENT_S)
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%dT%H:%M:%SZ}"


LAST_MOMENT_S: Final = 253_402_300_799.0
"""The end of the year 9999, after which nothing can be written as RFC 3339."""


class ThingNotFoundError(FMIError):
    """There is no such site, packet, dictionary or destination."""

    reason = Reason.NOT_FOUND

    def __init__(self, what: str, name: str) -> None:
        self.what = what
        self.name = name
        super().__init__(f"there is no {what} {name!r}")

    @property
    def metadata(self) -> Mapping[str, str]:
        """What was asked for."""
        return {self.what.replace(" ", "_"): self.name}
