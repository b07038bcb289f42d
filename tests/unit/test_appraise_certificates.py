"""Certificates, one wrong detail at a time: as the site's or the host's own key could sign them."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.appraise.verifier import appraise
from holdfast.errors import AppraisalError
from holdfast.evidence.bundle import Companions
from holdfast.evidence.oids import OID_ACTIVATED_EK
from tests.unit.evidence_maker import (
    AUDIENCE,
    NONCE,
    NOW,
    USER_DATA,
    Given,
    HardwareMaker,
    Host,
    Site,
    Vtpm,
    make,
    policy_for,
)

VENDOR = HardwareMaker()
SITE = Site()
HOST = Host(SITE, ek=VENDOR.ek.public.encode(), ek_certificate=VENDOR.certificate)
WEB = Vtpm(HOST)
POLICY = policy_for(HOST)
HARDWARE = replace(
    POLICY, trust=replace(POLICY.trust, software_host_tpm=frozenset(), ek_roots=(VENDOR.anchor,))
)
Extensions = list[tuple[x509.ExtensionType, bool]]
Edit = Callable[[Extensions], object]


def resigned(data: bytes, key: ec.EllipticCurvePrivateKey, edit: Edit, **changed: Any) -> bytes:
    """The certificate with its extensions edited, signed by `key` again."""
    old = x509.load_der_x509_certificate(data)
    extensions: Extensions = [(e.value, e.critical) for e in old.extensions]
    edit(extensions)
    builder = (
        x509.CertificateBuilder()
        .subject_name(changed.get("subject", old.subject))
        .issuer_name(old.issuer)
        .public_key(changed.get("public", old.public_key()))
        .serial_number(old.serial_number)
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(changed.get("until", old.not_valid_after_utc))
    )
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    signed = builder.sign(key, changed.get("hash", hashes.SHA256()))
    return signed.public_bytes(serialization.Encoding.DER)


def without(kind: type[x509.ExtensionType]) -> Edit:
    return lambda es: es.remove(next(e for e in es if isinstance(e[0], kind)))


def drop(extensions: Extensions, oid: str) -> None:
    extensions[:] = [e for e in extensions if e[0].oid.dotted_string != oid]


def instead(value: x509.ExtensionType, critical: bool = True) -> Edit:
    def edit(extensions: Extensions) -> None:
        extensions[:] = [e for e in extensions if e[0].oid != value.oid]
        extensions.append((value, critical))

    return edit


def refused(what: str, why: str, **companions: bytes) -> None:
    evidence = make(Given(WEB, companions=companions))
    with pytest.raises(AppraisalError) as caught:
        appraise(evidence.encode_cbor(), POLICY, NONCE, AUDIENCE, USER_DATA, NOW)
    assert caught.value.step == "identity", str(caught.value)
    assert what in caught.value.why, str(caught.value)
    assert why in caught.value.why, str(caught.value)


def unlimited(*, permitted: Any = None, excluded: Any = None) -> x509.NameConstraints:
    return x509.NameConstraints(permitted, excluded)


def directory(**names: str) -> x509.DirectoryName:
    oids = {"o": x509.NameOID.ORGANIZATION_NAME, "cn": x509.NameOID.COMMON_NAME}
    return x509.DirectoryName(x509.Name([x509.NameAttribute(oids[k], v) for k, v in names.items()]))


NO_SIGNING = x509.KeyUsage(False, False, False, False, False, False, True, False, False)
CA = x509.BasicConstraints(ca=True, path_length=None)
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.25.1"), b"\x05\x00")
TPM_EK = x509.ObjectIdentifier("2.23.133.8.1")
MACHINE = x509.SubjectAlternativeName([x509.DNSName("bank.example")])


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (without(x509.NameConstraints), "NameConstraints"),
        (instead(unlimited(excluded=[x509.DNSName("")]), critical=False), "not critical"),
        (instead(unlimited(excluded=[x509.RFC822Name("a@b")])), "unknown to us"),
        (instead(unlimited(permitted=[directory(o="Other")])), "may certify"),
        (instead(unlimited(excluded=[directory(o="Example")])), "may certify"),
        (instead(CA), "may issue CA certificates"),
        (instead(CA, critical=False), "not a CA's"),
        (instead(x509.BasicConstraints(ca=False, path_length=None)), "not a CA's"),
        (instead(NO_SIGNING), "not a CA's"),
        (without(x509.KeyUsage), "KeyUsage"),
        (instead(UNKNOWN), "critical extension 2.25.1"),
    ],
)
def test_an_issuing_ca_is_limited(edit: Edit, why: str) -> None:
    what = "the vTPM's RSA EK certificate" if "may certify" in why else "the issuing CA's"
    refused(what, why, ca_certificate=resigned(HOST.ca_certificate, SITE.key, edit))


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (instead(x509.ExtendedKeyUsage([TPM_EK])), "not an attestation key's"),
        (without(x509.ExtendedKeyUsage), "ExtendedKeyUsage"),
        (instead(CA), "is a CA's"),
        (instead(NO_SIGNING), "not for signatures alone"),
        (instead(UNKNOWN), "critical extension 2.25.1"),
    ],
)
def test_an_attestation_keys_certificate_is_for_that_alone(edit: Edit, why: str) -> None:
    host = resigned(HOST.ak_certificate, SITE.key, edit)
    refused("the host AK's certificate", why, host_ak_certificate=host)
    own = resigned(WEB.ak_certificate, HOST.ca.key, edit)
    refused("the vTPM's AK certificate", why, ak_certificate=own)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (instead(MACHINE), "alternative name"),
        (instead(CA), "is a CA's"),
        (instead(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])), "endorsement"),
        (lambda es: drop(es, "2.23.133.6.4"), "does not say that its TPM is virtual"),
    ],
)
def test_an_ek_certificate_is_a_virtual_tpms(edit: Edit, why: str) -> None:
    refused(
        "the vTPM's RSA EK certificate",
        why,
        ek_rsa_certificate=resigned(WEB.ek_rsa_certificate, HOST.ca.key, edit),
    )
    refused(
        "the vTPM's ECC EK certificate",
        why,
        ek_ecc_certificate=resigned(WEB.ek_ecc_certificate, HOST.ca.key, edit),
    )


def test_a_vtpms_certificates_are_of_its_site_and_named_as_they_are_named() -> None:
    anything = instead(unlimited(excluded=[x509.DNSName("")]))
    free = resigned(HOST.ca_certificate, SITE.key, anything)
    for subject in (directory(o="Other", cn=f"web:{WEB.id}").value, directory(cn="web").value):
        ek = resigned(WEB.ek_rsa_certificate, HOST.ca.key, lambda _: None, subject=subject)
        what = "the vTPM's RSA EK certificate"
        refused(what, "may certify", ek_rsa_certificate=ek)
        refused(what, "not of the site", ek_rsa_certificate=ek, ca_certificate=free)
    for name in ("web", "web:1", f"..:{WEB.id}", f":{WEB.id}"):
        subject = directory(o="Example", cn=name).value
        parts = ("ek_rsa_certificate", "ek_ecc_certificate", "ak_certificate")
        renamed = {
            part: resigned(getattr(WEB, part), HOST.ca.key, lambda _: None, subject=subject)
            for part in parts
        }
        refused("the vTPM's certificates", "", **renamed)


def test_an_expired_certificate_is_named() -> None:
    until = NOW - datetime.timedelta(days=1)
    old = resigned(HOST.ca_certificate, SITE.key, lambda _: None, until=until)
    refused("the issuing CA's certificate", "has expired", ca_certificate=old)


def test_a_root_that_may_not_make_cas_makes_none() -> None:
    root = resigned(SITE.root, SITE.key, instead(x509.BasicConstraints(ca=True, path_length=0)))
    site = Site(key=SITE.key)
    site.root = root
    host = Host(site)
    evidence = make(Given(Vtpm(host))).encode_cbor()
    with pytest.raises(AppraisalError, match="must not issue CA certificates"):
        appraise(evidence, policy_for(host), NONCE, AUDIENCE, USER_DATA, NOW)


@pytest.mark.parametrize("value", [b"", b"\x04\x02ab", b"\x04\x7f" + bytes(127), b"\x05\x02ab"])
def test_a_host_ak_that_names_its_ek_wrongly_is_not_hardware(value: bytes) -> None:
    named = x509.UnrecognizedExtension(OID_ACTIVATED_EK, value)
    certificate = resigned(HOST.ak_certificate, SITE.key, instead(named, critical=False))
    evidence = make(Given(WEB, companions={"host_ak_certificate": certificate})).encode_cbor()
    with pytest.raises(AppraisalError):
        appraise(evidence, HARDWARE, NONCE, AUDIENCE, USER_DATA, NOW)


def test_a_host_ak_that_names_no_ek_is_not_hardware() -> None:
    certificate = resigned(
        HOST.ak_certificate, SITE.key, lambda es: drop(es, OID_ACTIVATED_EK.dotted_string)
    )
    evidence = make(Given(WEB, companions={"host_ak_certificate": certificate})).encode_cbor()
    with pytest.raises(AppraisalError, match="which EK it was activated by") as caught:
        appraise(evidence, HARDWARE, NONCE, AUDIENCE, USER_DATA, NOW)
    assert caught.value.step == "host TPM"


PARTS = [
    "ek_rsa_certificate", "ek_ecc_certificate", "ak_certificate", "ca_certificate",
    "host_ak_certificate", "root_certificate", "ek_rsa", "ek_ecc", "ak", "host_ak",
    "container_log", "host_log", "host_ek_certificate", "host_ek",
]  # fmt: skip
GOOD: Companions = make(Given(WEB)).companions


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(PARTS), st.data())
def test_whatever_a_hostile_host_signs_is_refused_as_an_appraisal_error(
    part: str, data: st.DataObject
) -> None:
    """The host makes a leaf over its own edit: no decoder lets another exception out."""
    original: bytes = getattr(GOOD, part)
    start = data.draw(st.integers(0, len(original) - 1))
    end = data.draw(st.integers(start, min(len(original), start + 6)))
    edited = original[:start] + data.draw(st.binary(max_size=6)) + original[end:]
    evidence = make(Given(WEB, companions={part: edited}))
    for policy in (POLICY, HARDWARE):
        try:
            appraise(evidence.encode_cbor(), policy, NONCE, AUDIENCE, USER_DATA, NOW)
        except AppraisalError:
            continue
        # What passes is what no signature of a TPM covers: words beside the host's digests, a
        # vendor's certificate that the policy does not ask for.
        free = ("host_log", "host_ek_certificate", "host_ek", "container_log")
        assert edited == original or part in free
