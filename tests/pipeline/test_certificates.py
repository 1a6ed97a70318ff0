"""Whom a client certificate is for, by certificates that another library made, and by many that ours did."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import SubjectAlternativeName
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from fmi_server.authority import Authority
from fmi_server.certificates import (
    CertificateFileError,
    RevocationList,
    UnusableCertificateError,
    read_authorities,
    read_client_certificate,
    read_revocations,
    read_server_pair,
)

NOW = datetime.now(UTC)
YEAR = timedelta(days=365)
KEY = ec.generate_private_key(ec.SECP256R1())
ROOT = Authority.create("authority", now=NOW, lifetime=10 * YEAR)
AUTHORITY = Authority(ROOT.certificate, ROOT.key)


def certificate(*, common=(), uris=(), hosts=(), mails=(), odd=None) -> bytes:
    """A certificate with the names that are given, signed by itself."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer")]))
        .public_key(KEY.public_key())
        .serial_number(4711)
        .not_valid_before(NOW)
        .not_valid_after(NOW + YEAR)
    )
    names = [
        *(x509.UniformResourceIdentifier(uri) for uri in uris),
        *(x509.DNSName(host) for host in hosts),
        *(x509.RFC822Name(mail) for mail in mails),
    ]
    extension = odd or (SubjectAlternativeName(names) if names else None)
    if extension is not None:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    ("names", "principal", "domain_ids"),
    [
        ({"common": ["site-1"]}, "site-1", {"site-1"}),
        ({"common": ["Klinik Süd"]}, "Klinik Süd", {"Klinik Süd"}),
        ({"common": ["x"], "hosts": ["site.example"]}, "site.example", {"site.example"}),
        (
            {"common": ["x"], "hosts": ["y"], "uris": ["spiffe://acme/site/7"]},
            "spiffe://acme/site/7",
            {"spiffe://acme/site/7"},
        ),
        ({"common": ["gate"], "uris": ["fmi://domain/a", "fmi://domain/b"]}, "gate", {"a", "b"}),
        ({"hosts": ["gate"], "uris": ["fmi://domain/ward%3A2"]}, "gate", {"ward:2"}),
        ({"uris": ["spiffe://acme/7", "fmi://domain/a"]}, "spiffe://acme/7", {"a"}),
        ({"common": ["site-1"], "mails": ["a@b.example"]}, "site-1", {"site-1"}),
    ],
)
def test_whom_it_is_for(names, principal, domain_ids):
    found = read_client_certificate(certificate(**names))
    assert (found.principal, found.domain_ids) == (principal, domain_ids)
    assert found.serial == 4711
    assert found.number == "1267"
    assert found.expires_at == int((NOW + YEAR).timestamp())


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"mails": ["a@b.example"]},
        {"uris": ["fmi://domain/a"]},
        {"common": ["a", "b"]},
        {"common": ["a"], "hosts": ["b", "c"]},
        {"uris": ["spiffe://x/1", "spiffe://x/2"], "common": ["a"]},
        {"common": ["*"]},
        {"common": ["a\nb"]},
    ],
)
def test_a_certificate_that_does_not_say_is_refused(names):
    with pytest.raises(UnusableCertificateError):
        read_client_certificate(certificate(**names))


@pytest.mark.parametrize(
    "names",
    [
        b"\x30\x04\xa3\x02\x30\x00",  # x400Address
        b"\x30\x06\xa5\x04\xa1\x02\x0c\x00",  # ediPartyName
        b"\x30\x08\x82\x06owne\xff\xfe",
        b"\x04\x01\x00",
    ],
)
def test_a_certificate_that_the_library_does_not_understand_is_refused(names):
    """An authority may sign names of kinds that the library knows of and does not read."""
    odd = x509.UnrecognizedExtension(SubjectAlternativeName.oid, names)
    with pytest.raises(UnusableCertificateError, match="cannot be read"):
        read_client_certificate(certificate(common=["a"], odd=odd))


def test_an_authority_on_the_way_may_be_revoked():
    root = trustme.CA()
    child = root.create_child_ca()
    leaf = child.issue_cert(common_name="site-1")
    pem, *shown = (blob.bytes() for blob in leaf.cert_chain_pems)
    found = read_client_certificate(pem, b"".join(shown))
    assert replace(found, shown=()) == read_client_certificate(pem)
    own = x509.load_pem_x509_certificate(child.cert_pem.bytes())
    revoked = RevocationList(frozenset({(own.issuer.public_bytes(), own.serial_number)}))
    assert found in revoked
    assert read_client_certificate(pem) not in revoked
    assert found not in RevocationList()


def test_an_authority_that_clients_are_checked_against_may_be_revoked(tmp_path):
    """A client need not show it then: what counts is that it stands among those that are known."""
    root = trustme.CA()
    child, sound = root.create_child_ca(), root.create_child_ca()
    signer = Authority(root.cert_pem.bytes(), root.private_key_pem.bytes())
    path, cas = tmp_path / "revoked.pem", tmp_path / "ca.pem"
    path.write_bytes(signer.revocations(revoked=[child.cert_pem.bytes()], now=NOW))
    cas.write_bytes(b"".join(ca.cert_pem.bytes() for ca in (root, child, sound)))
    _, authorities = read_authorities(cas)
    found = read_revocations(path, authorities)
    for ca, expected in ((child, True), (sound, False), (root, False)):
        pem = ca.issue_cert(common_name="site-1").cert_chain_pems[0].bytes()
        assert (read_client_certificate(pem) in found) == expected


@pytest.mark.parametrize(
    ("shown", "told"),
    [(b"garbage", "cannot be read"), (ROOT.certificate * 40, "bytes of authorities")],
)
def test_what_is_shown_with_a_certificate_is_bounded(shown, told):
    with pytest.raises(UnusableCertificateError, match=told):
        read_client_certificate(certificate(common=["a"]), shown)


