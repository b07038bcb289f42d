"""X.509 as swtpm_localca and swtpm_cert write it: a CA of two steps, EK and platform certificates.

    swtpm-localca-rootca ── swtpm-localca ─┬─ endorsement keys (EKU 2.23.133.8.1)
                                           └─ platforms (EKU 2.23.133.8.2)

Extensions have their order and content, so that who was content with those is with ours. Neither
CA's nor TPM's certificates end (RFC 5280, 4.1.2.5), and no revocation list is named.

Pure but for the CAs' random serial numbers.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

from holdfast.errors import HostError, InvalidInput
from holdfast.swtpm.setup.manufacture import Facts
from holdfast.tpm2.certificates import CN_MAX, FOREVER, key_usage
from holdfast.tpm2.constants import ObjectAttr
from holdfast.tpm2.keys import public_key
from holdfast.tpm2.structures import Public

ROOT_NAME: Final = "swtpm-localca-rootca"
ISSUER_NAME: Final = "swtpm-localca"
_TAIL: Final = 37  # of a name that is cut: ":" and a uuid, as libvirt ends it
_EKU_EK: Final = ObjectIdentifier("2.23.133.8.1")
_EKU_PLATFORM: Final = ObjectIdentifier("2.23.133.8.2")
_OIDS_TPM: Final = tuple(ObjectIdentifier(f"2.23.133.2.{n}") for n in (1, 2, 3))
_OIDS_PLATFORM: Final = tuple(ObjectIdentifier(f"2.23.133.5.1.{n}") for n in (1, 4, 5))
_OID_DIRECTORY_ATTRIBUTES: Final = ObjectIdentifier("2.5.29.9")
_DER_TPM_SPECIFICATION: Final = bytes.fromhex("06056781050210")  # 2.23.133.2.16

SigningKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Platform:
    """What a platform certificate says of the machine."""

    manufacturer: str = "Fedora"
    model: str = "QEMU"
    version: str = "2.1"


def common_name(vmid: str | None) -> str:
    """Of a VM's certificates. InvalidInput if it cannot be one.

    `,` and `+` become `_`, as swtpm_localca has it; of what is too long the middle goes, so that
    a uuid at the end stays.
    """
    if vmid is None:
        return "unknown"
    name = vmid.translate({ord(","): "_", ord("+"): "_"}).strip()
    if not name or not name.isprintable():
        raise InvalidInput(f"--vmid {vmid!r} cannot be the name in a certificate")
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"--vmid {vmid!r} is not text") from None
    if len(raw) <= CN_MAX:
        return name
    return (raw[: CN_MAX - _TAIL] + raw[-_TAIL:]).decode(errors="ignore")


def root(key: SigningKey, now: datetime.datetime) -> x509.Certificate:
    """The self-signed root."""
    return _authority(ROOT_NAME, key.public_key(), key, None, now)


def intermediate(
    key: SigningKey, issuer: x509.Certificate, issuer_key: SigningKey, now: datetime.datetime
) -> x509.Certificate:
    """The CA that signs for TPMs, by the root."""
    return _authority(ISSUER_NAME, key.public_key(), issuer_key, issuer, now)


def endorsement(
    ek: Public, name: str, facts: Facts, serial: int,
    issuer: x509.Certificate, key: SigningKey, now: datetime.datetime,
) -> bytes:  # fmt: skip
    """An EK's certificate (DER)."""
    signs, decrypts = ObjectAttr.SIGN in ek.attributes, ObjectAttr.DECRYPT in ek.attributes
    values = (facts.manufacturer, facts.model, facts.version)
    builder = (
        _builder(_named(name), issuer.subject, public_key(ek), serial, now)
        .add_extension(x509.ExtendedKeyUsage([_EKU_EK]), critical=False)
        .add_extension(_directory(_OIDS_TPM, values), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_specification(facts), critical=False)
        .add_extension(_authority_identifier(issuer), critical=False)
        .add_extension(_key_usage(ek, signs=signs, decrypts=decrypts), critical=True)
    )
    return _signed(builder, issuer, key)


