"""A whole `holdfast serve` of a test's own, on a software host TPM that can be ended and stopped.

Nothing is left behind: `left_over` says what would be.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyrage

from holdfast.client import Client
from holdfast.errors import HoldfastError, HostError
from holdfast.linux.mounts import mounted
from tests.asking import until
from tests.disk import Disk, a_disk

from .conftest import HOST_LOG, PYTHON

PROGRAM = str(Path(sys.executable).with_name("holdfast"))
ROOT = Path(__file__).parents[2]
GROUPS = "holdfast-worker-"
START_SECONDS = 60.0


@dataclass
class Serve:
    """One host: its directory, its stand-in TPM, and `holdfast serve` while it runs."""

    directory: Path
    cdi: Path
    event_log: Path
    process: subprocess.Popen[bytes] | None = None
    disk: Disk | None = None  # that its state is on, if it is one of the test's own
    tpm: subprocess.Popen[bytes] | None = None
    made: dict[str, Any] = field(default_factory=dict)  # what init said
    _workers: set[int] = field(default_factory=set)

    # --- paths ---

    @property
    def config(self) -> Path:
        return self.directory / "holdfast.toml"

    @property
    def api(self) -> Path:
        return self.directory / "run" / "api.sock"

    @property
    def database(self) -> Path:
        return self.directory / "state" / "registry.sqlite"

    def place(self, name: str) -> Path:
        return self.directory / "run" / "vtpm" / name

    def log(self) -> str:
        return (self.directory / "log").read_text()

    # --- the host TPM ---

    def start_tpm(self, log: Path = HOST_LOG) -> None:
        """Power it on, in a boot that was as `log` has it."""
        command = [*PYTHON, "holdfast.worker.plain", "--directory", str(self.directory)]
        command += ["--state", str(self.directory / "host-tpm"), "--replay", str(log)]
        path = self.directory / "tpm.sock"
        path.unlink(missing_ok=True)
        self.tpm = subprocess.Popen(command)
        until("the host TPM listens", path.exists)

    def end_tpm(self) -> None:
        if self.tpm is not None:
            time.sleep(0.1)  # the keeper is done with what it does unasked
            self.tpm.send_signal(signal.SIGCONT)
            self.tpm.terminate()
            self.tpm.wait(20)
            self.tpm = None

    # --- serve ---

    def write_config(self, tcti: str = "", per_day: int = 50) -> None:
        tcti = tcti or f"swtpm:path={self.directory}/tpm.sock"
        self.config.write_text(
            f'[host]\ntcti = "{tcti}"\n'
            f'event_log = "{self.event_log}"\nstand_in = true\n'
            f'[paths]\nstate = "{self.directory}/state"\nrun = "{self.directory}/run"\n'
            f'cdi = "{self.cdi}"\n[keeper]\nuser = "root"\n'
            f"[store]\ndurable_anchors_per_day = {per_day}\n"
        )

    def init(self) -> None:
        identity = pyrage.x25519.Identity.generate()
        (self.directory / "identity").write_text(str(identity))
        recipient = str(identity.to_public())
        done = self.cli(
            "init", "--config", str(self.config), "--recovery-recipient", recipient,
            "--out", str(self.directory / "out"), "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.made = json.loads(done.stdout)

    def start(self) -> None:
        """Start, and wait until the API answers."""
        self.api.unlink(missing_ok=True)
        with (self.directory / "log").open("ab") as log:
            command = [PROGRAM, "serve", "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        until("the API answers", self.answers, START_SECONDS)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            self.call("GET", "/v1/version")
        except HostError:
            return False
        return True

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        assert self.process is not None
        self.children()
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.process = None

    def end(self) -> None:
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.end_tpm()

    # --- asking ---

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        client = Client(self.api)
        try:
            return client.call(method, path, body)
        finally:
            client.close()

    def create(self, name: str, profile: str = "plain", **more: Any) -> Any:
        return self.call("POST", "/v1/vtpms", {"name": name, "profile": profile, **more})

    def power_on(self, name: str) -> Any:
        return self.call("POST", f"/v1/vtpms/{name}/start", {})

    def inspect(self, name: str) -> Any:
        return self.call("GET", f"/v1/vtpms/{name}")

    def finding(self, what: str) -> Any:
        findings = self.call("GET", "/v1/doctor")["findings"]
        return next(finding for finding in findings if finding["what"] == what)

    def cli(self, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return self.cli_with({"HOLDFAST_SOCKET": str(self.api)}, *arguments, timeout=timeout)

    @staticmethod
    def cli_with(
        environment: dict[str, str], *arguments: str, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, *arguments], env={**os.environ, **environment},
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    # --- its processes ---

    def children(self) -> dict[str, int]:
        """keeper, spawner, daemon, and the workers' mother: pids of those that live."""
        assert self.process is not None
        found = {}
        for pid in children(self.process.pid):
            for name in ("keeper", "spawner", "daemon"):
                if f"holdfast.{name}" in arguments(pid):
                    found[name] = pid
        if "spawner" in found:
            its = children(found["spawner"])
            self._workers |= {found["spawner"], *its}
            mothers = [pid for pid in its if "holdfast.spawner.mother" in arguments(pid)]
            found |= {"mother": mothers[0]} if mothers else {}
        return found

    def workers(self) -> list[int]:
        """Workers that serve a vTPM: they have its device."""
        spawner = self.children().get("spawner")
        return [pid for pid in children(spawner) if serves(pid)] if spawner else []

    def left_over(self) -> list[str]:
        """What is still there of a host that has ended, and should not be."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                pid = int(entry.name)
                ours = str(self.directory) in " ".join(arguments(pid)) or pid in self._workers
                if ours and pid not in (os.getpid(), self.tpm.pid if self.tpm else 0):
                    found.append(f"process {pid} {arguments(pid)}")
        for line in Path("/proc/self/mounts").read_text().splitlines():
            if f"{self.directory}/run" in line:
                found.append(f"mount {line}")
        found += [f"cgroup {path}" for path in groups() if group_pid(path) in self._workers]
        run = self.directory / "run"
        found += [str(path) for path in run.rglob("*") if path.is_socket()]
        for path in self.cdi.glob("holdfast.dev-vtpm_*.json"):
            if str(self.directory) in path.read_text():
                found.append(str(path))
        return found


def as_user(uid: int, action: Callable[[], Any]) -> Any:
    """What `action` returns in a process of that user; the name of the error it raised."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            try:
                result: Any = action()
            except HoldfastError as error:
                result = type(error).__name__
            os.write(write, json.dumps(result).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0
    return json.loads(data)


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def serves(pid: int) -> bool:
    """Whether it has a device: its own, for a blank just forked has the spawner's until its box."""
    try:
        if "\nSeccomp:\t2" not in Path(f"/proc/{pid}/status").read_text():
            return False
        names = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    return "/dev/fuse" in names


def groups() -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"**/{GROUPS}*"))


