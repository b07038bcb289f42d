"""The collection: one encoding in each form, everything bounded, nothing unknown."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import DecodeError, InvalidInput
from holdfast.evidence import bundle
from holdfast.evidence.bundle import MEMBERS, Evidence, Statement
from tests.unit.evidence_maker import Given, Host, Site, Vtpm, make

EVIDENCE = make(Given(Vtpm(Host(Site())), notes=("a note",)))
JSON = EVIDENCE.encode_json()
CBOR = EVIDENCE.encode_cbor()


def test_both_forms_read_back_to_the_same() -> None:
    assert Evidence.decode(JSON) == EVIDENCE
    assert Evidence.decode(CBOR) == EVIDENCE


def test_it_is_a_cmw_collection_that_others_can_read() -> None:
    collection = json.loads(JSON)
    assert collection.pop("__cmwc_t") == "tag:holdfast.dev,2026:evidence/2"
    binary = cbor2.loads(CBOR)
    assert binary.pop("__cmwc_t") == "tag:holdfast.dev,2026:evidence/2"
    assert set(collection) == set(binary) == set(EVIDENCE.members())
    for label, (kind, value, indicator) in collection.items():
        raw = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
        assert binary[label] == [kind, raw, indicator]
        assert indicator == (
            2 if "certificate" in kind or kind.endswith("tpmt-public") else indicator
        )
        assert raw == EVIDENCE.members()[label]


def edited(edit: Callable[[dict[str, Any]], object]) -> tuple[bytes, bytes]:
    """The collection in both forms after an edit, encoded canonically again."""
    text, binary = json.loads(JSON), cbor2.loads(CBOR)
    edit(text)
    edit(binary)
    dumped = json.dumps(text, sort_keys=True, separators=(",", ":")).encode()
    return dumped, cbor2.dumps(binary, canonical=True)


@pytest.mark.parametrize("label", [m.label for m in MEMBERS if not m.optional])
def test_a_member_that_is_missing_is_named(label: str) -> None:
    for data in edited(lambda c: c.pop(label)):
        with pytest.raises(DecodeError, match=f"has no {label}"):
            Evidence.decode(data)


def test_a_member_that_is_unknown_is_named() -> None:
    for data in edited(lambda c: c.update({"else": c["leaf"]})):
        with pytest.raises(DecodeError, match="else"):
            Evidence.decode(data)


def test_evidence_of_the_first_version_is_refused_with_what_it_lacks() -> None:
    for data in edited(lambda c: c.update({"__cmwc_t": "tag:holdfast.dev,2026:evidence/1"})):
        with pytest.raises(DecodeError, match=r"version 1, which does not say .* newest"):
            Evidence.decode(data)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update({"__cmwc_t": "tag:other"}),
        lambda c: c.pop("__cmwc_t"),
        lambda c: c["leaf"].append(1),
        lambda c: c["leaf"].pop(),
        lambda c: c["leaf"].__setitem__(0, "text/plain"),
        lambda c: c["leaf"].__setitem__(2, 2),
        lambda c: c["leaf"].__setitem__(2, True),
        lambda c: c["leaf"].__setitem__(1, 5),
        lambda c: c.update(leaf={"a": 1}),
        lambda c: c["host-pcrs"].__setitem__(1, c["leaf"][1]),
        lambda c: c["inclusion-proof"].__setitem__(1, c["leaf"][1]),
        lambda c: c["statement"].__setitem__(1, c["leaf"][1]),
        lambda c: c["anchor"].__setitem__(1, c["leaf"][1]),
        lambda c: c["map-path"].__setitem__(1, c["leaf"][1]),
        lambda c: c["ak"].__setitem__(1, c["ak"][1][:0]),
    ],
)
def test_a_record_that_is_not_its_rows_is_refused(edit: Callable[[dict[str, Any]], object]) -> None:
    for data in edited(edit):
        with pytest.raises(DecodeError):
            Evidence.decode(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d + b"\n",
        lambda d: b" " + d,
        lambda d: d.replace(b'":[', b'": [', 1),
        lambda d: d.replace(b"leaf+cbor", b"le\\u0061f+cbor"),
        lambda d: d[:-1] + b',"ak":["x","",1]}',
        lambda d: d.replace(b"__cmwc_t", b"__cmwc_u"),
        lambda d: d[:-1],
        lambda d: b"\xef\xbb\xbf" + d,
        lambda d: b"{" * 50_000,
        lambda d: b"",
    ],
)
def test_json_that_is_not_canonical_is_refused(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(DecodeError):
        Evidence.decode(change(JSON))


def test_base64url_has_no_padding_no_other_alphabet_and_no_bits_left_over() -> None:
    collection = json.loads(JSON)
    label = next(k for k, v in collection.items() if k != "__cmwc_t" and len(v[1]) % 4)
    good = collection[label][1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    left_over = good[:-1] + alphabet[alphabet.index(good[-1]) + 1]
    for text in (good + "=", good[:-1] + "+", good[:-1] + "!", left_over, good + "é"):
        collection[label][1] = text
        dumped = json.dumps(collection, sort_keys=True, separators=(",", ":")).encode()
        with pytest.raises(DecodeError):
            Evidence.decode(dumped)


def test_every_member_is_bounded() -> None:
    for member in MEMBERS:
        if member.in_leaf and member.label not in ("statement", "host-log", "container-log"):
            field = member.label.replace("-", "_")
            change: dict[str, Any] = {field: bytes(member.limit + 1)}
            companions = replace(EVIDENCE.companions, **change)
            with pytest.raises(InvalidInput, match=member.label):
                replace(EVIDENCE, companions=companions).encode_json()
    with pytest.raises(DecodeError, match="at most"):
        Evidence.decode(bytes(bundle.EVIDENCE_MAX + 1))


def test_notes_are_few_short_and_printable() -> None:
    assert Statement.decode(Statement(True, ("ein Wort",)).encode()) == Statement(
        True, ("ein Wort",)
    )
    for notes in (("",), ("a\nb",), ("\x1b[0m",), ("a" * 513,), ("a",) * 17):
        with pytest.raises(DecodeError):
            Statement.decode(Statement(False, notes).encode())


def test_the_leafs_digests_are_of_every_member_that_no_tpm_signs() -> None:
    signed = {
        "vtpm-attest", "vtpm-signature", "vtpm-pcrs", "leaf", "inclusion-proof",
        "host-attest", "host-signature", "host-pcrs",
        "anchor-attest", "anchor-signature", "anchor-public", "anchor", "map-path",
    }  # fmt: skip
    assert {member.label for member in MEMBERS if not member.in_leaf} == signed
    assert set(EVIDENCE.companions.digests()) == set(EVIDENCE.members()) - signed


@given(st.binary(max_size=400))
def test_any_bytes_are_evidence_or_a_decode_error(data: bytes) -> None:
    for prefix in (b"", b"{", b"\xb5"):
        with pytest.raises(DecodeError):
            Evidence.decode(prefix + data)


@settings(max_examples=300)
@given(st.sampled_from([JSON, CBOR]), st.data())
def test_edited_evidence_is_other_evidence_or_a_decode_error(
    original: bytes, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(original) - 1))
    end = data.draw(st.integers(start, min(len(original), start + 9)))
    mutated = original[:start] + data.draw(st.binary(max_size=9)) + original[end:]
    try:
        evidence = Evidence.decode(mutated)
    except DecodeError:
        return
    assert mutated in (evidence.encode_json(), evidence.encode_cbor())
