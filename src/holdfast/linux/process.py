"""What a process does to itself, and in which boot: prctl(2), capabilities, memory locking."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from holdfast.linux import libc_abi

# cffi and not ctypes: a worker shuts its doors with this, and ctypes writes to more of its memory.
_ffi: Final[Any] = libc_abi.ffi
_libc: Final[Any] = _ffi.dlopen(None)
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
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = _ffi.errno
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option: int, argument: int, what: str) -> None:
    _check(_libc.prctl(option, argument, 0, 0, 0), what)


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
    text = _ffi.new("char[]", name.encode()[:15])
    # SAFETY: the kernel copies up to 16 bytes, of which the last is the NUL.
    _prctl(_PR_SET_NAME, int(_ffi.cast("uintptr_t", text)), "PR_SET_NAME")


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
    header = _ffi.new("uint32_t[2]", (_CAPABILITY_VERSION_3, 0))
    # SAFETY: version 3 reads two structures of three 32-bit words.
    _check(_libc.capset(header, _ffi.new("uint32_t[6]")), "capset")


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
    _check(_libc.mlockall(flags), "mlockall")


def limit(which: int, value: int) -> None:
    """Set a resource limit, soft and hard."""
    resource.setrlimit(which, (value, value))


def boot_id() -> UUID:
    """Of the kernel that runs: another after each boot (random(4))."""
    return UUID(_BOOT_ID.read_text().strip())
