"""A real swtpm on Unix sockets, as a host TPM for tests."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from holdfast.protocol.control import Command
from holdfast.tpm2.wire import u32
from tests.asking import connect, until

from .standin import StandIn

READY_SECONDS = 10


@dataclass
class Swtpm(StandIn):
    """One swtpm with its state in `directory`."""

    @property
    def socket(self) -> Path:
        return self.directory / "s"

    @property
    def state_file(self) -> Path:
        return self.directory / "state" / "tpm2-00.permall"

    def start(self) -> None:
        self._start("startup-clear")

    def resume(self) -> None:
        """Power on after `suspend`: TPM2_Startup(STATE)."""
        self._start("startup-state")

    def _start(self, startup: str) -> None:
        state = self.state_file.parent
        state.mkdir(parents=True, exist_ok=True)
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            [
                "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}",
                "--server", f"type=unixio,path={self.socket}",
                "--ctrl", f"type=unixio,path={self.socket}.ctrl",
                "--flags", f"not-need-init,{startup}",
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

    def shut_down(self) -> None:
        self.tool("tpm2_shutdown", "-c")
        self.stop()

    def suspend(self) -> None:
        """As when a host sleeps: TPM2_Shutdown(STATE), then no power."""
        self.tool("tpm2_shutdown")
        self.stop()
