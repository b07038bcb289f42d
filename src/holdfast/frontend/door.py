"""The door of one run: its open ends, and who answers at the device while no worker does.

While the vTPM is off its files can be seen and not opened; a runtime looks at them before its hooks
run. Only the kernel's requests for names are read here, never a client's command; by vtpm_proxy a
command is the only request there is, and is answered as a TPM does that has no power.
"""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Callable
from functools import partial

from holdfast.errors import DecodeError
from holdfast.frontend.attach import Attachment
from holdfast.frontend.devices import TPM0, TPMRM0, Devices
from holdfast.frontend.nodes import NodeKind, Nodes
from holdfast.frontend.page import Page, SharedPage, Words
from holdfast.frontend.proxy import answer, locality_answer
from holdfast.protocol.fuse import REQUEST_MAX
from holdfast.tpm2.constants import BUFFER_MAX, Rc
from holdfast.tpm2.requests import error_response


class Unpowered:
    """Answers at a vTPM's devices while it has no power; the descriptors stay their owner's."""

    def __init__(self, nodes: Nodes, fuse: int | None = None) -> None:
        self._devices = Devices(None, Page(), time.monotonic, int(time.time()))
        self._watched: list[int] = []
        if fuse is not None:
            self._watch(fuse, self._one, 0)
        if nodes.kind is NodeKind.CUSE:
            for fd, node in zip(nodes.fds, (TPM0, TPMRM0), strict=True):
                self._watch(fd, self._one, node)
        elif nodes.kind is NodeKind.VTPM_PROXY:
            (server,) = nodes.fds
            self._watch(server, self._refuse, 0)

    def _watch(self, fd: int, serve: Callable[[int, int], None], node: int) -> None:
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, partial(serve, fd, node))
        self._watched.append(fd)

    def _one(self, fd: int, node: int) -> None:
        try:
            reply = self._devices.answer(os.read(fd, REQUEST_MAX), node)
            if reply is not None:
                os.write(fd, reply)
                self._devices.answered()
        except (BlockingIOError, FileNotFoundError, InterruptedError):
            return
        except (OSError, DecodeError):
            self.leave()

    def _refuse(self, fd: int, _node: int) -> None:
        ready = select.poll()
        ready.register(fd, select.POLLIN)
        if not ready.poll(0):
            return  # somebody else took it: a read would wait for the next
        try:
            command = os.read(fd, BUFFER_MAX)  # readable: the driver has one, and waits
        except OSError:
            self.leave()
            return
        answer(fd, locality_answer(command) or error_response(Rc.INITIALIZE))

    def leave(self) -> None:
        """Answer no more: a worker does, or nobody."""
        while self._watched:
            asyncio.get_running_loop().remove_reader(self._watched.pop())


class Door:
    """What `instance.door.Door` wants of an attachment."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._page: SharedPage | None = None  # of the worker that lives, or died last
        self._words = Words()  # what was in it, while there is none
        self._unpowered: Unpowered | None = None

    @property
    def nodes(self) -> str:
        return self._attachment.nodes.kind.value

    def descriptors(self) -> tuple[int, ...]:
        """/dev/fuse, data listener, control listener, nodes: for their holder."""
        ends = self._attachment
        data, control = ends.listeners()
        return ends.fuse, data.fileno(), control.fileno(), *ends.nodes.fds

    def held(self) -> None:
        """Their holder has them: keep only what could not be made again."""
        self._attachment.close_listeners()

    def share(self, page: int) -> None:
        """Map the page of this run's worker; takes the descriptor over."""
        self.unshare()
        self._page = SharedPage(page)
        os.close(page)

    def unshare(self) -> None:
        """There is no worker, and that in good order: keep of its page what is in it."""
        if self._page is not None:
            self._words = self._page.words
            self._page.close()
            self._page = None

    @property
    def words(self) -> tuple[int, int]:
        """What is known of open files, as `lc.Hold` says it."""
        return self._words if self._page is None else self._page.words

    def used(self) -> float:
        """When the worker that lives served somebody last (monotonic); later than now: it lies."""
        if self._page is None:
            return 0.0
        with self._page.used as used:
            return float(used[0])

    def fail_in_flight(self) -> None:
        """Answer, with an error, what a worker took and did not answer."""
        if self._page is not None:
            ends = self._attachment
            self._page.fail_in_flight(ends.fuse, ends.nodes.kind, ends.nodes.fds)

    def answer(self) -> None:
        """Answer at the device from now on: the vTPM is off."""
        ends = self._attachment
        self._unpowered = Unpowered(ends.nodes, ends.fuse)

    def leave(self) -> None:
        """Answer no more: a worker does, or nobody."""
        if self._unpowered is not None:
            self._unpowered.leave()
            self._unpowered = None

    def close(self) -> None:
        """Close our copies of the ends."""
        self.leave()
        self.unshare()
        self._attachment.close()
