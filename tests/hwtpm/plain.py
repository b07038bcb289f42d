"""Our own plain TPM (`holdfast tpm`) as a host TPM for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .standin import StandIn

SAID_MAX = 4096  # bytes of why it does not start


@dataclass
class Plain(StandIn):
    """One plain TPM, its state kept unprotected."""

    @property
    def socket(self) -> Path:
        return self.directory / "tpm.sock"

    @property
    def state_file(self) -> Path:
        return self.directory / "state" / "permanent"

    def start(self) -> None:
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [
                sys.executable, "-P", "-m", "holdfast.worker.plain", "--directory",
                str(self.directory), "--state", str(self.state_file.parent),
                "--ready-fd", str(write),
            ],
            pass_fds=(write,),
        )  # fmt: skip
        os.close(write)
        with os.fdopen(read, "rb") as said:
            assert said.read(SAID_MAX) == b"\n"

    def shut_down(self) -> None:
        """It does so at SIGTERM."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(10) == 0
        self.process = None
