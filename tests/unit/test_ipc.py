"""Messages between our processes: what is written reads back; bytes parse or are refused."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError
from holdfast.protocol import (
    hibernation,  # noqa: F401 - registers its records
    ipc,
    lifecycle,  # noqa: F401 - registers its messages
)
from holdfast.tpm2.wire import u16

KINDS = sorted(ipc._REGISTRY.items())
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(0, (1 << 64) - 1),
    bytes: st.binary(max_size=80),
    str: st.text(max_size=40),
    UUID: st.uuids(),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    if kind in SCALARS:
        return SCALARS[kind]
    if typing.get_origin(kind) is tuple:
        return st.lists(values(typing.get_args(kind)[0]), max_size=4).map(tuple)
    hints = typing.get_type_hints(kind)
    fields = {field.name: values(hints[field.name]) for field in dataclasses.fields(kind)}
    return st.builds(kind, **fields)


messages = st.sampled_from([kind for _, kind in KINDS]).flatmap(values)


@given(messages)
def test_every_message_reads_back_as_it_was(message: ipc.Message) -> None:
    assert ipc.decode(message.encode()) == message


def parses_or_is_refused(data: bytes) -> None:
    """We either parse it, and writing it gives the same bytes, or raise DecodeError."""
    try:
        message = ipc.decode(data)
    except DecodeError:
        return
    assert message.encode() == data


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    parses_or_is_refused(data)


@given(st.sampled_from([code for code, _ in KINDS]), st.binary(max_size=300))
def test_any_body_of_a_known_code_parses_or_is_refused(code: int, body: bytes) -> None:
    parses_or_is_refused(u16(code) + body)


@given(messages, st.data())
def test_changed_message_parses_or_is_refused(message: ipc.Message, data: st.DataObject) -> None:
    raw = bytearray(message.encode())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    parses_or_is_refused(bytes(raw))


@given(messages, st.data())
def test_shortened_message_is_refused(message: ipc.Message, data: st.DataObject) -> None:
    raw = message.encode()
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    with pytest.raises(DecodeError):
        ipc.decode(cut)


@given(messages, st.binary(min_size=1, max_size=8))
def test_message_with_more_behind_it_is_refused(message: ipc.Message, more: bytes) -> None:
    with pytest.raises(DecodeError):
        ipc.decode(message.encode() + more)


def test_oversized_message_is_refused() -> None:
    with pytest.raises(DecodeError, match="at most"):
        ipc.decode(bytes(ipc.MESSAGE_MAX + 1))


def test_list_that_claims_too_many_items_is_refused_before_it_is_read() -> None:
    data = u16(ipc.HostPcrValues.CODE) + b"\xff\xff\xff\xff"
    with pytest.raises(DecodeError, match="items"):
        ipc.decode(data)


def test_codes_are_unique_and_fit_their_field() -> None:
    assert len({kind for _, kind in KINDS}) == len(KINDS)
    assert all(0 < code < 1 << 16 for code, _ in KINDS)
