"""swtpm's state files and blobs: what we write we read, and nothing that was changed."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError, IntegrityError
from holdfast.protocol import linear
from holdfast.protocol.stateblob import (
    Key,
    decode_blob,
    decode_file,
    encode_blob,
    encode_file,
    key_from_password,
)

K16, K32 = Key(bytes(range(16))), Key(bytes(range(32)))
IV = bytes(range(100, 132))
STATE = b"permanent state " * 9
KEYS = [None, K16, K32]


@given(st.binary(max_size=300), st.sampled_from(KEYS), st.sampled_from(KEYS))
def test_what_is_written_is_read(state: bytes, key: Key | None, outer: Key | None) -> None:
    assert decode_file(encode_file(state, key, IV), key) == state
    assert decode_blob(encode_blob(state, key, outer, IV, IV), key, outer) == state


@pytest.mark.parametrize("key", KEYS[1:])
@pytest.mark.parametrize("blob", [False, True])
def test_no_byte_of_an_encrypted_state_can_be_changed(key: Key, blob: bool) -> None:
    data = encode_blob(STATE, None, key, IV, IV) if blob else encode_file(STATE, key, IV)
    for place in range(len(data)):
        for mask in (1, 0x80):
            changed = bytearray(data)
            changed[place] ^= mask
            try:
                state = (
                    decode_blob(bytes(changed), None, key)
                    if blob
                    else decode_file(bytes(changed), key)
                )
            except (DecodeError, IntegrityError):
                continue
            # Only the version that the writer says it is of, which readers do not act on.
            assert place in (0, 1)
            assert state == STATE


@pytest.mark.parametrize("key", KEYS)
def test_a_state_that_is_cut_short_or_longer_is_refused(key: Key | None) -> None:
    data = encode_file(STATE, key, IV)
    for size in range(len(data)):
        with pytest.raises(DecodeError):
            decode_file(data[:size], key)
    with pytest.raises(DecodeError):
        decode_file(data + b"\0", key)


@given(st.binary(max_size=120))
def test_any_bytes_are_a_state_or_an_error(data: bytes) -> None:
    for decode in (lambda: decode_file(data, K16), lambda: decode_blob(data, K16, K32)):
        with contextlib.suppress(DecodeError, IntegrityError):
            decode()


@pytest.mark.parametrize(
    ("written", "read", "why"),
    [
        (K16, None, "no key was given"),
        (K16, Key(bytes(16)), "HMAC"),
        (K16, K32, "key of 128 bits, and one of 256"),
        (K32, K16, "key of 256 bits, and one of 128"),
    ],
)
def test_a_wrong_key_is_named(written: Key, read: Key | None, why: str) -> None:
    with pytest.raises(IntegrityError, match=why):
        decode_file(encode_file(STATE, written, IV), read)
    with pytest.raises(IntegrityError, match=why.replace("no key", "no migration key")):
        decode_blob(encode_blob(STATE, None, written, IV, IV), None, read)


def test_a_file_is_no_blob_and_a_blob_no_file() -> None:
    with pytest.raises(DecodeError, match="not a file"):
        decode_file(encode_blob(STATE, None, None, IV, IV), None)
    with pytest.raises(DecodeError, match="not a blob"):
        decode_blob(encode_file(STATE, None, IV), None, None)


def test_keys_are_never_shown_and_of_two_sizes() -> None:
    assert "0001" not in repr(K16).replace("\\x", "")
    for size in (0, 15, 17, 24, 33):
        with pytest.raises(DecodeError):
            Key(bytes(size))
    assert len(key_from_password(b"secret", 16, "pbkdf2").value) == 16
    assert key_from_password(b"secret", 32, "sha512") != key_from_password(b"secret", 32, "pbkdf2")


# --- the linear store -------------------------------------------------------------------------


def test_a_linear_store_keeps_what_is_there_until_its_header_is_turned() -> None:
    store, data = linear.EMPTY, bytearray(linear.HEADER_SIZE)
    states: dict[str, bytes] = {}
    for turn in range(20):
        name = linear.STATES[turn % 3]
        states = {**states, name: os.urandom(700 * (turn % 5 + 1))}
        change = linear.replace(store, states)
        before = dict(store.states)
        end = change.offset + len(change.sections)
        data.extend(bytes(max(0, end - len(data))))
        data[change.offset : end] = change.sections
        if turn:
            assert linear.decode(bytes(data)).states == before  # a power cut here loses nothing
        data[: linear.HEADER_SIZE] = change.header
        store = linear.decode(bytes(data))
        assert store.states == states
        assert store == change.store
    assert store.end < 8 * sum(map(len, states.values()))


@given(st.binary(max_size=400))
def test_any_bytes_are_a_linear_store_or_an_error(data: bytes) -> None:
    good = linear.replace(linear.EMPTY, {"permall": b"x" * 200})
    for candidate in (data, good.header[: -len(data) or None] + data, good.header + data):
        try:
            found = linear.decode(candidate)
        except DecodeError:
            continue
        assert all(len(state) <= len(candidate) for state in found.states.values())


def test_offsets_of_a_linear_store_lead_nowhere_else() -> None:
    change = linear.replace(linear.EMPTY, {"permall": b"x" * 200, "volatilestate": b"y" * 200})
    whole = change.header + change.sections
    for place in range(12, 36):
        for value in (0, 1, 0x7F, 0xFF):
            changed = bytearray(whole)
            changed[place] = value
            try:
                found = linear.decode(bytes(changed)).states
            except DecodeError:
                continue
            assert all(len(state) <= len(whole) for state in found.values())
    overlap = bytearray(whole)
    overlap[24:36] = overlap[12:24]
    with pytest.raises(DecodeError, match="overlaps"):
        linear.decode(bytes(overlap))
