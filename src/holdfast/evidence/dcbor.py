"""Deterministic CBOR (RFC 8949, 4.2.1) of integers, byte strings, text, lists and maps with text
keys: one encoding for each value, and a decoder that refuses every other.

Not here: what the values mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import cbor2

from holdfast.errors import DecodeError

DEPTH_MAX: Final = 8  # our deepest value, a leaf, has two levels
ENCODED_MAX: Final = 32 << 20
_TAG: Final = 6
_STRINGS: Final = (2, 3)
_ARGUMENT: Final = {24: 1, 25: 2, 26: 4, 27: 8}  # bytes of the argument after the head


def encode(value: object) -> bytes:
    """The one encoding of `value`."""
    encoded: bytes = cbor2.dumps(value, canonical=True)
    return encoded


def decode(data: bytes, what: str) -> Any:
    """The value of which `data` is the one encoding; DecodeError, naming `what` was read."""
    if len(data) > ENCODED_MAX:
        raise DecodeError(what, f"{len(data)} bytes, at most {ENCODED_MAX}")
    _refuse_tags(data, what)
    try:
        value = cbor2.loads(
            data,
            max_depth=DEPTH_MAX,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except (cbor2.CBORError, ValueError, RecursionError, OverflowError) as error:
        raise DecodeError(what, f"is not CBOR: {error}") from None
    _check(value, what)
    if encode(value) != data:
        raise DecodeError(what, "is not in its one deterministic encoding")
    return value


def decode_map(data: bytes, fields: Mapping[str, type], what: str) -> dict[str, Any]:
    """A map with exactly these members, each of its type; DecodeError names the first that is not.

    `bool` is told from `int`; integers are unsigned and below 2^64.
    """
    value = decode(data, what)
    if not isinstance(value, dict):
        raise DecodeError(what, "is not a map")
    for name in sorted(set(value) ^ set(fields)):
        raise DecodeError(what, f"has no {name}" if name in fields else f"has an unknown {name!a}")
    for name, kind in fields.items():
        if type(value[name]) is not kind:
            raise DecodeError(what, f"{name} is not of type {kind.__name__}")
        if kind is int and not 0 <= value[name] < 1 << 64:
            raise DecodeError(what, f"{name} is not between 0 and 2^64 - 1")
    return value


def _refuse_tags(data: bytes, what: str) -> None:
    """DecodeError at the first tag (major type 6): by tags 28 and 29 a value may hold itself.

    Walks over heads alone, once; where they make no sense, the decoder will say so.
    """
    at, end = 0, len(data)
    while at < end:
        major, info = data[at] >> 5, data[at] & 0x1F
        at += 1
        if major == _TAG:
            raise DecodeError(what, "holds a tag")
        size = _ARGUMENT.get(info, 0)
        argument = int.from_bytes(data[at : at + size], "big") if size else info
        at += size
        if major in _STRINGS:
            at += argument


def _check(value: object, what: str) -> None:
    """Only the types we use. The decoder has bounded the depth."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if not all(type(key) is str for key in item):
                raise DecodeError(what, "has a map key that is not text")
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        elif type(item) not in (int, bytes, str, bool):
            raise DecodeError(what, f"holds a value of type {type(item).__name__}")
