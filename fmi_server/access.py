"""Who may do what: decisions about callers, cohorts and the names of sites.

A caller is a `Principal`. What it may do in a cohort stands in the cohort's `AccessRules`; what is not
allowed there is denied. A cohort in which a caller may do nothing does not exist for it: it gets the
answer that it would get for a name that nobody has, whatever it calls.

| | listed, or `*` | operator | anybody else |
|---|---|---|---|
| emit | yes | no | no |
| subscribe | yes | yes | no |
| admin | yes | yes | no |

An operator who wants to emit is listed like everybody: to operate a server is not to be a site.

There is no gRPC here, no file and no clock: what proves who a caller is stands in `transport.identity`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from fmi_server.errors import (
    AccessDeniedError,
    CohortUnknownError,
    DomainIdMismatchError,
    FMIError,
    Violation,
)

__all__ = [
    "ANYONE",
    "TRUSTED",
    "AccessRules",
    "Action",
    "Gate",
    "Principal",
    "View",
]

ANYONE: Final = "*"
"""Stands in a list of principals for every caller who is authenticated."""


class Action(Enum):
    """What can be done in a cohort. The values are the names of the lists in `AccessSpec`."""

    EMIT = "emit"
    SUBSCRIBE = "subscribe"
    ADMIN = "admin"


_VERBS: Final = {
    Action.EMIT: "emit",
    Action.SUBSCRIBE: "subscribe and read",
    Action.ADMIN: "administer",
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls.

    Attributes:
        name: The name that the credentials prove.
        domain_ids: The names of sites that it may speak under.
        operator: Whether it operates the server.
        unrestricted: Whether it may do everything: the program itself, or everybody where the server
            authenticates nobody.
        credential: What proved it, for whoever checked that: never a secret.
        account: What its calls are charged to (`fmi_server.quotas`); empty where they are not.
    """

    name: str
    domain_ids: frozenset[str] = frozenset()
    operator: bool = False
    unrestricted: bool = False
    credential: Hashable = None
    account: str = ""

    def speaks_as(self, domain_id: str) -> bool:
        """Say whether it may speak under the name of a site."""
        return self.unrestricted or domain_id in self.domain_ids

    def same_rights(self, other: Principal) -> bool:
        """Say whether another one may do exactly the same."""
        return (self.name, self.domain_ids, self.operator, self.unrestricted) == (
            other.name,
            other.domain_ids,
            other.operator,
            other.unrestricted,
        )


TRUSTED: Final = Principal("", unrestricted=True)
"""The program itself; and everybody, where the server authenticates nobody."""


class Lists(Protocol):
    """What is read of an `AccessSpec`."""

    @property
    def emit(self) -> Iterable[str]:
        """Who may emit."""

    @property
    def subscribe(self) -> Iterable[str]:
        """Who may subscribe and read."""

    @property
    def admin(self) -> Iterable[str]:
        """Who may administer."""


