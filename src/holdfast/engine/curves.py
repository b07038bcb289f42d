"""NIST's curves by OpenSSL's own code for them: elliptic curves several times as fast.

libtpms describes each curve to OpenSSL by its numbers (EC_GROUP_new_curve_GFp), so OpenSSL computes
on it as on any curve. For a curve that it knows by name it has code of its own, in constant time,
and for P-256 in assembler. So where libtpms calls that function, it calls ours: for the numbers of
such a curve we answer with OpenSSL's own group (EC_GROUP_new_by_curve_name), for all others we call
what libtpms would have called. The mathematics, keys and signatures are the same.

It is done in this process alone, by one entry of libtpms' table of imported functions (ELF: the
slot of a JUMP_SLOT or GLOB_DAT relocation). Where that is not as expected, nothing is changed.

Not here: anything else that libtpms computes.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from holdfast.engine import libcrypto_abi
from holdfast.linux.memory import exchange_pointer, mappings

FUNCTION: Final = "EC_GROUP_new_curve_GFp"
_CURVES: Final = (415, 716, 715, 713)  # NIDs of P-256, P-521, P-384, P-224
_ELF64: Final = b"\x7fELF\x02\x01"
_PHDR_AT: Final = struct.Struct("<Q")  # e_phoff
_PHDRS: Final = struct.Struct("<HH")  # e_phentsize, e_phnum
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_PAIR: Final = struct.Struct("<QQ")
_RELA: Final = struct.Struct("<QQq")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL = 2, 5, 6, 7, 8, 23
_E_PHOFF, _E_PHENTSIZE = 32, 54  # in the file's header
_NAME_MAX: Final = 64


class _Known(NamedTuple):
    """A curve that OpenSSL has by name: its numbers, as BIGNUMs."""

    nid: int
    p: Any
    a: Any
    b: Any


class Curves:
    """Keeps what libtpms calls alive; `fast` says whether it calls us."""

    def __init__(self, library: str) -> None:
        """`library`: the name of libtpms' file, which is loaded already."""
        self._ffi: Any = libcrypto_abi.ffi
        self._lib: Any = self._ffi.dlopen("libcrypto.so.3")
        self._known = tuple(filter(None, map(self._curve, _CURVES)))
        kind = self._ffi.typeof(self._lib.EC_GROUP_new_curve_GFp)
        self._callback = self._ffi.callback(kind, self._group)
        self.fast = bool(self._known) and self._install(library)

    def _curve(self, nid: int) -> _Known | None:
        lib, null = self._lib, self._ffi.NULL
        group = lib.EC_GROUP_new_by_curve_name(nid)
        if group == null:
            return None
        numbers = [lib.BN_new() for _ in range(3)]
        # SAFETY: the numbers are ours and are kept for good; the group is freed once.
        found = lib.EC_GROUP_get_curve(group, *numbers, null)
        lib.EC_GROUP_free(group)
        return _Known(nid, *numbers) if found == 1 else None

    def _group(self, p: Any, a: Any, b: Any, context: Any) -> Any:
        """What libtpms calls. An exception here would be NULL: libtpms' failure mode."""
        compare = self._lib.BN_cmp
        for known in self._known:
            if not (compare(p, known.p) or compare(a, known.a) or compare(b, known.b)):
                group = self._lib.EC_GROUP_new_by_curve_name(known.nid)
                if group != self._ffi.NULL:
                    return group
        return self._lib.EC_GROUP_new_curve_GFp(p, a, b, context)

    def _install(self, library: str) -> bool:
        """Put our function where libtpms looks for OpenSSL's; False if that is not to be found."""
        try:
            return self._exchanged(library)
        except OSError:
            return False  # its file was replaced meanwhile, or its table cannot be written

    def _exchanged(self, library: str) -> bool:
        ffi = self._ffi
        theirs = int(ffi.cast("uintptr_t", ffi.addressof(self._lib, FUNCTION)))
        ours = int(ffi.cast("uintptr_t", self._callback))
        for mapping in mappings():
            if mapping.offset == 0 and Path(mapping.path).name.startswith(library):
                slots = [mapping.start + offset for offset in _slots(Path(mapping.path), FUNCTION)]
                return len(slots) == 1 and exchange_pointer(slots[0], theirs, ours)
        return False


def _slots(path: Path, function: str) -> list[int]:
    """Where a library has the address of an imported function, relative to its start."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        try:
            return list(_jump_slots(data, function.encode()))
        except (struct.error, ValueError, KeyError, StopIteration):
            return []  # no ELF file as we know them


def _jump_slots(data: mmap.mmap, function: bytes) -> Iterator[int]:
    if data[:6] != _ELF64:
        raise ValueError("not a 64-bit little-endian ELF file")
    (at,) = _PHDR_AT.unpack_from(data, _E_PHOFF)
    size, count = _PHDRS.unpack_from(data, _E_PHENTSIZE)
    headers = [_PHDR.unpack_from(data, at + size * number) for number in range(count)]
    loads = [(h[3], h[2], h[5]) for h in headers if h[0] == _PT_LOAD]  # address, offset, size

    def offset(address: int) -> int:
        return next(int(o) + address - int(a) for a, o, s in loads if a <= address < a + s)

    dynamic = next(h for h in headers if h[0] == _PT_DYNAMIC)
    entries = dict(_PAIR.iter_unpack(_whole(data, dynamic[2], dynamic[5], _PAIR.size)))
    symbols, names = offset(entries[_DT_SYMTAB]), offset(entries[_DT_STRTAB])
    tables = [(_DT_JMPREL, _DT_PLTRELSZ), (_DT_RELA, _DT_RELASZ)]
    for table, length in tables:
        if table not in entries:
            continue
        begin = offset(entries[table])
        for place, info, _ in _RELA.iter_unpack(_whole(data, begin, entries[length], _RELA.size)):
            symbol = info >> 32
            if symbol:
                name, *_ = _SYMBOL.unpack_from(data, symbols + _SYMBOL.size * symbol)
                start = names + name
                if data[start : start + _NAME_MAX].partition(b"\0")[0] == function:
                    yield place


def _whole(data: mmap.mmap, begin: int, length: int, size: int) -> bytes:
    """As many whole entries of `size` bytes as `length` has room for."""
    return data[begin : begin + length // size * size]
