"""A throw-away TPM for a command or a test: no root, no daemon, nothing left behind.

The TPM is a process of its own (`holdfast.worker.plain`) on sockets in a private directory.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from holdfast.errors import HostError

START_SECONDS: Final = 20.0


@contextmanager
def plain_tpm(state: Path | None = None, replay: Path | None = None) -> Iterator[Path]:
    """Run a plain TPM for as long as the block lasts; yields the path of its socket.

    HostError if it does not start.
    """
    directory = Path(tempfile.mkdtemp(prefix="holdfast-tpm-"))
    process: subprocess.Popen[bytes] | None = None
    read, write = os.pipe()
    try:
        command = [sys.executable, "-P", "-m", "holdfast.worker.plain", "--directory"]
        command += [str(directory)]
        command += ["--ready-fd", str(write)]
        command += ["--state", str(state)] if state is not None else []
        command += ["--replay", str(replay)] if replay is not None else []
        process = subprocess.Popen(command, pass_fds=(write,))
        os.close(write)
        write = -1
        if not select.select([read], [], [], START_SECONDS)[0] or process.poll() is not None:
            raise HostError("the TPM did not start")
        yield directory / "tpm.sock"
    finally:
        os.close(read)
        if write >= 0:
            os.close(write)
        if process is not None:
            process.terminate()
            process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def environment(sock: Path) -> Mapping[str, str]:
    """What makes TPM software use the TPM at `sock` (tpm2-tss' swtpm TCTI)."""
    tcti = f"swtpm:path={sock}"
    names = ("TPM2TOOLS_TCTI", "TPM2_PKCS11_TCTI", "TPM2OPENSSL_TCTI", "TCTI")
    return {**os.environ, **dict.fromkeys(names, tcti)}


def run_command(command: list[str], state: Path | None, replay: Path | None) -> int:
    """Run `command` with a TPM of its own; its exit status."""
    with plain_tpm(state, replay) as sock:
        try:
            return subprocess.run(command, env=environment(sock), check=False).returncode
        except FileNotFoundError:
            raise HostError(f"there is no command {command[0]!a} here") from None
