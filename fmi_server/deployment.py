"""The folder of a first deployment: an authority, a server's certificate, credentials of clients.

    FOLDER/ca/ca.crt ca.key revoked.pem   the authority, and what it revoked; it signs what is new only
    FOLDER/server/server.crt server.key   what the server shows
    FOLDER/server/ca.crt revoked.pem      what it checks clients against
    FOLDER/clients/NAME/                  what a client gets: client.crt, client.key, ca.crt
    FOLDER/clients/NAME.revoked-TIME/     what is not valid any more; NAME.renewed-TIME still is
    FOLDER/cohorts/default.yaml           a cohort for all clients
    FOLDER/fmi.yaml                       the settings of the server

Nothing is ever written over, but for the list of revoked certificates, which never loses one, and the
server's certificate and key when they are renewed. A subfolder appears when it is whole. Keys have mode 0600.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import yaml
from cryptography import x509

from fmi_server.authority import Authority, Issued
from fmi_server.certificates import UnusableCertificateError, read_client_certificate

__all__ = ["CLIENT_NAME", "Deployment", "DeploymentError"]

CLIENT_NAME: Final = re.compile("[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")
"""What a client may be called: a name of a site that fits into a certificate."""

AUTHORITY_LIFETIME: Final = timedelta(days=3650)

_FOLDER_NAME: Final = re.compile("[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
"""What a client's folder may be called, also one that was set aside."""

_REVOKED: Final = re.compile(r".+\.revoked-\d{8}T\d{6}Z")

_COHORT: Final = """\
# A cohort for everybody who has credentials. Who may do what stands in `access`: names of clients, or "*" for
# every client. What is not listed is denied.
name: default
access:
  emit: ["*"]
  subscribe: ["*"]
"""


