"""Not one byte of evidence can be changed: in JSON, in CBOR, in whatever is signed or not.

There is no list of unsigned members, because there are none: `bundle.MEMBERS` says for each what
protects it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from holdfast.appraise.verifier import STEPS, appraise
from holdfast.errors import AppraisalError
from holdfast.evidence import dcbor
from holdfast.evidence.bundle import MEMBERS
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.keys import verify
from holdfast.tpm2.structures import Signature
from holdfast.tpm2.wire import sized, u16
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

# A host with an EK certificate as well, so that every member of the table is there.
VENDOR = HardwareMaker()
HOST = Host(Site(), ek=VENDOR.ek.public.encode(), ek_certificate=VENDOR.certificate)
POLICY = policy_for(HOST)
EVIDENCE = make(Given(Vtpm(HOST), notes=("a note",)))


def judged(data: bytes) -> str:
    """The step that refuses; AssertionError if none does."""
    try:
        appraise(data, POLICY, NONCE, AUDIENCE, USER_DATA, NOW)
    except AppraisalError as error:
        return error.step
    raise AssertionError("accepted")


ORDER = ec.SECP256R1().group_order


@pytest.mark.parametrize(
    "form",
    [
        lambda r, s: (r, (ORDER - int.from_bytes(s, "big")).to_bytes(32, "big")),
        lambda r, s: (bytes(1) + r, s),
        lambda r, s: (r, bytes(400) + s),
    ],
    ids=["the other s", "a zero before r", "zeros before s"],
)
@pytest.mark.parametrize(("of", "step"), [("host", "host quote"), ("anchored", "freshness")])
def test_another_form_of_the_host_s_signatures_is_refused(
    form: Callable[[bytes, bytes], tuple[bytes, bytes]], of: str, step: str
) -> None:
    signed = getattr(EVIDENCE, of)
    r, s = form(*Signature.decode(signed.signature).values)
    signature = u16(Alg.ECDSA) + u16(Alg.SHA256) + sized(r) + sized(s)
    verify(HOST.ak.public, Signature.decode(signature), signed.attest)
    changed = replace(EVIDENCE, **{of: replace(signed, signature=signature)})
    assert judged(changed.encode_json()) == step


def survivors(data: bytes, places: Iterable[int], masks: Sequence[int]) -> list[int]:
    """Offsets at which a byte flipped by one of the masks, in turn, is accepted."""
    accepted = []
    mutable = bytearray(data)
    for place in places:
        mask = masks[place % len(masks)]
        mutable[place] ^= mask
        try:
            appraise(bytes(mutable), POLICY, NONCE, AUDIENCE, USER_DATA, NOW)
            accepted.append(place)
        except AppraisalError:
            pass
        mutable[place] ^= mask
    return accepted


def test_the_sample_has_every_member_and_is_accepted() -> None:
    assert set(EVIDENCE.members()) == {member.label for member in MEMBERS}
    for data in (EVIDENCE.encode_json(), EVIDENCE.encode_cbor()):
        assert appraise(data, POLICY, NONCE, AUDIENCE, USER_DATA, NOW)


def test_every_byte_of_the_cbor_form_counts() -> None:
    data = EVIDENCE.encode_cbor()
    assert survivors(data, range(len(data)), [1 << n for n in range(8)]) == []


def test_every_byte_of_the_json_form_counts() -> None:
    # Bits 6 and 7 leave ASCII or the base64url alphabet, which is refused early: bits 0-5.
    data = EVIDENCE.encode_json()
    assert survivors(data, range(len(data)), [1 << n for n in range(6)]) == []


@pytest.mark.parametrize("label", [m.label for m in MEMBERS if not m.in_leaf])
def test_every_bit_of_what_a_tpm_protects_counts(label: str) -> None:
    data, member = EVIDENCE.encode_cbor(), EVIDENCE.members()[label]
    start = data.index(member, data.index(dcbor.encode(label)))
    for bit in range(8):
        places = range(start, start + min(len(member), 200))
        assert survivors(data, places, (1 << bit,)) == []


def test_bytes_cannot_be_added_or_taken_away() -> None:
    for data in (EVIDENCE.encode_json(), EVIDENCE.encode_cbor()):
        for place in range(0, len(data), 7):
            judged(data[:place] + data[place + 1 :])
            judged(data[:place] + b"A" + data[place:])


def test_flips_end_at_the_step_that_is_there_for_them() -> None:
    data = EVIDENCE.encode_cbor()
    steps: Counter[str] = Counter()
    for label, member in EVIDENCE.members().items():
        place = data.index(member, data.index(dcbor.encode(label))) + len(member) // 2
        steps[judged(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :])] += 1
    assert set(steps) <= {name for name, _ in STEPS}
    assert steps["members"] >= 10
    assert steps["host quote"] >= 2
    assert steps["freshness"] >= 4
