"""The limits of /dev/tpm0 and /dev/tpmrm0 that no test waits for or fills: two minutes, 256 files.

How programs meet these files is shown by tests/system/test_device_semantics.py.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from itertools import count

import pytest

from holdfast.frontend import page
from holdfast.frontend.devices import OPEN_MAX, RESPONSE_SECONDS, TPM0, TPMRM0, Devices
from holdfast.frontend.filter import Profile
from holdfast.frontend.page import SharedPage
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol.fuse import Op
from holdfast.tpm2 import requests as rq

MADE = 1_700_000_000  # what stat(2) shows
GET_RANDOM = rq.get_random(6)
ANSWER = rq.error_response(0) + b"random"


class Kernel:
    """The other side of /dev/fuse, and its clock; layouts as in linux/fuse.h."""

    def __init__(self, shared: SharedPage) -> None:
        self.now = 1000.0
        vtpm = Vtpm(lambda _: ANSWER, Profile.LINKED)
        self._devices = Devices(vtpm, shared, lambda: self.now, MADE)
        self._numbers = count(2, 2)

    def _ask(self, opcode: Op, node: int, body: bytes) -> bytes:
        """What follows fuse_out_header; OSError with its error."""
        unique = next(self._numbers)
        head = struct.pack("=IIQQIIIHH", 40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0)
        answer = self._devices.answer(head + body)
        self._devices.answered()
        assert answer is not None
        size, error, number = struct.unpack_from("=IiQ", answer)
        assert (size, number) == (len(answer), unique)
        if error:
            raise OSError(-error, os.strerror(-error))
        return answer[16:]

    def open(self, node: int) -> int:
        body = self._ask(Op.OPEN, node, struct.pack("=II", os.O_RDWR, 0))
        return int(struct.unpack_from("=Q", body)[0])

    def release(self, node: int, handle: int) -> None:
        self._ask(Op.RELEASE, node, struct.pack("=QIIQ", handle, 0, 0, 0))

    def write(self, node: int, handle: int, data: bytes) -> None:
        head = struct.pack("=QQIIQII", handle, 0, len(data), 0, 0, 0, 0)
        written = self._ask(Op.WRITE, node, head + data)
        assert struct.unpack("=II", written) == (len(data), 0)

    def read(self, node: int, handle: int, size: int = 4096) -> bytes:
        return self._ask(Op.READ, node, struct.pack("=QQIIQII", handle, 0, size, 0, 0, 0, 0))


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    fd = page.create()
    shared = SharedPage(fd)
    os.close(fd)
    yield Kernel(shared)
    shared.close()


def refused(number: int, action: object, *arguments: object) -> None:
    assert callable(action)
    with pytest.raises(OSError) as caught:
        action(*arguments)
    assert caught.value.errno == number


@pytest.mark.parametrize("node", [TPM0, TPMRM0], ids=["tpm0", "tpmrm0"])
def test_a_response_nobody_reads_is_dropped_after_two_minutes(kernel: Kernel, node: int) -> None:
    assert RESPONSE_SECONDS == 120
    handle = kernel.open(node)
    kernel.write(node, handle, GET_RANDOM)
    kernel.now += 119.9
    refused(errno.EBUSY, kernel.write, node, handle, GET_RANDOM)  # and it is no less old for this
    kernel.now += 0.1
    assert kernel.read(node, handle) == b""
    kernel.write(node, handle, GET_RANDOM)
    kernel.now += 120
    kernel.write(node, handle, GET_RANDOM)  # in the place of one that was dropped
    kernel.now += 119.9
    assert kernel.read(node, handle) == ANSWER


def test_the_rest_of_a_response_is_dropped_as_late_as_all_of_it(kernel: Kernel) -> None:
    handle = kernel.open(TPMRM0)
    kernel.write(TPMRM0, handle, GET_RANDOM)
    assert kernel.read(TPMRM0, handle, 10) == ANSWER[:10]
    kernel.now += 120
    assert kernel.read(TPMRM0, handle) == b""
    kernel.write(TPMRM0, handle, GET_RANDOM)
    assert kernel.read(TPMRM0, handle) == ANSWER  # from its beginning


def test_any_number_of_files_are_open_up_to_256_of_both(kernel: Kernel) -> None:
    assert OPEN_MAX == 256
    first = kernel.open(TPM0)
    handles = [kernel.open(TPMRM0) for _ in range(255)]
    assert len({first, *handles}) == 256
    refused(errno.EMFILE, kernel.open, TPMRM0)
    for handle in handles:
        kernel.write(TPMRM0, handle, GET_RANDOM)
    for handle in handles:
        assert kernel.read(TPMRM0, handle) == ANSWER
    kernel.release(TPMRM0, handles[0])
    last = kernel.open(TPMRM0)
    assert last not in handles
    refused(errno.EMFILE, kernel.open, TPMRM0)
    kernel.release(TPM0, first)
    assert kernel.open(TPMRM0)
    refused(errno.EMFILE, kernel.open, TPM0)
