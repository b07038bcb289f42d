"""Records: digests follow from content, and whoever changes one of the two is named."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError, IntegrityError, InvalidInput
from holdfast.eventlog import records, tcg2
from holdfast.eventlog.records import PCR_OF, Record, make_record, verify_record
from holdfast.tpm2.algorithms import HASH_NAMES, Alg

BANKS = (Alg.SHA1, Alg.SHA256, Alg.SHA384, Alg.SHA512)
OWN = sorted(set(PCR_OF) - {records.IMA})
LOG = tcg2.parse((files("holdfast.data") / "hostlog" / "ovmf-qemu.bin").read_bytes())

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
contents = st.dictionaries(text, values, max_size=5)


def test_each_content_type_has_its_pcr_as_the_design_says() -> None:
    assert {kind: PCR_OF[kind] for kind in PCR_OF} == {
        "ima_template": 10,
        "holdfast.provider/1": 11,
        "holdfast.config/1": 12,
        "holdfast.image/1": 13,
        "holdfast.moved/1": 14,
        "holdfast.identity/1": 15,
    }


def test_the_digest_is_that_of_the_canonical_json() -> None:
    """A vector by hand: users seal to what this leads to, so it must never change."""
    record = make_record(7, records.CONFIG, {"b": [1, True, None], "a": "é\n"}, BANKS)
    canonical = '{"content":{"a":"é\\n","b":[1,true,null]},"type":"holdfast.config/1"}'.encode()
    assert verify_record(record) == canonical
    assert record.pcr == 12
    for alg in BANKS:
        assert record.digests[alg] == hashlib.new(HASH_NAMES[alg], canonical).digest()
    assert record.digests[Alg.SHA256].hex() == VECTOR


# printf '%s' '{"content":…}' | sha256sum, once, by a foreign tool
VECTOR = "c2620e05effc05b9447726d18bc5df4e1c62da90c8b5d2260a9045c075d1e4f8"


@given(st.sampled_from(OWN), contents)
def test_what_is_made_verifies(kind: str, content: dict[str, Any]) -> None:
    verify_record(make_record(1, kind, content, BANKS))


@given(st.sampled_from(OWN), contents, contents)
def test_other_content_does_not_verify(
    kind: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    record = make_record(3, kind, one, [Alg.SHA256])
    if records.canonical(one) == records.canonical(other):
        return
    with pytest.raises(IntegrityError, match=r"event 3 \(holdfast"):
        verify_record(replace(record, content=other))


@pytest.mark.parametrize("bank", BANKS)
def test_a_digest_changed_in_one_bank_is_named(bank: Alg) -> None:
    record = make_record(5, records.IMAGE, {"digest": "sha256:00"}, BANKS)
    value = bytearray(record.digests[bank])
    value[-1] ^= 1
    changed = replace(record, digests={**record.digests, bank: bytes(value)})
    with pytest.raises(IntegrityError, match=rf"event 5 \(holdfast.image/1\): its {bank.name}"):
        verify_record(changed)


@pytest.mark.parametrize(
    "changes",
    [
        {"pcr": 12},
        {"content_type": records.CONFIG},
        {"content_type": "holdfast.image/2"},
        {"digests": {}},
        {"digests": {Alg.SM3_256: bytes(32)}},
        {"content": {"n": 1.5}},
        {"content": {"n": 2**60}},
    ],
)
def test_a_record_that_is_not_what_it_says_does_not_verify(changes: dict[str, Any]) -> None:
    record = make_record(0, records.IMAGE, {"n": 1}, BANKS)
    with pytest.raises(IntegrityError, match="event 0"):
        verify_record(replace(record, **changes))


def nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for _ in range(depth):
        content = {"": content}
    return content


@pytest.mark.parametrize(
    "content",
    [
        {"n": 2**53},
        {"n": -(2**53)},
        {"n": 0.5},
        {"n": float("nan")},
        {"n": b"bytes"},
        {"n": "\ud800"},
        {"\ud800": 1},
        {1: "n"},
        nested(records.DEPTH_MAX + 1),
        {"n": list(range(records.NODES_MAX))},
    ],
)
def test_content_without_one_canonical_form_is_refused(content: Any) -> None:
    with pytest.raises(InvalidInput):
        make_record(0, records.CONFIG, content, [Alg.SHA256])


@pytest.mark.parametrize(
    ("recnum", "kind", "banks"),
    [
        (0, "holdfast.config/2", [Alg.SHA256]),
        (0, records.PCCLIENT, [Alg.SHA256]),
        (0, records.IMA, [Alg.SHA256]),
        (0, records.CONFIG, []),
        (0, records.CONFIG, [Alg.SM3_256]),
        (-1, records.CONFIG, [Alg.SHA256]),
        (2**32, records.CONFIG, [Alg.SHA256]),
    ],
)
def test_no_record_is_made_of_that(recnum: int, kind: str, banks: list[Alg]) -> None:
    with pytest.raises(InvalidInput):
        make_record(recnum, kind, {}, banks)


def test_host_events_travel_as_records_and_come_back() -> None:
    for number, event in enumerate(LOG.events):
        record = records.record_of_event(number, event)
        assert records.event_of_record(record) == event
        if event.content_verified:
            assert verify_record(record) == event.verified_data
        else:
            with pytest.raises(IntegrityError, match=f"event {number} "):
                verify_record(record)


def test_a_host_event_of_a_type_without_a_name_travels_by_number() -> None:
    event = tcg2.Tcg2Event(4, 0xABCD, {Alg.SHA1: bytes(20)}, b"data")
    record = records.record_of_event(0, event)
    assert record.content == {"event_type": 0xABCD, "event_data": "64617461"}
    assert records.event_of_record(record) == event


def test_only_a_hosts_no_action_extends_nothing() -> None:
    event = tcg2.Tcg2Event(0, tcg2.EV_NO_ACTION, {Alg.SHA1: bytes(20)}, b"")
    assert not records.extends_pcr(records.record_of_event(0, event))
    assert all(records.extends_pcr(make_record(0, kind, {}, BANKS)) for kind in OWN)
    with pytest.raises(InvalidInput):
        records.record_of_event(0, replace(event, pcr=0xFFFFFFFF))


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"event_type": "EV_NO_SUCH", "event_data": ""},
        {"event_type": -1, "event_data": ""},
        {"event_type": True, "event_data": ""},
        {"event_type": 2**32, "event_data": ""},
        {"event_type": 4, "event_data": "0"},
        {"event_type": 4, "event_data": "AA"},
        {"event_type": 4, "event_data": "00 00"},
        {"event_type": 4, "event_data": 4},
        {"event_type": 4, "event_data": "", "more": 1},
    ],
)
def test_host_event_content_is_read_strictly(content: dict[str, Any]) -> None:
    record = Record(0, 4, {Alg.SHA1: bytes(20)}, records.PCCLIENT, content)
    with pytest.raises(DecodeError):
        records.event_of_record(record)
