"""Certificates as foreign verifiers see them: the openssl program, cryptography, tpm2-tools."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier

from holdfast.evidence.oids import EKU_AK, EKU_EK, OID_VIRTUAL
from holdfast.hwtpm.anchor import Chain
from holdfast.keeper import vault
from holdfast.keeper.custody import Custody
from holdfast.tpm2.certificates import CN_MAX
from holdfast.tpm2.keys import public_key
from holdfast.tpm2.structures import Public

from .box import CRL, SITE, Box, Guest

TPM_ATTRIBUTES = {
    "2.23.133.2.1": "id:484F4C44",
    "2.23.133.2.2": "Holdfast vTPM",
    "2.23.133.2.3": "id:00010000",
}
NV_SIZE_MAX = 2048  # a certificate must fit into one NV index
# SEQUENCE OF { 2.23.133.2.16, { "2.0", 0, 164 } }, written out by `openssl asn1parse -genconf`.
SPECIFICATION = "3019301706056781050210310e300c0c03322e30020100020200a4"


class Enrolled(NamedTuple):
    """A vTPM's certificates (DER)."""

    ek_rsa: bytes
    ek_ecc: bytes
    ak: bytes
    chain: tuple[bytes, ...]


def enrol(custody: Custody, guest: Guest, name: str = "web") -> Enrolled:
    custody.enrol(guest.activate(custody.challenge(guest.keys())))
    certified = [custody.certify(wish) for wish in guest.wishes(name)]
    rsa, ecc, ak = (each.certificate for each in certified)
    return Enrolled(rsa, ecc, ak, certified[0].chain)


@pytest.fixture
def enrolled(box: Box, guest: Guest) -> Enrolled:
    custody = box.custody()
    try:
        return enrol(custody, guest)
    finally:
        custody.close()


def pem(der: bytes, path: Path) -> str:
    path.write_bytes(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM))
    return str(path)


def openssl_verify(root: str, leaf: str, *options: str) -> subprocess.CompletedProcess[str]:
    # What OpenSSL does not know among the critical extensions it would refuse: there is none.
    return subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", root, *options, leaf],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_openssl_accepts_the_whole_chain(box: Box, enrolled: Enrolled, tmp_path: Path) -> None:
    ca = pem(enrolled.chain[0], tmp_path / "ca")
    root = pem(enrolled.chain[1], tmp_path / "root")
    assert Path(root).read_bytes() == (box.out / "site-root-ca.pem").read_bytes()
    for name, der in (("rsa", enrolled.ek_rsa), ("ecc", enrolled.ek_ecc), ("ak", enrolled.ak)):
        done = openssl_verify(root, pem(der, tmp_path / name), "-untrusted", ca)
        assert done.returncode == 0, (name, done.stderr)
    made = vault.load(box.keeper)
    done = openssl_verify(root, pem(made.ak_certificate, tmp_path / "host-ak"))
    assert done.returncode == 0, done.stderr


def test_pyca_accepts_every_signature_in_the_chain(enrolled: Enrolled) -> None:
    ca, root = map(x509.load_der_x509_certificate, enrolled.chain)
    ca.verify_directly_issued_by(root)
    for der in (enrolled.ek_rsa, enrolled.ek_ecc, enrolled.ak):
        x509.load_der_x509_certificate(der).verify_directly_issued_by(ca)