def platform(
    ek: Public, name: str, machine: Platform, serial: int,
    issuer: x509.Certificate, key: SigningKey, now: datetime.datetime,
) -> bytes:  # fmt: skip
    """A platform's certificate (DER), over the endorsement key of its TPM."""
    values = (machine.manufacturer, machine.model, machine.version)
    builder = (
        _builder(_named(name), issuer.subject, public_key(ek), serial, now)
        .add_extension(_directory(_OIDS_PLATFORM, values), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_authority_identifier(issuer), critical=False)
        .add_extension(_key_usage(ek, signs=False, decrypts=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_EKU_PLATFORM]), critical=False)
    )
    return _signed(builder, issuer, key)


def check_key(certificate: bytes, ek: Public, who: str) -> None:
    """HostError unless this is a certificate (DER) of that key; `who` made it."""
    try:
        certified = x509.load_der_x509_certificate(certificate).public_key()
    except ValueError as error:
        raise HostError(f"{who} made no certificate: {error}") from None
    if certified != public_key(ek):
        raise HostError(f"{who} made a certificate of another key than the EK's")


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name,
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, serial: int, now: datetime.datetime,
) -> x509.CertificateBuilder:  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(now.replace(microsecond=0))
        .not_valid_after(FOREVER)
    )


def _authority(
    name: str, key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, signer: SigningKey,
    issuer: x509.Certificate | None, now: datetime.datetime,
) -> x509.Certificate:  # fmt: skip
    subject = _named(name)
    above = subject if issuer is None else issuer.subject
    builder = (
        _builder(subject, above, key, x509.random_serial_number(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(key_usage(key_cert_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    if issuer is not None:
        builder = builder.add_extension(_authority_identifier(issuer), critical=False)
    return builder.sign(signer, hashes.SHA256())


def _signed(builder: x509.CertificateBuilder, issuer: x509.Certificate, key: SigningKey) -> bytes:
    """Signed and looked over: the CA's key was loaded without a proof that it is one."""
    certificate = builder.sign(key, hashes.SHA256())
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        raise HostError("the local CA's signing key is not its issuer certificate's") from None
    return certificate.public_bytes(serialization.Encoding.DER)


def _authority_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except (x509.ExtensionNotFound, ValueError):
        raise HostError("the local CA's issuer certificate has no subjectKeyIdentifier") from None
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _directory(
    oids: tuple[ObjectIdentifier, ...], values: tuple[str, str, str]
) -> x509.SubjectAlternativeName:
    name = x509.Name(
        [x509.NameAttribute(oid, value) for oid, value in zip(oids, values, strict=True)]
    )
    return x509.SubjectAlternativeName([x509.DirectoryName(name)])


def _key_usage(ek: Public, *, signs: bool, decrypts: bool) -> x509.KeyUsage:
    is_rsa = isinstance(public_key(ek), rsa.RSAPublicKey)
    return key_usage(
        digital_signature=signs,
        key_encipherment=decrypts and is_rsa,
        key_agreement=decrypts and not is_rsa,
    )


def _specification(facts: Facts) -> x509.UnrecognizedExtension:
    """subjectDirectoryAttributes with TPMSpecification (TCG EK Credential Profile 2.5, 3.1.3)."""
    value = _der(0x0C, facts.family.encode()) + _integer(facts.level) + _integer(facts.revision)
    attribute = _DER_TPM_SPECIFICATION + _der(0x31, _der(0x30, value))
    return x509.UnrecognizedExtension(_OID_DIRECTORY_ATTRIBUTES, _der(0x30, _der(0x30, attribute)))


def _integer(number: int) -> bytes:
    return _der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _der(tag: int, content: bytes) -> bytes:
    if len(content) > 127:
        raise HostError("libtpms names a specification that is too long")
    return bytes((tag, len(content))) + content
