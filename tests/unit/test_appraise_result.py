"""Results: made by the verifier alone, said in plain words and as an EAR that others can check."""

from __future__ import annotations

import base64
from dataclasses import fields, replace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from holdfast.appraise.policy import parse_policy
from holdfast.appraise.result import AttestedContainer, ear_claims, sign_ear
from holdfast.appraise.verifier import appraise
from holdfast.errors import InvalidInput
from holdfast.ids import InstanceName
from tests.unit.evidence_maker import (
    AUDIENCE,
    INDEX,
    MANIFEST,
    NONCE,
    NOW,
    USER_DATA,
    Given,
    HardwareMaker,
    Host,
    Site,
    Vtpm,
    make,
    policy_text,
)

SITE = Site()
VENDOR = HardwareMaker()
HOST = Host(SITE, ek=VENDOR.ek.public.encode(), ek_certificate=VENDOR.certificate)
WEB = Vtpm(HOST)
TEXT = policy_text(HOST)
HARDWARE_TEXT = TEXT.replace("software_host_tpm", "ek_roots").replace(
    HOST.ak_name, VENDOR.pem.replace("\n", "\\n")
)


def attested(text: str = TEXT, **given: Any) -> AttestedContainer:
    data = make(Given(WEB, **given)).encode_cbor()
    return appraise(data, parse_policy(text), NONCE, AUDIENCE, USER_DATA, NOW)


def test_nobody_but_the_verifier_makes_an_attested_container() -> None:
    good = attested()
    values = {f.name: getattr(good, f.name) for f in fields(good)}
    with pytest.raises(TypeError, match="only the verifier"):
        AttestedContainer(**values)
    with pytest.raises(TypeError, match="only the verifier"):
        AttestedContainer(**values, made_by=object())
    with pytest.raises((TypeError, ValueError)):
        replace(good, name=InstanceName("mallory"))


def test_an_attested_container_cannot_be_changed() -> None:
    good = attested()
    with pytest.raises(AttributeError):
        good.name = "mallory"  # type: ignore[misc,assignment]
    with pytest.raises(TypeError):
        good.host.pcrs[0] = bytes(32)  # type: ignore[index]


def test_a_hardware_host_with_everything_wanted_is_affirmed() -> None:
    records = WEB.records(files=[("/bin/sh", bytes(32))])
    text = HARDWARE_TEXT.replace("not_measured = true", f'files = ["sha256:{"0" * 64}"]')
    claims = ear_claims(attested(text, records=records), "test 1")
    assert claims["eat_profile"] == "tag:ietf.org,2026:rats/ear#04"
    assert claims["ear_status"] == "affirming"
    host, container = claims["submods"]["host"], claims["submods"]["container"]
    assert host["ear_trustworthiness_vector"] == {
        "instance-identity": 2, "hardware": 2, "executables": 3,
    }  # fmt: skip
    assert container["ear_trustworthiness_vector"] == {
        "instance-identity": 2, "configuration": 2, "file-system": 2, "executables": 2,
    }  # fmt: skip
    assert "runtime-opaque" not in container["ear_trustworthiness_vector"]


def test_a_stand_in_and_unmeasured_execution_are_warnings() -> None:
    claims = ear_claims(attested(), "test 1")
    assert claims["ear_status"] == "warning"
    assert claims["submods"]["host"]["ear_trustworthiness_vector"]["hardware"] == 32
    assert claims["submods"]["container"]["ear_trustworthiness_vector"]["executables"] == 32
    limits = claims["submods"]["host"]["ear_verifier_claims"]["limits"]
    assert "user space of the host: not measured" in limits


def test_what_the_host_counts_of_its_map_is_claimed() -> None:
    good = attested(anchor={"sequence": 9, "unclean": 2, "recoveries": 1})
    claims = ear_claims(good, "test 1")["submods"]["host"]["ear_verifier_claims"]
    assert (claims["unclean_boots"], claims["recoveries"], claims["anchor_sequence"]) == (2, 1, 9)
    assert claims["anchor_name"] == INDEX.name.hex()
    assert any("older state" in limit for limit in claims["limits"])


def test_an_unlinked_vtpm_is_a_warning_in_both() -> None:
    claims = ear_claims(attested(TEXT + "unsafe_unlinked = true\n", unlinked=True), "test 1")
    vectors = [claims["submods"][n]["ear_trustworthiness_vector"] for n in ("host", "container")]
    assert [v["configuration"] for v in vectors] == [32, 2]
    assert vectors[1]["hardware"] == 32


def test_what_the_policy_does_not_constrain_makes_no_claim() -> None:
    text = HARDWARE_TEXT[: HARDWARE_TEXT.index("[host]")]
    for name in ("host", "provider", "image", "config", "exec", "identity"):
        text += f"[{name}]\nany = true\n"
    claims = ear_claims(attested(text), "test 1")
    assert claims["submods"]["container"]["ear_trustworthiness_vector"] == {}
    assert claims["submods"]["container"]["ear_status"] == "none"
    assert "executables" not in claims["submods"]["host"]["ear_trustworthiness_vector"]


def test_claims_of_the_image_are_told_from_what_was_measured() -> None:
    container = ear_claims(attested(), "test 1")["submods"]["container"]
    assert container["ear_attester_claims"] == {
        "image_reference": "example.org/web:1", "image_digest": MANIFEST,
    }  # fmt: skip
    assert container["ear_verifier_claims"]["image"]["upper"] == "empty"


def test_the_token_is_a_jwt_that_anybody_can_check() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    claims = ear_claims(attested(), "test 1", lifetime=300)
    token = sign_ear(claims, key, "key-1")
    options: Any = {"verify_exp": False, "verify_iat": False}
    read = jwt.decode(token, key.public_key(), algorithms=["ES256"], options=options)
    assert read == claims
    assert jwt.get_unverified_header(token) == {"alg": "ES256", "typ": "JWT", "kid": "key-1"}
    assert read["exp"] - read["iat"] == 300
    assert base64.urlsafe_b64decode(read["eat_nonce"] + "==") == NONCE
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(token, other, algorithms=["ES256"], options=options)


def test_a_token_is_signed_by_p_256_alone() -> None:
    with pytest.raises(InvalidInput, match="P-256"):
        sign_ear({}, ec.generate_private_key(ec.SECP384R1()))
