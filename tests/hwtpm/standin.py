"""A software TPM as a host TPM for tests: a process, its state, and its power switch."""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from holdfast.hwtpm.context import Context
from holdfast.hwtpm.host import HostTpm
from holdfast.hwtpm.transport import PATIENCE_TO_MAKE_KEYS, Transport


@dataclass
class StandIn(ABC):
    """One TPM with its state below `directory`; ended by its own pid."""

    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def socket(self) -> Path:
        """Where it answers."""

    @property
    @abstractmethod
    def state_file(self) -> Path:
        """What it has in its NV memory."""

    @abstractmethod
    def start(self) -> None:
        """Power on: TPM2_Startup(CLEAR) included."""

    @abstractmethod
    def shut_down(self) -> None:
        """Power off as an operating system does it, after TPM2_Shutdown(CLEAR)."""

    @property
    def tcti(self) -> str:
        return f"swtpm:path={self.socket}"

    def stop(self) -> None:
        """Power off, without warning."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def wrote(self, action: Callable[[], object]) -> bool:
        """Whether NV memory was written during `action`, be it with the same content."""
        os.utime(self.state_file, ns=(0, 0))
        before = self.state_file.stat()
        action()
        after = self.state_file.stat()
        return (before.st_ino, 0) != (after.st_ino, after.st_mtime_ns)

    def tool(self, *command: str, ok: bool = True) -> str:
        """Run a program of tpm2-tools against it; what it says."""
        environment = {**os.environ, "TPM2TOOLS_TCTI": self.tcti, "TSS2_LOG": "all+NONE"}
        done = subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert (done.returncode == 0) is ok, done.stderr
        return done.stdout if ok else done.stderr

    def extend(self, pcr: int) -> None:
        """Make the boot state another."""
        self.tool("tpm2_pcrextend", f"{pcr}:sha256={'ab' * 32}")

    def context(self, patience: float = PATIENCE_TO_MAKE_KEYS) -> Context:
        return Context(Transport(self.tcti, patience))

    def host(self, context: Context) -> HostTpm:
        return HostTpm(context)
