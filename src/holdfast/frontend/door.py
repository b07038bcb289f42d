"""The door of one run: its open ends, and who answers at the device while no worker does.

While the vTPM is off its files can be seen and not opened; a runtime looks at them before its hooks
run. Only the kernel's requests for names are read here, never a client's command.
"""

from __future__ import annotations

import asyncio
import os
import time

from holdfast.errors import DecodeError
from holdfast.frontend.attach import Attachment
from holdfast.frontend.devices import Devices
from holdfast.frontend.page import SharedPage
from holdfast.protocol.fuse import REQUEST_MAX


class Door:
    """What `instance.vtpm.Door` wants of an attachment."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._page: SharedPage | None = None
        self._devices: Devices | None = None

    def descriptors(self) -> tuple[int, int, int]:
        """/dev/fuse, data listener, control listener: for their holder."""
        ends = self._attachment
        return ends.fuse, ends.data.fileno(), ends.control.fileno()

    def share(self, page: int) -> None:
        """Map the page that this run's workers write; takes the descriptor over."""
        former, self._page = self._page, SharedPage(page)
        os.close(page)
        if former is not None:
            self._page.take_over(former)
            former.close()

    def fail_in_flight(self) -> None:
        """Answer, with an error, what a worker took and did not answer."""
        if self._page is not None:
            self._page.fail_in_flight(self._attachment.fuse)

    def answer(self) -> None:
        """Answer at the device from now on: the vTPM is off."""
        assert self._page is not None
        fuse = self._attachment.fuse
        os.set_blocking(fuse, False)
        self._devices = Devices(None, self._page, time.monotonic, int(time.time()))
        asyncio.get_running_loop().add_reader(fuse, self._one)

    def _one(self) -> None:
        if self._devices is None:
            return
        try:
            reply = self._devices.answer(os.read(self._attachment.fuse, REQUEST_MAX))
            if reply is not None:
                os.write(self._attachment.fuse, reply)
                self._devices.answered()
        except (BlockingIOError, FileNotFoundError, InterruptedError):
            return
        except (OSError, DecodeError):
            self.leave()

    def leave(self) -> None:
        """Answer no more: a worker does, or nobody."""
        if self._devices is not None:
            asyncio.get_running_loop().remove_reader(self._attachment.fuse)
            self._devices = None

    def close(self) -> None:
        """Close our copies of the ends."""
        self.leave()
        if self._page is not None:
            self._page.close()
        self._attachment.close()
