"""Encodings: what is written reads back, and nothing else than DecodeError comes out of bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError, InvalidInput
from holdfast.eventlog import cel, ima, records, tcg2
from holdfast.eventlog.records import Record
from holdfast.tpm2.algorithms import HASH_SIZES, Alg

BANKS = (Alg.SHA256, Alg.SHA1)
LOG = tcg2.parse((files("holdfast.data") / "hostlog" / "ovmf-qemu.bin").read_bytes())

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=8,
)
digests = st.fixed_dictionaries(
    {}, optional={alg: st.binary(min_size=n, max_size=n) for alg, n in HASH_SIZES.items()}
)
hexes = st.binary(max_size=40).map(bytes.hex)
event_types = st.sampled_from(sorted(tcg2.EVENT_TYPES.values())) | st.integers(
    0xA000_0000, 0xFFFF_FFFF
)
kinds_and_contents = (
    st.tuples(text.filter(bool).filter(lambda t: t not in (records.IMA, records.PCCLIENT)),
              st.dictionaries(text, values, max_size=4))
    | st.tuples(st.just(records.IMA),
                st.fixed_dictionaries({"template_name": text, "template_data": hexes}))
    | st.tuples(st.just(records.PCCLIENT),
                st.fixed_dictionaries({"event_type": event_types, "event_data": hexes}))
)  # fmt: skip
any_record = st.builds(
    lambda recnum, pcr, digests, kind: Record(recnum, pcr, digests, *kind),
    st.integers(0, records.RECNUM_MAX), st.integers(0, 23), digests, kinds_and_contents,
)  # fmt: skip
logs = st.lists(any_record, max_size=4)


GOOD = {
    "recnum": 0,
    "pcr": 12,
    "digests": [{"hashAlg": "sha1", "digest": "00" * 20}],
    "content_type": "holdfast.config/1",
    "content": {},
}


def sample() -> list[Record]:
    """Some of each: host, execution, and every type of our own."""
    listed = [records.record_of_event(0, LOG.events[0]), records.record_of_event(1, LOG.events[3])]
    listed.append(ima.not_measured_record(2, BANKS))
    for kind in sorted(set(records.PCR_OF) - {records.IMA}):
        listed.append(records.make_record(len(listed), kind, {"é": [None, {"x": -1}]}, BANKS))
    return listed


def seq(listed: list[Record]) -> bytes:
    return b"".join(map(cel.encode_seq, listed))


@given(logs)
def test_json_reads_back(listed: list[Record]) -> None:
    encoded = cel.encode_json(listed)
    assert cel.decode_json(encoded) == tuple(listed)
    assert cel.decode_json(encoded.encode()) == tuple(listed)


@given(logs)
def test_a_json_sequence_reads_back(listed: list[Record]) -> None:
    assert cel.decode_seq(seq(listed)) == (tuple(listed), b"")


@given(logs)
def test_tlv_reads_back(listed: list[Record]) -> None:
    assert cel.decode_tlv(cel.encode_tlv(listed)) == tuple(listed)


def damaged(draw: st.DataObject, whole: bytes) -> bytes:
    start = draw.draw(st.integers(0, len(whole)))
    end = draw.draw(st.integers(start, min(len(whole), start + 40)))
    return whole[:start] + draw.draw(st.binary(max_size=40)) + whole[end:]


@given(st.binary(max_size=200), st.data())
def test_any_bytes_are_json_records_or_a_decode_error(noise: bytes, draw: st.DataObject) -> None:
    for data in (noise, damaged(draw, cel.encode_json(sample()).encode())):
        try:
            found = cel.decode_json(data)
        except DecodeError:
            continue
        assert cel.decode_json(cel.encode_json(found)) == found


@given(st.binary(max_size=200), st.data())
def test_any_bytes_are_a_sequence_or_a_decode_error(noise: bytes, draw: st.DataObject) -> None:
    for data in (noise, b"\x1e" + noise + b"\n", damaged(draw, seq(sample()))):
        try:
            found, torn = cel.decode_seq(data)
        except DecodeError:
            continue
        assert cel.decode_seq(data[: len(data) - len(torn)]) == (found, b"")


@given(st.binary(max_size=200), st.data())
def test_any_bytes_are_tlv_records_or_a_decode_error(noise: bytes, draw: st.DataObject) -> None:
    for data in (noise, damaged(draw, cel.encode_tlv(sample()))):
        try:
            found = cel.decode_tlv(data)
        except DecodeError:
            continue
        assert cel.encode_tlv(found) == data


@given(
    st.recursive(
        values | st.floats(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["recnum", "pcr", "digests", "content_type", "content", "hashAlg"]),
                inner,
            )
        ),
        max_leaves=20,
    )
)
def test_any_json_value_is_records_or_a_decode_error(value: Any) -> None:
    try:
        cel.decode_json(json.dumps(value))
    except DecodeError:
        return


def test_a_crash_at_any_byte_of_an_append_loses_that_record_alone() -> None:
    listed = sample()
    before, last = seq(listed[:-1]), cel.encode_seq(listed[-1])
    for size in range(len(last)):
        assert cel.decode_seq(before + last[:size]) == (tuple(listed[:-1]), last[:size])
    assert cel.decode_seq(before + last) == (tuple(listed), b"")


def test_a_tail_of_zeros_is_torn_too() -> None:
    before = seq(sample())
    assert cel.decode_seq(before + bytes(4096)) == (tuple(sample()), bytes(4096))


def test_damage_before_the_end_is_not_a_torn_record() -> None:
    listed = sample()
    first, rest = cel.encode_seq(listed[0]), seq(listed[1:])
    for damage in (
        first[:-1],
        first[1:],
        first[:20] + b"\0" + first[21:],
        first[:9] + b"\n",
        b"\n",
    ):
        with pytest.raises(DecodeError):
            cel.decode_seq(damage + rest)


@pytest.mark.parametrize("tail", [b"{}", b"garbage", b"\0\0x", b" "])
def test_a_tail_no_append_of_ours_leaves_is_refused(tail: bytes) -> None:
    with pytest.raises(DecodeError):
        cel.decode_seq(seq(sample()) + tail)


def test_a_json_record_has_the_members_of_the_specification() -> None:
    record = records.record_of_event(9, tcg2.Tcg2Event(6, 0x0C, {Alg.SHA1: b"\x11" * 20}, b"Dell"))
    assert json.loads(cel.encode_json([record])) == [
        {
            "recnum": 9,
            "pcr": 6,
            "digests": [{"hashAlg": "sha1", "digest": "11" * 20}],
            "content_type": "pcclient_std",
            "content": {"event_type": "EV_COMPACT_HASH", "event_data": "44656c6c"},
        }
    ]


def test_tlv_is_laid_out_as_the_specification_says() -> None:
    event = tcg2.Tcg2Event(6, 0x0C, {Alg.SHA1: b"\x11" * 20}, b"Dell")
    assert cel.encode_tlv([records.record_of_event(9, event)]).hex(" ", 1) == (
        "00 00 00 00 04 00 00 00 09 "  # recnum
        "01 00 00 00 04 00 00 00 06 "  # pcr
        "03 00 00 00 19 04 00 00 00 14 " + "11 " * 20 +  # digests
        "05 00 00 00 12 00 00 00 00 04 00 00 00 0c 01 00 00 00 04 44 65 6c 6c"
    )  # fmt: skip


def test_two_tlv_digests_for_one_bank_are_refused() -> None:
    one = bytes((Alg.SHA1,)) + (20).to_bytes(4, "big") + bytes(20)
    whole = cel.encode_tlv([cel.from_json(GOOD)])
    twice = whole.replace((25).to_bytes(4, "big") + one, (50).to_bytes(4, "big") + one * 2)
    assert len(cel.decode_tlv(whole)) == 1
    with pytest.raises(DecodeError, match="0x04"):
        cel.decode_tlv(twice)


def test_tlv_content_of_our_own_is_what_its_digests_hash() -> None:
    record = records.make_record(0, records.IMAGE, {"b": 1, "a": 2}, BANKS)
    assert cel.encode_tlv([record]).endswith(records.verify_record(record))


@pytest.mark.parametrize(
    "changes",
    [
        {"recnum": -1},
        {"recnum": 2**32},
        {"recnum": True},
        {"recnum": "0"},
        {"pcr": 24},
        {"pcr": None},
        {"digests": {}},
        {"digests": [{"hashAlg": "sha1", "digest": "00" * 20}] * 2},
        {"digests": [{"hashAlg": "sha1", "digest": "00" * 19}]},
        {"digests": [{"hashAlg": "sha1", "digest": "AA" * 20}]},
        {"digests": [{"hashAlg": "sha1", "digest": 5}]},
        {"digests": [{"hashAlg": "md5", "digest": "00" * 16}]},
        {"digests": [{"hashAlg": ["sha1"], "digest": "00" * 20}]},
        {"digests": [{"hashAlg": "sha1"}]},
        {"content_type": 5},
        {"content_type": ""},
        {"content_type": "x" * 65},
        {"content": []},
        {"content": {"x": 2**53}},
        {"content": {"x": 1.0}},
        {"content": {"x": "\ud800"}},
        {"content_type": "ima_template"},
        {"content_type": "pcclient_std"},
        {"more": 1},
    ],
)
def test_a_json_record_is_read_strictly(changes: dict[str, Any]) -> None:
    assert len(cel.decode_json(json.dumps([GOOD]))) == 1
    with pytest.raises(DecodeError):
        cel.decode_json(json.dumps([{**GOOD, **changes}]))


@pytest.mark.parametrize(
    "data",
    [
        json.dumps([{**GOOD, "content": {"x": 1}}]).replace('"x": 1', '"x": 1, "x": 1'),
        "[NaN]",
        "[1e999]",
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" + "9" * 5000 + "]",
        b"\xff\xfe[\0]\0",
        b"\xef\xbb\xbf[]",
        b"[] []",
        b"",
        b"{}",
    ],
)
def test_json_that_two_readers_could_read_differently_is_refused(data: str | bytes) -> None:
    with pytest.raises(DecodeError):
        cel.decode_json(data)


def test_limits_hold_on_both_sides() -> None:
    large = {"x": "y" * cel.RECORD_MAX}
    record = records.make_record(0, records.CONFIG, large, BANKS)
    for encode in (cel.encode_seq, lambda one: cel.encode_json([one]),
                   lambda one: cel.encode_tlv([one])):  # fmt: skip
        with pytest.raises(InvalidInput):
            encode(record)
    line = b"\x1e" + json.dumps({**GOOD, "content": large}).encode() + b"\n"
    with pytest.raises(DecodeError):
        cel.decode_seq(line)
    with pytest.raises(DecodeError):
        cel.decode_seq(b"\x1e" * (cel.RECORD_MAX + 1))
    for decode in (cel.decode_json, cel.decode_seq, cel.decode_tlv):
        with pytest.raises(DecodeError):
            decode(bytes(cel.LOG_MAX + 1))


def test_a_sequence_has_at_most_so_many_records() -> None:
    tiny = cel.encode_seq(replace(cel.from_json(GOOD), digests={}))
    assert len(cel.decode_seq(tiny * 10)[0]) == 10
    # The bound itself costs seconds to reach; that it stands is checked on the cheapest decoder.
    with pytest.raises(DecodeError):
        cel.decode_json("[" + "0," * cel.RECORDS_MAX + "0]")


@pytest.mark.parametrize(
    "change",
    [
        {"pcr": 24},
        {"recnum": -1},
        {"content_type": ""},
        {"content": {"x": 0.5}},
        {"digests": {Alg.SHA1: b""}},
        {"digests": {Alg.SM3_256: bytes(32)}},
        {"content_type": records.IMA},
    ],
)
def test_what_would_not_read_back_is_not_written(change: dict[str, Any]) -> None:
    record = replace(cel.from_json(GOOD), **change)
    for encode in (cel.encode_seq, lambda one: cel.encode_tlv([one])):
        with pytest.raises(InvalidInput):
            encode(record)


@pytest.mark.parametrize(
    "content",
    [
        b'{"content": {},"type":"holdfast.config/1"}',
        b'{"type":"holdfast.config/1","content":{}}',
        b'{"content":{},"type":"ima_template"}',
        b'{"content":{"template_data":"","template_name":""},"type":"ima_template"}',
        b'{"content":{},"type":"holdfast.config/1","x":1}',
        b'{"content":[],"type":"holdfast.config/1"}',
        b'{"content":{"n":1.0},"type":"holdfast.config/1"}',
    ],
)
def test_tlv_content_of_our_own_has_one_form(content: bytes) -> None:
    head = cel.encode_tlv([replace(cel.from_json(GOOD), content={})])
    head = head[: head.index(b"\xf0")]
    with pytest.raises(DecodeError):
        cel.decode_tlv(head + b"\xf0" + len(content).to_bytes(4, "big") + content)
