"""A disk of a test's own: a FUSE file system in memory, in a process of its own.

It fails on demand as a disk does, and it can write down all that is done to it, in order, so that
a test can make of it what a power cut leaves.

Not here: what a power cut leaves (`tests/system/test_power_cut.py`).
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import select
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from holdfast.linux.mounts import mount_fuse, unmount
from holdfast.protocol import fuse

MARKS: Final = "marks"  # a file: what is written to it is of the test, between all else
_WRITE_MAX: Final = 128 << 10
_BUFFER: Final = _WRITE_MAX + 4096
_BIG_WRITES: Final = 1 << 5  # FUSE_BIG_WRITES: else one write is one a page
_PAGE: Final = 4096
_ROOM: Final = 1 << 30  # bytes that it says it has
_REPLY_MAX: Final = 4096

_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHII6I")
_ATTR: Final = struct.Struct("=6Q10I")
_SETATTR: Final = struct.Struct("=IIQQQQQQIIIIIIII")
_WRITE: Final = struct.Struct("=QQIIQII")
_STATFS: Final = struct.Struct("=5Q4I6I")
_DIRENT: Final = struct.Struct("=QQII")
_SET_MODE, _SET_UID, _SET_GID, _SET_SIZE = 1, 2, 4, 8


class Done(NamedTuple):
    """One thing that was done to the disk. `name` is of a directory's entry, `node` what it is of.

    what: write, size, sync, link, unlink, rename, sync-names, mark.
    """

    what: str
    node: int = 0
    offset: int = 0
    data: bytes = b""
    name: str = ""
    other: str = ""


@dataclass
class _Node:
    number: int
    mode: int
    uid: int = 0
    gid: int = 0
    name: str = ""
    data: bytearray = field(default_factory=bytearray)
    entries: dict[str, _Node] = field(default_factory=dict)

    def encode(self) -> bytes:
        size = len(self.data)
        links = 2 if stat.S_ISDIR(self.mode) else 1
        return _ATTR.pack(
            self.number, size, -(-size // 512), 0, 0, 0, 0, 0, 0, self.mode, links, self.uid,
            self.gid, 0, _PAGE, 0,
        )  # fmt: skip


class _Server:
    """What answers the kernel, and the test."""

    def __init__(self, fd: int, control: socket.socket) -> None:
        self._fd = fd
        self._control = control
        root = _Node(fuse.ROOT_ID, stat.S_IFDIR | 0o755)
        self._nodes = {fuse.ROOT_ID: root}
        self._faults: dict[str, int] = {}  # read, write, sync, change: errno
        self._of: list[str] = []  # names of the files that have them; without any, all
        self._kept: dict[int, bytes] = {}  # contents that a sync which fails goes back to
        self._recording = False
        self._done: list[Done] = []
        self._caller = (0, 0)
        self._answers: dict[int, Callable[[_Node, bytes], bytes]] = {
            fuse.Op.LOOKUP: lambda n, b: self._entry(self._in(n, b[:-1])),
            fuse.Op.GETATTR: lambda n, _: self._attributes(n),
            fuse.Op.SETATTR: self._set_attributes,
            fuse.Op.ACCESS: lambda *_: b"",
            fuse.Op.OPEN: lambda *_: struct.pack("=QII", 0, 0, 0),
            fuse.Op.OPENDIR: lambda *_: struct.pack("=QII", 0, 0, 0),
            fuse.Op.RELEASE: lambda *_: b"",
            fuse.Op.RELEASEDIR: lambda *_: b"",
            fuse.Op.FLUSH: lambda *_: b"",
            fuse.Op.READ: self._read,
            fuse.Op.READDIR: self._list,
            fuse.Op.WRITE: self._write,
            fuse.Op.STATFS: self._room,
            8: lambda n, b: self._make(n, struct.unpack_from("=I", b)[0], b[16:-1]),  # MKNOD
            9: lambda n, b: self._make(  # MKDIR
                n, stat.S_IFDIR | struct.unpack_from("=I", b)[0], b[8:-1]
            ),
            10: self._unlink,
            11: self._unlink,  # RMDIR
            12: lambda n, b: self._rename(n, b, 8),
            20: self._sync,
            30: self._sync_names,  # FSYNCDIR
            35: self._create,
            45: lambda n, b: self._rename(n, b, 16),  # RENAME2
        }

    def serve(self) -> None:
        """Until the test lets go, or somebody unmounts it."""
        while True:
            ready, _, _ = select.select([self._fd, self._control], [], [])
            if self._control in ready:
                data = self._control.recv(_REPLY_MAX)
                if not data:
                    return
                self._control.sendall(json.dumps(self._obey(json.loads(data))).encode())
            if self._fd in ready:
                try:
                    answer = self._answer()
                    if answer:
                        os.write(self._fd, answer)
                except OSError as error:
                    if error.errno == errno.ENODEV:
                        return
                    if error.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                        raise  # else: who asked has gone

    def _obey(self, order: dict[str, Any]) -> Any:
        if "faults" in order:
            self._faults, self._of = order["faults"], order["of"]
            lost = self._nodes.values() if order["lose"] else ()
            self._kept = {node.number: bytes(node.data) for node in lost}
        if "record" in order:
            self._recording = True
        if "take" in order:
            with open(order["take"], "wb") as file:
                pickle.dump([tuple(done) for done in self._done], file)
        return {}

    def _answer(self) -> bytes:
        data = os.read(self._fd, _BUFFER)
        asked = fuse.request(data)
        self._caller = struct.unpack_from("=II", data, 24)
        if asked.opcode in fuse.NO_REPLY:
            return b""
        if asked.opcode == fuse.Op.INIT:
            out = _INIT_OUT.pack(
                fuse.MAJOR, fuse.MINOR, 0, _BIG_WRITES, 16, 12, _WRITE_MAX, 1, *(0,) * 10
            )
            return fuse.reply(asked.unique, out)
        answer = self._answers.get(asked.opcode)
        if answer is None:
            return fuse.error(asked.unique, errno.ENOSYS)
        try:
            return fuse.reply(asked.unique, answer(self._nodes[asked.node], asked.body))
        except OSError as error:
            return fuse.error(asked.unique, error.errno or errno.EIO)

    def _note(self, node: _Node, done: Done) -> None:
        if self._recording and not node.name.endswith("-shm"):  # of no use after a power cut
            self._done.append(done)

    def _may(self, what: str, node: _Node) -> None:
        number = self._faults.get(what)
        if number and (not self._of or node.name in self._of):
            raise OSError(number, os.strerror(number))

    # --- names ---

    def _in(self, directory: _Node, name: bytes) -> _Node:
        node = directory.entries.get(name.decode())
        if node is None:
            raise OSError(errno.ENOENT, "")
        return node

    def _entry(self, node: _Node) -> bytes:
        return struct.pack("=4Q2I", node.number, 0, 0, 0, 0, 0) + node.encode()

    def _attributes(self, node: _Node) -> bytes:
        return struct.pack("=QII", 0, 0, 0) + node.encode()

    def _make(self, directory: _Node, mode: int, name: bytes) -> bytes:
        number = len(self._nodes) + 1
        node = _Node(number, mode, *self._caller, name.decode())
        self._may("change", node)
        self._nodes[number] = directory.entries[node.name] = node
        self._note(node, Done("link", number, name=node.name))
        return self._entry(node)

    def _create(self, directory: _Node, body: bytes) -> bytes:
        _, mode = struct.unpack_from("=II", body)
        return self._make(directory, mode, body[16:-1]) + struct.pack("=QII", 0, 0, 0)

    def _unlink(self, directory: _Node, body: bytes) -> bytes:
        node = self._in(directory, body[:-1])
        self._may("change", node)
        if node.entries:
            raise OSError(errno.ENOTEMPTY, "")
        del directory.entries[node.name]
        self._note(node, Done("unlink", node.number, name=node.name))
        return b""

    def _rename(self, directory: _Node, body: bytes, head: int) -> bytes:
        (target,) = struct.unpack_from("=Q", body)
        old, new, _ = body[head:].split(b"\0")
        node = self._in(directory, old)
        self._may("change", node)
        del directory.entries[node.name]
        self._note(node, Done("rename", node.number, name=node.name, other=new.decode()))
        node.name = new.decode()
        self._nodes[target].entries[node.name] = node
        return b""

    def _list(self, directory: _Node, body: bytes) -> bytes:
        _, offset, size, _ = struct.unpack_from("=QQII", body)
        out = b""
        for index, node in enumerate([*directory.entries.values()][offset:], offset + 1):
            name = node.name.encode()
            entry = _DIRENT.pack(node.number, index, len(name), stat.S_IFMT(node.mode) >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(out) + len(entry) > size:
                break
            out += entry
        return out

    def _sync_names(self, directory: _Node, _: bytes) -> bytes:
        self._may("sync", directory)
        self._note(directory, Done("sync-names", directory.number))
        return b""

    # --- content ---

    def _set_attributes(self, node: _Node, body: bytes) -> bytes:
        valid, _, _, size, *_, mode, _, uid, gid, _ = _SETATTR.unpack_from(body)
        self._may("change", node)
        if valid & _SET_MODE:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        if valid & _SET_UID:
            node.uid = uid
        if valid & _SET_GID:
            node.gid = gid
        if valid & _SET_SIZE:
            node.data = resized(node.data, size)
            self._note(node, Done("size", node.number, size))
        return self._attributes(node)

    def _read(self, node: _Node, body: bytes) -> bytes:
        self._may("read", node)
        _, offset, size, _ = struct.unpack_from("=QQII", body)
        return bytes(node.data[offset : offset + size])

    def _write(self, node: _Node, body: bytes) -> bytes:
        self._may("write", node)
        _, offset, *_ = _WRITE.unpack_from(body)
        data = body[_WRITE.size :]
        if node.name == MARKS:
            self._note(node, Done("mark", data=data))
        else:
            put(node.data, offset, data)
            self._note(node, Done("write", node.number, offset, data))
        return struct.pack("=II", len(data), 0)

    def _sync(self, node: _Node, _: bytes) -> bytes:
        try:
            self._may("sync", node)
        except OSError:
            if node.number in self._kept:
                node.data = bytearray(self._kept[node.number])
            raise
        self._note(node, Done("sync", node.number))
        return b""

    def _room(self, *_: object) -> bytes:
        blocks = _ROOM // _PAGE
        return _STATFS.pack(blocks, blocks, blocks, 1 << 20, 1 << 20, _PAGE, 255, _PAGE, *(0,) * 7)


def put(content: bytearray, offset: int, data: bytes) -> None:
    """What a write does; what it leaves out is zeros."""
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def resized(content: bytearray, size: int) -> bytearray:
    return content[:size] + bytes(max(0, size - len(content)))


class Disk:
    """The test's end of one."""

    def __init__(self, place: Path, control: socket.socket) -> None:
        self.place = place
        self._control = control

    def _order(self, **order: Any) -> None:
        self._control.sendall(json.dumps(order).encode())
        assert json.loads(self._control.recv(_REPLY_MAX)) == {}

    def fail(self, *of: str, lose: bool = False, **faults: int) -> None:
        """From now on `read`, `write`, `sync` or `change` (of names, sizes, modes) fail so.

        Of files with these names, or of all. Without a fault it is mended. `lose`: when a sync
        fails, what was written since now is lost, as a disk does it; the kernel remembers it until
        nobody has the file open.
        """
        self._order(faults=faults, of=of, lose=lose)

    def forget(self, *names: str) -> None:
        """Have the kernel ask the disk again for what it remembers of these files."""
        for name in names:
            fd = os.open(self.place / name, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def record(self) -> None:
        """Write down what is done from now on."""
        self._order(record=True)

    def recorded(self, scratch: Path) -> list[Done]:
        self._order(take=str(scratch))
        with scratch.open("rb") as file:
            return [Done(*done) for done in pickle.load(file)]


@contextmanager
def a_disk(place: Path) -> Iterator[Disk]:
    """One that is mounted on `place`."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = mount_fuse(place, "disk")
    command = [sys.executable, "-m", "tests.disk", str(fd), str(theirs.fileno())]
    try:
        process = subprocess.Popen(
            command, pass_fds=(fd, theirs.fileno()), cwd=Path(__file__).parents[1]
        )
        theirs.close()
        os.close(fd)
        try:
            control.settimeout(30)
            yield Disk(place, control)
        finally:
            unmount(place)
            control.close()
            process.kill()
            process.wait()
    except BaseException:
        theirs.close()
        raise


if __name__ == "__main__":
    _Server(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))).serve()
