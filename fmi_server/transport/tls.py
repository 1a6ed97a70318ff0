"""TLS of the server: credentials that follow their files.

gRPC asks for the certificates at each new connection, from a thread of its own. What is open keeps the
certificates that it began with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import grpc

from fmi_server.certificates import read_authorities, read_server_pair
from fmi_server.watched_files import WatchedFiles

__all__ = ["ServerTLS"]

SOON_S: Final = 14 * 86_400.0
"""Seconds before the end of a certificate from which on there are warnings, one a day."""

_DAY_S: Final = 86_400.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    configuration: grpc.ServerCertificateConfiguration
    expires_at: float


class ServerTLS:
    """The certificates of a server, and what client certificates are checked against.

    Args:
        certificate: PEM file of the server's certificate chain.
        key: PEM file of its key.
        client_ca: PEM file of the authorities of clients. Where it is given, a client without a
            certificate of theirs gets no connection.
        clock: Unix time in seconds.

    Raises:
        CertificateFileError: A file cannot be used.
    """

    def __init__(
        self,
        certificate: Path,
        key: Path,
        *,
        client_ca: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._clock = clock
        self._lock = threading.Lock()  # gRPC's threads and the event loop look for changes
        paths = [certificate, key, *([] if client_ca is None else [client_ca])]
        self._files = WatchedFiles(paths, self._load, what="TLS certificates of the server")
        self._handed_out = self._files.value
        self._warned_at = -_DAY_S

    def credentials(self) -> grpc.ServerCredentials:
        """Make the credentials with which a server listens."""
        # The stubs forget that a fetcher may say None, for no change.
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._fetch)
        return grpc.dynamic_ssl_server_credentials(
            self._files.value.configuration,
            fetch,
            require_client_authentication=self._client_ca is not None,
        )

    def refresh(self) -> None:
        """Look for new files, so that a bad one is told of before somebody connects."""
        with self._lock:
            self._files.refresh()
        left_s = self._files.value.expires_at - self._clock()
        if left_s < SOON_S and self._clock() - self._warned_at >= _DAY_S:
            self._warned_at = self._clock()
            told = f"expires in {left_s / _DAY_S:.1f} days" if left_s > 0 else "has expired"
            _log.warning("the server's certificate %s %s; replace it", self._certificate, told)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the certificates for new connections; None where they are still the same."""
        with self._lock:
            self._files.refresh()
            loaded = self._files.value
            if loaded is self._handed_out:
                return None
            self._handed_out = loaded
            return loaded.configuration

    def _load(self) -> _Loaded:
        pair = read_server_pair(self._certificate, self._key, now=self._clock())
        roots = None if self._client_ca is None else read_authorities(self._client_ca)[0]
        configuration = grpc.ssl_server_certificate_configuration(
            [(pair.key, pair.chain)], root_certificates=roots
        )
        return _Loaded(configuration, pair.expires_at)