@pytest.mark.parametrize("pem", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_what_is_no_certificate_is_refused(pem):
    with pytest.raises(UnusableCertificateError):
        read_client_certificate(pem)


def test_certificates_of_another_library_are_read_alike():
    issued = trustme.CA().issue_cert("site.example", common_name="ignored")
    found = read_client_certificate(issued.cert_chain_pems[0].bytes())
    assert found.principal == "site.example"


ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}", fullmatch=True)


@given(ids, st.lists(ids, max_size=4, unique=True))
@settings(max_examples=25, deadline=None)
def test_what_the_authority_issues_says_what_was_asked_for(name, domain_ids):
    issued = AUTHORITY.issue_client(name, domain_ids, now=NOW, lifetime=YEAR)
    found = read_client_certificate(issued.certificate)
    assert found.principal == name
    assert found.domain_ids == frozenset(domain_ids or [name])


def test_nothing_outlives_the_authority():
    brief = Authority.create("brief", now=NOW, lifetime=timedelta(days=1))
    issued = Authority(brief.certificate, brief.key).issue_client("a", now=NOW, lifetime=YEAR)
    found = read_client_certificate(issued.certificate)
    assert found.expires_at <= (NOW + timedelta(days=1)).timestamp()


# Revocation


def test_a_list_says_what_was_revoked_and_keeps_what_it_had(tmp_path):
    path, ca = tmp_path / "crl.pem", tmp_path / "ca.pem"
    ca.write_bytes(ROOT.certificate)
    _, authorities = read_authorities(ca)
    one, two, three = (AUTHORITY.issue_client(n, now=NOW, lifetime=YEAR) for n in "abc")
    first = AUTHORITY.revocations(revoked=[one.certificate], now=NOW)
    path.write_bytes(AUTHORITY.revocations(first, revoked=[two.certificate] * 2, now=NOW))
    found = read_revocations(path, authorities)
    assert read_client_certificate(one.certificate) in found
    assert read_client_certificate(two.certificate) in found
    assert read_client_certificate(three.certificate) not in found
    assert NOW.timestamp() < found.next_update < (NOW + 2 * YEAR).timestamp()


def test_the_number_of_another_authority_is_not_revoked(tmp_path):
    other = Authority.create("another", now=NOW, lifetime=YEAR)
    theirs = Authority(other.certificate, other.key)
    path, ca = tmp_path / "crl.pem", tmp_path / "ca.pem"
    ca.write_bytes(ROOT.certificate + other.certificate)
    _, authorities = read_authorities(ca)
    doomed = AUTHORITY.issue_client("a", now=NOW, lifetime=YEAR)
    # Both lists in one file.
    path.write_bytes(
        AUTHORITY.revocations(now=NOW) + theirs.revocations(revoked=[doomed.certificate], now=NOW)
    )
    assert read_client_certificate(doomed.certificate) not in read_revocations(path, authorities)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no certificate revocation list"),
        (b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "cannot be read"),
    ],
)
def test_a_list_that_is_none_is_told(tmp_path, content, told):
    path = tmp_path / "crl.pem"
    path.write_bytes(content)
    with pytest.raises(CertificateFileError, match=told):
        read_revocations(path, [])


# The server's


def pair(tmp_path, issued, other=None):
    cert, key = tmp_path / "server.crt", tmp_path / "server.key"
    cert.write_bytes(issued.certificate)
    key.write_bytes((other or issued).key)
    return cert, key


def test_a_server_pair_is_read(tmp_path):
    issued = AUTHORITY.issue_server(["localhost", "::1"], now=NOW, lifetime=YEAR)
    found = read_server_pair(*pair(tmp_path, issued), now=NOW.timestamp())
    assert (found.chain, found.key) == (issued.certificate, issued.key)
    assert "PRIVATE" not in repr(found)


def test_keys_of_other_kinds_do_too(tmp_path):
    for kind in (trustme.KeyType.RSA, trustme.KeyType.ECDSA):
        issued = trustme.CA(key_type=kind).issue_cert("localhost", key_type=kind)
        cert, key = tmp_path / "a.crt", tmp_path / "a.key"
        cert.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))
        key.write_bytes(issued.private_key_pem.bytes())
        read_server_pair(cert, key, now=NOW.timestamp())


def test_a_pair_that_cannot_be_used_is_told_without_the_key(tmp_path):
    good = AUTHORITY.issue_server(["localhost"], now=NOW, lifetime=YEAR)
    other = AUTHORITY.issue_server(["localhost"], now=NOW, lifetime=YEAR)
    past = AUTHORITY.issue_server(["localhost"], now=NOW - 2 * YEAR, lifetime=YEAR)
    future = AUTHORITY.issue_server(["localhost"], now=NOW + YEAR, lifetime=YEAR)
    for issued, key, told in (
        (good, other, "do not belong together"),
        (past, None, "expired at"),
        (future, None, "not valid before"),
    ):
        with pytest.raises(CertificateFileError, match=told):
            read_server_pair(*pair(tmp_path, issued, key), now=NOW.timestamp())
    cert, key_file = pair(tmp_path, good)
    locked = KEY.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )
    for content in (b"", b"garbage", good.certificate, locked):
        key_file.write_bytes(content)
        with pytest.raises(CertificateFileError, match="holds no private key"):
            read_server_pair(cert, key_file, now=NOW.timestamp())
    cert.write_bytes(b"garbage")
    with pytest.raises(CertificateFileError, match="holds no certificate"):
        read_server_pair(cert, key_file, now=NOW.timestamp())
