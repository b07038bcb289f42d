"""Certificates: who vouches for the host AK and for the vTPM's keys, up to a pinned site root.

    site root CA ─┬─ host AK                        host EK ── a vendor's CA that the policy names
                  └─ issuing CA ── EK RSA, EK ECC, AK of the vTPM

Every certificate is checked to the letter (RFC 5280, 6.1): signature, issuer, validity,
basicConstraints, keyUsage, extendedKeyUsage, name constraints, no unknown critical extension. An
error names the certificate. Revocation lists are not read: see docs/verification.md.

Not here: quotes, and whether a key's owner did anything.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA224
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID, NameOID, ObjectIdentifier

from holdfast.errors import IntegrityError, InvalidInput
from holdfast.evidence.bundle import Companions
from holdfast.evidence.oids import EKU_AK, EKU_EK, OID_ACTIVATED_EK, OID_HOST_AK, OID_VIRTUAL
from holdfast.ids import InstanceId, InstanceName, instance_id, instance_name
from holdfast.tpm2.keys import public_key
from holdfast.tpm2.structures import Public
from holdfast.tpm2.templates import AK_P256, EK_P256, EK_RSA2048

CERTIFIED_NAME_MAX: Final = 27  # of an instance's name: a common name has 64, `:uuid` takes 37
_CONSTRAINED: Final = (x509.DirectoryName, x509.DNSName, x509.IPAddress)
_UNDERSTOOD: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)
_COORDINATE: Final = 32  # bytes of a P-256 coordinate; the AK's template has none
_WEAK: Final = (SHA1, SHA224)
_RSA_BITS_MIN: Final = 2048
_X509_ERRORS: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
    CryptographyDeprecationWarning,  # not strict DER; an exception only where warnings are errors
)


@dataclass(frozen=True)
class Identity:
    """What the certificates establish: site, host, and whose vTPM it is.

    `name` has at most CERTIFIED_NAME_MAX characters of the instance's.
    """

    root_fingerprint: bytes
    site: str
    host_ak: Public
    ak: Public
    ek_rsa: Public
    ek_ecc: Public
    instance: InstanceId
    name: InstanceName
    activated_ek: bytes | None  # Name of the host EK that the site root tied to the host AK


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Name the certificate in whatever goes wrong with it."""
    try:
        yield
    except InvalidSignature:
        raise IntegrityError(f"{what}: its signature is not its issuer's") from None
    except (*_X509_ERRORS, InvalidInput) as error:
        why = str(error) or type(error).__name__
        raise IntegrityError(f"{what}: {why}") from None


def check_identity(
    companions: Companions, pinned: frozenset[bytes], now: datetime.datetime
) -> Identity:
    """All certificates of the site; IntegrityError names the one that does not hold, and why.

    `pinned` are SHA-256 fingerprints of site roots. The host EK's is `check_host_ek`.
    """
    root = _load("the site root's certificate", companions.root_certificate)
    _check_root(root, pinned, now)
    host = _load("the host AK's certificate", companions.host_ak_certificate)
    _check_issued(host, root, now)
    _check_attestation(host)
    _check_key(host, host_ak := Public.decode(companions.host_ak))
    _check_template(host.what, host_ak, AK_P256)
    issuing = _load("the issuing CA's certificate", companions.ca_certificate)
    _check_issued(issuing, root, now)
    constraints = _check_ca(issuing)
    if _name_held(issuing, OID_HOST_AK) != host_ak.name:
        raise IntegrityError(f"{issuing.what}: is not of the host whose AK has quoted")
    ak = Public.decode(companions.ak)
    ek_rsa, ek_ecc = Public.decode(companions.ek_rsa), Public.decode(companions.ek_ecc)
    subjects = set()
    for what, data, public, template in (
        ("the vTPM's RSA EK certificate", companions.ek_rsa_certificate, ek_rsa, EK_RSA2048),
        ("the vTPM's ECC EK certificate", companions.ek_ecc_certificate, ek_ecc, EK_P256),
        ("the vTPM's AK certificate", companions.ak_certificate, ak, AK_P256),
    ):
        certificate = _load(what, data)
        _check_issued(certificate, issuing, now)
        _check_attestation(certificate) if template is AK_P256 else _check_ek(certificate)
        _check_names(certificate, constraints, root.x509.subject)
        _check_key(certificate, public)
        _check_template(what, public, template)
        subjects.add(certificate.x509.subject)
    if len(subjects) != 1:
        raise IntegrityError("the vTPM's certificates are not all of one vTPM")
    instance, name = _named(subjects.pop())
    return Identity(
        root.fingerprint, _site(root), host_ak, ak, ek_rsa, ek_ecc, instance, name,
        _name_held(host, OID_ACTIVATED_EK),
    )  # fmt: skip


