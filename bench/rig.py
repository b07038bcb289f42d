"""The two sides: a Holdfast host, and Debian's swtpm. All ended with the block."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pyrage

from holdfast.cli.tpm import plain_tpm
from holdfast.client import Client

HOST_LOG = Path(str(resources.files("holdfast.data"))) / "hostlog" / "ovmf-qemu.bin"
PYTHON = [sys.executable, "-P", "-m"]


@dataclass
class Host:
    """A running Holdfast."""

    directory: Path
    client: Client
    serve: subprocess.Popen[bytes]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.client.call(method, path, body)

    def pid_of_worker(self) -> int:
        """The one worker that is active: not blank, so it has the sockets open."""
        found = [
            int(pid) for pid in os.listdir("/proc")
            if pid.isdigit() and _is_worker(int(pid), self.serve.pid)
        ]  # fmt: skip
        assert len(found) == 1, found
        return found[0]


def _parent(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[1])


def _is_worker(pid: int, serve: int) -> bool:
    """Whether it is an active worker of this very host: serve's spawner is its parent."""
    try:
        if _parent(_parent(pid)) != serve:
            return False
        if Path(f"/proc/{pid}/comm").read_text().strip() != "holdfast-worker":
            return False
        return any(
            os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/fuse"
            for fd in os.listdir(f"/proc/{pid}/fd")
        )
    except OSError:
        return False


@contextmanager
def holdfast(
    manufactured: int = 0, durability: str = "fsync", idle_after: int = 30
) -> Iterator[Host]:
    """A host with a software host TPM, on a tmpfs-free directory of its own."""
    directory = Path(tempfile.mkdtemp(prefix="hfb-"))
    host = None
    try:
        with plain_tpm(directory / "host-tpm", HOST_LOG) as sock:
            (directory / "holdfast.toml").write_text(
                f'[host]\ntcti = "swtpm:path={sock}"\nevent_log = "{HOST_LOG}"\nstand_in = true\n'
                f'[paths]\nstate = "{directory}/state"\nrun = "{directory}/run"\n'
                f'cdi = "{directory}/cdi"\n[keeper]\nuser = "root"\n'
                f"[workers]\nmanufactured = {manufactured}\nidle_after = {idle_after}\n"
                f'[store]\ndurability = "{durability}"\n'
            )
            recipient = str(pyrage.x25519.Identity.generate().to_public())
            config = ["--config", str(directory / "holdfast.toml")]
            program = str(Path(sys.executable).with_name("holdfast"))
            subprocess.run(
                [program, "init", "--recovery-recipient", recipient, "--out",
                 str(directory / "out"), *config],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            log = (directory / "log").open("wb")
            serve = subprocess.Popen([program, "serve", *config], stderr=log, stdout=log)
            api = directory / "run" / "api.sock"
            host = Host(directory, Client(api), serve)  # whose `serve` may be another one later
            until = time.monotonic() + 30
            while not api.exists():
                assert time.monotonic() < until, (directory / "log").read_text()
                time.sleep(0.05)
            yield host
            host.serve.send_signal(signal.SIGTERM)
            host.serve.wait(300)  # thousands are put in order
    finally:
        if host is not None and host.serve.poll() is None:
            host.serve.kill()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def swtpm(
    state: Path | None = None, program: str = "swtpm"
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Debian's swtpm on a Unix socket, started up; or another program that is driven so."""
    directory = Path(tempfile.mkdtemp(prefix="swb-"))
    where = state or directory / "state"
    where.mkdir(exist_ok=True)
    process = start_swtpm(where, directory, program)
    try:
        yield process, directory / "tpm.sock"
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def start_swtpm(state: Path, directory: Path, program: str = "swtpm") -> subprocess.Popen[bytes]:
    sock = directory / "tpm.sock"
    process = subprocess.Popen(
        [program, "socket", "--tpm2", "--tpmstate", f"dir={state}",
         "--server", f"type=unixio,path={sock}", "--ctrl", f"type=unixio,path={sock}.ctrl",
         "--flags", "not-need-init,startup-clear"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not Path(f"{sock}.ctrl").exists():
        time.sleep(0.0005)
    return process


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    until = time.monotonic() + 10
    while True:
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < until
            time.sleep(0.0002)
        else:
            return sock


def private_mb(pid: int) -> float:
    """Private memory, clean and dirty, in MB."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean", "Private_Dirty")):
            total += int(line.split()[1])
    return total / 1024


@contextmanager
def pinned(cpu: int, *pids: int) -> Iterator[None]:
    """Put processes (all their threads) on one CPU for a while."""
    before = {pid: os.sched_getaffinity(pid) for pid in pids}
    for pid in pids:
        os.sched_setaffinity(pid, {cpu})
    try:
        yield
    finally:
        for pid, cpus in before.items():
            try:
                os.sched_setaffinity(pid, cpus)
            except ProcessLookupError:
                continue
