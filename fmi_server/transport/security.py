"""What secures a server, made from its settings: TLS, who calls, the audit log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Final

import grpc

from fmi_server.audit import AuditLog
from fmi_server.certificates import CertificateFileError
from fmi_server.config import ServerSettings, SettingsError
from fmi_server.credential_files import CredentialFiles
from fmi_server.router import FMIRouter
from fmi_server.tokens import TokenFileError
from fmi_server.transport.identity import Authenticator
from fmi_server.transport.tls import ServerTLS

__all__ = ["Security", "wrong_credentials"]

LOOK_S: Final = 1.0
"""Seconds between two looks at the files: about as long a revoked token goes on."""

LOOKS_UNTIL_EXPIRY: Final = 5
"""Looks after which the callers of subscriptions are checked although no file changed: what they showed may
have expired."""


_log = logging.getLogger(__name__)


class Security:
    """What secures a server.

    Args:
        settings: How the server runs.

    Attributes:
        authenticator: Says who calls; None where callers are not authenticated.
        audit: The audit log; None where there is none.

    Raises:
        SettingsError: A file cannot be used.
    """

    def __init__(self, settings: ServerSettings) -> None:
        if wrong := list(wrong_credentials(settings)):
            raise SettingsError("\n".join(wrong))
        self._tls = _tls(settings)
        self._files = _credential_files(settings)
        self.authenticator: Authenticator | None = None
        if settings.authenticated:
            self.authenticator = Authenticator(self._files, operators=settings.operators)
        self.audit: AuditLog | None = None
        if settings.audit_log is not None:
            try:
                self.audit = AuditLog(settings.audit_log)
            except OSError as error:
                raise SettingsError(
                    f"audit_log: {settings.audit_log} cannot be written: {error.strerror}"
                ) from None

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Let a server listen; return the port."""
        if self._tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._tls.credentials())

    async def watch(self, router: FMIRouter) -> None:
        """Follow the files, and end subscriptions of callers who are not what they were, until cancelled."""
        turn = 0
        while True:
            await asyncio.sleep(LOOK_S)
            turn += 1
            try:
                changed = await asyncio.to_thread(self._refresh)
                due = changed or turn % LOOKS_UNTIL_EXPIRY == 0
                if due and self.authenticator is not None:
                    await router.check_callers(self.authenticator.refusal)
            except Exception:  # revocations must go on being looked for
                _log.exception("credentials could not be looked at; the next look is in a second")

    def close(self) -> None:
        """Close the audit log."""
        if self.audit is not None:
            self.audit.close()

    def _refresh(self) -> bool:
        if self._tls is not None:
            self._tls.refresh()
        return self._files.refresh()


def wrong_credentials(settings: ServerSettings) -> Iterator[str]:
    """Say what is wrong with the files that settings name."""
    try:
        _tls(settings)
    except CertificateFileError as error:
        yield f"tls_cert, tls_key: {error}"
    try:
        _credential_files(settings)
    except TokenFileError as error:
        yield f"tokens: {error}"
    except CertificateFileError as error:
        yield f"tls_client_ca, tls_crl: {error}"


def _tls(settings: ServerSettings) -> ServerTLS | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return ServerTLS(settings.tls_cert, settings.tls_key, client_ca=settings.tls_client_ca)


def _credential_files(settings: ServerSettings) -> CredentialFiles:
    return CredentialFiles(
        tokens=settings.tokens, client_ca=settings.tls_client_ca, crl=settings.tls_crl
    )
