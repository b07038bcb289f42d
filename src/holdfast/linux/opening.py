"""Opening files by openat2(2), so that the kernel holds a path inside the tree being measured.

Duty: the two ways in which `measure` opens anything below a directory it holds. Not here: what is
done with the descriptors. Python 3.11 has no openat2 of its own.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import time
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_SYS_OPENAT2: Final = 437  # the same on every architecture
_RESOLVE_NO_XDEV: Final = 0x01
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_NO_SYMLINKS: Final = 0x04
_RESOLVE_BENEATH: Final = 0x08
_RESOLVE_IN_ROOT: Final = 0x10
# The kernel gives up with EAGAIN where a rename, or a change of any mount, races with its walk; a
# mount namespace that is made holds such a lock for as long as all its mounts take to be copied.
_ATTEMPTS: Final = 16  # one after the other
_SECONDS: Final = 5.0  # then with pauses
_PAUSE: Final = 0.001


class _OpenHow(ctypes.Structure):
    """struct open_how of openat2(2)."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_SIZE: Final = ctypes.c_size_t(ctypes.sizeof(_OpenHow))


def open_child(directory: int, name: bytes, flags: int) -> int:
    """Open one entry of `directory`: no symbolic link, and no step onto another mount (EXDEV)."""
    resolve = _RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | _RESOLVE_BENEATH
    return _openat2(directory, name, flags, resolve)


def open_in_root(root: int, path: bytes, flags: int) -> int:
    """Open `path` as a process with `root` as its root directory would; links stay inside it."""
    return _openat2(root, path, flags, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)


def _openat2(directory: int, path: bytes, flags: int, resolve: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    deadline, number = time.monotonic() + _SECONDS, 0
    for attempt in itertools.count(1):
        # SAFETY: `path` and `how` outlive the call, and the kernel is told how's exact size.
        fd = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(directory), path, ctypes.byref(how), _SIZE
        )
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR) or time.monotonic() > deadline:
            break
        if attempt >= _ATTEMPTS:
            time.sleep(_PAUSE)
    raise OSError(number, os.strerror(number), os.fsdecode(path))
