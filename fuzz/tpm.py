"""A whole TPM behind its filter, as a worker has it: what a client's bytes must not be able to do.

One engine in this process (libtpms), the linked profile, no sandbox. Every input meets the same
TPM in the same state, so that what breaks it breaks it again.
"""

from __future__ import annotations

from functools import cache
from typing import Final

from holdfast.engine.libtpms import Engine, Entropy, StateKind
from holdfast.errors import DecodeError
from holdfast.frontend.filter import Profile
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol.frames import FrameBuffer
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import BUFFER_MAX, HEADER_SIZE, Rc
from holdfast.tpm2.structures import PcrSelection
from holdfast.worker import manufacture
from holdfast.worker.tpm import DurableTpm

_TAGS: Final = (b"\x80\x01", b"\x80\x02", b"\x00\xc4")
_SELECTIONS: Final = tuple(PcrSelection.of(Alg.SHA256, range(at, at + 8)) for at in (0, 8))


class Subject:
    """A manufactured, powered-on TPM that can be had again and again as it was."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._engine.manufacture()
        rq.response(Cc.Startup, self._engine.process(rq.startup()))
        manufacture.make_ecc_keys(self._engine.process)
        for pcr in range(16):
            extend = rq.pcr_extend(pcr, {Alg.SHA256: bytes((pcr,)) * 32})
            rq.response(Cc.PCR_Extend, self._engine.process(extend))
        self._permanent = self._engine.dump(StateKind.PERMANENT)
        self._volatile = self._engine.dump(StateKind.VOLATILE)
        self._engine.power_off()

    def holds(self, data: bytes) -> bool:
        """Whatever the bytes: each command is answered as a TPM answers, no measured PCR moves.

        True if a command did something.
        """
        engine = self._engine
        engine.restore(self._permanent, self._volatile)
        try:
            tpm = DurableTpm(engine, lambda _: True)
            tpm.committed(self._permanent)
            before = self._pcrs()
            succeeded = self._played(Vtpm(tpm.execute, Profile.LINKED, engine.process), data)
            assert self._pcrs() == before
        finally:
            engine.power_off()
        return succeeded

    @staticmethod
    def _played(vtpm: Vtpm, data: bytes) -> bool:
        client = vtpm.attach()
        try:
            commands = FrameBuffer().feed(data)
        except DecodeError:
            return False
        codes = set()
        for command in commands:
            response = vtpm.execute(client, command)
            assert response[:2] in _TAGS
            assert HEADER_SIZE <= len(response) <= BUFFER_MAX
            assert int.from_bytes(response[2:6], "big") == len(response)
            code = int.from_bytes(response[6:10], "big")
            assert code != Rc.FAILURE
            codes.add(code)
        vtpm.detach(client)
        return Rc.SUCCESS in codes

    def _pcrs(self) -> tuple[bytes, ...]:
        values: tuple[bytes, ...] = ()
        for selection in _SELECTIONS:
            values += rq.pcr_read_values(self._engine.process(rq.pcr_read(selection)))[1]
        return values


@cache
def subject() -> Subject:
    """The one of this process: libtpms holds one TPM."""
    engine = Engine()
    Entropy().reseed()
    return Subject(engine)


def holds(data: bytes) -> bool:
    """The property, of bytes from a client."""
    return subject().holds(data)