def check_host_ek(
    companions: Companions,
    identity: Identity,
    anchors: Sequence[x509.Certificate],
    now: datetime.datetime,
) -> str:
    """The subject of the CA that issued the host EK's certificate, one of `anchors`.

    IntegrityError unless that certificate is an EK certificate for the EK which the site root tied
    to the host AK.
    """
    what = "the host EK's certificate"
    if not companions.host_ek_certificate or not companions.host_ek:
        raise IntegrityError(f"{what}: there is none")
    public = Public.decode(companions.host_ek)
    if identity.activated_ek is None:
        raise IntegrityError("the host AK's certificate: does not say which EK it was activated by")
    if identity.activated_ek != public.name:
        raise IntegrityError(f"{what}: is not of the EK that the host AK was activated by")
    certificate = _load(what, companions.host_ek_certificate)
    _check_validity(certificate, now)
    _check_key(certificate, public)
    with _about(what):
        usages = certificate.x509.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        if EKU_EK not in usages:
            raise IntegrityError(f"{what}: is not for an endorsement key")
        _check_end_entity(certificate)
        for anchor in anchors:
            if anchor.subject == certificate.x509.issuer:
                certificate.x509.verify_directly_issued_by(anchor)
                return anchor.subject.rfc4514_string()
        issuer = certificate.x509.issuer.rfc4514_string()
    raise IntegrityError(f"{what}: its issuer {issuer} is not among the policy's EK roots")


@dataclass(frozen=True)
class _Certificate:
    """A parsed certificate, and what it is called in errors."""

    what: str
    x509: x509.Certificate
    fingerprint: bytes


def fingerprint(data: bytes) -> bytes:
    """SHA-256 of a certificate's DER."""
    return hashlib.sha256(data).digest()


def _load(what: str, data: bytes) -> _Certificate:
    with _about(what):
        certificate = x509.load_der_x509_certificate(data)
        key = certificate.public_key()
        algorithm = certificate.signature_hash_algorithm
        critical = {e.oid for e in certificate.extensions if e.critical} - _UNDERSTOOD
    if algorithm is None or isinstance(algorithm, _WEAK):
        raise IntegrityError(f"{what}: is signed with a hash that is not accepted")
    if certificate.serial_number <= 0:
        raise IntegrityError(f"{what}: its serial number is not positive")
    if critical:
        oid = min(oid.dotted_string for oid in critical)
        raise IntegrityError(f"{what}: has a critical extension {oid}, unknown to us")
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _RSA_BITS_MIN:
        raise IntegrityError(f"{what}: has an RSA key of {key.key_size} bits")
    return _Certificate(what, certificate, fingerprint(data))


def _check_root(root: _Certificate, pinned: frozenset[bytes], now: datetime.datetime) -> None:
    if root.fingerprint not in pinned:
        raise IntegrityError(f"{root.what}: sha256:{root.fingerprint.hex()} is not pinned")
    _check_issued(root, root, now)
    length = _check_authority(root)
    if length is not None and length < 1:
        raise IntegrityError(f"{root.what}: must not issue CA certificates")


def _check_issued(certificate: _Certificate, issuer: _Certificate, now: datetime.datetime) -> None:
    _check_validity(certificate, now)
    with _about(certificate.what):
        certificate.x509.verify_directly_issued_by(issuer.x509)


def _check_validity(certificate: _Certificate, now: datetime.datetime) -> None:
    with _about(certificate.what):
        start, end = certificate.x509.not_valid_before_utc, certificate.x509.not_valid_after_utc
    if now < start:
        raise IntegrityError(f"{certificate.what}: is not valid before {start.isoformat()}")
    if now > end:
        raise IntegrityError(f"{certificate.what}: has expired on {end.isoformat()}")


def _check_authority(certificate: _Certificate) -> int | None:
    """The path length of a CA's certificate; refuses one that is not a CA's."""
    with _about(certificate.what):
        extensions = certificate.x509.extensions
        basic = extensions.get_extension_for_class(x509.BasicConstraints)
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    if not (basic.critical and basic.value.ca and usage.key_cert_sign):
        raise IntegrityError(f"{certificate.what}: is not a CA's")
    return basic.value.path_length


def _check_ca(issuing: _Certificate) -> x509.NameConstraints:
    """An issuing CA's certificate: it makes no other CA, and there are names it may not certify."""
    if _check_authority(issuing) != 0:
        raise IntegrityError(f"{issuing.what}: may issue CA certificates")
    with _about(issuing.what):
        constraints = issuing.x509.extensions.get_extension_for_class(x509.NameConstraints)
    value = constraints.value
    if not constraints.critical:
        raise IntegrityError(f"{issuing.what}: its name constraints are not critical")
    for tree in (*(value.permitted_subtrees or ()), *(value.excluded_subtrees or ())):
        if not isinstance(tree, _CONSTRAINED):
            raise IntegrityError(f"{issuing.what}: constrains names of a kind unknown to us")
    return value


