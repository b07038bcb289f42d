"""Run by test_worker_box: a spawner's pool that is PID 1 or 2 of a PID namespace of its own.

Each of a hundred workers restores the same TPM, and manufactures one; a line for each worker says
what was random and which EK was made. With `by-hand` as argument the workers are forked without
the pool, each to PID 2 of a namespace of its own: what the pool's workers never are.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from holdfast.engine.libtpms import Engine, Entropy, StateKind
from holdfast.linux import channel
from holdfast.linux.namespaces import Clone
from holdfast.spawner.mother import Mother
from holdfast.spawner.pool import Pool
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.worker.manufacture import make_ecc_keys
from holdfast.worker.tpm import DurableTpm

from .pid_twins import in_new_namespace

COUNT = 100


class Original:
    """One TPM's state, and what a worker that has the engine does with it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        engine.manufacture()
        rq.response(Cc.Startup, engine.process(rq.startup()))
        self._permanent = engine.dump(StateKind.PERMANENT)
        self._volatile = engine.dump(StateKind.VOLATILE)
        engine.power_off()

    def words(self) -> str:
        """Random numbers of the state powered on, and of it restored; the Name of a new EK."""
        engine = self._engine
        tpm = DurableTpm(engine, lambda _: True)
        said = []
        for volatile in (None, self._volatile):
            if volatile is None:
                tpm.restore(self._permanent)
                rq.response(Cc.Startup, engine.process(rq.startup()))
            else:
                engine.restore(self._permanent, volatile)
            tpm.stir()
            said.append(engine.process(rq.get_random(16))[12:].hex())
            engine.power_off()
        engine.manufacture()
        rq.response(Cc.Startup, engine.process(rq.startup()))
        said.append(make_ecc_keys(engine.process).ek.name.hex())
        return " ".join(said)


class Twin(Mother):
    """A mother whose workers are her own children: as process 1, she cannot have siblings."""

    def __init__(self) -> None:
        super().__init__(kin=Clone(0))
        self.version = self.known_bad = ""
        self._original = Original(self.engine)
        self.life = self.say

    def renew(self) -> None:
        """She stays."""

    def say(self, sock: socket.socket, _engine: Engine, _canceller: object) -> NoReturn:
        channel.send(sock, f"{os.getpid()} {self._original.words()}".encode())
        os._exit(0)


def by_pool() -> None:
    pool = Pool(0, Twin())
    for _ in range(COUNT):
        blank = pool.make()
        print(os.getpid(), channel.receive(blank.channel)[0].decode(), flush=True)
        blank.discard()


def by_hand() -> None:
    engine, entropy = Engine(), Entropy()
    entropy.reseed()
    original = Original(engine)
    for _ in range(COUNT):
        if in_new_namespace(2):
            entropy.reseed()
            # The parent is this number in its own namespace, and 0 as seen from here.
            print(2, os.getpid(), original.words(), flush=True)
            os._exit(0)


if __name__ == "__main__":
    by_hand() if sys.argv[1:] == ["by-hand"] else by_pool()