class DeploymentError(Exception):
    """The folder cannot be used as it was asked for. The message says why; nothing was written over."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A folder, which need not exist yet.

    Attributes:
        folder: The folder.
        now: The time.
        lifetime: How long new certificates are valid.
    """

    folder: Path
    now: datetime
    lifetime: timedelta

    @property
    def settings_file(self) -> Path:
        """The settings of the server."""
        return self.folder / "fmi.yaml"

    def client_folder(self, name: str) -> Path:
        """Return the folder with the credentials of a client."""
        return self.folder / "clients" / name

    def create(self, hosts: Sequence[str], operator: str) -> list[Path]:
        """Make what a server needs and is not there yet; return what was made.

        Args:
            hosts: Names and addresses of the server, as clients will write them.
            operator: The client who operates the server.

        Raises:
            DeploymentError: A name cannot be one, or a file cannot be read or made.
        """
        made: list[Path] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(_telling())
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            stack.enter_context(self._alone())
            if not self._ca.exists():
                root = Authority.create("FMI authority", now=self.now, lifetime=AUTHORITY_LIFETIME)
                made += _folder_of(self._ca, _pair("ca", root))
            if not self._server.exists():
                authority = self._authority()
                pair = authority.issue_server(hosts, now=self.now, lifetime=self.lifetime)
                files = {
                    **_pair("server", pair),
                    "ca.crt": self._read("ca.crt"),
                    "revoked.pem": self._revocations(authority),
                }
                made += _folder_of(self._server, files)
            if not self.client_folder(operator).exists():
                made += self.add_client(operator)
            cohorts = self.folder / "cohorts"
            if not cohorts.exists():
                made += _folder_of(cohorts, {"default.yaml": _COHORT.encode()})
            if not self.settings_file.exists():
                _write(self.settings_file, self._settings(operator), mode=0o644)
                made.append(self.settings_file)
        return made

    def add_client(self, name: str, domain_ids: Sequence[str] = ()) -> list[Path]:
        """Make credentials for a client; return the files.

        Args:
            name: The client, which is the principal.
            domain_ids: The names of sites that it may speak under; its own where none is given.

        Raises:
            DeploymentError: There are such credentials, or the authority's key is not there.
        """
        for given in (name, *domain_ids):
            if not CLIENT_NAME.fullmatch(given) or _REVOKED.fullmatch(given):
                raise DeploymentError(
                    f"{given!r} is no name: 1 to 64 letters, digits and ._:@- that begin with a letter or "
                    "a digit"
                )
        folder = self.client_folder(name)
        if folder.exists():
            raise DeploymentError(
                f"{folder} exists, and nothing is written over; choose another name"
            )
        with _telling():
            pair = self._authority().issue_client(
                name, domain_ids, now=self.now, lifetime=self.lifetime
            )
            return _folder_of(folder, {**_pair("client", pair), "ca.crt": self._read("ca.crt")})

    def revoke(self, name: str) -> Path:
        """Revoke the certificate of a client and set its folder aside; return where that is now.

        Args:
            name: The client, or the name of a folder that was set aside when it was renewed.

        Raises:
            DeploymentError: There is no such client, or the authority's key is not there.
        """
        with _telling(), self._alone():
            certificate = self._certificate_of(name)
            new = self._revocations(self._authority(), certificate.read_bytes())
            for folder in (self._ca, self._server):  # the authority's first: it is what counts
                _replace(folder / "revoked.pem", new, mode=0o644)
            return self._set_aside(name, "revoked")

    def renew_client(self, name: str) -> tuple[Path, list[Path]]:
        """Make a new certificate with the names of a client's present one, which is not revoked by that.

        Returns:
            Where the present one is now, and the new files.

        Raises:
            DeploymentError: There is no such client, or the authority's key is not there.
        """
        with _telling(), self._alone():
            present = read_client_certificate(self._certificate_of(name).read_bytes())
            own = present.domain_ids == {present.principal}
            pair = self._authority().issue_client(
                present.principal,
                () if own else sorted(present.domain_ids),
                now=self.now,
                lifetime=self.lifetime,
            )
            files = {**_pair("client", pair), "ca.crt": self._read("ca.crt")}
            aside = self._set_aside(name, "renewed")
            return aside, _folder_of(self.client_folder(name), files)

    def renew_server(self, hosts: Sequence[str] = ()) -> list[Path]:
        """Make a new certificate and key for the server, in the places of its present ones.

        Args:
            hosts: Its names and addresses; those of the present certificate where none is given.

        Raises:
            DeploymentError: There is no present certificate, or the authority's key is not there.
        """
        with _telling(), self._alone():
            certificate, key = self._server / "server.crt", self._server / "server.key"
            if not certificate.exists():
                raise DeploymentError(f"there is no {certificate}; `fmi-server init` makes one")
            authority = self._authority()
            pair = authority.issue_server(
                hosts or _hosts_of(certificate.read_bytes()), now=self.now, lifetime=self.lifetime
            )
            _replace(self._server / "revoked.pem", self._revocations(authority), mode=0o644)
            # A server that runs keeps the old pair while the two do not belong together.
            _replace(key, pair.key, mode=0o600)
            _replace(certificate, pair.certificate, mode=0o644)
        return [certificate, key]

    def _certificate_of(self, name: str) -> Path:
        certificate = self.client_folder(name) / "client.crt"
        if not _FOLDER_NAME.fullmatch(name) or not certificate.exists():
            raise DeploymentError(f"there is no {certificate}")
        if _REVOKED.fullmatch(name):
            raise DeploymentError(f"{certificate} is revoked already")
        return certificate

    def _set_aside(self, name: str, why: str) -> Path:
        folder = self.client_folder(name)
        aside = folder.with_name(f"{name}.{why}-{self.now.astimezone(UTC):%Y%m%dT%H%M%SZ}")
        if aside.exists():
            raise DeploymentError(f"{aside} exists, and nothing is written over; try again")
        return folder.rename(aside)

    def _revocations(self, authority: Authority, *certificates: bytes) -> bytes:
        """Return the list of all that was ever revoked here, as far as anything in the folder tells."""
        present = [
            listed.read_bytes()
            for listed in (self._ca / "revoked.pem", self._server / "revoked.pem")
            if listed.exists()
        ]
        aside = [
            path.read_bytes()
            for path in sorted((self.folder / "clients").glob("*/client.crt"))
            if _REVOKED.fullmatch(path.parent.name)
        ]
        return authority.revocations(*present, revoked=[*aside, *certificates], now=self.now)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one command at a time change the folder: of two lists that are written, one would be lost."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @property
    def _ca(self) -> Path:
        return self.folder / "ca"

    @property
    def _server(self) -> Path:
        return self.folder / "server"

    def _read(self, name: str) -> bytes:
        return (self._ca / name).read_bytes()

    def _authority(self) -> Authority:
        key = self._ca / "ca.key"
        if not key.exists():
            raise DeploymentError(f"{key} is not there; bring the authority's key back to sign")
        return Authority(self._read("ca.crt"), key.read_bytes())

    def _settings(self, operator: str) -> bytes:
        folder = self.folder.resolve()
        settings = {
            "listen": "0.0.0.0:50061",
            "data_dir": str(folder / "data"),
            "cohorts": str(folder / "cohorts"),
            "open_cohorts": False,
            "tls_cert": str(folder / "server" / "server.crt"),
            "tls_key": str(folder / "server" / "server.key"),
            "tls_client_ca": str(folder / "server" / "ca.crt"),
            "tls_crl": str(folder / "server" / "revoked.pem"),
            "operators": [operator],
            "audit_log": str(folder / "audit.jsonl"),
        }
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()


def _hosts_of(certificate: bytes) -> list[str]:
    """Return the names and addresses that a server's certificate is for."""
    found = x509.load_pem_x509_certificate(certificate)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def _pair(name: str, issued: Issued) -> dict[str, bytes]:
    return {f"{name}.crt": issued.certificate, f"{name}.key": issued.key}


def _folder_of(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Make a folder with files, all at once: a folder that is there is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Its mode is 0700: keys are nobody else's.
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for name, content in files.items():
            _write(scratch / name, content, mode=0o600 if name.endswith(".key") else 0o644)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return [folder / name for name in files]


def _write(path: Path, content: bytes, *, mode: int) -> None:
    """Write a new file, with its mode from the first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, content: bytes, *, mode: int) -> None:
    """Put a file in the place of another at once."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    _write(temporary, content, mode=mode)
    temporary.replace(path)


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DeploymentError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, x509.ExtensionNotFound, UnusableCertificateError) as error:
        raise DeploymentError(f"the authority in the folder cannot be used: {error}") from None
