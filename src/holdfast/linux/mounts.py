"""Mounting: mount(2), umount2(2), pivot_root(2), and a FUSE connection without libfuse."""

from __future__ import annotations

import ctypes
import os
from enum import IntFlag
from pathlib import Path
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_SYS_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}
MNT_DETACH: Final = 2
FUSE_DEVICE: Final = Path("/dev/fuse")


class Ms(IntFlag):
    """MS_* flags of mount(2)."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    REMOUNT = 32
    BIND = 4096
    REC = 16384
    PRIVATE = 1 << 18


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str | Path, kind: str, flags: Ms, data: str = "") -> None:
    """mount(2)."""
    # SAFETY: every argument is a NUL-terminated copy that outlives the call.
    result = _libc.mount(
        source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode()
    )
    _check(result, f"mount {kind} on {target}")


def unmount(target: str | Path, flags: int = MNT_DETACH) -> None:
    """umount2(2), by default lazily: whoever still holds it keeps it until they let go."""
    _check(_libc.umount2(os.fsencode(target), flags), f"unmount {target}")


def pivot_root_here() -> None:
    """Make the current directory the root and drop the old one, stacked in the same place."""
    number = _SYS_PIVOT_ROOT[os.uname().machine]
    _check(_libc.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    unmount(".")


def mount_fuse(target: Path, name: str) -> int:
    """Mount a FUSE file system that any user may use; returns its descriptor of /dev/fuse.

    The kernel checks permissions by the files' mode bits (default_permissions).
    """
    fd = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40755,user_id=0,group_id=0,allow_other,default_permissions"
    try:
        mount(name, target, "fuse.holdfast", Ms.NOSUID | Ms.NODEV | Ms.NOEXEC, options)
    except OSError:
        os.close(fd)
        raise
    return fd


def mounted(target: Path) -> bool:
    """Whether something is mounted at `target` in our namespace.

    By the numbers of mounts: the whole table grows with every vTPM. What is mounted there is not
    asked: a FUSE file system that nobody serves would not answer.
    """
    return _mount_of(target) not in (None, _mount_of(target.parent))


def _mount_of(path: Path) -> int | None:
    """The number of the mount that a path leads to (proc_pid_fdinfo(5)); None if it does not."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
    finally:
        os.close(fd)
