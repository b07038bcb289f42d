"""The deep-quote round: encodings that cannot be confused, and a tree that is RFC 9162's."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError, IntegrityError, InvalidInput
from holdfast.evidence import dcbor
from holdfast.evidence import round as rd
from holdfast.evidence.pcrs import decode_pcrs, encode_pcrs, ledger_digest
from holdfast.ids import InstanceId
from holdfast.tpm2.algorithms import Alg

LEAF = rd.Leaf(
    nonce=bytes(16),
    audience="verifier",
    user_data=bytes(32),
    instance=InstanceId(UUID("6c7a1c62-3a0c-4c7e-9c55-2b1f6d4a9e01")),
    ek_name=b"\x00\x0b" + bytes(32),
    ak_name=b"\x00\x0b" + bytes(32),
    quote=bytes(32),
    ledger=bytes(32),
    host_log_index=5,
    epoch=1,
    run=2,
    clear_count=0,
    lineage=0,
    salt=bytes(32),
    members={"container-log": bytes(32)},
)
BANKS = {Alg.SHA256: {pcr: bytes((pcr,)) * 32 for pcr in range(24)}}


def hashes(count: int) -> list[bytes]:
    return [hashlib.sha256(n.to_bytes(4, "big")).digest() for n in range(count)]


def rfc9162_root(leaves: list[bytes]) -> bytes:
    """MTH of RFC 9162, 2.1.1 to the letter: split at the largest power of two below n."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    left, right = rfc9162_root(leaves[:split]), rfc9162_root(leaves[split:])
    return hashlib.sha256(b"\x01" + left + right).digest()


@pytest.mark.parametrize("count", [*range(1, 34), 1000])
def test_the_root_is_that_of_rfc_9162_and_every_leaf_has_a_proof(count: int) -> None:
    leaves = hashes(count)
    root = rd.tree_root(leaves)
    assert root == rfc9162_root(leaves)
    for leaf, proof in zip(leaves, rd.inclusion_proofs(leaves), strict=True):
        assert proof.root(leaf) == root
        assert rd.InclusionProof.decode(proof.encode()) == proof
        assert len(proof.path) <= rd.PATH_MAX


def led_to(proof: rd.InclusionProof, leaf: bytes) -> bytes | None:
    """The root, or None for a path that is not of its place's length."""
    try:
        return proof.root(leaf)
    except IntegrityError:
        return None


@pytest.mark.parametrize("count", [2, 3, 7, 8, 13])
def test_a_proof_holds_for_its_own_leaf_and_place_alone(count: int) -> None:
    leaves = hashes(count)
    root = rd.tree_root(leaves)
    proofs = rd.inclusion_proofs(leaves)
    for index, proof in enumerate(proofs):
        for other in range(count):
            if other != index:
                assert proof.root(leaves[other]) != root
                assert led_to(replace(proofs[other], path=proof.path), leaves[index]) != root


def test_a_path_that_is_too_long_or_too_short_is_refused_by_decoder_and_check() -> None:
    leaves = hashes(5)
    proof = rd.inclusion_proofs(leaves)[1]
    for path in (proof.path[:-1], (*proof.path, bytes(32))):
        wrong = replace(proof, path=path)
        with pytest.raises(IntegrityError):
            wrong.root(leaves[1])
        with pytest.raises(DecodeError, match="path"):
            rd.InclusionProof.decode(wrong.encode())


def test_a_node_is_never_taken_for_a_leaf() -> None:
    leaves = hashes(2)
    node = rd.tree_root(leaves)
    assert rd.leaf_hash(leaves[0] + leaves[1]) != node


def test_a_round_has_at_least_one_leaf_and_a_bound() -> None:
    for leaves in ([], [b"short"]):
        with pytest.raises(InvalidInput):
            rd.tree_root(leaves)
    with pytest.raises(InvalidInput):
        rd.round_extra_data(rd.TREE_MAX + 1, bytes(32))


def test_the_hosts_extra_data_is_the_tagged_structure_of_the_design() -> None:
    expected = b"holdfast/round/1" + b"\x00\x0b" + (3).to_bytes(8, "big") + bytes(32)
    assert rd.round_extra_data(3, bytes(32)) == hashlib.sha256(expected).digest()


def test_qualifying_data_is_unambiguous_in_its_parts() -> None:
    values = {
        rd.qualifying_data(bytes(8), "ab", b""),
        rd.qualifying_data(bytes(8), "a", b"b"),
        rd.qualifying_data(bytes(9), "ab", b""),
        rd.qualifying_data(bytes(8) + b"a", "b", b""),
    }
    assert len(values) == 4
    assert all(len(value) == 32 for value in values)


@pytest.mark.parametrize(
    ("nonce", "audience"),
    [(bytes(7), "a"), (bytes(65), "a"), (bytes(8), ""), (bytes(8), "a\n"), (bytes(8), "a" * 257)],
)
def test_a_challenge_out_of_bounds_is_refused(nonce: bytes, audience: str) -> None:
    with pytest.raises(InvalidInput):
        rd.qualifying_data(nonce, audience, b"")


