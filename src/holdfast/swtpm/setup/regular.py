"""Reading files that others name or leave: regular ones alone, for others might keep us waiting."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read(path: Path, size: int) -> bytes:
    """Up to `size` bytes. OSError, which it also is if this is a FIFO, a device or the like."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read(size)
