"""Bare runc: a bundle of one's own, `holdfast cdi --bundle`, hooks, and a lease without a daemon.

podman cleans up after its containers; here nobody does, so that what ends a run is seen by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from holdfast.tpm2 import requests as rq
from holdfast.tpm2.algorithms import Alg
from holdfast.tpm2.commands import Cc
from holdfast.tpm2.constants import NvAttr, Rh
from holdfast.tpm2.structures import PcrSelection
from tests.asking import connect, exchange, rc, until

from .rootfs import make_rootfs
from .serve import Serve, a_host

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers of the system need root"),
    pytest.mark.skipif(not shutil.which("runc"), reason="runc is not installed"),
]

NAME = f"bare-{os.getpid()}"
INDEX = 0x01500030
NV = NvAttr.OWNERWRITE | NvAttr.OWNERREAD | NvAttr.AUTHREAD | NvAttr.NO_DA
GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")


@dataclass
class Bundle:
    """A container that may be started, by runc and nobody else."""

    host: Serve
    directory: Path
    vtpm: str

    @property
    def config(self) -> dict[str, Any]:
        value = json.loads((self.directory / "config.json").read_text())
        assert isinstance(value, dict)
        return value

    def change(self, **sections: Any) -> None:
        (self.directory / "config.json").write_text(json.dumps(self.config | sections))

    def runs(self, *command: str) -> None:
        self.change(process=self.config["process"] | {"args": list(command)})

    def give(self) -> None:
        """The vTPM, as the command line does it."""
        done = self.host.cli("cdi", self.vtpm, "--bundle", str(self.directory))
        assert done.returncode == 0, done.stderr

    def runc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Output goes to files: a container that stays would keep a pipe of ours open."""
        out, err = self.directory / "out", self.directory / "err"
        with out.open("w") as stdout, err.open("w") as stderr:
            done = subprocess.run(
                ["runc", "--root", str(self.directory / "runc"), *arguments], cwd=self.directory,
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, timeout=60, check=False,
            )  # fmt: skip
        return subprocess.CompletedProcess(
            done.args, done.returncode, out.read_text(), err.read_text()
        )

    def init(self) -> int:
        state = self.directory / "runc" / NAME / "state.json"
        return int(json.loads(state.read_text())["init_process_pid"])

    def vtpm_state(self) -> str:
        return str(self.host.inspect(self.vtpm)["state"])

    def is_off(self) -> bool:
        return self.vtpm_state() == "off"


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    with a_host() as made:
        yield made


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rootfs(tmp_path_factory.mktemp("rootfs") / "rootfs")


counter = iter(range(1000))


@pytest.fixture
def bundle(host: Serve, rootfs: Path, tmp_path: Path) -> Iterator[Bundle]:
    vtpm = f"{NAME}-{next(counter)}"
    host.create(vtpm, "linked")
    shutil.copytree(rootfs, tmp_path / "rootfs", symlinks=True)
    subprocess.run(["runc", "spec"], cwd=tmp_path, check=True)
    made = Bundle(host, tmp_path, vtpm)
    process = made.config["process"] | {"terminal": False}
    process.pop("rlimits", None)
    made.change(process=process)
    made.runs("sh", "-c", "echo started")
    try:
        yield made
    finally:
        made.runc("delete", "--force", NAME)
        host.call("POST", f"/v1/vtpms/{vtpm}/stop", {})
        host.call("DELETE", f"/v1/vtpms/{vtpm}")


def test_a_bundle_is_given_a_vtpm_once(bundle: Bundle) -> None:
    bundle.give()
    done = bundle.runc("run", NAME)
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr
    until("its end powers it off", bundle.is_off)
    before = bundle.config
    again = bundle.host.cli("cdi", bundle.vtpm, "--bundle", str(bundle.directory))
    assert again.returncode == 4
    assert bundle.config == before


# --- hooks ---------------------------------------------------------------------------------------


def add_hook(bundle: Bundle, stage: str, path: str, *, first: bool = False) -> None:
    hooks = bundle.config["hooks"]
    others = hooks.get(stage, [])
    hooks[stage] = [{"path": path}, *others] if first else [*others, {"path": path}]
    bundle.change(hooks=hooks)


@pytest.mark.parametrize("stage", ["createRuntime", "createContainer", "startContainer"])
def test_a_hook_of_the_bundles_that_runs_after_ours_stops_the_start(
    bundle: Bundle, stage: str
) -> None:
    """One such hook changed a file after we had measured it."""
    bundle.give()
    script = bundle.directory / "rootfs" / "late"
    script.write_text("#!/bin/sh\necho changed > /tmp/late\n")
    script.chmod(0o755)
    path = str(script) if stage != "startContainer" else "/late"
    add_hook(bundle, stage, path)
    done = bundle.runc("run", NAME)
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert f"{path} is a hook that runs after this was measured" in done.stderr
    assert bundle.vtpm_state() == "off"
    assert bundle.host.inspect(bundle.vtpm)["run"] == 0
    assert not (bundle.directory / "rootfs" / "tmp" / "late").exists()