@dataclass(frozen=True, slots=True)
class AccessRules:
    """Who may do what in one cohort; see `AccessSpec`. What is not listed is denied."""

    emit: frozenset[str] = frozenset()
    subscribe: frozenset[str] = frozenset()
    admin: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        *,
        emit: Iterable[str] = (),
        subscribe: Iterable[str] = (),
        admin: Iterable[str] = (),
    ) -> AccessRules:
        """Make rules from lists."""
        return cls(frozenset(emit), frozenset(subscribe), frozenset(admin))

    @classmethod
    def of_spec(cls, spec: Lists) -> AccessRules:
        """Make the rules that an `AccessSpec` writes down."""
        return cls.of(emit=spec.emit, subscribe=spec.subscribe, admin=spec.admin)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the lists that are not empty."""
        return tuple(action.value for action in Action if self.listed(action))

    def allow(self, principal: Principal, action: Action) -> bool:
        """Say whether a principal may do something in the cohort."""
        if principal.unrestricted or (principal.operator and action is not Action.EMIT):
            return True
        listed = self.listed(action)
        return principal.name in listed or ANYONE in listed

    def show(self, principal: Principal) -> bool:
        """Say whether the cohort exists for a principal: whether it may do anything in it."""
        return any(self.allow(principal, action) for action in Action)

    def listed(self, action: Action) -> frozenset[str]:
        """Return the principals that are listed for an action."""
        match action:
            case Action.EMIT:
                return self.emit
            case Action.SUBSCRIBE:
                return self.subscribe
            case Action.ADMIN:
                return self.admin


_NOBODY: Final = AccessRules()


@dataclass(frozen=True, slots=True)
class Gate:
    """Decides, by the rules of the cohorts as they are at that moment.

    Attributes:
        rules_of: The rules of a cohort; None where there is no such cohort.
    """

    rules_of: Callable[[str], AccessRules | None]

    def may(self, principal: Principal, action: Action, cohort: str) -> bool:
        """Say whether a principal may do something in a cohort, which need not exist."""
        return principal.unrestricted or self._rules(cohort).allow(principal, action)

    def shows(self, principal: Principal, cohort: str) -> bool:
        """Say whether a cohort exists for a principal; of one that nobody has, operators may ask."""
        return principal.unrestricted or self._rules(cohort).show(principal)

    def require(self, principal: Principal, action: Action, cohort: str) -> None:
        """Refuse what a principal may not do.

        For who may do everything it does not say whether there is such a cohort.

        Raises:
            CohortUnknownError: There is no such cohort, or none for this principal.
            AccessDeniedError: The principal may not do this in the cohort.
        """
        error = self.refusal(principal, action, cohort)
        if error is not None:
            raise error

    def refusal(self, principal: Principal, action: Action, cohort: str) -> FMIError | None:
        """Return why a principal may not do something in a cohort; None where it may."""
        if principal.unrestricted:
            return None
        rules = self.rules_of(cohort)
        if rules is None:
            rules = _NOBODY
            if action is Action.EMIT:
                return CohortUnknownError(cohort)
        if rules.allow(principal, action):
            return None
        if not rules.show(principal):
            return CohortUnknownError(cohort)
        return AccessDeniedError(principal.name, _VERBS[action], cohort)

    def require_operator(self, principal: Principal, doing: str) -> None:
        """Refuse what only an operator may do.

        Args:
            principal: Who calls.
            doing: What, as in "may not ...".

        Raises:
            AccessDeniedError: It is no operator.
        """
        if not (principal.operator or principal.unrestricted):
            raise AccessDeniedError(principal.name, doing)

    def require_name(self, principal: Principal, domain_id: str, field: str) -> None:
        """Refuse the name of a site that a principal may not speak under.

        Raises:
            DomainIdMismatchError: It may not.
        """
        if not principal.speaks_as(domain_id):
            raise DomainIdMismatchError(principal.name, domain_id, field)

    def violations(self, principal: Principal, domain_id: str, cohort: str) -> list[Violation]:
        """List why a principal may not emit a packet of a site to a cohort; nothing where it may."""
        if principal.unrestricted:
            return []
        if not principal.speaks_as(domain_id):
            mismatch = DomainIdMismatchError(principal.name, domain_id, "header.domain_id")
            return list(mismatch.violations)
        error = self.refusal(principal, Action.EMIT, cohort)
        if error is None:
            return []
        # To a caller for which it does not exist it is the violation of a cohort that nobody has.
        rule = "fmi.access.emit" if isinstance(error, AccessDeniedError) else "fmi.cohort.known"
        return [Violation("header.cohort", rule, str(error), error.reason)]

    def _rules(self, cohort: str) -> AccessRules:
        return self.rules_of(cohort) or _NOBODY


@dataclass(frozen=True, slots=True)
class View:
    """The cohorts that a principal may subscribe to, by the rules at the moment when it is asked."""

    gate: Gate
    principal: Principal

    def __call__(self, cohort: str) -> bool:
        """Say whether a cohort may be read."""
        return self.gate.may(self.principal, Action.SUBSCRIBE, cohort)
