"""The kernel's FUSE and CUSE protocol (linux/fuse.h, 7.31), as far as two device files need it.

Structures and their sizes only, in native byte order. Not here: what the files do
(`frontend.devices`), and the descriptor of /dev/fuse.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from holdfast.errors import DecodeError

MAJOR: Final = 7
MINOR: Final = 31
WRITE_MAX: Final = 4096
REQUEST_MAX: Final = 65536  # more than the kernel sends for WRITE_MAX; it insists on 8192 at least
ROOT_ID: Final = 1

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_NONSEEKABLE: Final = 1 << 2
FOPEN_STREAM: Final = 1 << 4  # no position at all: each write is at 0, and meets no size limit

_IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
_OUT_HEADER: Final = struct.Struct("=IiQ")
_INIT_IN: Final = struct.Struct("=IIII")
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHII6I")
_CUSE_INIT_IN: Final = struct.Struct("=IIII")
_CUSE_INIT_OUT: Final = struct.Struct("=IIIIIIII10I")
_ATTR: Final = struct.Struct("=6Q10I")
_ENTRY_HEAD: Final = struct.Struct("=4Q2I")
_ATTR_HEAD: Final = struct.Struct("=QII")
_OPEN_IN: Final = struct.Struct("=II")
_OPEN_OUT: Final = struct.Struct("=QII")
_READ_IN: Final = struct.Struct("=QQII")
_WRITE_OUT: Final = struct.Struct("=II")
_STATFS_OUT: Final = struct.Struct("=5Q4I6I")
_DIRENT: Final = struct.Struct("=QQII")
_HANDLE: Final = struct.Struct("=Q")
_WRITE_HEAD: Final = 40


class Op(IntEnum):
    """FUSE_* opcodes that we answer."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    CUSE_INIT = 4096


_NOTIFY_RESEND: Final = 7
NO_REPLY: Final = frozenset({Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT})


class Request(NamedTuple):
    """One request: header fields that matter, and the body after the header."""

    opcode: int
    unique: int
    node: int
    body: bytes


def request(data: bytes) -> Request:
    """Read one request as the kernel wrote it; DecodeError if it is cut short."""
    if len(data) < _IN_HEADER.size:
        raise DecodeError("FUSE request", f"{len(data)} bytes")
    size, opcode, unique, node, *_ = _IN_HEADER.unpack_from(data)
    if size != len(data):
        raise DecodeError("FUSE request", f"says {size} bytes, is {len(data)}")
    return Request(opcode, unique, node, data[_IN_HEADER.size :])


def reply(unique: int, body: bytes = b"") -> bytes:
    """A successful answer."""
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 0, unique) + body


def error(unique: int, errno: int) -> bytes:
    """An answer that fails with a (positive) errno."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, -errno, unique)


def resend() -> bytes:
    """FUSE_NOTIFY_RESEND (Linux 6.9): give us again what was read and never answered."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, _NOTIFY_RESEND, 0)


def init_request() -> bytes:
    """FUSE_INIT as a kernel of our version sends it, for whoever plays the kernel."""
    body = _INIT_IN.pack(MAJOR, MINOR, 0, 0)
    size = _IN_HEADER.size + len(body)
    return _IN_HEADER.pack(size, Op.INIT, 1, 0, 0, 0, 0, 0, 0) + body


def init_reply(unique: int, body: bytes) -> bytes:
    """Agree on our version; no optional feature, so that descriptors outlive the process."""
    if len(body) < _INIT_IN.size:
        raise DecodeError("FUSE_INIT", f"{len(body)} bytes")
    major, _, readahead, _ = _INIT_IN.unpack_from(body)
    if major != MAJOR:
        raise DecodeError("FUSE_INIT", f"protocol version {major}")
    out = _INIT_OUT.pack(
        MAJOR, MINOR, readahead, 0, 16, 12, WRITE_MAX, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
    )
    return reply(unique, out)


def cuse_init_reply(data: bytes, name: str) -> bytes:
    """Answer the first request read from /dev/cuse: a character device, in sysfs under `name`.

    Its numbers are the kernel's choice. DecodeError if that is not the request.
    """
    first = request(data)
    if first.opcode != Op.CUSE_INIT or len(first.body) < _CUSE_INIT_IN.size:
        raise DecodeError("CUSE_INIT", f"operation {first.opcode} of {len(first.body)} bytes")
    major, *_ = _CUSE_INIT_IN.unpack_from(first.body)
    if major != MAJOR:
        raise DecodeError("CUSE_INIT", f"protocol version {major}")
    out = _CUSE_INIT_OUT.pack(MAJOR, MINOR, 0, 0, WRITE_MAX, WRITE_MAX, 0, 0, *(0,) * 10)
    return reply(first.unique, out + f"DEVNAME={name}\0".encode())


class Attributes(NamedTuple):
    """What stat(2) shows."""

    inode: int
    mode: int
    links: int
    seconds: int

    def encode(self) -> bytes:
        times = (self.seconds,) * 3
        return _ATTR.pack(
            self.inode, 0, 0, *times, 0, 0, 0, self.mode, self.links, 0, 0, 0, WRITE_MAX, 0
        )


def attributes_reply(unique: int, attributes: Attributes, valid: int) -> bytes:
    """`valid`: seconds the kernel may remember them."""
    return reply(unique, _ATTR_HEAD.pack(valid, 0, 0) + attributes.encode())


def entry_reply(unique: int, attributes: Attributes, valid: int) -> bytes:
    head = _ENTRY_HEAD.pack(attributes.inode, 0, valid, valid, 0, 0)
    return reply(unique, head + attributes.encode())


def open_reply(unique: int, handle: int, flags: int) -> bytes:
    return reply(unique, _OPEN_OUT.pack(handle, flags, 0))


def write_reply(unique: int, size: int) -> bytes:
    return reply(unique, _WRITE_OUT.pack(size, 0))


def statfs_reply(unique: int) -> bytes:
    return reply(unique, _STATFS_OUT.pack(*(0,) * 5, WRITE_MAX, 255, 0, 0, *(0,) * 6))


def directory_reply(unique: int, entries: tuple[tuple[int, int, bytes], ...], offset: int) -> bytes:
    """Directory entries (inode, type, name) from `offset` on; they always fit one page."""
    out = b""
    for index, (inode, kind, name) in enumerate(entries[offset:], offset + 1):
        entry = _DIRENT.pack(inode, index, len(name), kind) + name
        out += entry + bytes(-len(entry) % 8)
    return reply(unique, out)


def handle_of(body: bytes) -> int:
    """The file handle with which a RELEASE, FLUSH, READ or WRITE body begins."""
    if len(body) < 8:
        raise DecodeError("FUSE request", "no file handle")
    return int(_HANDLE.unpack_from(body)[0])


def read_request(body: bytes) -> tuple[int, int, int]:
    """(handle, offset, size) of a READ or READDIR."""
    if len(body) < _READ_IN.size:
        raise DecodeError("FUSE_READ", f"{len(body)} bytes")
    handle, offset, size, _ = _READ_IN.unpack_from(body)
    return handle, offset, size


def write_request(body: bytes) -> tuple[int, bytes]:
    """(handle, data) of a WRITE."""
    if len(body) < _WRITE_HEAD:
        raise DecodeError("FUSE_WRITE", f"{len(body)} bytes")
    handle, _, size, _ = _READ_IN.unpack_from(body)
    data = body[_WRITE_HEAD:]
    if len(data) != size:
        raise DecodeError("FUSE_WRITE", f"says {size} bytes, carries {len(data)}")
    return handle, data