@pytest.mark.parametrize(
    ("stage", "first"), [("prestart", False), ("createRuntime", True), ("poststart", False)]
)
def test_a_hook_that_runs_before_ours_or_beside_the_user_is_measured_with_the_rest(
    bundle: Bundle, stage: str, first: bool
) -> None:
    bundle.give()
    add_hook(bundle, stage, "/bin/true", first=first)
    done = bundle.runc("run", NAME)
    assert (done.returncode, done.stdout) == (0, "started\n"), done.stderr


def test_a_second_hook_like_ours_for_another_vtpm_is_a_hook_after_ours(bundle: Bundle) -> None:
    other = f"{bundle.vtpm}-x"
    bundle.host.create(other, "linked")
    try:
        bundle.give()
        hooks = bundle.config["hooks"]
        (ours,) = hooks["createRuntime"]
        theirs = ours | {"args": [*ours["args"][:-1], other]}
        bundle.change(hooks=hooks | {"createRuntime": [ours, theirs]})
        done = bundle.runc("run", NAME)
        assert done.returncode != 0
        assert "started" not in done.stdout
        assert bundle.vtpm_state() == bundle.host.inspect(other)["state"] == "off"
    finally:
        bundle.host.call("DELETE", f"/v1/vtpms/{other}")


def test_without_a_daemon_nothing_starts(bundle: Bundle) -> None:
    bundle.give()
    hooks = bundle.config["hooks"]
    for each in hooks["createRuntime"]:
        each["env"] = [f"HOLDFAST_SOCKET={bundle.directory}/nobody"]
    bundle.change(hooks=hooks)
    done = bundle.runc("run", NAME)
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert "no daemon answers" in done.stderr


def test_what_cannot_be_written_down_is_not_started(bundle: Bundle) -> None:
    """The log goes before the extends: without it there is no power-on."""
    bundle.give()
    logs = bundle.host.directory / "state" / "logs"
    logs.mkdir(exist_ok=True)
    in_the_way = logs / bundle.host.inspect(bundle.vtpm)["id"]
    in_the_way.write_text("not a directory")
    try:
        done = bundle.runc("run", NAME)
        assert done.returncode != 0
        assert "started" not in done.stdout
        assert bundle.vtpm_state() == "off"
        assert bundle.host.workers() == []
    finally:
        in_the_way.unlink()
    bundle.runc("delete", "--force", NAME)
    assert bundle.runc("run", NAME).stdout == "started\n"


def test_what_was_extended_is_what_was_written_down(bundle: Bundle) -> None:
    bundle.give()
    bundle.runs("sleep", "600")
    start(bundle)
    events = bundle.host.call("GET", f"/v1/vtpms/{bundle.vtpm}/log")["events"]
    values = {pcr: bytes(32) for pcr in (10, 11, 12, 13, 15)}
    for record in events:
        digest = next(d["digest"] for d in record["digests"] if d["hashAlg"] == "sha256")
        values[record["pcr"]] = sha256(values[record["pcr"]] + bytes.fromhex(digest)).digest()
    assert bytes(32) not in values.values()  # PCR 10 too: not measured is said, never zero
    assert events[0]["pcr"] == 10
    with connect(tpm_of(bundle)) as sock:
        for pcr, value in values.items():
            read = rq.pcr_read(PcrSelection.of(Alg.SHA256, (pcr,)))
            assert rq.pcr_read_values(exchange(sock, read))[1] == (value,), pcr


def test_a_bundle_with_the_devices_and_without_the_hook_finds_no_tpm(bundle: Bundle) -> None:
    """Mounts alone are no authority: the vTPM is off until something was measured."""
    bundle.give()
    bundle.change(hooks={})
    script = "exec 3<>/dev/tpmrm0 && echo open; cat /run/vtpm/eventlog.json; echo end"
    bundle.runs("sh", "-c", script)
    done = bundle.runc("run", NAME)
    assert "open" not in done.stdout
    assert bundle.vtpm_state() == "off"


# --- the lease -----------------------------------------------------------------------------------


def tpm_of(bundle: Bundle) -> Path:
    """The socket as a process in the container reaches it."""
    return Path(f"/proc/{bundle.init()}/root/run/vtpm/tpm.sock")


def clock(response: bytes) -> tuple[int, int, bool]:
    """resetCount, restartCount, safe of a ReadClock response."""
    params = rq.response(Cc.ReadClock, response).params
    params.take(16)
    return params.u32(), params.u32(), bool(params.u8())


def start(bundle: Bundle) -> None:
    done = bundle.runc("run", "--detach", NAME)
    assert done.returncode == 0, done.stderr
    assert bundle.vtpm_state() == "active"


