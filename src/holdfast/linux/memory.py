"""Memory protection: no page of a worker is both writable and executable."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_PROT_READ_EXEC: Final = 1 | 4


def writable_code() -> tuple[tuple[int, int], ...]:
    """(start, length) of every mapping of ours that is writable and executable."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, *_ = line.split(None, 2)
        if permissions[1] == "w" and permissions[2] == "x":
            start, end = (int(part, 16) for part in span.split("-"))
            found.append((start, end - start))
    return tuple(found)


def forbid_writable_code() -> None:
    """Take write permission from every such mapping.

    cffi's callbacks leave one: they are written once, when they are made. Freeing them later
    would fault, so the process leaves by os._exit.
    """
    for start, length in writable_code():
        # SAFETY: the range was just read from our own map; libffi writes to its closures only
        # when one is made or freed, which does not happen again.
        result = _libc.mprotect(
            ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_PROT_READ_EXEC)
        )
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"mprotect: {os.strerror(number)}")
