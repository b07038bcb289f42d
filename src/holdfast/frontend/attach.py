"""Where a container meets its vTPM: a FUSE mount with the devices, and a tmpfs with the sockets.

    DIRECTORY/dev/tpm0, tpmrm0        bound into the container as /dev/tpm0 and /dev/tpmrm0
    DIRECTORY/run/tpm.sock, .ctrl     bound, read-only, as /run/vtpm
    DIRECTORY/run/evidence.sock, eventlog.json

Both are made afresh for every run, so that holding an old mount gives no way to a later run.
Not here: who answers on the descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from holdfast.frontend import nodes
from holdfast.frontend.nodes import NodeKind, Nodes, Number
from holdfast.linux.mounts import Ms, mount, mount_fuse, mounted, unmount

DATA_SOCKET: Final = "tpm.sock"
CONTROL_SOCKET: Final = "tpm.sock.ctrl"  # where tpm2-tss looks for it
EVIDENCE_SOCKET: Final = "evidence.sock"
EVENT_LOG: Final = "eventlog.json"
BACKLOG: Final = 128
_TMPFS: Final = "size=4m,nr_inodes=64,mode=0755"
_ANY: Final = 0xFFFFFFFF  # ACL_UNDEFINED_ID (linux/posix_acl.h): a row that names nobody


@dataclass(eq=False)
class Attachment:
    """The open ends of one run: descriptors that the caller owns."""

    directory: Path
    fuse: int
    data: socket.socket
    control: socket.socket
    evidence: socket.socket
    nodes: Nodes = field(default_factory=Nodes)
    surplus: tuple[Nodes, ...] = ()  # with numbers that are taken; not closed by `close`

    def take_evidence(self) -> socket.socket:
        """The evidence socket, for who serves it, and is to close it."""
        return socket.socket(fileno=self.evidence.detach())

    def listeners(self) -> tuple[socket.socket, socket.socket]:
        """For commands and for controls: made anew, at the same places, if they were closed."""
        run = self.directory / "run"
        if self.data.fileno() < 0:
            self.data = _listen_again(run / DATA_SOCKET)
        if self.control.fileno() < 0:
            self.control = _listen_again(run / CONTROL_SOCKET)
        return self.data, self.control

    def close_listeners(self) -> None:
        """Somebody else has them too. Who waits in them waits on."""
        self.data.close()
        self.control.close()

    def close(self) -> None:
        os.close(self.fuse)
        for sock in (self.data, self.control, self.evidence):
            sock.close()
        self.nodes.close()


def attach(
    directory: Path,
    name: str,
    owner: int,
    kind: NodeKind = NodeKind.NONE,
    taken: Collection[Number] = (),
) -> Attachment:
    """Make both mounts under `directory`, replacing what an earlier run left there, and the nodes.

    On the host only root and `owner` (a uid) come through to them: whoever does may use the vTPM.
    The nodes get no number that is `taken`.
    """
    detach(directory)
    devices, run = directory / "dev", directory / "run"
    directory.mkdir(mode=0o700, parents=True)
    devices.mkdir()
    run.mkdir()
    with contextlib.ExitStack() as undo:
        fuse = mount_fuse(devices, f"holdfast:{name}")
        undo.callback(os.close, fuse)
        undo.callback(unmount, devices)
        mount("holdfast", run, "tmpfs", Ms.NOSUID | Ms.NODEV | Ms.NOEXEC, _TMPFS)
        undo.callback(unmount, run)
        ends: list[socket.socket] = []
        for socket_name in (DATA_SOCKET, CONTROL_SOCKET, EVIDENCE_SOCKET):
            ends.append(undo.enter_context(_listen(run / socket_name)))
        if owner:
            _let_pass(directory, owner)
        made, surplus = nodes.make(kind, name, taken)
        undo.pop_all()
    data, control, evidence = ends
    return Attachment(directory, fuse, data, control, evidence, made, surplus)


def _let_pass(directory: Path, uid: int) -> None:
    """Let one user go through a directory that stays root's: who could write there, could have
    root mount and write elsewhere by a link. Where there are no ACLs, nobody but root passes.
    """
    rows = ((1, 7, _ANY), (2, 1, uid), (4, 0, _ANY), (16, 1, _ANY), (32, 0, _ANY))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *row) for row in rows)
    try:
        os.setxattr(directory, "system.posix_acl_access", acl)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise


def adopt(directory: Path, fds: list[int]) -> Attachment:
    """The ends of a run that goes on, from their holder; only the evidence socket is new."""
    try:
        fuse, data, control, *served = fds
        kind = NodeKind.of(len(served))
        evidence = _listen_again(directory / "run" / EVIDENCE_SOCKET)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    nodes = Nodes(kind, tuple(served))
    return Attachment(directory, fuse, _stream(data), _stream(control), evidence, nodes)


def _stream(fd: int) -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)


def _listen_again(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    return _listen(path)


def _listen(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(os.fspath(path))
        path.chmod(0o666)  # of a container any user: the mount is the authority
        server.listen(BACKLOG)
    except OSError:
        server.close()
        raise
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
