"""What wears the host TPM: nothing that a container does, however fast; measured by its NV memory.

Each of the two TPMs that can stand for a host's writes its state file anew whenever its NV is.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import NvAttr, Rc, Rh
from holdfast.tpm2.wire import sized, u16
from tests.asking import rc, until
from tests.hwtpm.conftest import powered
from tests.hwtpm.swtpm import Swtpm

from .serve import Serve, a_host
from .test_faults import GET_RANDOM, Stream, attest, define, read, write

LOCKED = 0x01500020
WRITES = 500
GUESSES = 100
POWER_CYCLES = 20  # as many as an owner may have at once
CRASHES = 3
QUOTES = 20


@dataclass
class Worn:
    """A host with a vTPM that is on, and the file that its TPM has its NV in."""

    host: Serve
    state: Path

    def wrote(self, action: Callable[[], object]) -> bool:
        """Whether NV memory was written during `action`, be it with the same content."""
        os.utime(self.state, ns=(0, 0))
        before = self.state.stat()
        action()
        after = self.state.stat()
        return (before.st_ino, 0) != (after.st_ino, after.st_mtime_ns)

    @property
    def durable_anchors(self) -> int:
        return int(self.host.call("GET", "/v1/status")["store"]["durable_anchors"]["used"])

    def epoch(self) -> int:
        """How much was committed in this boot: that it did something at all."""
        return int(self.host.call("GET", "/v1/status")["store"]["commits"])

    # --- what a container can do ---

    def write(self) -> None:
        with closing(Stream(self.host.place("web"))) as wire:
            for value in range(WRITES):
                assert write(wire, value) == 0

    def guess(self) -> None:
        guess = rq.command(
            Cc.NV_Write, (LOCKED, LOCKED), (rq.Auth(password=b"wrong"),), sized(bytes(8)) + u16(0)
        )
        with closing(Stream(self.host.place("web"))) as wire:
            codes = [rc(wire.exchange(guess)) for _ in range(GUESSES)]
        assert codes[-1] == Rc.LOCKOUT

    def start_over(self) -> None:
        """Its TPM, as an operating system does; and the container."""
        with closing(Stream(self.host.place("web"))) as wire:
            for command in (rq.shutdown(), rq.startup()) * POWER_CYCLES:
                wire.exchange(command)
        for _ in range(POWER_CYCLES):
            self.host.call("POST", "/v1/vtpms/web/stop", {})
            self.host.power_on("web")

    def crash(self) -> None:
        for _ in range(CRASHES):
            before = self.host.workers()
            for worker in before:
                os.kill(worker, signal.SIGKILL)
            until("a new worker", partial(self._others, before))
        with closing(Stream(self.host.place("web"))) as wire:  # until that one serves
            assert rc(wire.exchange(GET_RANDOM)) == 0

    def _others(self, than: list[int]) -> bool:
        now = self.host.workers()
        return bool(now) and not {*now} & {*than}

    def attest(self) -> None:
        for _ in range(QUOTES):
            attest(self.host, "web")


@pytest.fixture(params=["plain", "swtpm"])
def worn(request: pytest.FixtureRequest) -> Iterator[Worn]:
    if request.param == "plain":
        with a_host() as host:
            yield Worn(host, host.directory / "host-tpm" / "permanent")
    else:
        with powered(Swtpm) as swtpm, a_host(tcti=swtpm.tcti) as host:
            yield Worn(host, swtpm.state_file)


def test_nothing_that_a_container_does_as_fast_as_it_can_writes_to_nv_of_the_host_tpm(
    worn: Worn,
) -> None:
    worn.host.create("web")
    worn.host.power_on("web")
    with closing(Stream(worn.host.place("web"))) as wire:
        define(wire)
        exposed = NvAttr.AUTHREAD | NvAttr.AUTHWRITE
        assert rc(wire.exchange(rq.nv_define_space(Rh.OWNER, LOCKED, exposed, 8))) == 0
    before = worn.durable_anchors
    for action in (worn.write, worn.guess, worn.start_over, worn.crash, worn.attest):
        committed = worn.epoch()
        assert not worn.wrote(action), action.__name__
        assert action == worn.attest or worn.epoch() > committed
    assert worn.durable_anchors == before
    with closing(Stream(worn.host.place("web"))) as wire:
        assert read(wire) == WRITES - 1
    # It is seen if there is one: what an administrator destroys is remembered.
    assert not worn.wrote(lambda: worn.host.call("POST", "/v1/vtpms/web/stop", {}))
    assert worn.wrote(lambda: worn.host.call("DELETE", "/v1/vtpms/web"))
    assert worn.durable_anchors == before + 1
