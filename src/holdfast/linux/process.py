"""What a process does to itself: prctl(2), capabilities, memory locking."""

from __future__ import annotations

import ctypes
import os
import resource
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NAME: Final = 15
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAPABILITIES_MAX: Final = 64
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2
_EINVAL: Final = 22


def _prctl(option: int, argument: int, what: str) -> None:
    longs = [ctypes.c_ulong(value) for value in (argument, 0, 0, 0)]
    if _libc.prctl(ctypes.c_int(option), *longs) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def set_pdeathsig(number: int) -> None:
    """Get this signal when the parent dies. A change of user or group clears it."""
    _prctl(_PR_SET_PDEATHSIG, number, "PR_SET_PDEATHSIG")


def set_dumpable(dumpable: bool) -> None:
    """Whether others of the same user may attach, and whether a core is written."""
    _prctl(_PR_SET_DUMPABLE, int(dumpable), "PR_SET_DUMPABLE")


def set_no_new_privileges() -> None:
    """No execve of ours, or of a child's, gains anything."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


def set_name(name: str) -> None:
    """The name that ps shows: at most 15 bytes."""
    text = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(_PR_SET_NAME, ctypes.addressof(text), "PR_SET_NAME")


def drop_capabilities() -> None:
    """Empty the bounding, ambient and all other capability sets, for good."""
    for capability in range(_CAPABILITIES_MAX):
        try:
            _prctl(_PR_CAPBSET_DROP, capability, "PR_CAPBSET_DROP")
        except OSError as error:
            if error.errno != _EINVAL:  # past the last capability this kernel has
                raise
            break
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, "PR_CAP_AMBIENT")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    # SAFETY: version 3 reads two structures of three 32-bit words.
    if _libc.capset(header, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")


def raise_open_files() -> None:
    """As many open files as we may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def lock_memory() -> None:
    """Keep our pages out of swap: those there are, and later ones where RLIMIT_MEMLOCK has no end.

    Under a finite limit a process that locks later pages too and then gives up its user gets no
    more memory at all.
    """
    flags = _MCL_CURRENT
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        flags |= _MCL_FUTURE
    if _libc.mlockall(ctypes.c_int(flags)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mlockall: {os.strerror(number)}")


def limit(which: int, value: int) -> None:
    """Set a resource limit, soft and hard."""
    resource.setrlimit(which, (value, value))
