"""Certificates from the `create_certs_tool` of swtpm_setup.conf(5), run as swtpm_setup runs it.

It gets its own process group, no shell and no standard input, and a bounded time: after that the
group is killed. What it prints goes to the log.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Final

from holdfast.errors import HostError
from holdfast.swtpm.setup import certificates, regular
from holdfast.swtpm.setup.config import SetupConfig
from holdfast.swtpm.setup.manufacture import Facts
from holdfast.tpm2.algorithms import Alg, Curve
from holdfast.tpm2.constants import ObjectAttr
from holdfast.tpm2.structures import Public
from holdfast.worker.manufacture import NV_INDEX_MAX

ENDING: Final = (signal.SIGTERM, signal.SIGINT)
_OUTPUT_MAX: Final = 16 * 1024  # bytes of what it prints that are shown
_CURVES: Final = {Curve.NIST_P384: "secp384r1"}


class Tool:
    """The program that signs, and what it is told of the TPM."""

    def __init__(
        self, config: SetupConfig, facts: Facts, vmid: str | None, log: str,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """`log`: the path of the log file, or empty. HostError if there is no such program."""
        path = shutil.which(config.tool)
        if path is None:
            raise HostError(f"Could not find {config.tool} in PATH.")
        self._path = path
        self._name = Path(path).name
        self._seconds = config.tool_seconds
        self._say = say
        self._common = [
            *(("--logfile", log) if log else ()),
            *(("--vmid", vmid) if vmid is not None else ()),
            "--tpm-spec-family", facts.family,
            "--tpm-spec-level", str(facts.level),
            "--tpm-spec-revision", str(facts.revision),
            "--tpm-manufacturer", facts.manufacturer,
            "--tpm-model", facts.model,
            "--tpm-version", facts.version,
            "--tpm2",
            *(("--configfile", config.tool_config) if config.tool_config else ()),
            *(("--optsfile", config.tool_options) if config.tool_options else ()),
        ]  # fmt: skip

    def endorsement(self, ek: Public) -> bytes:
        signs = []
        if ObjectAttr.SIGN in ek.attributes:
            signs = ["--allow-signing"]
            signs += ["--decryption"] if ObjectAttr.DECRYPT in ek.attributes else []
        certificate = self._run("ek", "ek.cert", ek, signs)
        certificates.check_key(certificate, ek, self._name)
        return certificate

    def platform(self, ek: Public) -> bytes:
        return self._run("platform", "platform.cert", ek, ())

    def _run(self, kind: str, name: str, ek: Public, more: Sequence[str]) -> bytes:
        with tempfile.TemporaryDirectory(prefix="swtpm_setup.certs.") as directory:
            arguments = ["--type", kind, "--ek", key_parameter(ek), "--dir", directory]
            command = [self._path, *arguments, *self._common, *more]
            self._say(f"  Invoking {' '.join(command)}")
            with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
                status = self._wait(command, out, errors)
                for line in _text(out).splitlines():
                    self._say(f"{self._name}: {line}")
                if status:
                    raise HostError(f"{self._name} exit with status {status}: {_text(errors)}")
            try:
                certificate = regular.read(Path(directory, name), NV_INDEX_MAX + 1)
            except OSError as error:
                raise HostError(f"{self._name} left no {name}: {error.strerror}") from None
        if not 0 < len(certificate) <= NV_INDEX_MAX:
            raise HostError(
                f"{self._name} left {name} of {len(certificate)} bytes, not 1 to {NV_INDEX_MAX}"
            )
        return certificate

    def _wait(self, command: list[str], out: IO[bytes], errors: IO[bytes]) -> int:
        # A signal that ends us must find the tool in our hands, or the tool goes on alone.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            # SAFETY: there is no other thread that could hold a lock when this forks.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
                preexec_fn=partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask),  # noqa: PLW1509
            )
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            raise HostError(f"Could not run {self._path}: {error.strerror}") from None
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            raise HostError(
                f"{self._name} did not end within {self._seconds} s and was killed"
            ) from None
        finally:
            if process.returncode is None:  # too slow, or we are to end ourselves
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def key_parameter(ek: Public) -> str:
    """A public key as swtpm_localca takes it: the modulus, or `x=,y=,id=`, in hexadecimal."""
    if ek.kind is Alg.RSA:
        return ek.unique[0].hex()
    x, y = ek.unique
    return f"x={x.hex()},y={y.hex()},id={_CURVES[ek.curve]}"


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_OUTPUT_MAX).decode(errors="replace").strip()
