"""The Authenticode digest of a PE/COFF image, which firmware measures of a program it starts.

"Windows Authenticode Portable Executable Signature Format", calculating the PE image hash; the TCG
PC Client PFP (EV_EFI_BOOT_SERVICES_APPLICATION) and UEFI's Secure Boot take the same. Hashed are
the headers without checksum and without the entry of the attribute certificate table, the sections
in the order in which the file has them, and what follows; not the certificates. Nothing is filled
up: a file that a signer has yet to lengthen to a multiple of 8 is hashed as it is, as by firmware.

Not here: whether a signature holds. Its issuers are read for a warning, and nothing else.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.serialization import pkcs7

from holdfast.errors import DecodeError
from holdfast.tpm2.algorithms import HASH_NAMES, Alg

SECTIONS_MAX: Final = 4096  # the PE specification has at most 96, firmware takes more
CERTIFICATES_MAX: Final = 16  # signatures of one image
_WHAT: Final = "PE image"
_PE_OFFSET: Final = 0x3C
_COFF_SIZE: Final = 24  # with "PE\0\0" before it
_CHECKSUM: Final = 64  # in the optional header; of 4 bytes
_HEADERS_SIZE: Final = 60
_DIRECTORIES: Final = {0x10B: 96, 0x20B: 112}  # where they begin, by magic: PE32, PE32+
_DIRECTORY: Final = struct.Struct("<II")
_CERTIFICATE_TABLE: Final = 4  # its place among the directories
_SECTION: Final = struct.Struct("<8sIIII16x")
_CERTIFICATE: Final = struct.Struct("<IHH")  # WIN_CERTIFICATE
_PKCS_SIGNED_DATA: Final = 2


@dataclass(frozen=True)
class _Section:
    name: bytes
    virtual_size: int
    start: int
    end: int


@dataclass(frozen=True)
class _Image:
    """Where things are in the file: as its headers say, and looked at again."""

    data: bytes
    checksum: int
    certificate_entry: int | None
    headers_end: int
    certificates: tuple[int, int]  # where they begin, and their size
    sections: tuple[_Section, ...]


def authenticode(data: bytes, alg: Alg = Alg.SHA256) -> bytes:
    """The image's digest; DecodeError for what is no PE image."""
    hashed = hashlib.new(HASH_NAMES[alg], usedforsecurity=alg is not Alg.SHA1)
    view = memoryview(data)
    for start, end in _hashed(_read(data)):
        hashed.update(view[start:end])
    return hashed.digest()


def section(data: bytes, name: str) -> bytes | None:
    """What the loader puts where a section is, or None: .linux of a unified kernel image."""
    for each in _read(data).sections:
        if each.name == name.encode():
            content = data[each.start : min(each.end, each.start + each.virtual_size)]
            return content.ljust(min(each.virtual_size, len(data)), b"\0")
    return None


def issuers(data: bytes) -> frozenset[str]:
    """Names of those who issued the certificates in the image's signatures; none if unsigned.

    Of a signature that cannot be read it is "unreadable".
    """
    found = set()
    for signature in _signatures(_read(data)):
        try:
            certificates = pkcs7.load_der_pkcs7_certificates(_der(signature))
            found |= {each.issuer.rfc4514_string() for each in certificates}
        except (ValueError, TypeError):  # of an algorithm nobody knows, or no PKCS #7
            found.add("unreadable")
    return frozenset(found)


def _hashed(image: _Image) -> Iterator[tuple[int, int]]:
    yield 0, image.checksum
    after = image.checksum + 4
    if image.certificate_entry is None:
        yield after, image.headers_end
    else:
        yield after, image.certificate_entry
        yield image.certificate_entry + _DIRECTORY.size, image.headers_end
    done = image.headers_end
    for each in sorted(image.sections, key=lambda section: section.start):
        yield each.start, each.end
        done += each.end - each.start
    rest = len(image.data) - image.certificates[1]
    if done > rest:
        raise DecodeError(_WHAT, "its headers, sections and certificates are longer than it is")
    yield done, rest


def _read(data: bytes) -> _Image:
    if data[:2] != b"MZ":
        raise DecodeError(_WHAT, "it does not begin with MZ")
    pe = _number(data, _PE_OFFSET, 4)
    if data[pe : pe + 4] != b"PE\0\0":
        raise DecodeError(_WHAT, "it has no PE header")
    count, optional_size = _number(data, pe + 6, 2), _number(data, pe + 20, 2)
    optional = pe + _COFF_SIZE
    directories = _DIRECTORIES.get(_number(data, optional, 2))
    if directories is None:
        raise DecodeError(_WHAT, "it is neither PE32 nor PE32+")
    headers_end = _number(data, optional + _HEADERS_SIZE, 4)
    entry = None
    certificates = 0, 0
    if _number(data, optional + directories - 4, 4) > _CERTIFICATE_TABLE:
        entry = optional + directories + _CERTIFICATE_TABLE * _DIRECTORY.size
        certificates = _number(data, entry, 4), _number(data, entry + 4, 4)
    end = (entry or optional + _CHECKSUM) + _DIRECTORY.size
    if not end <= headers_end <= len(data):
        raise DecodeError(_WHAT, f"{headers_end} bytes of headers in {len(data)}")
    if count > SECTIONS_MAX:
        raise DecodeError(_WHAT, f"{count} sections")
    table = optional + optional_size
    sections = tuple(_section(data, table + number * _SECTION.size) for number in range(count))
    present = tuple(each for each in sections if each.end > each.start)
    return _Image(data, optional + _CHECKSUM, entry, headers_end, certificates, present)


def _section(data: bytes, at: int) -> _Section:
    if at + _SECTION.size > len(data):
        raise DecodeError(_WHAT, "it ends within its table of sections")
    name, virtual_size, _, size, start = _SECTION.unpack_from(data, at)
    if size and start + size > len(data):
        raise DecodeError(_WHAT, "it ends within a section")
    return _Section(name.rstrip(b"\0"), virtual_size, start, start + size)


def _number(data: bytes, at: int, size: int) -> int:
    if at + size > len(data):
        raise DecodeError(_WHAT, "it ends within its headers")
    return int.from_bytes(data[at : at + size], "little")


def _signatures(image: _Image) -> Iterator[bytes]:
    at, size = image.certificates
    end = min(at + size, len(image.data))
    for _ in range(CERTIFICATES_MAX):
        if not size or at + _CERTIFICATE.size > end:
            return
        length, _, kind = _CERTIFICATE.unpack_from(image.data, at)
        if length < _CERTIFICATE.size:
            return
        if kind == _PKCS_SIGNED_DATA:
            yield image.data[at + _CERTIFICATE.size : min(at + length, end)]
        at += length + -length % 8


def _der(data: bytes) -> bytes:
    """Without the bytes that fill a certificate up: a SEQUENCE says how long it is."""
    if len(data) < 2 or data[0] != 0x30:
        raise ValueError("no SEQUENCE")
    if data[1] < 0x80:
        return data[: 2 + data[1]]
    of_length = data[1] & 0x7F
    return data[: 2 + of_length + int.from_bytes(data[2 : 2 + of_length], "big")]
