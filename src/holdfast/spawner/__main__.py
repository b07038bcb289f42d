"""`python -m holdfast.spawner`: started by `holdfast serve`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from holdfast.errors import HoldfastError
from holdfast.linux import cgroup, channel, process
from holdfast.spawner.pool import GROUP, MotherProcess, Pool
from holdfast.spawner.service import Spawner
from holdfast.spawner.trial import self_test


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="holdfast-spawner", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True, help="where daemons connect")
    parser.add_argument("--keeper", type=Path, required=True, help="the keeper's socket")
    parser.add_argument("--blank", type=int, default=3, help="workers kept ready")
    options = parser.parse_args(arguments)
    process.set_pdeathsig(signal.SIGTERM)
    process.set_dumpable(False)
    process.raise_open_files()
    cgroup.sweep(GROUP)  # what a predecessor that was killed left behind
    try:
        mother = MotherProcess()
        pool = Pool(options.blank, mother)
        self_test(pool)
    except (HoldfastError, OSError) as error:
        sys.stderr.write(f"holdfast-spawner: the self-test failed: {error}\n")
        return 1
    spawner = Spawner(pool, channel.listen(options.socket, 0o600), options.keeper)
    signal.signal(signal.SIGTERM, lambda *_: spawner.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's ^C is the supervisor's to act on
    spawner.run()
    spawner.close()
    mother.close()
    options.socket.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
