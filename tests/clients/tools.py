"""Programs that use a TPM, run for a test: each succeeds, or is refused for the reason given.

Not here: which TPM (`conftest`), what is tested.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

Way = str
WAYS: dict[Way, str] = {
    "socket": "swtpm:path={place}/run/tpm.sock",
    "tpm0": "device:{place}/dev/tpm0",
    "tpmrm0": "device:{place}/dev/tpmrm0",
}
SECONDS = 60.0
# What a program would else take from whoever runs the tests.
OTHERS = ("TPM2", "TSS2", "TPM_", "TCTI", "OPENSSL", "SSH_", "DBUS_", "PKCS11")


def environment(**more: str) -> dict[str, str]:
    """The present one without anything that says where a TPM is, and with `more`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OTHERS)}
    return {**kept, "LC_ALL": "C", **more}


@dataclass
class Programs:
    """Programs in a directory, with an environment."""

    directory: Path
    environment: dict[str, str]

    def run(self, *command: str | Path, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            command, cwd=self.directory, env=self.environment, input=given, capture_output=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip

    def out(self, *command: str | Path, given: bytes = b"") -> bytes:
        """Its standard output; it must end with 0."""
        done = self.run(*command, given=given)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def fails(self, *command: str | Path, given: bytes = b"") -> str:
        """What it says when it does not succeed, as it must not; nor may it crash."""
        done = self.run(*command, given=given)
        assert done.returncode > 0, (command, done.returncode, done.stdout, done.stderr)
        return (done.stdout + done.stderr).decode()

    def write(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(data)
        return path

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()


class Package(Programs):
    """Programs of one package; those that did what they should are put into `ran`."""

    def __init__(self, directory: Path, environment: dict[str, str], ran: set[str]) -> None:
        super().__init__(directory, environment)
        self._ran = ran

    def other(self, *command: str) -> bytes:
        """A program of the package that has another kind of name."""
        output = self.out(*command)
        self._ran.add(command[0])
        return output


class Tools(Package):
    """tpm2-tools, called as in a shell: `tpm("sign -c key.ctx -o s message")`."""

    def __init__(self, directory: Path, tcti: str, ran: set[str] | None = None) -> None:
        super().__init__(directory, environment(TPM2TOOLS_TCTI=tcti), set() if ran is None else ran)
        self.tcti = tcti

    def __call__(self, line: str, given: bytes = b"") -> str:
        """Run it; it must succeed. Its standard output."""
        return self.data(line, given).decode()

    def data(self, line: str, given: bytes = b"") -> bytes:
        command = shlex.split(f"tpm2_{line}")
        output = self.out(*command, given=given)
        self._ran.add(command[0])
        return output

    def refused(self, code: int, line: str, given: bytes = b"") -> None:
        """Run it; the TPM must answer `code`."""
        command = shlex.split(f"tpm2_{line}")
        said = self.fails(*command, given=given)
        assert f"(0x{code:X})" in said, (line, hex(code), said)
        self._ran.add(command[0])

    def invalid(self, line: str, given: bytes = b"") -> str:
        """Run it; the tool itself must find what it was given wrong."""
        command = shlex.split(f"tpm2_{line}")
        said = self.fails(*command, given=given)
        assert "Esys_" not in said, (line, said)
        return said

    def inventory(self) -> list[str]:
        """What clients can leave in a TPM, once objects and sessions are flushed."""
        for kind in ("-t", "-l", "-s"):
            self(f"flushcontext {kind}")
        kinds = ("transient", "persistent", "nv-index", "loaded-session", "saved-session")
        return [self(f"getcap handles-{kind}") for kind in kinds]


# TPM_RC (Part 2, 6.6) that a test expects: of a first session unless the name says otherwise.
POLICY_FAIL = 0x99D
AUTH_FAIL = 0x98E
BAD_AUTH = 0x9A2
NO_COMMAND = 0x143
LOCALITY = 0x907
VALUE_P1 = 0x1C4