def group_pid(path: Path) -> int:
    """The spawner whose worker's group this is."""
    return int(path.name.removeprefix(GROUPS).partition("-")[0])


@contextmanager
def a_host(
    event_log: Path = HOST_LOG,
    cdi: Path | None = None,
    state_size: str = "",
    *,
    running: bool = True,
    tcti: str = "",
    per_day: int = 50,
    own_disk: bool = False,
) -> Iterator[Serve]:
    """A host that was set up; and its stand-in TPM. `state_size`: its state on a tmpfs of that.

    `tcti`: the host TPM, if not a stand-in of its own. `own_disk`: its state on `Serve.disk`.
    """
    directory = Path(tempfile.mkdtemp(prefix="hfs-"))
    host = Serve(directory, cdi or directory / "cdi", event_log)
    mounts = contextlib.ExitStack()
    try:
        if own_disk:
            (directory / "state").mkdir()
            host.disk = mounts.enter_context(a_disk(directory / "state"))
        host.write_config(tcti, per_day)
        if state_size:
            (directory / "state").mkdir()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={state_size}", "none", directory / "state"],
                check=True,
            )
        host.start_tpm()
        host.init()
        if running:
            host.start()
        yield host
    except BaseException:
        if (directory / "log").exists():
            sys.stderr.write(host.log()[-6000:])
        raise
    finally:
        host.end()
        for place in (directory / "run" / "vtpm").glob("*/*"):
            while mounted(place):
                subprocess.run(["umount", "-l", place], check=True)
        if state_size:
            subprocess.run(["umount", "-l", directory / "state"], check=True)
        mounts.close()
        shutil.rmtree(directory, ignore_errors=True)


# --- containers of the demo's images -------------------------------------------------------------

IMAGE = "localhost/holdfast-demo-a"
PODMAN = (
    "podman", "run", "--runtime", "runc", "--network", "none",
    "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024",
)  # fmt: skip


def build_images() -> None:
    """Build the demo's images; where they are there already, look and do nothing."""
    subprocess.run(
        [ROOT / "scripts" / "build-demo-image", ROOT / ".cache" / "demo-image"],
        check=True, timeout=240, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def podman(*args: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """`podman run` with these arguments."""
    return subprocess.run(
        [*PODMAN, *args], capture_output=True, text=True, timeout=seconds, check=False
    )


def remove_container(name: str) -> None:
    command = ["podman", "rm", "--force", "--ignore", "--time", "0", name]
    subprocess.run(command, capture_output=True, timeout=60, check=False)


@contextmanager
def container(vtpm: str, *options: str, image: str = IMAGE) -> Iterator[str]:
    """A container that stays, with that vTPM; yields its name."""
    name = f"of-{vtpm}"
    device = f"holdfast.dev/vtpm={vtpm}"
    try:
        done = podman("-d", "--name", name, "--device", device, *options, image, "sleep", "600")
        assert done.returncode == 0, done.stderr
        yield name
    finally:
        remove_container(name)