def test_a_leaf_reads_back_and_its_hash_is_over_its_bytes() -> None:
    data = LEAF.encode()
    assert rd.Leaf.decode(data) == LEAF
    assert rd.leaf_hash(data) == hashlib.sha256(b"\x00" + data).digest()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"nonce": b"short"},
        {"audience": "\x1b[31m"},
        {"salt": bytes(31)},
        {"epoch": -1},
        {"run": 1 << 64},
        {"members": {"x": b"short"}},
        {"members": {str(n): bytes(32) for n in range(rd.MEMBERS_MAX + 1)}},
        {"ak_name": bytes(67)},
    ],
)
def test_a_leaf_out_of_bounds_can_be_neither_made_nor_read(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        replace(LEAF, **change).encode()  # type: ignore[arg-type]


def test_a_leaf_has_one_encoding() -> None:
    value = dcbor.decode(LEAF.encode(), "leaf")
    for wrong in (
        dcbor.encode(value | {"extra": 1}),
        dcbor.encode({k: v for k, v in value.items() if k != "salt"}),
        LEAF.encode() + b"\x00",
        LEAF.encode()[:-1],
        b"\xbf" + LEAF.encode()[1:] + b"\xff",  # indefinite length
    ):
        with pytest.raises(DecodeError):
            rd.Leaf.decode(wrong)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_leaf_or_a_decode_error(data: bytes) -> None:
    for decode in (rd.Leaf.decode, rd.InclusionProof.decode):
        try:
            value = decode(data)
        except DecodeError:
            continue
        assert value.encode() == data


@given(st.data())
def test_an_edited_leaf_is_another_leaf_or_a_decode_error(data: st.DataObject) -> None:
    original = LEAF.encode()
    at = data.draw(st.integers(0, len(original) - 1))
    edited = bytearray(original)
    edited[at] ^= data.draw(st.integers(1, 255))
    try:
        leaf = rd.Leaf.decode(bytes(edited))
    except DecodeError:
        return
    assert leaf.encode() == bytes(edited) != original


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_any_bytes_are_cbor_of_ours_or_a_decode_error(data: bytes, tail: bytes) -> None:
    try:
        value = dcbor.decode(data, "test")
    except DecodeError:
        return
    assert dcbor.encode(value) == data
    if tail:
        with pytest.raises(DecodeError):
            dcbor.decode(data + tail, "test")


@pytest.mark.parametrize(
    "data",
    [
        bytes.fromhex("c11a514b67b0"),  # a date
        bytes.fromhex("c24101"),  # a bignum
        bytes.fromhex("f93c00"),  # a fraction
        bytes.fromhex("f6"),  # null
        bytes.fromhex("1800"),  # 0 in two bytes
        bytes.fromhex("a2616200616100"),  # keys out of order
        bytes.fromhex("a2616100616100"),  # a key twice
        bytes.fromhex("a10000"),  # a key that is no text
        bytes.fromhex("81" * 50 + "00"),  # too deep
        bytes.fromhex("9bffffffffffffffff"),  # longer than anything
        bytes.fromhex("d81c8100d81d00"),  # shared references
        bytes.fromhex("61ff"),  # not UTF-8
    ],
)
def test_cbor_of_other_types_and_other_encodings_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        dcbor.decode(data, "test")


def test_pcr_values_read_back() -> None:
    values = {**BANKS, Alg.SHA1: {0: bytes(20), 10: bytes(20)}}
    assert decode_pcrs(encode_pcrs(values)) == values
    assert decode_pcrs(b"") == {}


@given(st.binary(max_size=120))
def test_any_bytes_are_pcr_values_in_their_one_encoding_or_a_decode_error(data: bytes) -> None:
    try:
        values = decode_pcrs(data)
    except DecodeError:
        return
    assert encode_pcrs(values) == data


def test_impossible_pcr_values_are_not_written() -> None:
    banks: list[dict[int, bytes]] = [{}, {0: bytes(20)}, {24: bytes(32)}]
    for bank in banks:
        with pytest.raises(InvalidInput):
            encode_pcrs({Alg.SHA256: bank})


def test_the_ledger_is_of_the_measured_pcrs_of_every_bank() -> None:
    digest = ledger_digest(BANKS)
    late = {Alg.SHA256: {**BANKS[Alg.SHA256], 16: bytes(32), 23: bytes(32)}}
    assert ledger_digest(late) == digest
    assert ledger_digest({Alg.SHA256: {**BANKS[Alg.SHA256], 15: bytes(32)}}) != digest
    more = {**BANKS, Alg.SHA384: {pcr: bytes(48) for pcr in range(24)}}
    assert ledger_digest(more) != digest
    with pytest.raises(InvalidInput):
        ledger_digest({})
    with pytest.raises(InvalidInput):
        ledger_digest({Alg.SHA256: {0: bytes(32)}})
