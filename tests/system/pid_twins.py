"""Run by test_sandbox: a spawner that is PID 1 or 2 of its own PID namespace, forking workers.

Workers are PID 1 of namespaces of their own, or (argument 2) PID 2 as their spawner is. Prints the
Names of the EKs that six of them manufactured.
"""

from __future__ import annotations

import os
import sys

from holdfast.engine.libtpms import Engine, Entropy
from holdfast.linux.namespaces import Clone, fork_into
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.worker.manufacture import make_ecc_keys


def in_new_namespace(number: int) -> bool:
    """Become process `number` (1 or 2) of a new PID namespace; False in everybody else."""
    pid = fork_into(Clone.NEWPID)
    if pid:
        os.waitpid(pid, 0)
        return False
    if number == 2:
        second = os.fork()
        if second:
            os.waitpid(second, 0)
            os._exit(0)
    assert os.getpid() == number
    return True


def main(number: int) -> None:
    if not in_new_namespace(number):
        return
    engine, entropy = Engine(), Entropy()
    entropy.reseed()
    engine.manufacture()
    rq.response(Cc.Startup, engine.process(rq.startup()))
    engine.power_off()
    for _ in range(6):
        if in_new_namespace(number):
            entropy.reseed()
            engine.manufacture()
            rq.response(Cc.Startup, engine.process(rq.startup()))
            print(make_ecc_keys(engine.process).ek.name.hex(), flush=True)
            os._exit(0)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
