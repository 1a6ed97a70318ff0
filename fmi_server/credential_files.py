"""The files that credentials are checked against, kept up to date: tokens and revoked certificates."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fmi_server.certificates import RevocationList, read_authorities, read_revocations
from fmi_server.tokens import TokenBook, read_tokens
from fmi_server.watched_files import WatchedFiles

__all__ = ["CredentialFiles"]

_DAY_S: Final = 86_400.0

_log = logging.getLogger(__name__)


class CredentialFiles:
    """Tokens and revocations, as their files say.

    Args:
        tokens: The file of tokens; None where there are no tokens.
        client_ca: The authorities of client certificates; None where clients need no certificates.
        crl: Their revocation lists; None where nothing is revoked.
        clock: Unix time in seconds.

    Raises:
        TokenFileError: The file of tokens cannot be used.
        CertificateFileError: Another file cannot be used.
    """

    def __init__(
        self,
        *,
        tokens: Path | None = None,
        client_ca: Path | None = None,
        crl: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._crl = crl
        self._warned_at = -math.inf
        self._tokens: WatchedFiles[TokenBook] | None = None
        if tokens is not None:
            self._tokens = WatchedFiles(
                [tokens], lambda: read_tokens(tokens), what=f"tokens {tokens}"
            )
        self._revocations: WatchedFiles[RevocationList] | None = None
        if client_ca is not None:
            self._revocations = WatchedFiles(
                [client_ca, *([] if crl is None else [crl])],
                lambda: _revocations(client_ca, crl),
                what="revoked client certificates",
            )

    @property
    def tokens(self) -> TokenBook | None:
        """The tokens; None where there are none."""
        return None if self._tokens is None else self._tokens.value

    @property
    def revocations(self) -> RevocationList | None:
        """The revoked certificates; None where clients need no certificates."""
        return None if self._revocations is None else self._revocations.value

    def refresh(self) -> bool:
        """Read again what changed; return whether there is something new. It may be called from a thread."""
        changed = False
        for files in (self._tokens, self._revocations):
            changed |= files is not None and files.refresh()
        self._warn_of_old_list()
        return changed

    def _warn_of_old_list(self) -> None:
        found, now = self.revocations, self._clock()
        if found is None or now < found.next_update or now - self._warned_at < _DAY_S:
            return
        self._warned_at = now
        _log.warning(
            "revocation list %s is older than it says that it may be; it stays in force", self._crl
        )


def _revocations(client_ca: Path, crl: Path | None) -> RevocationList:
    _, authorities = read_authorities(client_ca)
    return RevocationList() if crl is None else read_revocations(crl, authorities)
