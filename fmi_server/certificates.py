"""Certificates: whom a client's is for, which are revoked, and whether a server's can be used.

Whom a client certificate is for, by the names that its authority wrote into it:

1. URI names of the form `fmi://domain/NAME` are not who it is, but which names of sites it may speak under.
2. Of the other names the first kind that it has counts: URI, then DNS (both in `subjectAltName`), then the
   common name of the subject. Of that kind it must have exactly one, which is the principal.
3. Without names of the first form it may speak under its principal's name, and no other.

That the certificate belongs to the caller, is in force and was signed by an authority in `tls_client_ca` was
checked by TLS before; what is checked here again is what can change while a connection lasts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

__all__ = [
    "DOMAIN_URI",
    "CertificateFileError",
    "ClientCertificate",
    "RevocationList",
    "ServerPair",
    "UnusableCertificateError",
    "read_authorities",
    "read_client_certificate",
    "read_revocations",
    "read_server_pair",
]

DOMAIN_URI: Final = "fmi://domain/"
"""How a URI name begins that is the name of a site."""

MAX_PRINCIPAL_BYTES: Final = 256

MAX_SHOWN_BYTES: Final = 16 * 1024
"""Bytes, in PEM, of the authorities that a client may show between its certificate and one known here."""

_UNREADABLE: Final = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What the library raises for a certificate that it does not understand; not all of it is a ValueError."""

_CRL_BEGIN: Final = b"-----BEGIN X509 CRL-----"
_CRL_END: Final = b"-----END X509 CRL-----"


class CertificateFileError(Exception):
    """A file with certificates, a key or revocations cannot be used. The message names it and says why."""


class UnusableCertificateError(Exception):
    """A client certificate does not say whom it is for. The message says why."""


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """What a client certificate says.

    Attributes:
        principal: Whom it is for.
        domain_ids: The names of sites that it may speak under.
        issuer: The name of its authority, encoded (DER).
        serial: Its number at the authority.
        expires_at: Unix time in seconds from which it is not valid any more.
        shown: Authority and number of each certificate that the client showed with it: of those between it
            and an authority that is known here.
    """

    principal: str
    domain_ids: frozenset[str]
    issuer: bytes
    serial: int
    expires_at: float
    shown: tuple[tuple[bytes, int], ...] = ()

    @property
    def number(self) -> str:
        """Its serial number as hex, as other tools write it."""
        return f"{self.serial:x}"


@dataclass(frozen=True, slots=True)
class RevocationList:
    """The certificates that their authorities revoked.

    Attributes:
        revoked: Authority and number of each.
        next_update: When the first of the lists that it was read from should have been followed by a newer
            one, Unix time in seconds; infinite where none says so.
        withdrawn: Names of authorities that were revoked themselves although they stand among those that
            clients are checked against. What they signed need not show them.
    """

    revoked: frozenset[tuple[bytes, int]] = frozenset()
    next_update: float = math.inf
    withdrawn: frozenset[bytes] = frozenset()

    def __contains__(self, certificate: object) -> bool:
        """Say whether a client's certificate was revoked, or an authority on the way to it."""
        if not isinstance(certificate, ClientCertificate):
            return False
        numbers = ((certificate.issuer, certificate.serial), *certificate.shown)
        return any(number in self.revoked or number[0] in self.withdrawn for number in numbers)


@dataclass(frozen=True, slots=True)
class ServerPair:
    """A server's certificate chain and its key, in PEM.

    Attributes:
        chain: The certificates, the server's own first.
        key: The private key.
        expires_at: When the first of the chain expires, Unix time in seconds.
    """

    chain: bytes
    key: bytes
    expires_at: float

    def __repr__(self) -> str:
        return f"ServerPair(expires_at={self.expires_at})"


def read_client_certificate(pem: bytes, shown: bytes = b"") -> ClientCertificate:
    """Read whom a client certificate is for. The answers of the last few thousand are kept.

    Args:
        pem: The certificate.
        shown: The certificates of authorities that the client showed with it; empty where it showed none.

    Raises:
        UnusableCertificateError: It does not say, or too much is shown with it.
    """
    if len(shown) > MAX_SHOWN_BYTES:
        raise UnusableCertificateError(
            f"more than {MAX_SHOWN_BYTES} bytes of authorities are shown with the certificate"
        )
    try:
        found = _client_certificate(pem)
        return replace(found, shown=_numbers(shown)) if shown else found
    except _UNREADABLE as error:
        raise UnusableCertificateError(f"the certificate cannot be read: {error}") from None


@lru_cache(maxsize=4096)
def _client_certificate(pem: bytes) -> ClientCertificate:
    certificate = x509.load_pem_x509_certificate(pem)
    uris, hosts = _alternative_names(certificate)
    common = [
        str(attribute.value)
        for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    ]
    domains = [unquote(uri[len(DOMAIN_URI) :]) for uri in uris if uri.startswith(DOMAIN_URI)]
    others = [uri for uri in uris if not uri.startswith(DOMAIN_URI)]
    principal = _only_name(others, hosts, common)
    issuer, serial = _number(certificate)
    return ClientCertificate(
        principal=principal,
        domain_ids=frozenset(domains or [principal]),
        issuer=issuer,
        serial=serial,
        expires_at=certificate.not_valid_after_utc.timestamp(),
    )