def test_the_end_of_init_powers_off_and_seals_without_anybody_cleaning_up(bundle: Bundle) -> None:
    """poststop runs at `runc delete` alone, and here nobody calls it."""
    bundle.give()
    bundle.runs("sleep", "600")
    start(bundle)
    with connect(tpm_of(bundle)) as sock:
        assert rc(exchange(sock, rq.nv_define_space(Rh.OWNER, INDEX, NV, 4))) == 0
        assert rc(exchange(sock, rq.nv_write(Rh.OWNER, INDEX, b"kept", 0))) == 0
        resets, restarts, safe = clock(exchange(sock, rq.read_clock()))
        assert safe
    os.kill(bundle.init(), signal.SIGKILL)
    until("it is off", bundle.is_off)
    assert (bundle.directory / "runc" / NAME / "state.json").exists()  # nothing was deleted
    assert bundle.host.workers() == []
    assert bundle.runc("delete", "--force", NAME).returncode == 0
    start(bundle)
    with connect(tpm_of(bundle)) as sock:
        value = exchange(sock, rq.nv_read(Rh.OWNER, INDEX, 4, 0))
        assert value[16:20] == b"kept"
        # An orderly end each time: one reset more, none unexpected, the clock never goes back.
        assert clock(exchange(sock, rq.read_clock())) == (resets + 1, restarts, True)
    assert bundle.host.inspect(bundle.vtpm)["run"] == 2
    assert bundle.host.inspect(bundle.vtpm)["restarts"] == 0


def test_a_process_that_outlives_init_finds_its_device_gone(bundle: Bundle) -> None:
    bundle.give()
    bundle.runs("sleep", "600")
    start(bundle)
    device = os.open(f"/proc/{bundle.init()}/root/dev/tpmrm0", os.O_RDWR)
    try:
        os.write(device, GET_RANDOM)
        assert len(os.read(device, 4096)) == 20
        os.kill(bundle.init(), signal.SIGKILL)
        until("it is off", bundle.is_off)
        with pytest.raises(OSError):
            os.write(device, GET_RANDOM)
    finally:
        with contextlib.suppress(OSError):  # its file system has ended
            os.close(device)


def test_the_tmpfs_of_one_run_leads_to_no_other(bundle: Bundle) -> None:
    bundle.give()
    bundle.runs("sleep", "600")
    start(bundle)
    old = os.open(f"/proc/{bundle.init()}/root/run/vtpm", os.O_PATH | os.O_DIRECTORY)
    try:
        with connect(Path(f"/proc/self/fd/{old}/tpm.sock")) as sock:
            assert len(exchange(sock, GET_RANDOM)) == 20
        os.kill(bundle.init(), signal.SIGKILL)
        until("it is off", bundle.is_off)
        bundle.runc("delete", "--force", NAME)
        start(bundle)
        for name in ("tpm.sock", "tpm.sock.ctrl", "evidence.sock"):
            with pytest.raises(OSError):
                connect(Path(f"/proc/self/fd/{old}/{name}"))
        new = os.stat(f"/proc/{bundle.init()}/root/run/vtpm")
        assert (new.st_dev, new.st_ino) != (os.fstat(old).st_dev, os.fstat(old).st_ino)
        with connect(tpm_of(bundle)) as sock:
            assert len(exchange(sock, GET_RANDOM)) == 20
    finally:
        os.close(old)


def test_a_container_can_put_nothing_in_its_sockets_place(bundle: Bundle) -> None:
    """A directory bound read-write let a container replace the socket by a symlink."""
    bundle.give()
    script = (
        "cd /run/vtpm; rm tpm.sock || echo kept; echo x > new || echo full; "
        "mkdir dir || echo none; ls; sleep 600"
    )
    bundle.runs("sh", "-c", script)
    start(bundle)
    output = bundle.directory / "out"
    until("it has tried", lambda: "tpm.sock.ctrl" in output.read_text())
    words = output.read_text().split()
    assert {"kept", "full", "none"} <= set(words)
    assert {"new", "dir"}.isdisjoint(words)
    with connect(tpm_of(bundle)) as sock:  # to connect, a read-only mount is enough
        assert len(exchange(sock, GET_RANDOM)) == 20
    log = json.loads(Path(f"/proc/{bundle.init()}/root/run/vtpm/eventlog.json").read_text())
    assert {record["pcr"] for record in log} >= {10, 11, 12, 13, 15}


def test_while_it_runs_no_other_container_gets_it(
    bundle: Bundle, rootfs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle.give()
    bundle.runs("sleep", "600")
    start(bundle)
    second = Bundle(bundle.host, tmp_path_factory.mktemp("second"), bundle.vtpm)
    shutil.copytree(rootfs, second.directory / "rootfs", symlinks=True)
    shutil.copyfile(bundle.directory / "config.json", second.directory / "config.json")
    second.runs("sh", "-c", "echo started")
    done = second.runc("run", f"{NAME}-second")
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert (
        f"is in use by container {NAME}: a vTPM belongs to one container at a time" in done.stderr
    )
    second.runc("delete", "--force", f"{NAME}-second")  # its poststop is not the lease's
    assert bundle.vtpm_state() == "active"
    with connect(tpm_of(bundle)) as sock:
        assert len(exchange(sock, GET_RANDOM)) == 20
