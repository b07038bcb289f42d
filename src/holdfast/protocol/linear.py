"""swtpm's linear store: all states of a TPM in one file or block device, behind a table.

    header    "swtpmlin" as a little-endian 64-bit word ‖ version (1) = 1 ‖ 0 (1) ‖ header size (2)
    then 15   offset (4) ‖ length of the data (4) ‖ length of its section (4)

All little-endian. States are found by their place in the table: `STATES`.

Pure. A change is written beside what is there, then the header is turned to it, so that a store is
whole whenever it is looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from holdfast.errors import DecodeError

STATES: Final = ("permall", "volatilestate", "savestate")
STORE_MAX: Final = 4 * 1024 * 1024  # bytes that are looked at
_MAGIC: Final = b"nilmptws"
_VERSION: Final = 1
_SLOTS: Final = 15
_HEADER: Final = struct.Struct("<8sBxH")
_SLOT: Final = struct.Struct("<III")
HEADER_SIZE: Final = _HEADER.size + _SLOTS * _SLOT.size
_ALIGN: Final = 1024


class Store(NamedTuple):
    """The states of a store, and the bytes they occupy: from `begin` up to `end`."""

    states: Mapping[str, bytes]
    begin: int
    end: int


EMPTY: Final = Store({}, HEADER_SIZE, HEADER_SIZE)


def decode(data: bytes) -> Store:
    """The store in `data`; EMPTY if all is zero. DecodeError for anything else."""
    if not data.strip(b"\0"):
        return EMPTY
    if len(data) < HEADER_SIZE:
        raise DecodeError("linear TPM store", f"{len(data)} bytes, shorter than its header")
    magic, version, size = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise DecodeError("linear TPM store", "it does not begin as one")
    if version != _VERSION or size != HEADER_SIZE:
        raise DecodeError("linear TPM store", f"version {version} with a header of {size} bytes")
    states = {}
    taken: list[tuple[int, int]] = [(0, HEADER_SIZE)]
    for number in range(_SLOTS):
        offset, length, section = _SLOT.unpack_from(data, _HEADER.size + number * _SLOT.size)
        if not offset:
            continue
        where = f"place {number}"
        if number >= len(STATES):
            raise DecodeError("linear TPM store", f"{where} holds a state that nobody knows")
        if length > section or offset + length > len(data):
            raise DecodeError("linear TPM store", f"{where} reaches beyond its section or its end")
        if any(offset < end and begin < offset + section for begin, end in taken):
            raise DecodeError("linear TPM store", f"{where} overlaps another")
        taken.append((offset, offset + section))
        if length:
            states[STATES[number]] = data[offset : offset + length]
    used = taken[1:] or [(HEADER_SIZE, HEADER_SIZE)]
    return Store(states, min(begin for begin, _ in used), max(end for _, end in used))


class Change(NamedTuple):
    """What to write, in this order: `sections` at `offset`, once durable `header` at 0."""

    store: Store  # what is there then
    offset: int
    sections: bytes
    header: bytes


def replace(store: Store, states: Mapping[str, bytes]) -> Change:
    """How to have `states` in place of what `store` has, without touching that on the way."""
    sizes = {name: -(-len(states[name]) // _ALIGN) * _ALIGN for name in STATES if name in states}
    total = sum(sizes.values())
    offset = HEADER_SIZE if HEADER_SIZE + total <= store.begin else store.end
    slots, sections = b"", b""
    for name in STATES:
        size = sizes.get(name, 0)
        where = offset + len(sections) if size else 0
        slots += _SLOT.pack(where, len(states.get(name, b"")), size)
        sections += states.get(name, b"").ljust(size, b"\0")
    header = _HEADER.pack(_MAGIC, _VERSION, HEADER_SIZE) + slots.ljust(_SLOTS * _SLOT.size, b"\0")
    return Change(Store(states, offset, offset + total), offset, sections, header)
