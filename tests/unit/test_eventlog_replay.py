"""PCR values: against those a kernel read from a TPM, and against the specification's formulas."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InvalidInput
from holdfast.eventlog import ima, records, replay, tcg2
from holdfast.tpm2.algorithms import HASH_SIZES, HASHES_BY_NAME, Alg

HOSTLOG = Path(__file__).parent.parent / "fixtures" / "hostlog"
LOG = tcg2.parse((files("holdfast.data") / "hostlog" / "ovmf-qemu.bin").read_bytes())
RECORDED = {
    HASHES_BY_NAME[bank]: {int(pcr): bytes.fromhex(value) for pcr, value in pcrs.items()}
    for bank, pcrs in json.loads((HOSTLOG / "ovmf-qemu.pcrs.json").read_text()).items()
}
FIRMWARE = [pcr for pcr in range(24) if pcr != 10]


def ima_extends() -> list[replay.Extend]:
    """What the guest's kernel extended. It had not loaded SHA-384 and SHA-512 when IMA began: such
    a bank gets the SHA-1 of the template, padded with zeros (security/integrity/ima/ima_crypto.c).
    """
    listed = ima.parse_ascii((HOSTLOG / "ovmf-qemu.ima").read_text())
    return [
        (
            pcr,
            {
                Alg.SHA1: entry.digest(Alg.SHA1),
                Alg.SHA256: entry.digest(Alg.SHA256),
                Alg.SHA384: entry.digest(Alg.SHA1).ljust(48, b"\0"),
                Alg.SHA512: entry.digest(Alg.SHA1).ljust(64, b"\0"),
            },
        )
        for pcr, entry in listed
    ]


def test_the_fixture_leads_to_the_values_its_tpm_had() -> None:
    values = replay.pcr_values(LOG)
    assert set(values) == set(RECORDED)
    assert replay.first_difference(values, RECORDED, FIRMWARE) is None
    assert replay.first_difference(values, RECORDED, range(24)) == "PCR 10 (sha1)"


def test_with_the_kernels_ima_list_the_fixture_leads_to_every_pcr_in_every_bank() -> None:
    assert replay.replay(replay.pcr_values(LOG), ima_extends()) == RECORDED


def test_the_fixture_carried_as_cel_records_leads_to_the_same_values() -> None:
    carried = [records.record_of_event(n, event) for n, event in enumerate(LOG.events)]
    assert replay.pcr_values(None, carried, LOG.algorithms) == replay.pcr_values(LOG)


def test_leaving_out_any_one_event_is_noticed() -> None:
    values = replay.pcr_values(LOG)
    for left_out in LOG.extends():
        rest = tuple(event for event in LOG.events if event is not left_out)
        assert replay.pcr_values(tcg2.build(rest, LOG.algorithms)) != values


def test_a_reset_leaves_zeros_ones_and_the_locality() -> None:
    values = replay.initial([Alg.SHA1, Alg.SHA384], 3)
    for alg, size in ((Alg.SHA1, 20), (Alg.SHA384, 48)):
        assert values[alg][0] == bytes(size - 1) + b"\3"
        assert {values[alg][pcr] for pcr in (*range(1, 17), 23)} == {bytes(size)}
        assert {values[alg][pcr] for pcr in range(17, 23)} == {b"\xff" * size}


def test_extend_is_the_hash_of_old_and_digest() -> None:
    old, event = bytes(32), b"e" * 32
    assert replay.extend(old, event, Alg.SHA256) == hashlib.sha256(old + event).digest()


@pytest.mark.parametrize(("old", "event"), [(31, 32), (32, 20), (0, 32)])
def test_extend_refuses_other_lengths(old: int, event: int) -> None:
    with pytest.raises(InvalidInput):
        replay.extend(bytes(old), bytes(event), Alg.SHA256)


def test_values_cannot_be_changed() -> None:
    values = replay.pcr_values(LOG)
    with pytest.raises(TypeError):
        values[Alg.SHA1][0] = b""  # type: ignore[index]
    with pytest.raises(TypeError):
        values[Alg.SHA1] = {}  # type: ignore[index]


def test_replay_leaves_its_start_alone() -> None:
    start = replay.initial([Alg.SHA256])
    before = {alg: dict(pcrs) for alg, pcrs in start.items()}
    replay.replay(start, [(4, {Alg.SHA256: bytes(32)})])
    assert start == before


@given(st.lists(st.tuples(st.integers(0, 23), st.binary(min_size=20, max_size=20)), max_size=20))
def test_replaying_in_parts_is_replaying_at_once(listed: list[tuple[int, bytes]]) -> None:
    extends = [(pcr, {Alg.SHA1: value}) for pcr, value in listed]
    start = replay.initial([Alg.SHA1, Alg.SHA256])
    at_once = replay.replay(start, extends)
    half = len(extends) // 2
    assert replay.replay(replay.replay(start, extends[:half]), extends[half:]) == at_once
    assert at_once[Alg.SHA256] == start[Alg.SHA256]


def test_composite_hashes_the_values_in_order_of_pcr() -> None:
    values = replay.pcr_values(LOG)
    one, four = values[Alg.SHA256][1], values[Alg.SHA256][4]
    for named in ([1, 4], [4, 1], [4, 4, 1]):
        assert replay.composite(values, Alg.SHA256, named) == hashlib.sha256(one + four).digest()
    # TPM2_Quote hashes with the scheme's algorithm, whatever the bank.
    wide = replay.composite(values, Alg.SHA1, [0], Alg.SHA384)
    assert wide == hashlib.sha384(values[Alg.SHA1][0]).digest()


@pytest.mark.parametrize(("bank", "pcr"), [(Alg.SHA256, 24), (Alg.SHA384, 0), (Alg.SM3_256, 0)])
def test_composite_refuses_what_has_no_value(bank: Alg, pcr: int) -> None:
    values = replay.initial([Alg.SHA256])
    with pytest.raises(InvalidInput):
        replay.composite(values, bank, [0, pcr])


def test_the_first_difference_is_named() -> None:
    values = replay.pcr_values(LOG)
    other = replay.replay(values, [(7, {Alg.SHA384: bytes(HASH_SIZES[Alg.SHA384])})])
    assert replay.first_difference(values, other, range(24)) == "PCR 7 (sha384)"
    with pytest.raises(InvalidInput):
        replay.first_difference({Alg.SHA1: values[Alg.SHA1]}, {}, range(24))


@pytest.mark.parametrize("locality", [-1, 1, 2, 5])
def test_no_reset_happens_at_another_locality(locality: int) -> None:
    with pytest.raises(InvalidInput):
        replay.initial([Alg.SHA256], locality)


def test_without_a_log_the_banks_must_be_named() -> None:
    with pytest.raises(InvalidInput):
        replay.pcr_values(None)
    assert replay.pcr_values(None, (), [Alg.SHA1]) == replay.initial([Alg.SHA1])
