"""Backups of vTPMs in one file: the format, before it is encrypted (age) to who may open it.

One after another, each as its length (32 bits) and dCBOR: a head {version, host, site, created,
count}, then `count` times {id, instance, name, created, epoch, sealed, wrapped}. All of it is
ciphertext of a vTPM's state, or public; it opens in its own host alone.

Not here: files and keys (`backup`), and whether the host still accepts one (`instance.snapshots`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from holdfast.errors import DecodeError, InvalidInput
from holdfast.evidence import dcbor
from holdfast.ids import instance_name

VERSION: Final = 1
ENTRIES_MAX: Final = 10_000
ENTRY_MAX: Final = 1 << 20  # bytes
ARCHIVE_MAX: Final = 1 << 30
NAME_MAX: Final = 256  # of hosts and sites
_LENGTH: Final = 4
_HEAD: Final = {"version": int, "host": str, "site": str, "created": str, "count": int}
_ENTRY: Final = {
    "id": bytes, "instance": bytes, "name": str, "created": str, "epoch": int, "sealed": bytes,
    "wrapped": bytes,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One vTPM's sealed state of one epoch, and its wrapped data key."""

    id: bytes
    instance: bytes
    name: str
    created: str
    epoch: int
    sealed: bytes
    wrapped: bytes


@dataclass(frozen=True)
class Archive:
    """What was backed up together."""

    host: str
    site: str
    created: str
    entries: tuple[Entry, ...]

    def encode(self) -> bytes:
        head = {
            "version": VERSION, "host": self.host, "site": self.site, "created": self.created,
            "count": len(self.entries),
        }  # fmt: skip
        parts = [head, *map(asdict, self.entries)]
        return b"".join(map(_framed, parts))

    @classmethod
    def decode(cls, data: bytes) -> Archive:
        """DecodeError unless `data` is exactly one archive."""
        parts = _parts(data)
        head = dcbor.decode_map(next(parts, b""), _HEAD, "backup")
        if head["version"] != VERSION:
            raise DecodeError("backup", f"is of version {head['version']}, not {VERSION}")
        entries = tuple(map(_entry, parts))
        if len(entries) != head["count"]:
            raise DecodeError("backup", f"{len(entries)} vTPMs, not {head['count']}")
        for name in ("host", "site", "created"):
            _checked(head[name], name)
        if len({entry.name for entry in entries}) != len(entries):
            raise DecodeError("backup", "has a vTPM twice")
        return cls(head["host"], head["site"], head["created"], entries)


def _framed(value: dict[str, Any]) -> bytes:
    encoded = dcbor.encode(value)
    return len(encoded).to_bytes(_LENGTH, "big") + encoded


def _parts(data: bytes) -> Iterator[bytes]:
    if len(data) > ARCHIVE_MAX:
        raise DecodeError("backup", f"{len(data)} bytes, at most {ARCHIVE_MAX}")
    at = 0
    for _ in range(ENTRIES_MAX + 1):
        if at == len(data):
            return
        size = int.from_bytes(data[at : at + _LENGTH], "big")
        at += _LENGTH + size
        if at > len(data) or size > ENTRY_MAX:
            raise DecodeError("backup", "is cut off, or a part of it is too large")
        yield data[at - size : at]
    if at != len(data):
        raise DecodeError("backup", f"has more than {ENTRIES_MAX} vTPMs")


def _entry(data: bytes) -> Entry:
    value = dcbor.decode_map(data, _ENTRY, "backup")
    if len(value["id"]) != 16 or len(value["instance"]) != 16:
        raise DecodeError("backup", "an id has 16 bytes")
    try:
        instance_name(value["name"])
    except InvalidInput as error:
        raise DecodeError("backup", str(error)) from None
    _checked(value["created"], "time")
    return Entry(**value)


def _checked(text: str, what: str) -> None:
    if len(text) > NAME_MAX or not text.isprintable():
        raise DecodeError("backup", f"its {what} is no such text")
