"""Device nodes made by the kernel's vtpm_proxy driver (include/uapi/linux/vtpm_proxy.h)."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final, NamedTuple

DEVICE: Final = "/dev/vtpmx"
_NEW_DEV: Final = 0xC014A100  # VTPM_PROXY_IOC_NEW_DEV
_FLAG_TPM2: Final = 1
_NEW: Final = struct.Struct("=IIIII")  # flags, number, server's descriptor, major, minor


class ProxyDevice(NamedTuple):
    """/dev/tpm`number`: `fd` is its server's end, which reads commands and writes responses."""

    fd: int
    number: int
    major: int
    minor: int


def new_device() -> ProxyDevice:
    """Have the kernel make a TPM 2.0 device, which lives as long as the descriptor."""
    with open(DEVICE, "r+b", buffering=0) as control:
        # SAFETY: the kernel reads and writes exactly these 20 bytes.
        answer = fcntl.ioctl(control, _NEW_DEV, _NEW.pack(_FLAG_TPM2, 0, 0, 0, 0))
    _, number, fd, major, minor = _NEW.unpack(answer)
    os.set_inheritable(fd, False)
    return ProxyDevice(fd, number, major, minor)
