"""Who calls: each call is authenticated here, and nowhere else.

A call proves its principal by a bearer token in its metadata, or by the client certificate of its connection
(`fmi_server.certificates` says how one names its principal). Where it has both, the token counts: it says
more, and one that is not valid is refused however good the certificate is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Protocol
from urllib.parse import unquote

import grpc

from fmi_server.access import Principal
from fmi_server.certificates import (
    ClientCertificate,
    RevocationList,
    UnusableCertificateError,
    read_client_certificate,
)
from fmi_server.errors import FMIError, UnauthenticatedError, UnauthorizedError
from fmi_server.quotas import account_of_host
from fmi_server.tokens import TokenBook, TokenRecord

__all__ = ["Authenticator", "Caller", "Credentials", "account_of_address"]

_SCHEME: Final = "bearer"
_NO_TOKEN: Final = "the token is not valid here; it may be mistyped, or it was revoked"

_Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call, and from where.

    Attributes:
        principal: Who.
        peer: The address, as gRPC writes it; empty where nobody asks.
        method: The full name of the method.
    """

    principal: Principal
    peer: str = ""
    method: str = ""


class Credentials(Protocol):
    """What credentials are checked against, as it is at the moment."""

    @property
    def tokens(self) -> TokenBook | None:
        """The tokens; None where there are none."""

    @property
    def revocations(self) -> RevocationList | None:
        """The revoked certificates; None where clients need no certificates."""


class Authenticator:
    """Says who calls, by tokens and certificates.

    Args:
        credentials: What they are checked against.
        operators: The principals that operate the server.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        credentials: Credentials,
        *,
        operators: Iterable[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._credentials = credentials
        self._operators = frozenset(operators)
        self._clock = clock

    def __call__(self, context: _Context) -> Principal:
        """Return who makes a call.

        Raises:
            UnauthenticatedError: There are no credentials, or they are not valid.
        """
        token = _bearer_token(context)
        if token is not None:
            return self._by_token(token)
        shown = context.auth_context()
        pem = next(iter(shown.get("x509_pem_cert", ())), None)
        if self._credentials.revocations is None or pem is None:
            raise UnauthenticatedError(self._lacking())
        try:
            chain = next(iter(shown.get("x509_pem_cert_chain", ())), b"")
            certificate = read_client_certificate(pem, chain)
        except UnusableCertificateError as error:
            raise UnauthenticatedError(str(error)) from None
        return self._of_certificate(certificate)

    def refusal(self, principal: Principal) -> FMIError | None:
        """Return why a subscription of a principal must end; None where it may go on."""
        try:
            now = self._renewed(principal)
        except UnauthenticatedError as error:
            return UnauthorizedError(error.detail)
        if now.same_rights(principal):
            return None
        return UnauthorizedError("the credentials are for something else now")

    def check(self, principal: Principal) -> None:
        """Check once more that a caller is who it was, in the middle of a long call.

        Raises:
            UnauthenticatedError: Its credentials are not valid any more, or for something else.
        """
        if not self._renewed(principal).same_rights(principal):
            raise UnauthenticatedError("the credentials are for something else now; call again")

    def _renewed(self, principal: Principal) -> Principal:
        match principal.credential:
            case TokenRecord() as record:
                book = self._credentials.tokens
                held = None if book is None else book.records.get(record.token_id)
                if held is None or held.sha256 != record.sha256:
                    raise UnauthenticatedError("the token was revoked")
                return self._of_token(held)
            case ClientCertificate() as certificate:
                return self._of_certificate(certificate)
            case _:
                return principal

    def _by_token(self, token: str) -> Principal:
        book = self._credentials.tokens
        record = None if book is None else book.find(token)
        if record is None:
            raise UnauthenticatedError(_NO_TOKEN)
        return self._of_token(record)

    def _of_token(self, record: TokenRecord) -> Principal:
        if record.expires_at is not None and record.expired(self._clock()):
            raise UnauthenticatedError(
                f"the token {record.token_id} expired at {_time(record.expires_at)}"
            )
        return self._principal(record.principal, frozenset(record.domain_ids), record)

    def _of_certificate(self, certificate: ClientCertificate) -> Principal:
        # TLS checked the time once, when the connection was made.
        if self._clock() >= certificate.expires_at:
            raise UnauthenticatedError(
                f"the certificate expired at {_time(certificate.expires_at)}"
            )
        revocations = self._credentials.revocations or RevocationList()
        if certificate in revocations:
            own = (certificate.issuer, certificate.serial) in revocations.revoked
            of = "" if own else "an authority on the way to "
            raise UnauthenticatedError(f"{of}the certificate {certificate.number} was revoked")
        return self._principal(certificate.principal, certificate.domain_ids, certificate)

    def _principal(
        self, name: str, domain_ids: frozenset[str], credential: TokenRecord | ClientCertificate
    ) -> Principal:
        operator = name in self._operators
        account = "" if operator else name
        return Principal(
            name, domain_ids, operator=operator, credential=credential, account=account
        )

    def _lacking(self) -> str:
        ways = []
        if self._credentials.tokens is not None:
            ways.append("a token (`authorization: Bearer ...`)")
        if self._credentials.revocations is not None:
            ways.append("a client certificate")
        return f"this server wants {' or '.join(ways)}"


def _bearer_token(context: _Context) -> str | None:
    """Return the token of a call; None where it has none.

    Raises:
        UnauthenticatedError: What stands there is no bearer token, or there are several.
    """
    found = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not found:
        return None
    text = found[0] if isinstance(found[0], str) else ""
    scheme, _, token = text.partition(" ")
    if len(found) > 1 or scheme.lower() != _SCHEME or not token:
        raise UnauthenticatedError("`authorization` must be given once, as `Bearer TOKEN`")
    return token


@lru_cache(maxsize=16_384)
def account_of_address(peer: str) -> str:
    """Return the account of a caller of whom nothing is known but an address, as gRPC writes it.

    All ports of an address are one account; see `fmi_server.quotas.account_of_host`.
    """
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    return account_of_host(host) if kind in ("ipv4", "ipv6") else kind


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
