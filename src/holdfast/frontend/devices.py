"""/dev/tpm0 and /dev/tpmrm0 by FUSE or CUSE, behaving as the kernel's TPM devices do.

Semantics of drivers/char/tpm/tpm-dev-common.c: a write is one command, the response waits to be
read, in pieces if the reader likes; a second write before that is EBUSY; a response nobody reads
is dropped after two minutes. /dev/tpm0 has one opener at a time, /dev/tpmrm0 any number, each with
objects of its own.

The same code serves the files of a vTPM that is off: they can be seen and not opened.
Not here: the descriptor of /dev/fuse.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.errors import DecodeError
from holdfast.frontend.page import Page
from holdfast.frontend.resources import Client
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol import fuse
from holdfast.protocol import hibernation as hb
from holdfast.protocol.fuse import Op
from holdfast.tpm2.constants import BUFFER_MAX, HEADER_SIZE

OPEN_MAX: Final = 256  # files of one vTPM open at once
RESPONSE_SECONDS: Final = 120.0
_NANO: Final = 1_000_000_000
_REMEMBER: Final = 3600  # seconds the kernel may keep names and attributes: they never change
TPM0: Final = 2  # the node number of each
TPMRM0: Final = 3
_NODES: Final[Mapping[bytes, int]] = {b"tpm0": TPM0, b"tpmrm0": TPMRM0}
_DIRECTORY: Final = (
    (fuse.ROOT_ID, stat.S_IFDIR >> 12, b"."),
    (fuse.ROOT_ID, stat.S_IFDIR >> 12, b".."),
    (TPM0, stat.S_IFREG >> 12, b"tpm0"),
    (TPMRM0, stat.S_IFREG >> 12, b"tpmrm0"),
)


class _Errno(Exception):
    """A file operation fails with this errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass(eq=False)
class _File:
    """An open file: its client, and the response that waits to be read."""

    node: int
    client: Client
    response: bytes = b""
    offset: int = 0
    deadline: float = 0.0


