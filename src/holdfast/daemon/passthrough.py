"""Which TPM may be passed through to a container: not the one that this host's own keys are in, nor
a vTPM of this host.

To look at a file that we ourselves serve is to wait for ourselves, so this runs in a thread.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.errors import Conflict, InvalidInput
from holdfast.frontend.nodes import Number
from holdfast.measure.mountinfo import parse_mountinfo

_DEFAULT: Final = "/dev/tpm0"  # of tpm2-tss' device TCTI


@dataclass(frozen=True)
class Own:
    """How to tell our own vTPMs: files of theirs are mounted below `run`, nodes have `numbers`."""

    run: Path
    numbers: frozenset[Number]


def check(path: str, anchor: str, ours: Own) -> None:
    """Whether a container may have the TPM at `path`, where `anchor` is the host's TCTI.

    InvalidInput for what is no TPM's exclusive device, Conflict for the anchor and for our own.
    """
    if not path.startswith("/"):
        raise InvalidInput(f"a TPM is named by its device, as /dev/tpm1, not by {path!a}")
    own = _identity(path)
    kind, _, place = anchor.partition(":")
    if kind == "device" and own == _identity(place or _DEFAULT, missing=True):
        raise Conflict(
            f"{path} is this host's anchor (host.tcti is {anchor!a}): it holds the keys of every "
            "vTPM here, and no container gets it"
        )
    if _is_own(path, ours):
        raise Conflict(f"{path} is a vTPM of this host, and no TPM that could be passed through")
    if _name(path).startswith("tpmrm"):
        raise InvalidInput(
            f"{path} has many users at once: name the exclusive device, "
            f"{path.replace('tpmrm', 'tpm')}"
        )


def same(one: str, other: str) -> bool:
    """Whether two devices lead to one TPM."""
    found = _identity(one, missing=True)
    return found is not None and found == _identity(other, missing=True)


def _is_own(path: str, ours: Own) -> bool:
    status = os.stat(path)
    if stat.S_ISCHR(status.st_mode):
        return Number(os.major(status.st_rdev), os.minor(status.st_rdev)) in ours.numbers
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    below = os.fsencode(ours.run) + b"/"
    mounts = parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())
    return any(mount.device == device and mount.point.startswith(below) for mount in mounts)


def _name(path: str) -> str:
    """What the kernel calls a device, whatever its file is called."""
    status = os.stat(path)
    if stat.S_ISCHR(status.st_mode):
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        try:
            text = Path(f"/sys/dev/char/{number}/uevent").read_text()
        except OSError:
            return Path(path).name
        found = re.search(r"^DEVNAME=(.+)$", text, re.MULTILINE)
        if found:
            return found[1]
    return Path(os.path.realpath(path)).name


def _identity(path: str, *, missing: bool = False) -> tuple[object, ...] | None:
    """The same for all devices of one TPM: tpm1 and tpmrm1, in the kernel or in a FUSE mount."""
    try:
        status = os.stat(path)
        name = _name(path)
    except OSError as error:
        if missing:
            return None
        raise InvalidInput(f"{path}: {error.strerror}") from None
    number = re.fullmatch(r"tpm(?:rm)?([0-9]+)", name)
    if number is None or stat.S_ISDIR(status.st_mode):
        raise InvalidInput(f"{path} is not the device of a TPM")
    if stat.S_ISCHR(status.st_mode):
        return ("kernel", int(number[1]))
    return ("file", status.st_dev, int(number[1]))