@lru_cache(maxsize=256)  # whoever has a certificate may show whatever else with it
def _numbers(pem: bytes) -> tuple[tuple[bytes, int], ...]:
    return tuple(map(_number, x509.load_pem_x509_certificates(pem)))


def _alternative_names(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [], []
    return (
        names.get_values_for_type(x509.UniformResourceIdentifier),
        names.get_values_for_type(x509.DNSName),
    )


def _only_name(*kinds: Sequence[str]) -> str:
    found = next((names for names in kinds if names), ())
    if len(found) != 1:
        told = "no name" if not found else f"{len(found)} names of one kind"
        raise UnusableCertificateError(
            f"the certificate has {told}; it must name its owner by exactly one URI, DNS or common name"
        )
    (name,) = found
    # "*" stands for everybody in access rules, and nobody is everybody.
    if (
        not name
        or name == "*"
        or not name.isprintable()
        or len(name.encode()) > MAX_PRINCIPAL_BYTES
    ):
        raise UnusableCertificateError(
            f"the certificate's name must be 1 to {MAX_PRINCIPAL_BYTES} printable bytes and not `*`"
        )
    return name


def read_server_pair(certificate: Path, key: Path, *, now: float) -> ServerPair:
    """Read a server's certificate chain and its key, and check that they can be used.

    Raises:
        CertificateFileError: One cannot be read, they do not belong together, or the time of the certificate
            is over or has not come.
    """
    chain_pem, key_pem = _content(certificate), _content(key)
    chain = _certificates(certificate, chain_pem)
    try:
        private = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # What the library says of a key is not told: it may quote it.
        raise CertificateFileError(f"{key}: holds no private key without a passphrase") from None
    own = chain[0]
    encoding = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if own.public_key().public_bytes(*encoding) != private.public_key().public_bytes(*encoding):
        raise CertificateFileError(f"{certificate} and {key} do not belong together")
    for link in chain:
        _check_time(certificate, link, now)
    expires_at = min(link.not_valid_after_utc.timestamp() for link in chain)
    return ServerPair(chain_pem, key_pem, expires_at)


def read_authorities(path: Path) -> tuple[bytes, list[x509.Certificate]]:
    """Read the authorities that client certificates are checked against: as PEM, and one by one.

    Raises:
        CertificateFileError: The file cannot be read, or holds no certificates.
    """
    content = _content(path)
    return content, _certificates(path, content)


def read_revocations(path: Path, authorities: Iterable[x509.Certificate]) -> RevocationList:
    """Read certificate revocation lists (RFC 5280): a file with one or several, in PEM.

    Raises:
        CertificateFileError: It cannot be read, or a list was signed by none of the authorities.
    """
    known = list(authorities)
    revoked: set[tuple[bytes, int]] = set()
    next_update = math.inf
    for block in _lists(path, _content(path)):
        try:
            found = x509.load_pem_x509_crl(block)
        except ValueError as error:
            raise CertificateFileError(
                f"{path}: holds a list that cannot be read: {error}"
            ) from None
        if not any(_signed(found, authority) for authority in known):
            raise CertificateFileError(f"{path}: a list was signed by none of tls_client_ca")
        issuer = found.issuer.public_bytes()
        revoked |= {(issuer, entry.serial_number) for entry in found}
        if found.next_update_utc is not None:
            next_update = min(next_update, found.next_update_utc.timestamp())
    doubtful = {a.subject.public_bytes() for a in known if _number(a) in revoked}
    sound = {a.subject.public_bytes() for a in known if _number(a) not in revoked}
    return RevocationList(frozenset(revoked), next_update, frozenset(doubtful - sound))


def _number(certificate: x509.Certificate) -> tuple[bytes, int]:
    return certificate.issuer.public_bytes(), certificate.serial_number


def _lists(path: Path, content: bytes) -> list[bytes]:
    blocks = [part.partition(_CRL_END)[0] for part in content.split(_CRL_BEGIN)[1:]]
    if not blocks:
        raise CertificateFileError(f"{path}: holds no certificate revocation list in PEM")
    return [_CRL_BEGIN + block + _CRL_END for block in blocks]


def _signed(found: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    if found.issuer != authority.subject:
        return False
    try:
        # Its type allows for keys that sign nothing, of which the library says so.
        return found.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except (InvalidSignature, TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _certificates(path: Path, content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise CertificateFileError(
            f"{path}: holds no certificate in PEM that can be read"
        ) from None


def _check_time(path: Path, certificate: x509.Certificate, now: float) -> None:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= end.timestamp():
        raise CertificateFileError(f"{path}: the certificate expired at {end.isoformat()}")
    if now < begin.timestamp():
        raise CertificateFileError(
            f"{path}: the certificate is not valid before {begin.isoformat()}"
        )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateFileError(f"{path}: cannot be read: {error.strerror}") from None