class Devices:
    """Answers FUSE requests for one vTPM; `vtpm` None while it is off."""

    def __init__(
        self, vtpm: Vtpm | None, page: Page, clock: Callable[[], float], made: int
    ) -> None:
        self._vtpm = vtpm
        self._page = page
        self._clock = clock
        self.made = made  # seconds since the epoch: what stat(2) shows
        self._files: dict[int, _File] = {}
        self._operations: Mapping[int, Callable[[fuse.Request], bytes]] = {
            Op.WRITE: self._write,
            Op.READ: self._read,
            Op.INIT: lambda r: fuse.init_reply(r.unique, r.body),
            Op.LOOKUP: self._lookup,
            Op.GETATTR: self._getattr,
            Op.SETATTR: self._getattr,  # truncation by O_TRUNC or a shell's ">" changes nothing
            Op.OPEN: self._open,
            Op.FLUSH: lambda r: fuse.reply(r.unique),
            Op.RELEASE: self._release,
            Op.OPENDIR: lambda r: fuse.open_reply(r.unique, 0, 0),
            Op.READDIR: self._readdir,
            Op.RELEASEDIR: lambda r: fuse.reply(r.unique),
            Op.STATFS: lambda r: fuse.statfs_reply(r.unique),
            Op.ACCESS: lambda r: fuse.reply(r.unique),
            Op.DESTROY: lambda r: fuse.reply(r.unique),
            Op.IOCTL: lambda r: fuse.error(r.unique, errno.ENOTTY),
        }

    def answer(self, data: bytes, node: int = 0) -> bytes | None:
        """The reply to one request read from /dev/fuse; None where the kernel expects none.

        `node`: which file it is about, where the request came by a descriptor of /dev/cuse, which
        is of one file alone. While it is being served the request is noted in the shared page.
        """
        request = fuse.request(data)
        if request.opcode in fuse.NO_REPLY:
            return None
        if node:
            request = request._replace(node=node)
        self._page.in_flight = request.unique
        operation = self._operations.get(request.opcode)
        if operation is None:
            return fuse.error(request.unique, errno.ENOSYS)
        try:
            return operation(request)
        except _Errno as error:
            return fuse.error(request.unique, error.number)
        except DecodeError:
            return fuse.error(request.unique, errno.EINVAL)

    def answered(self) -> None:
        """The reply has been written."""
        self._page.in_flight = 0

    # --- sleep and wake ---

    def clients(self) -> list[Client]:
        """Of open files, those that are not shared."""
        return [file.client for file in self._files.values() if file.node != TPM0]

    def asleep(self, place: Mapping[Client, int]) -> tuple[hb.File, ...]:
        """The open files, as a successor goes on with them; each client by its `place`."""
        return tuple(
            hb.File(
                handle, file.node, place[file.client], file.response, file.offset,
                int(file.deadline * _NANO),
            )
            for handle, file in self._files.items()
        )  # fmt: skip

    def resume(self, kept: Sequence[hb.File], clients: Sequence[Client]) -> None:
        """Go on with open files, whose clients these are."""
        self._files = {
            file.handle: _File(
                file.node, clients[file.client], file.response, file.offset, file.deadline / _NANO
            )
            for file in kept
        }

    # --- names and attributes ---

    def _attributes(self, node: int) -> fuse.Attributes:
        if node == fuse.ROOT_ID:
            return fuse.Attributes(node, stat.S_IFDIR | 0o755, 2, self.made)
        if node in (TPM0, TPMRM0):
            return fuse.Attributes(node, stat.S_IFREG | 0o666, 1, self.made)
        raise _Errno(errno.ESTALE)

    def _lookup(self, request: fuse.Request) -> bytes:
        node = _NODES.get(request.body.rstrip(b"\0"))
        if request.node != fuse.ROOT_ID or node is None:
            raise _Errno(errno.ENOENT)
        return fuse.entry_reply(request.unique, self._attributes(node), _REMEMBER)

    def _getattr(self, request: fuse.Request) -> bytes:
        return fuse.attributes_reply(request.unique, self._attributes(request.node), _REMEMBER)

    def _readdir(self, request: fuse.Request) -> bytes:
        _, offset, _ = fuse.read_request(request.body)
        return fuse.directory_reply(request.unique, _DIRECTORY, offset)

    # --- open files ---

    def _open(self, request: fuse.Request) -> bytes:
        if self._vtpm is None:
            raise _Errno(errno.ENXIO)
        if len(self._files) >= OPEN_MAX:
            raise _Errno(errno.EMFILE)
        if request.node == TPM0 and self._page.exclusive:
            raise _Errno(errno.EBUSY)
        handle = self._page.new_handle()
        self._files[handle] = self._file(self._vtpm, request.node)
        if request.node == TPM0:
            self._page.exclusive = handle
        flags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_NONSEEKABLE | fuse.FOPEN_STREAM
        return fuse.open_reply(request.unique, handle, flags)

    @staticmethod
    def _file(vtpm: Vtpm, node: int) -> _File:
        return _File(node, vtpm.shared if node == TPM0 else vtpm.attach())

    def _opened(self, request: fuse.Request, handle: int) -> _File:
        """The open file; one that a dead predecessor opened begins anew, with nothing loaded."""
        file = self._files.get(handle)
        if file is None:
            if self._vtpm is None or not handle or len(self._files) >= OPEN_MAX:
                raise _Errno(errno.EIO)
            file = self._files[handle] = self._file(self._vtpm, request.node)
        return file

    def _release(self, request: fuse.Request) -> bytes:
        handle = fuse.handle_of(request.body)
        file = self._files.pop(handle, None)
        if handle == self._page.exclusive:
            self._page.exclusive = 0
        if file is not None and self._vtpm is not None:
            self._vtpm.detach(file.client)
        return fuse.reply(request.unique)

    def _write(self, request: fuse.Request) -> bytes:
        handle, data = fuse.write_request(request.body)
        file = self._opened(request, handle)
        if self._vtpm is None:
            raise _Errno(errno.EIO)
        if file.response and not file.offset and self._clock() < file.deadline:
            raise _Errno(errno.EBUSY)
        if len(data) < HEADER_SIZE:
            raise _Errno(errno.EINVAL)
        declared = int.from_bytes(data[2:6], "big")
        if declared > BUFFER_MAX:
            raise _Errno(errno.E2BIG)
        if declared > len(data):
            raise _Errno(errno.EINVAL)
        file.response = self._vtpm.execute(file.client, data[:declared] if declared else data)
        file.offset = 0
        file.deadline = self._clock() + RESPONSE_SECONDS
        return fuse.write_reply(request.unique, len(data))

    def _read(self, request: fuse.Request) -> bytes:
        handle, _, size = fuse.read_request(request.body)
        file = self._opened(request, handle)
        if file.response and self._clock() >= file.deadline:
            file.response = b""
        start = file.offset
        piece = file.response[start : start + size]
        file.offset = start + len(piece)
        if file.offset >= len(file.response):
            file.response, file.offset = b"", 0
        return fuse.reply(request.unique, piece)
