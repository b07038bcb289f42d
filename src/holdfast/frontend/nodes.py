"""Real device nodes for a container, where the kernel can make them: by vtpm_proxy, else by CUSE.

Both make character devices that live as long as the descriptors of their server. By vtpm_proxy it
is the kernel's own TPM driver, with its resource manager at tpmrm0, that talks to the vTPM; before
the device appears the driver asks the TPM what it is, so somebody has to answer (`worker`).

Not here: who serves the descriptors (`devices` for CUSE, `proxy`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from holdfast.errors import DecodeError, HostError, InvalidInput
from holdfast.linux import vtpm_proxy
from holdfast.protocol import fuse

CUSE: Final = "/dev/cuse"
DEVICES: Final = ("tpm0", "tpmrm0")  # as a container knows them
_SYS: Final = Path("/sys/class")


class NodeKind(Enum):
    """What makes a container's device nodes; NONE: it gets files of a FUSE file system."""

    NONE = ""
    CUSE = "cuse"
    VTPM_PROXY = "vtpm-proxy"

    @property
    def descriptors(self) -> int:
        """How many serve the nodes of one vTPM."""
        return _DESCRIPTORS[self]

    @classmethod
    def of(cls, descriptors: int) -> NodeKind:
        """The kind with so many. InvalidInput if there is none."""
        for kind, count in _DESCRIPTORS.items():
            if count == descriptors:
                return kind
        raise InvalidInput(f"{descriptors} descriptors serve no device nodes")


_DESCRIPTORS: Final = {NodeKind.NONE: 0, NodeKind.CUSE: 2, NodeKind.VTPM_PROXY: 1}


class Asked(Enum):
    """How somebody wants a container to meet its vTPM."""

    AUTO = "auto"
    FUSE = "fuse"
    CUSE = "cuse"
    VTPM_PROXY = "vtpm-proxy"


class Number(NamedTuple):
    """Which device a node is of."""

    major: int
    minor: int


@dataclass(frozen=True)
class Nodes:
    """What serves the nodes, as descriptors of the caller's.

    `names`: of the two devices in sysfs. `given`: numbers that the kernel told when it made them.
    """

    kind: NodeKind = NodeKind.NONE
    fds: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    given: tuple[Number, ...] = ()

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def chosen(asked: Asked) -> NodeKind:
    """What to make the nodes by on this kernel. InvalidInput if it has not what was asked for."""
    proxy, cuse = Path(vtpm_proxy.DEVICE).exists(), Path(CUSE).exists()
    match asked:
        case Asked.FUSE:
            return NodeKind.NONE
        case Asked.AUTO if proxy:
            return NodeKind.VTPM_PROXY
        case Asked.AUTO:
            return NodeKind.CUSE if cuse else NodeKind.NONE
        case Asked.VTPM_PROXY if not proxy:
            raise InvalidInput(f"there is no {vtpm_proxy.DEVICE}: modprobe tpm_vtpm_proxy")
        case Asked.CUSE if not cuse:
            raise InvalidInput(f"there is no {CUSE}: modprobe cuse")
        case _:
            return NodeKind(asked.value)


def make(
    kind: NodeKind, name: str, taken: Collection[Number] = ()
) -> tuple[Nodes, tuple[Nodes, ...]]:
    """Make the nodes of a vTPM; and those that came in between with numbers that are `taken`.

    HostError if the kernel makes none.
    """
    with contextlib.ExitStack() as undo:
        surplus: list[Nodes] = []
        for attempt in range(len(taken) + 1):
            try:
                made = _make(kind, name, attempt)
            except (OSError, DecodeError) as error:
                raise HostError(f"no device node by {kind.value}: {error}") from None
            if not set(made.given) & set(taken):
                undo.pop_all()
                return made, tuple(surplus)
            surplus.append(made)
            undo.callback(made.close)
        raise HostError(f"{kind.value} has no device with a number that is not in use")


def _make(kind: NodeKind, name: str, attempt: int) -> Nodes:
    match kind:
        case NodeKind.NONE:
            return Nodes()
        case NodeKind.CUSE:
            return _by_cuse(f"{name}.{attempt}" if attempt else name)
        case NodeKind.VTPM_PROXY:
            device = vtpm_proxy.new_device()
            names = (f"tpm/tpm{device.number}", f"tpmrm/tpmrm{device.number}")
            return Nodes(kind, (device.fd,), names, (Number(device.major, device.minor),))


def _by_cuse(name: str) -> Nodes:
    with contextlib.ExitStack() as undo:
        fds, names = [], []
        for device in DEVICES:
            fd = os.open(CUSE, os.O_RDWR | os.O_CLOEXEC)
            undo.callback(os.close, fd)
            called = f"holdfast!{name}!{device}"  # /dev/holdfast/NAME/DEVICE
            os.write(fd, fuse.cuse_init_reply(os.read(fd, fuse.REQUEST_MAX), called))
            fds.append(fd)
            names.append(f"cuse/{called}")
        given = tuple(map(_number, names))
        undo.pop_all()
        return Nodes(NodeKind.CUSE, tuple(fds), tuple(names), given)


def numbers(nodes: Nodes) -> tuple[Number, ...]:
    """Which devices tpm0 and tpmrm0 are. HostError if the kernel has not made them."""
    try:
        return tuple(_number(name) for name in nodes.names)
    except OSError as error:
        raise HostError(f"no device node by {nodes.kind.value}: {error}") from None


def numbers_yet(nodes: Nodes) -> tuple[Number, ...] | None:
    """The same, or None while there are none."""
    try:
        return numbers(nodes)
    except HostError:
        return None


def _number(name: str) -> Number:
    major, _, minor = (_SYS / name / "dev").read_text().strip().partition(":")
    return Number(int(major), int(minor))