@pytest.mark.parametrize(
    ("site", "maker"), [("Another site", "id:484F4C44"), (SITE, "id:494E5443")]
)
def test_host_ca_cannot_certify_for_another_site_or_another_maker(
    box: Box, tmp_path: Path, site: str, maker: str
) -> None:
    """What somebody who has taken the host over could have its CA key sign."""
    made = vault.load(box.keeper)
    ca = x509.load_der_x509_certificate(made.ca_certificate)
    now = datetime.datetime.now(datetime.UTC)
    tpm = x509.Name([x509.NameAttribute(ObjectIdentifier("2.23.133.2.1"), maker)])
    custody = box.custody()
    try:
        forged = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, site)]))
            .issuer_name(ca.subject)
            .public_key(ca.public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.DirectoryName(tpm)]), critical=True)
            .sign(custody._ca_key, hashes.SHA256())
        )
    finally:
        custody.close()
    issuer = pem(made.ca_certificate, tmp_path / "ca")
    leaf = pem(forged.public_bytes(Encoding.DER), tmp_path / "leaf")
    done = subprocess.run(
        ["openssl", "verify", "-CAfile", str(box.out / "site-root-ca.pem"), "-untrusted", issuer,
         leaf],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "permitted subtree violation" in done.stderr


def test_ek_certificates_follow_the_profile(enrolled: Enrolled, guest: Guest) -> None:
    issuer = x509.load_der_x509_certificate(enrolled.chain[0])
    for der, key, bit in (
        (enrolled.ek_rsa, guest.ek_rsa, "key_encipherment"),
        (enrolled.ek_ecc, guest.ek_ecc, "key_agreement"),
    ):
        certificate = x509.load_der_x509_certificate(der)
        assert len(der) <= NV_SIZE_MAX
        assert certificate.public_bytes(Encoding.DER) == der
        assert certificate.issuer == issuer.subject
        assert certificate.serial_number.bit_length() in range(121, 128)  # 16 octets, positive
        assert certificate.not_valid_after_utc.year == 9999
        assert certificate.public_key().public_bytes(
            Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        ) == public_key(key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert [
            name for name in (
                "digital_signature", "content_commitment", "key_encipherment",
                "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
            ) if getattr(usage.value, name)
        ] == [bit]  # fmt: skip
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert not constraints.value.ca
        purpose = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(purpose) == [EKU_EK]
        issuer_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        authority = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
        assert authority.value.key_identifier == issuer_key.digest


def test_ek_certificate_names_the_tpm_and_says_it_is_virtual(box: Box, enrolled: Enrolled) -> None:
    for der in (enrolled.ek_rsa, enrolled.ek_ecc):
        extensions = x509.load_der_x509_certificate(der).extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert names.critical
        (directory,) = names.value.get_values_for_type(x509.DirectoryName)
        assert {a.oid.dotted_string: a.value for a in directory} == TPM_ATTRIBUTES
        raw = extensions.get_extension_for_oid(ObjectIdentifier("2.5.29.9")).value
        assert raw.public_bytes().hex() == SPECIFICATION
        virtual = extensions.get_extension_for_oid(OID_VIRTUAL)
        assert not virtual.critical
        assert vault.load(box.keeper).service.encode() in virtual.value.public_bytes()


def test_subject_is_name_and_uuid_and_a_long_name_is_cut_not_the_uuid(
    box: Box, guest: Guest
) -> None:
    custody = box.custody()
    try:
        for name in ("web", "n" * 63):
            enrolled = enrol(custody, guest, name)
            for der in (enrolled.ek_rsa, enrolled.ek_ecc, enrolled.ak):
                subject = x509.load_der_x509_certificate(der).subject
                (common,) = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
                assert str(common.value).endswith(f":{guest.id}")
                assert str(common.value) == f"{name[:27]}:{guest.id}"
                assert len(common.value) <= CN_MAX
                (site,) = subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
                assert site.value == SITE
    finally:
        custody.close()


def test_ak_certificate_is_for_attestation_alone(enrolled: Enrolled, guest: Guest) -> None:
    certificate = x509.load_der_x509_certificate(enrolled.ak)
    assert len(enrolled.ak) <= NV_SIZE_MAX
    purpose = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purpose) == [EKU_AK]
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert certificate.public_key() == public_key(guest.ak)


def test_the_place_of_a_revocation_list_is_named(enrolled: Enrolled) -> None:
    ek = x509.load_der_x509_certificate(enrolled.ek_rsa)
    places = ek.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    assert [name.value for place in places for name in place.full_name or ()] == [CRL]


def test_without_a_place_there_is_no_distribution_point(box: Box, guest: Guest) -> None:
    custody = box.custody()
    try:
        object.__setattr__(custody._made, "crl", "")
        enrolled = enrol(custody, guest)
    finally:
        custody.close()
    extensions = x509.load_der_x509_certificate(enrolled.ek_rsa).extensions
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.CRLDistributionPoints)


def test_tpm2_checkquote_accepts_the_host_quote(box: Box, tmp_path: Path) -> None:
    box.swtpm.extend(11)
    tree_size, root = 5, b"r" * 32
    custody = box.custody()
    try:
        custody.chains.extend(Chain.HYBRID, bytes(32))
        value = custody.chains.read().hybrid
        assert value is not None
        quote = custody.quote_round(tree_size, root, value)
    finally:
        custody.close()
    tagged = b"holdfast/round/1" + b"\x00\x0b" + tree_size.to_bytes(8, "big") + root
    ak = Public.decode(vault.load(box.keeper).ak.public)
    key, message, signature = tmp_path / "ak.pem", tmp_path / "attest", tmp_path / "signature"
    key.write_bytes(public_key(ak).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    message.write_bytes(quote.attest)
    signature.write_bytes(quote.signature)
    check = ["tpm2_checkquote", "-u", str(key), "-m", str(message), "-s", str(signature)]
    check += ["-g", "sha256", "-q", hashlib.sha256(tagged).hexdigest()]
    box.swtpm.tool(*check)
    with pytest.raises(AssertionError):
        box.swtpm.tool(*check[:-1], hashlib.sha256(b"other").hexdigest())
    assert [value.pcr for value in quote.pcrs] == list(range(24))
