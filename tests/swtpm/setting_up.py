"""What tests of holdfast-swtpm-setup share: a place for a TPM and its CA, and what a TPM has."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Cap, Ht, Rh
from holdfast.tpm2.structures import PcrSelection, Public

from .program import SECONDS, SETUP, STARTED, THEIRS, Program, running

THEIR_SETUP = "swtpm_setup"
CERTIFIED = ("--create-ek-cert", "--create-platform-cert", "--lock-nvram")
AUTHORITY_KEY = "2.5.29.35"


@dataclass(frozen=True)
class Place:
    """A directory with configuration files and two local CAs: ours, and swtpm_localca's."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def ca(self) -> Path:
        return self.path / "ca"

    def config(self, text: str, name: str = "given.conf") -> tuple[str, str]:
        (self.path / name).write_text(text)
        return ("--config", str(self.path / name))

    def run(
        self, *options: str, program: str = SETUP, state: str = "", pass_fds: tuple[int, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        given = ["--tpm2", "--tpmstate", state or str(self.state), *options]
        if "--config" not in options:
            given += ["--config", str(self.path / "setup.conf")]
        return self.call(program, *given, pass_fds=pass_fds)

    def call(
        self, program: str, *options: str, pass_fds: tuple[int, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *options], cwd=self.path, capture_output=True, text=True,
            timeout=6 * SECONDS, check=False, pass_fds=pass_fds,
        )  # fmt: skip

    def made(self, *options: str, program: str = SETUP, state: str = "") -> str:
        done = self.run(*options, program=program, state=state)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def refused(self, *options: str, state: str = "") -> str:
        """What it says; it must leave every directory as it was, but for lock files."""
        before = self.files()
        done = self.run(*options, state=state)
        assert done.returncode == 1, done
        assert done.stderr
        assert "Traceback" not in done.stderr
        assert self.files() == before
        return done.stderr

    def files(self) -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in self.path.rglob("*")
            if path.is_file() and not path.name.startswith(".lock")
        }

    def verify(self, certificate: bytes, ca: Path) -> None:
        (self.path / "one.der").write_bytes(certificate)
        done = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", ca / "swtpm-localca-rootca-cert.pem",
             "-untrusted", ca / "issuercert.pem", "one.der"],
            cwd=self.path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        # The names of a TPM's make are critical, and unknown to OpenSSL as extensions they are not.
        assert done.returncode == 0, done.stderr + done.stdout


def authority_config(place: Path, name: str) -> None:
    directory = place / name
    (place / f"{name}.conf").write_text(
        f"statedir = {directory}\nsigningkey = {directory}/signkey.pem\n"
        f"issuercert = {directory}/issuercert.pem\ncertserial = {directory}/certserial\n"
    )


@dataclass(frozen=True)
class Tpm:
    """What a TPM that was booted shows."""

    keys: dict[int, Public]
    indices: dict[int, bytes]  # TPMS_NV_PUBLIC
    contents: dict[int, bytes]
    banks: PcrSelection
    permanent: dict[int, int]  # properties that a set-up can change


def ask(program: Program) -> Tpm:
    def handles(kind: Ht) -> tuple[int, ...]:
        return rq.handles(program.send(rq.get_capability(Cap.HANDLES, kind << 24, 64)))

    keys = {handle: rq.read_public_area(program.send(rq.read_public(handle)))
            for handle in handles(Ht.PERSISTENT)}  # fmt: skip
    indices, contents = {}, {}
    for index in handles(Ht.NV_INDEX):
        answer = program.send(rq.command(Cc.NV_ReadPublic, (index,)))
        indices[index] = rq.response(Cc.NV_ReadPublic, answer).params.sized()
        size = int.from_bytes(indices[index][-2:], "big")
        data = b""
        while len(data) < size:
            command = rq.nv_read(Rh.OWNER, index, min(rq.NV_CHUNK, size - len(data)), len(data))
            data += rq.response(Cc.NV_Read, program.send(command)).params.sized()
        contents[index] = data
    reader = rq.response(Cc.GetCapability, program.send(rq.get_capability(Cap.PCRS, 0, 1))).params
    reader.take(5)
    banks = PcrSelection.read(reader)
    answer = program.send(rq.get_capability(Cap.TPM_PROPERTIES, 0x200, 32))
    reader = rq.response(Cc.GetCapability, answer).params
    reader.take(5)
    properties = {reader.u32(): reader.u32() for _ in range(reader.u32())}
    return Tpm(keys, indices, contents, banks, properties)


def boot(
    place: Place, command: tuple[str, ...] = THEIRS, *options: str, state: tuple[str, ...] = ()
) -> Tpm:
    with running(Program(place.path, command, state), *STARTED, *options) as program:
        tpm = ask(program)
        program.shut_down()
    return tpm


def about(certificate: bytes, *without: str) -> tuple[object, ...]:
    """All of a certificate but keys, signature, serial number and time."""
    read = x509.load_der_x509_certificate(certificate)
    extensions = [
        (extension.oid.dotted_string, extension.critical, extension.value.public_bytes())
        for extension in read.extensions
        if extension.oid.dotted_string not in (AUTHORITY_KEY, *without)
    ]
    return (read.version, read.subject, read.issuer, read.not_valid_after_utc,
            read.signature_algorithm_oid, extensions)  # fmt: skip


@contextlib.contextmanager
def opened_to_nobody(path: Path) -> Iterator[None]:
    """pytest's directories are for one user; others may pass through until this ends."""
    parents = [one for one in (path, *path.parents) if not one.stat().st_mode & 0o001]
    modes = {one: one.stat().st_mode for one in parents}
    try:
        for one in parents:
            one.chmod(0o755)
        yield
    finally:
        for one, mode in modes.items():
            one.chmod(mode)
