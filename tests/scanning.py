"""Looking for known secrets: in files, and in the memory of processes, as root sees it.

A secret is looked for in pieces of 16 bytes, because half a key is found as well as a whole one:
as it is, backwards (as a number is kept), and in hexadecimal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PIECE = 16
CHUNK = 16 << 20
PAGE = 4096
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)")
_NO_PAGE = bytes(PAGE)


def patterns(secrets: Mapping[str, bytes]) -> dict[bytes, str]:
    """What to look for, and of which secret it is."""
    made = {}
    for name, secret in secrets.items():
        assert len(secret) >= PIECE, f"{name} is too short to be told from chance"
        for start in {*range(0, len(secret) - PIECE + 1, PIECE), len(secret) - PIECE}:
            piece = secret[start : start + PIECE]
            assert len(set(piece)) > PIECE // 2, f"{name} is no secret: {piece.hex()}"
            text = piece.hex()
            for form in (piece, piece[::-1], text.encode(), text.upper().encode()):
                made[form] = name
    return made


def found(data: bytes, wanted: Mapping[bytes, str]) -> set[str]:
    return {name for form, name in wanted.items() if form in data}


def in_memory(pid: int, wanted: Mapping[bytes, str]) -> set[str]:
    """Names of the secrets in what root can read of a process; all that it may write to."""
    names = set()
    for data in memory(pid):
        names |= found(data, wanted)
    return names


def memory(pid: int) -> Iterator[bytes]:
    """Everything that a process has mapped and could have written, without pages of zeros."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for start, end in _writable(pid):
            for at in range(start, end, CHUNK):
                try:
                    data = os.pread(file.fileno(), min(CHUNK + PIECE * 2, end - at), at)
                except OSError:
                    continue  # what even root cannot read
                yield _without_zeros(data)


def _writable(pid: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        match = _LINE.match(line)
        assert match is not None, line
        start, end, permissions, inode, path = match.groups()
        # A file that was mapped to be read holds what the file holds.
        own = permissions[0] == "r" and (permissions[1] == "w" or inode == "0")
        if own and not path.startswith(("[vvar", "[vdso", "[vsyscall")):
            yield int(start, 16), int(end, 16)


def _without_zeros(data: bytes) -> bytes:
    pages = (data[at : at + PAGE] for at in range(0, len(data), PAGE))
    kept, skipped = [], False
    for page in pages:
        if page == _NO_PAGE[: len(page)]:
            skipped = True
            continue
        if skipped and kept:
            kept.append(bytes(PIECE * 2))  # what is on both sides of a gap does not touch
        kept.append(page)
        skipped = False
    return b"".join(kept)


def in_files(places: Iterable[Path], wanted: Mapping[bytes, str]) -> dict[str, set[str]]:
    """Path → names of the secrets in it, for `places` that are files, and every file below them."""
    hits = {}
    for path in (file for place in places for file in (place, *place.rglob("*"))):
        if path.is_file() and not path.is_symlink():
            names = found(path.read_bytes(), wanted)
            if names:
                hits[str(path)] = names
    return hits
