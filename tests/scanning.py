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
EDGE = 2 * PIECE  # the longest form of a piece
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) *(.*)")


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


class Scanner:
    """Looks into one process after the other, once at each page that several have (forks do)."""

    def __init__(self, secrets: Mapping[str, bytes]) -> None:
        self.wanted = patterns(secrets)
        self._clean = {hash(bytes(PAGE))}

    def in_memory(self, pid: int) -> set[str]:
        """Names of the secrets in all that a process may write to, as far as root can read it.

        Nothing of one that has ended.
        """
        names: set[str] = set()
        pages: set[int] = set()
        for data in memory(pid):
            names |= found(self._without_clean(data, pages), self.wanted)
        if not names:
            self._clean |= pages
        return names

    def _without_clean(self, data: bytes, pages: set[int]) -> bytes:
        """Pages not seen yet, and of their neighbours what may be a piece's other half."""
        cut = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
        hashes = [hash(page) for page in cut]
        pages.update(hashes)
        new = [False, *(value not in self._clean for value in hashes), False]
        kept = []
        for number, page in enumerate(cut, 1):
            if new[number]:
                kept.append(page)
            else:
                kept += [page[:EDGE]] * new[number - 1] + [page[-EDGE:]] * new[number + 1]
        return b"".join(kept)


def memory(pid: int) -> Iterator[bytes]:
    """Everything that a process has mapped and could have written."""
    try:
        file = open(f"/proc/{pid}/mem", "rb", buffering=0)  # noqa: SIM115 - it is closed below
    except (FileNotFoundError, ProcessLookupError):
        return
    with file:
        for start, end in _writable(pid):
            for at in range(start, end, CHUNK):
                try:
                    data = os.pread(file.fileno(), min(CHUNK + EDGE, end - at), at)
                except OSError:
                    continue  # what even root cannot read, or is gone
                yield data


def _writable(pid: int) -> Iterator[tuple[int, int]]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return
    for line in lines:
        match = _LINE.match(line)
        assert match is not None, line
        start, end, permissions, inode, path = match.groups()
        # A file that was mapped to be read holds what the file holds.
        own = permissions[0] == "r" and (permissions[1] == "w" or inode == "0")
        if own and not path.startswith(("[vvar", "[vdso", "[vsyscall")):
            yield int(start, 16), int(end, 16)


def in_files(places: Iterable[Path], wanted: Mapping[bytes, str]) -> dict[str, set[str]]:
    """Path → names of the secrets in it, for `places` that are files, and every file below them."""
    hits = {}
    for path in (file for place in places for file in (place, *place.rglob("*"))):
        if path.is_file() and not path.is_symlink():
            names = found(path.read_bytes(), wanted)
            if names:
                hits[str(path)] = names
    return hits
