"""Where a container meets its vTPM: a FUSE mount with the devices, and a tmpfs with the sockets.

    DIRECTORY/dev/tpm0, tpmrm0        bound into the container as /dev/tpm0 and /dev/tpmrm0
    DIRECTORY/run/tpm.sock, .ctrl     bound, read-only, as /run/vtpm
    DIRECTORY/run/evidence.sock, eventlog.json

Both are made afresh for every run, so that holding an old mount gives no way to a later run.
Not here: who answers on the descriptors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.linux.mounts import Ms, mount, mount_fuse, mounted, unmount

DATA_SOCKET: Final = "tpm.sock"
CONTROL_SOCKET: Final = "tpm.sock.ctrl"  # where tpm2-tss looks for it
EVIDENCE_SOCKET: Final = "evidence.sock"
EVENT_LOG: Final = "eventlog.json"
BACKLOG: Final = 128
_TMPFS: Final = "size=4m,nr_inodes=64,mode=0755"


@dataclass(frozen=True)
class Attachment:
    """The open ends of one run: descriptors that the caller owns."""

    fuse: int
    data: socket.socket
    control: socket.socket
    evidence: socket.socket

    def close(self) -> None:
        os.close(self.fuse)
        for sock in (self.data, self.control, self.evidence):
            sock.close()


def attach(directory: Path, name: str, owner: int) -> Attachment:
    """Make both mounts under `directory`, replacing what an earlier run left there.

    On the host only root and `owner` (a uid) come through to them: whoever does may use the vTPM.
    """
    detach(directory)
    devices, run = directory / "dev", directory / "run"
    directory.mkdir(mode=0o700, parents=True)
    os.chown(directory, owner, -1)
    devices.mkdir()
    run.mkdir()
    fuse = mount_fuse(devices, f"holdfast:{name}")
    try:
        mount("holdfast", run, "tmpfs", Ms.NOSUID | Ms.NODEV | Ms.NOEXEC, _TMPFS)
    except OSError:
        os.close(fuse)
        unmount(devices)
        raise
    data, control, evidence = (
        _listen(run / name) for name in (DATA_SOCKET, CONTROL_SOCKET, EVIDENCE_SOCKET)
    )
    return Attachment(fuse, data, control, evidence)


def adopt(directory: Path, fds: list[int]) -> Attachment:
    """The ends of a run that goes on, from their holder; only the evidence socket is new."""
    fuse, data, control = fds
    path = directory / "run" / EVIDENCE_SOCKET
    path.unlink(missing_ok=True)
    return Attachment(fuse, _stream(data), _stream(control), _listen(path))


def _stream(fd: int) -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)


def _listen(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(os.fspath(path))
    path.chmod(0o666)  # of a container any user: the mount is the authority
    server.listen(BACKLOG)
    return server


def detach(directory: Path) -> None:
    """Undo `attach`. Processes that still hold the old mounts hold dead ones."""
    for name in ("dev", "run"):
        place = directory / name
        while mounted(place):
            unmount(place)
        with contextlib.suppress(FileNotFoundError):
            place.rmdir()
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
