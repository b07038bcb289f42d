"""X.509: site root, host issuing CA, host AK, and the certificates of vTPMs.

    site root CA ─┬─ host issuing CA (path length 0, names below O=<site>) ─┬─ EK, RSA-2048
                  └─ host AK                                                ├─ EK, P-256
                                                                            └─ evidence AK
EK certificates follow the TCG EK Credential Profile 2.5 (3.2): strict DER, TPM manufacturer, model
and version in a critical subjectAltName, tpmSpecification among the subject directory attributes,
EKU 2.23.133.8.1, and no end of validity, since they must outlive every move of their vTPM. They
say that their TPM is virtual twice: by the model, and by the extension
virtualPlatformAttestationService (2.23.133.6.4, TCG Virtualized Platform Architecture).

The issuing CA's names are constrained to O=<site>, and, as subtrees hold for the directory name in
the subjectAltName too (RFC 5280, 4.2.1.10), to TPMs of our make. OpenSSL enforces both; libraries
without subtrees of directory names (pyca/cryptography's verifier, Go) refuse such a chain.
Where the site names a place for it, they name the host CA's revocation list; nothing makes one.

Pure but for serial numbers. Not here: keys in TPMs (a key is anything that can sign).
"""

from __future__ import annotations

import datetime
import secrets
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

from holdfast.evidence.oids import EKU_AK, EKU_EK, OID_ACTIVATED_EK, OID_HOST_AK, OID_VIRTUAL
from holdfast.tpm2.certificates import CN_MAX, FOREVER, key_usage
from holdfast.tpm2.keys import public_key
from holdfast.tpm2.structures import Public

MANUFACTURER: Final = "id:484F4C44"  # "HOLD"; not in the TCG's vendor registry
MODEL: Final = "Holdfast vTPM"
VERSION: Final = "id:00010000"
CLOCK_SKEW: Final = datetime.timedelta(minutes=5)
CA_LIFETIME: Final = datetime.timedelta(days=3653)

_OID_MANUFACTURER: Final = ObjectIdentifier("2.23.133.2.1")
_OID_MODEL: Final = ObjectIdentifier("2.23.133.2.2")
_OID_VERSION: Final = ObjectIdentifier("2.23.133.2.3")
_OID_DIRECTORY_ATTRIBUTES: Final = ObjectIdentifier("2.5.29.9")
# SEQUENCE OF Attribute { 2.23.133.2.16, { TPMSpecification { "2.0", 0, 164 } } }
_SPECIFICATION: Final = bytes.fromhex("3019301706056781050210310e300c0c03322e30020100020200a4")

CaKey = ec.EllipticCurvePrivateKey


def _tpm_name(attributes: int = 3) -> x509.Name:
    """Manufacturer, model and version of our vTPMs: the first `attributes` of them."""
    values = ((_OID_MANUFACTURER, MANUFACTURER), (_OID_MODEL, MODEL), (_OID_VERSION, VERSION))
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in values[:attributes]])


def _named(site: str, common: str) -> x509.Name:
    return x509.Name([
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, site),
        x509.NameAttribute(NameOID.COMMON_NAME, common[:CN_MAX]),
    ])  # fmt: skip