def _check_names(
    certificate: _Certificate, constraints: x509.NameConstraints, site: x509.Name
) -> None:
    """Name constraints (RFC 5280, 4.2.1.10), and the site's own name in the subject.

    A vTPM's certificate has directory names alone, so constraints of other kinds always hold.
    """
    subject = certificate.x509.subject
    names = [subject]
    with _about(certificate.what):
        for extension in certificate.x509.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                for general in extension.value:
                    if not isinstance(general, x509.DirectoryName):
                        raise IntegrityError(f"{certificate.what}: has an alternative name")
                    names.append(general.value)
    permitted = _directory_names(constraints.permitted_subtrees)
    excluded = _directory_names(constraints.excluded_subtrees)
    for name in names:
        within = not permitted or any(_is_below(name, tree) for tree in permitted)
        if not within or any(_is_below(name, tree) for tree in excluded):
            raise IntegrityError(
                f"{certificate.what}: {name.rfc4514_string()} is not a name its issuer may certify"
            )
    if _organizations(subject) != _organizations(site):
        raise IntegrityError(f"{certificate.what}: is not of the site that its root names")


def _directory_names(trees: Iterable[x509.GeneralName] | None) -> list[x509.Name]:
    return [tree.value for tree in trees or () if isinstance(tree, x509.DirectoryName)]


def _is_below(name: x509.Name, tree: x509.Name) -> bool:
    return list(name.rdns)[: len(tree.rdns)] == list(tree.rdns)


def _organizations(name: x509.Name) -> list[str | bytes]:
    return [a.value for a in name.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]


def _check_end_entity(certificate: _Certificate) -> None:
    for extension in certificate.x509.extensions:
        if isinstance(extension.value, x509.BasicConstraints) and extension.value.ca:
            raise IntegrityError(f"{certificate.what}: is a CA's")


def _check_attestation(certificate: _Certificate) -> None:
    """An AK's certificate: for signatures, and for TPM attestation alone."""
    with _about(certificate.what):
        extensions = certificate.x509.extensions
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        _check_end_entity(certificate)
    if not usage.digital_signature or usage.key_cert_sign:
        raise IntegrityError(f"{certificate.what}: is not for signatures alone")
    if not extended.critical or list(extended.value) != [EKU_AK]:
        raise IntegrityError(f"{certificate.what}: is not an attestation key's")


def _check_ek(certificate: _Certificate) -> None:
    """A vTPM's EK certificate: for an endorsement key, and marked as virtual."""
    with _about(certificate.what):
        extensions = certificate.x509.extensions
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        _check_end_entity(certificate)
        virtual = any(extension.oid == OID_VIRTUAL for extension in extensions)
    if usage.key_cert_sign or usage.digital_signature or list(extended) != [EKU_EK]:
        raise IntegrityError(f"{certificate.what}: is not an endorsement key's")
    if not virtual:
        raise IntegrityError(f"{certificate.what}: does not say that its TPM is virtual")


def _check_key(certificate: _Certificate, public: Public) -> None:
    with _about(certificate.what):
        certified = certificate.x509.public_key()
    key = public_key(public)
    if not isinstance(certified, (rsa.RSAPublicKey, ec.EllipticCurvePublicKey)):
        raise IntegrityError(f"{certificate.what}: its key is neither RSA nor ECC")
    if certified != key:
        raise IntegrityError(f"{certificate.what}: certifies another key than the public area's")


def _check_template(what: str, public: Public, template: Public) -> None:
    """A certificate is for a key; that the rest of a public area is its template's makes it the
    key's one Name, and its attributes more than the host's word."""
    sizes = zip(public.unique, template.unique, strict=True)
    if replace(public, unique=template.unique) != template:
        raise IntegrityError(f"{what}: its key's public area does not follow the template")
    if any(len(part) > max(len(model), _COORDINATE) for part, model in sizes):
        raise IntegrityError(f"{what}: its key's public area is padded")


def _named(subject: x509.Name) -> tuple[InstanceId, InstanceName]:
    """CN `name:uuid`. A name may itself have colons; a long one is cut (`CERTIFIED_NAME_MAX`)."""
    what = "the vTPM's certificates"
    with _about(what):
        (attribute,) = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name, colon, uuid = str(attribute.value).rpartition(":")
        if not colon:
            raise ValueError("their common name is not name:uuid")
        named = instance_id(uuid), instance_name(name)
    return named


def _site(root: _Certificate) -> str:
    with _about(root.what):
        names = root.x509.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(names[0].value) if names else ""


def _name_held(certificate: _Certificate, oid: ObjectIdentifier) -> bytes | None:
    """A key's Name in an OCTET STRING of at most 66 bytes, so with a length of one byte."""
    with _about(certificate.what):
        extensions = certificate.x509.extensions
    for extension in extensions:
        if extension.oid == oid:
            assert isinstance(extension.value, x509.UnrecognizedExtension)
            data = extension.value.value
            if len(data) < 4 or data[0] != 4 or data[1] != len(data) - 2 or data[1] > 66:
                raise IntegrityError(f"{certificate.what}: its extension for a key is malformed")
            return data[2:]
    return None
