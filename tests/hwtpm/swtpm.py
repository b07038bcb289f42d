"""A real swtpm on Unix sockets, as a host TPM for tests; ended by its own pid."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import HostTpm
from holdfast.hwtpm.transport import PATIENCE_TO_MAKE_KEYS, Transport
from holdfast.protocol.control import Command
from holdfast.tpm2.wire import u32
from tests.asking import connect, until

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
        until("swtpm answers", self._answers, READY_SECONDS)
        self.socket.chmod(0o666)  # the keeper gives up being root

    def _answers(self) -> bool:
        """On its control channel, when both are listened to: a socket is there before that."""
        try:
            with connect(self.socket.with_name("s.ctrl"), READY_SECONDS) as sock:
                sock.sendall(u32(Command.GET_CONFIG))
                return bool(sock.recv(8))
        except OSError:
            return False

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
