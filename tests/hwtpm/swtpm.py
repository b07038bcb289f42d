"""A real swtpm on Unix sockets, as a host TPM for tests; ended by its own pid."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import HostTpm
from holdfast.hwtpm.transport import PATIENCE_TO_MAKE_KEYS, Transport

READY_SECONDS = 10


@dataclass
class Swtpm:
    """One swtpm with its state in `directory`."""

    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.directory / "s"

    @property
    def tcti(self) -> str:
        return f"swtpm:path={self.socket}"

    def start(self) -> None:
        """Power on: TPM2_Startup(CLEAR) included."""
        state = self.directory / "state"
        state.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [
                "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}",
                "--server", f"type=unixio,path={self.socket}",
                "--ctrl", f"type=unixio,path={self.socket}.ctrl",
                "--flags", "not-need-init,startup-clear",
            ],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(self.socket.exists)
        self.socket.chmod(0o666)  # the keeper gives up being root

    def stop(self) -> None:
        """Power off, without warning."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def tool(self, *command: str) -> str:
        """Run a program of tpm2-tools against it."""
        environment = {**os.environ, "TPM2TOOLS_TCTI": self.tcti, "TSS2_LOG": "all+NONE"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def extend(self, pcr: int) -> None:
        """Make the boot state another."""
        self.tool("tpm2_pcrextend", f"{pcr}:sha256={'ab' * 32}")

    def context(self, patience: float = PATIENCE_TO_MAKE_KEYS) -> Context:
        return Context(Transport(self.tcti, patience))

    def host(self, context: Context) -> HostTpm:
        return HostTpm(context)


def wait_for(condition: object, seconds: float = READY_SECONDS) -> None:
    """Wait until `condition()` is true; there is no event to wait for in another program."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
