"""One host and its keeper, and the TPM of one container: real programs, ended by their own pids."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pyrage

from holdfast.evidence.freshness import Link
from holdfast.hwtpm.transport import Transport
from holdfast.keeper import vault
from holdfast.keeper.custody import Custody
from holdfast.keeper.vault import Vault
from holdfast.linux import channel
from holdfast.linux.secret import SecretMemory
from holdfast.protocol import ipc
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import Rh
from holdfast.tpm2.structures import Public
from holdfast.tpm2.templates import AK_P256, EK_P256, EK_RSA2048
from tests.asking import until
from tests.hwtpm.swtpm import Swtpm

NOBODY = 65534
PYTHON = [sys.executable, "-P", "-m"]
CRL = "https://ca.example.org/host.crl"
SITE = "Test site"
M = TypeVar("M", bound=ipc.Message)


@dataclass
class Box:
    """A host's directories, its TPM, its keeper."""

    directory: Path
    swtpm: Swtpm
    identity: Any = field(default_factory=pyrage.x25519.Identity.generate)
    process: subprocess.Popen[bytes] | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    hybrid: bytes = b""  # the last link of `commit`

    @property
    def keeper(self) -> Path:
        return self.directory / "keeper"

    @property
    def out(self) -> Path:
        return self.directory / "out"

    @property
    def socket(self) -> Path:
        return self.directory / "k.sock"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def run(
        self, action: str, *arguments: str, ok: bool = True, given: bytes = b""
    ) -> dict[str, Any]:
        """`python -m holdfast.keeper`; what it prints, as JSON."""
        command = [*PYTHON, "holdfast.keeper", action, "--dir", str(self.keeper)]
        command += ["--tcti", self.swtpm.tcti, *arguments]
        done = subprocess.run(command, input=given, capture_output=True, check=False)
        assert (done.returncode == 0) is ok, done
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def provision(self) -> None:
        self.summary = self.run(
            "provision", "--recovery-recipient", str(self.identity.to_public()),
            "--out", str(self.out), "--stand-in", "--site", SITE, "--crl", CRL, *self.user(),
        )  # fmt: skip

    def user(self) -> list[str]:
        return ["--uid", str(NOBODY), "--gid", str(NOBODY)] if os.geteuid() == 0 else []

    def authorize(self, *arguments: str, ok: bool = True) -> dict[str, Any]:
        key = self.directory / "identity"
        key.write_text(f"# a comment, as age-keygen writes\n{self.identity}\n")
        return self.run(
            "authorize", "--identity", str(key),
            "--recovery-file", str(self.out / "recovery.age"), *self.user(), *arguments, ok=ok,
        )  # fmt: skip

    def vault(self) -> Vault:
        return vault.load(self.keeper)

    def custody(self, memory: SecretMemory | None = None) -> Custody:
        """What the keeper holds, in this process."""
        return Custody(self.vault(), Transport(self.swtpm.tcti), memory or SecretMemory())

    def start(self) -> None:
        """Run the keeper as a service."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *PYTHON, "holdfast.keeper", "serve", "--dir", str(self.keeper),
                    "--tcti", self.swtpm.tcti, "--socket", str(self.socket), *self.user(),
                ],
                stderr=log,
            )  # fmt: skip
        until("the keeper listens", self.listens)

    def listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        try:
            channel.connect(self.socket).close()
        except OSError:
            return False
        return True

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the keeper; its exit status."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(number)
        return process.wait(20)

    def connect(self) -> Client:
        return Client(channel.connect(self.socket))

    def commit(self, client: Client) -> Link:
        """Show the keeper that there is no vTPM, and commit that; the link that is anchored."""
        client.ask(ipc.MapLeaves(True, ()), ipc.Done)
        opened = client.ask(ipc.OpenMap(self.hybrid, b"", b"", b""), ipc.MapOpened)
        before = Link.decode(opened.value + opened.anchor)
        link = Link(before.before, before.anchor.after(before.anchor.root))
        client.ask(ipc.Advance((), link.anchor.digest), ipc.Done)
        self.hybrid = link.encode()
        return link


class Client:
    """A peer of the keeper's that asks and waits."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(20)

    def ask(self, message: ipc.Message, kind: type[M], fds: tuple[int, ...] = ()) -> M:
        channel.send(self.sock, message.encode(), fds)
        data, _ = channel.receive(self.sock)
        answer = ipc.decode(data)
        assert isinstance(answer, kind), answer
        return answer

    def show_map(self) -> None:
        """As a daemon that has no vTPM yet; a keeper that is not open refuses that."""
        for message in (ipc.MapLeaves(True, ()), ipc.OpenMap(b"", b"", b"", b"")):
            channel.send(self.sock, message.encode())
            channel.receive(self.sock)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


class Worker:
    """A process that stands for a worker, and its key channel."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["sleep", "1000"])
        self.pidfd = os.pidfd_open(self.process.pid)
        self.keys, self.keepers = channel.pair()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        os.close(self.pidfd)
        self.keys.close()
        self.keepers.close()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def lease(self, client: Client, instance: UUID, kind: type[M]) -> M:
        client.show_map()
        return client.ask(ipc.Lease(instance), kind, (self.keepers.fileno(), self.pidfd))

    def key(self, wrapped: bytes, kind: type[M]) -> M:
        return Client(self.keys).ask(ipc.KeyRequest(wrapped), kind)


class Guest:
    """A container's TPM, with the keys it is manufactured with."""

    def __init__(self, swtpm: Swtpm) -> None:
        self._tcti = Transport(swtpm.tcti).attach()
        self.id = uuid4()
        self.ek, self.ek_ecc = self._primary(Rh.ENDORSEMENT, EK_P256)
        self.ak_handle, self.ak = self._primary(Rh.PLATFORM, AK_P256)
        rsa, self.ek_rsa = self._primary(Rh.ENDORSEMENT, EK_RSA2048)
        self._send(rq.flush_context(rsa))

    def _send(self, command: bytes) -> bytes:
        self._tcti.transmit(command)
        return bytes(self._tcti.receive())

    def _primary(self, hierarchy: Rh, template: Public) -> tuple[int, Public]:
        return rq.created_public(self._send(rq.create_primary(hierarchy, template)))

    def keys(self) -> ipc.EnrolKeys:
        return ipc.EnrolKeys(self.id, self.ek_ecc.encode(), self.ak.encode())

    def wishes(self, name: str = "web") -> list[ipc.Certify]:
        """For certificates of the RSA EK, the ECC EK and the AK."""
        keys = (self.ek_rsa, self.ek_ecc, self.ak)
        return [ipc.Certify(self.id, name, public.encode()) for public in keys]

    def activate(self, challenge: ipc.EnrolChallenge) -> ipc.EnrolProof:
        session = rq.response(Cc.StartAuthSession, self._send(rq.start_policy_session())).handle
        rq.response(Cc.PolicySecret, self._send(rq.policy_secret(Rh.ENDORSEMENT, session)))
        command = rq.activate_credential(
            self.ak_handle, self.ek, session, challenge.id_object, challenge.secret
        )
        return ipc.EnrolProof(self.id, rq.activated_credential(self._send(command)))
