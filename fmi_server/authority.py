"""A small certificate authority: keys and certificates for a first deployment.

Certificates are as `fmi_server.certificates` reads them. Keys are of the curve P-256, without a passphrase,
because a server must start without somebody who types one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fmi_server.certificates import DOMAIN_URI

__all__ = ["Authority", "Issued"]

SLACK: Final = timedelta(minutes=5)
"""How far back a certificate begins: the clocks of those who check it may be behind."""

CRL_LIFETIME: Final = timedelta(days=365)

_CRL_BEGIN: Final = b"-----BEGIN X509 CRL-----"


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate chain and its key, in PEM."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Issued(...)"


class Authority:
    """Signs certificates.

    Args:
        certificate: Its own certificate, in PEM.
        key: Its key, in PEM.

    Raises:
        ValueError: They cannot be read.
    """

    def __init__(self, certificate: bytes, key: bytes) -> None:
        self._certificate = x509.load_pem_x509_certificate(certificate)
        private = serialization.load_pem_private_key(key, password=None)
        match private:
            case ec.EllipticCurvePrivateKey():
                self._key = private
            case _:
                raise ValueError("the authority's key is none of an elliptic curve")

    @classmethod
    def create(cls, name: str, *, now: datetime, lifetime: timedelta) -> Issued:
        """Make an authority: a certificate that it signed itself, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            _builder(subject, subject, key, now=now, lifetime=lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        return Issued(_pem(certificate), _key_pem(key))

    def issue_server(self, hosts: Sequence[str], *, now: datetime, lifetime: timedelta) -> Issued:
        """Make a server's certificate for names and addresses."""
        names = x509.SubjectAlternativeName([_host_name(host) for host in hosts])
        return self._issue(
            hosts[0], [names], ExtendedKeyUsageOID.SERVER_AUTH, now=now, lifetime=lifetime
        )

    def issue_client(
        self, name: str, domain_ids: Iterable[str] = (), *, now: datetime, lifetime: timedelta
    ) -> Issued:
        """Make a client's certificate: its common name is the principal.

        Args:
            name: The principal.
            domain_ids: The names of sites that it may speak under; its own where none is given.
            now: The time.
            lifetime: How long it is valid.
        """
        uris = [
            x509.UniformResourceIdentifier(DOMAIN_URI + quote(domain_id, safe=""))
            for domain_id in domain_ids
        ]
        names = [x509.SubjectAlternativeName(uris)] if uris else []
        return self._issue(name, names, ExtendedKeyUsageOID.CLIENT_AUTH, now=now, lifetime=lifetime)

    def revocations(self, *present: bytes, revoked: Iterable[bytes] = (), now: datetime) -> bytes:
        """Return a revocation list, in PEM.

        Args:
            present: Lists so far, whose entries stay.
            revoked: Certificates that it has besides, in PEM.
            now: The time.

        Raises:
            ValueError: A list cannot be read, or is several, which would not all be kept.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._certificate.subject)
            .last_update(now - SLACK)
            .next_update(now + CRL_LIFETIME)
        )
        entries: dict[int, x509.RevokedCertificate] = {}
        for listed in present:
            if listed.count(_CRL_BEGIN) > 1:
                raise ValueError("its revoked.pem holds the lists of several authorities")
            entries |= {entry.serial_number: entry for entry in x509.load_pem_x509_crl(listed)}
        for certificate in revoked:
            serial = x509.load_pem_x509_certificate(certificate).serial_number
            new = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
            entries.setdefault(serial, new.build())
        for entry in entries.values():
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _issue(
        self,
        common_name: str,
        names: Iterable[x509.SubjectAlternativeName],
        purpose: x509.ObjectIdentifier,
        *,
        now: datetime,
        lifetime: timedelta,
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        # Nothing outlives the authority that signed it.
        left = self._certificate.not_valid_after_utc - now.astimezone(UTC)
        builder = _builder(
            subject, self._certificate.subject, key, now=now, lifetime=min(lifetime, left)
        )
        for name in names:
            builder = builder.add_extension(name, critical=False)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return Issued(_pem(certificate), _key_pem(key))


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    *,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