def _serial() -> int:
    """A random positive number of exactly 16 octets."""
    return secrets.randbits(126) | 1 << 126


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    until: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(_serial())
        .not_valid_before((now - CLOCK_SKEW).replace(microsecond=0))
        .not_valid_after(until.replace(microsecond=0))
    )


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def site_root(site: str, key: CaKey, now: datetime.datetime) -> bytes:
    """The site's self-signed root (DER)."""
    name = _named(site, "Holdfast site root CA")
    public = key.public_key()
    builder = (
        _builder(name, name, public, now, now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    return _der(builder.sign(key, hashes.SHA256()))


def host_ca(
    site: str, host: str, ca: Public, ak: Public, root: bytes, root_key: CaKey,
    now: datetime.datetime,
) -> bytes:  # fmt: skip
    """The host's issuing CA (DER): it certifies vTPMs of this site and nothing else.

    It names the AK of its host, so that no other host can show one of its vTPMs as its own.
    """
    issuer = x509.load_der_x509_certificate(root)
    public = public_key(ca)
    site_names = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, site)])
    within = x509.NameConstraints(
        [x509.DirectoryName(site_names), x509.DirectoryName(_tpm_name(2))], None
    )
    builder = (
        _builder(
            _named(site, f"Holdfast issuing CA of {host}"),
            issuer.subject, public, now, issuer.not_valid_after_utc,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(within, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(_authority(issuer), critical=False)
        .add_extension(_holding(OID_HOST_AK, ak.name), critical=False)
    )  # fmt: skip
    return _der(builder.sign(root_key, hashes.SHA256()))


def host_ak(
    site: str, host: str, ak: Public, ek: Public, root: bytes, root_key: CaKey,
    now: datetime.datetime,
) -> bytes:  # fmt: skip
    """The host AK's certificate (DER), given after a credential was activated for `ek` and `ak`."""
    issuer = x509.load_der_x509_certificate(root)
    builder = _builder(
        _named(site, f"Holdfast host AK of {host}"),
        issuer.subject, public_key(ak), now, issuer.not_valid_after_utc,
    )  # fmt: skip
    activated = _holding(OID_ACTIVATED_EK, ek.name)
    builder = _attestation(builder, issuer).add_extension(activated, critical=False)
    return _der(builder.sign(root_key, hashes.SHA256()))


def _holding(oid: ObjectIdentifier, name: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(oid, _octets(name))


def vtpm_ek(
    subject: x509.Name, ek: Public, issuer: x509.Certificate, key: CaKey, service: str, crl: str,
    now: datetime.datetime,
) -> bytes:  # fmt: skip
    """An EK certificate (DER) for an RSA or ECC EK.

    `service`: URI of who attests its platform; `crl`: URI of the revocation list, or empty.
    """
    public = public_key(ek)
    is_rsa = isinstance(public, rsa.RSAPublicKey)
    tpm = x509.DirectoryName(_tpm_name())
    usage = key_usage(key_encipherment=is_rsa, key_agreement=not is_rsa)
    builder = (
        _builder(subject, issuer.subject, public, now, FOREVER)
        .add_extension(x509.SubjectAlternativeName([tpm]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([EKU_EK]), critical=False)
        .add_extension(
            x509.UnrecognizedExtension(_OID_DIRECTORY_ATTRIBUTES, _SPECIFICATION), critical=False
        )
        .add_extension(x509.UnrecognizedExtension(OID_VIRTUAL, _uri(service)), critical=False)
        .add_extension(_authority(issuer), critical=False)
    )
    return _der(_revocable(builder, crl).sign(key, hashes.SHA256()))


def vtpm_ak(
    subject: x509.Name, ak: Public, issuer: x509.Certificate, key: CaKey, crl: str,
    now: datetime.datetime,
) -> bytes:  # fmt: skip
    """The certificate (DER) of a vTPM's evidence AK, given after its credential was activated."""
    builder = _builder(subject, issuer.subject, public_key(ak), now, FOREVER)
    return _der(_revocable(_attestation(builder, issuer), crl).sign(key, hashes.SHA256()))


def vtpm_subject(site: str, name: str, instance: str) -> x509.Name:
    """CN `name:uuid`, so that a certificate tells whose vTPM it is.

    A common name has at most 64 characters: a longer name is cut, never the uuid.
    """
    return _named(site, f"{name[: CN_MAX - 1 - len(instance)]}:{instance}")


def _attestation(
    builder: x509.CertificateBuilder, issuer: x509.Certificate
) -> x509.CertificateBuilder:
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([EKU_AK]), critical=True)
        .add_extension(_authority(issuer), critical=False)
    )


def _revocable(builder: x509.CertificateBuilder, crl: str) -> x509.CertificateBuilder:
    if not crl:
        return builder
    place = x509.DistributionPoint([x509.UniformResourceIdentifier(crl)], None, None, None)
    return builder.add_extension(x509.CRLDistributionPoints([place]), critical=False)


def _authority(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _octets(data: bytes) -> bytes:
    """An OCTET STRING shorter than 128 bytes."""
    return b"\x04" + bytes((len(data),)) + data


def _uri(text: str) -> bytes:
    """A GeneralName of the form uniformResourceIdentifier, shorter than 128 bytes."""
    raw = text.encode("ascii")
    if len(raw) > 127:
        raise ValueError("a service URI has at most 127 characters")
    return b"\x86" + bytes((len(raw),)) + raw
