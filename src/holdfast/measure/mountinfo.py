"""/proc/PID/mountinfo (proc(5)), and what an overlay mount says of its layers.

Duty: decode the table and overlayfs' options, strictly. Not here: opening what they name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from holdfast.errors import DecodeError

TABLE_MAX: Final = 32 << 20
MOUNTS_MAX: Final = 100_000  # the kernel's own default, sysctl fs.mount-max
LAYERS_MAX: Final = 500  # OVL_MAX_STACK
_WHAT: Final = "mountinfo"
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_NUMBER: Final = re.compile(rb"[0-9]{1,10}")


@dataclass(frozen=True)
class Mount:
    """One line: `root` is the directory of the file system that is mounted at `point`."""

    mount_id: int
    parent: int
    device: tuple[int, int]
    root: bytes
    point: bytes
    options: tuple[bytes, ...]
    kind: bytes
    source: bytes
    super_options: bytes  # as they stand, still escaped: a comma in a value is \\054


@dataclass(frozen=True)
class Overlay:
    """The layers of an overlay mount, bottom first, as the paths given when it was mounted."""

    lower: tuple[bytes, ...]
    upper: bytes | None


def parse_mountinfo(data: bytes) -> tuple[Mount, ...]:
    """Read a whole table, or raise DecodeError."""
    if len(data) > TABLE_MAX:
        raise DecodeError(_WHAT, f"more than {TABLE_MAX} bytes")
    if data and not data.endswith(b"\n"):
        raise DecodeError(_WHAT, "the last line is cut short")
    lines = data.split(b"\n")[:-1]
    if len(lines) > MOUNTS_MAX:
        raise DecodeError(_WHAT, f"more than {MOUNTS_MAX} mounts")
    return tuple(_parse_line(line) for line in lines)


def parse_overlay(mount: Mount) -> Overlay:
    """The layers of a mount of type overlay, or DecodeError.

    `lowerdir` lists directories from the top, between colons; a colon or backslash in a name is
    escaped by a backslash. Where they were given one at a time (`lowerdir+`, Linux 6.5), each has
    an option of its own, without such escapes. Data-only layers (`::`, `datadir+`) are refused.
    """
    lower: list[bytes] = []
    upper = None
    for option in mount.super_options.split(b","):
        name, _, value = option.partition(b"=")
        value = _unescape(value)
        if name == b"lowerdir":
            lower += _split_layers(value)
        elif name == b"lowerdir+":
            lower.append(value)
        elif name == b"upperdir":
            (upper,) = _split_layers(value, single=True)
        elif name == b"datadir+":
            raise DecodeError("overlay", "data-only layers are not supported")
    if not 0 < len(lower) <= LAYERS_MAX:
        raise DecodeError("overlay", f"{len(lower)} lower layers")
    return Overlay(tuple(reversed(lower)), upper)


def _parse_line(line: bytes) -> Mount:
    fields = line.split(b" ")
    try:
        dash = fields.index(b"-", 6)
        mount_id, parent, device, root, point, options = fields[:6]
        kind, source, super_options = fields[dash + 1], fields[dash + 2], fields[dash + 3 :]
        major, minor = device.split(b":")
    except (ValueError, IndexError):
        raise DecodeError(_WHAT, f"not a mount: {line[:80]!a}") from None
    if not super_options:
        raise DecodeError(_WHAT, f"a mount without options: {line[:80]!a}")
    point = _unescape(point)
    if not point.startswith(b"/"):
        raise DecodeError(_WHAT, f"a mount at no absolute path: {line[:80]!a}")
    return Mount(
        _number(mount_id),
        _number(parent),
        (_number(major), _number(minor)),
        _unescape(root),
        point,
        tuple(options.split(b",")),
        kind,
        _unescape(source),
        b" ".join(super_options),
    )


def _number(field: bytes) -> int:
    if not _NUMBER.fullmatch(field):
        raise DecodeError(_WHAT, f"{field[:20]!a} is not a number")
    return int(field)


def _unescape(field: bytes) -> bytes:
    """Undo seq_file's octal escapes of space, tab, newline, backslash and, in options, comma."""

    def byte(match: re.Match[bytes]) -> bytes:
        value = int(match[1], 8)
        if value > 0xFF:
            raise DecodeError(_WHAT, f"{match[0]!a} is not a byte")
        return bytes((value,))

    return _ESCAPE.sub(byte, field)


def _split_layers(value: bytes, single: bool = False) -> list[bytes]:
    """Directories from a list between colons; `single` is one directory, escaped the same way."""
    names = [b""]
    escaped = False
    for number in value:
        character = bytes((number,))
        if escaped:
            names[-1] += character
            escaped = False
        elif character == b"\\":
            escaped = True
        elif character == b":" and not single:
            names.append(b"")
        else:
            names[-1] += character
    if escaped or not all(names):
        raise DecodeError("overlay", f"layers cannot be told apart: {value[:80]!a}")
    return names
