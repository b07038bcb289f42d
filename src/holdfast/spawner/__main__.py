"""`python -m holdfast.spawner`: started by `holdfast serve`, and by itself to be renewed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError
from holdfast.linux import cgroup, channel, process
from holdfast.spawner.pool import GROUP, Pool
from holdfast.spawner.service import Spawner, execute_anew


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="holdfast-spawner", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="where daemons connect")
    parser.add_argument("--keeper", type=Path, required=True, help="the keeper's socket")
    parser.add_argument("--blank", type=int, default=3, help="workers kept ready")
    parser.add_argument("--resume", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    process.set_pdeathsig(signal.SIGTERM)
    process.set_dumpable(False)
    pool = Pool(options.blank)
    if options.resume >= 0:
        state = _resume(options.resume)
        spawner = Spawner(pool, socket.socket(fileno=state["listener"]), options.keeper)
        spawner.load(state)
    else:
        cgroup.sweep(GROUP)  # what a predecessor that was killed left behind
        try:
            pool.self_test()
        except (HoldfastError, OSError) as error:
            sys.stderr.write(f"holdfast-spawner: the self-test failed: {error}\n")
            return 1
        spawner = Spawner(pool, channel.listen(options.socket, 0o600), options.keeper)
    signal.signal(signal.SIGTERM, lambda *_: spawner.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's ^C is the supervisor's to act on
    if spawner.run():
        kept = [a for a in arguments if not a.startswith("--resume")]
        execute_anew(spawner.dump(), kept)
    spawner.close()
    options.socket.unlink(missing_ok=True)
    return 0


def _resume(fd: int) -> dict[str, Any]:
    with os.fdopen(fd, "rb") as file:
        state = json.loads(file.read())
    assert isinstance(state, dict)
    while True:  # blank workers of the former self ended with its channels; collect them
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
    return state


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
