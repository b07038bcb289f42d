"""`worker.plain` on a state that it neither made nor stirs: DIRECTORY/permanent and /volatile.

Everything that serves is `worker.plain`'s own. What it would do first is left out, because
afterwards its random numbers are its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from holdfast.linux import process
from holdfast.worker import plain


class Restored(plain.PlainTpm):
    """A TPM that goes on from a volatile state."""

    def __init__(self, directory: Path) -> None:
        super().__init__(None)
        permanent = (directory / "permanent").read_bytes()
        self.engine.power_off()
        self.engine.restore(permanent, (directory / "volatile").read_bytes())
        self.tpm.committed(permanent)
        self._state = directory / "state"
        self._state.mkdir(exist_ok=True)


def main() -> None:
    directory, ready = Path(sys.argv[1]), int(sys.argv[2])
    process.set_pdeathsig(15)

    def announce() -> None:
        os.write(ready, b"\n")
        os.close(ready)

    plain.serve(directory, Restored(directory), announce)


if __name__ == "__main__":
    main()
