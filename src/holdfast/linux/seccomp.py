"""System call filters: an allow-list, and death to everything else.

The program is built once by libseccomp and loaded as bytes by every process it is for: building
takes milliseconds, loading microseconds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

from holdfast.errors import HostError
from holdfast.linux import libc_abi, seccomp_abi

LIBRARY: Final = "libseccomp.so.2"
KILL_PROCESS: Final = 0x80000000
ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
LOG: Final = 0x7FFC0000
_BAD_ARCHITECTURE: Final = 2  # SCMP_FLTATR_ACT_BADARCH
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_INSTRUCTION: Final = 8  # bytes of a struct sock_filter


class Op(IntEnum):
    """enum scmp_compare."""

    NE = 1
    EQ = 4
    MASKED_EQ = 7


class Match(NamedTuple):
    """A condition on one argument; with MASKED_EQ, `value` is compared after `mask`."""

    argument: int
    op: Op
    value: int
    mask: int = 0


Rule = Sequence[Match]  # all must hold; none: always


def errno_action(number: int) -> int:
    """Make the call fail with this errno."""
    return _ERRNO | number


def build(
    allow: Mapping[str, Rule],
    *,
    otherwise: int = KILL_PROCESS,
    fail: Mapping[str, int] | None = None,
) -> bytes:
    """The filter that allows `allow`, lets `fail` fail with an errno, and does `otherwise`.

    A name that this architecture does not have is left out: it cannot be called.
    """
    ffi: Any = seccomp_abi.ffi
    try:
        lib: Any = ffi.dlopen(LIBRARY)
    except OSError:
        raise HostError(f"{LIBRARY} is not installed (Debian: apt install libseccomp2)") from None
    context = lib.seccomp_init(otherwise)
    if context == ffi.NULL:
        raise HostError("libseccomp cannot make a filter")
    try:
        # Through another ABI: by default that ends the thread alone, and the others go on.
        if lib.seccomp_attr_set(context, _BAD_ARCHITECTURE, otherwise) != 0:
            raise HostError("libseccomp refuses what is to happen in another architecture's name")
        rows = [(name, ALLOW, rule) for name, rule in allow.items()]
        rows += [(name, errno_action(number), ()) for name, number in (fail or {}).items()]
        for row in rows:
            _add(ffi, lib, context, row)
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            if lib.seccomp_export_bpf(context, fd) != 0:
                raise HostError("libseccomp cannot export the filter")
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
    finally:
        lib.seccomp_release(context)


def _add(ffi: Any, lib: Any, context: Any, row: tuple[str, int, Rule]) -> None:
    name, action, rule = row
    number = lib.seccomp_syscall_resolve_name(name.encode())
    if number < 0:
        return
    matches = ffi.new("struct scmp_arg_cmp[]", len(rule) or 1)
    for slot, match in zip(matches, rule, strict=False):
        slot.arg, slot.op = match.argument, match.op
        if match.op is Op.MASKED_EQ:
            slot.datum_a, slot.datum_b = match.mask, match.value
        else:
            slot.datum_a = match.value
    if lib.seccomp_rule_add_array(context, action, number, len(rule), matches) != 0:
        raise HostError(f"libseccomp refuses the rule for {name}")


def load(program: bytes) -> None:
    """Put this process (which has no_new_privs) under the filter, for good."""
    ffi: Any = libc_abi.ffi
    code = ffi.from_buffer(program)
    fprog = ffi.new("struct sock_fprog *", (len(program) // _INSTRUCTION, code))
    # SAFETY: the kernel copies the program; both live until the call returns.
    address = int(ffi.cast("uintptr_t", fprog))
    if ffi.dlopen(None).prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, address, 0, 0) != 0:
        raise OSError(ffi.errno, f"seccomp: {os.strerror(ffi.errno)}")
