"""Deterministic CBOR: one encoding of a value, and nothing but plain values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError
from holdfast.evidence import dcbor

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.integers(min_value=-(2**64), max_value=2**64 - 1)
    | st.binary(max_size=300)
    | st.text(max_size=300)
    | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@given(VALUES.filter(lambda value: depth(value) <= dcbor.DEPTH_MAX))
def test_what_was_encoded_is_decoded(value: Any) -> None:
    assert dcbor.decode(dcbor.encode(value), "it") == value


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "data",
    [
        "d81c81d81d00",  # a list that holds itself
        "82d81c8100d81d00",
        "a16161d81ca16162d81d00",
        "c000",
        "81c249010000000000000000",  # a bignum
        "a16161c074323032362d31312d32335430303a30303a30305a",
        "9a0000000182d81c01d81d00",
    ],
)
def test_a_tag_is_refused_wherever_it_is(data: str) -> None:
    with pytest.raises(DecodeError, match="holds a tag"):
        dcbor.decode(bytes.fromhex(data), "it")


@given(st.binary(max_size=60))
def test_bytes_that_look_like_tags_are_no_tags_inside_strings(data: bytes) -> None:
    value = {"a": b"\xd8\x1c" + data, "b": "\u00d8\u001c", "c": [b"\xc0" * 40]}
    assert dcbor.decode(dcbor.encode(value), "it") == value


@pytest.mark.timeout(20)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_an_error(data: bytes) -> None:
    try:
        value = dcbor.decode(data, "it")
    except DecodeError:
        return
    assert dcbor.encode(value) == data
