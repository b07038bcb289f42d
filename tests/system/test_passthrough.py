"""A TPM that is not this host's anchor, given to one container as it is.

It is a plain vTPM of a second Holdfast here, reached by its FUSE device; in the lab it is a guest's
/dev/tpm0, made by the kernel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import Conflict, InvalidInput
from holdfast.tpm2 import requests as rq
from tests.asking import connect, exchange, until

from .serve import IMAGE, Serve, a_host, build_images, container, podman

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers of the system need root"),
    pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed"),
]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """The host whose vTPMs stand for TPMs of this machine."""
    with a_host(cdi=tmp_path_factory.mktemp("cdi")) as made:
        for name in ("one", "two"):
            made.create(name)
            made.power_on(name)
        yield made


@pytest.fixture(scope="module")
def host() -> Iterator[Serve]:
    build_images()
    with a_host(cdi=Path("/run/cdi")) as made:
        yield made


def device(other: Serve, name: str, node: str = "tpm0") -> str:
    return str(other.place(name) / "dev" / node)


def tool(other: Serve, name: str, *command: str) -> str:
    """A program of tpm2-tools on the TPM itself."""
    tcti = f"swtpm:path={other.place(name) / 'run' / 'tpm.sock'}"
    done = subprocess.run(
        command, env={**os.environ, "TPM2TOOLS_TCTI": tcti, "TSS2_LOG": "all+NONE"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_container_has_that_very_tpm_and_leaves_nothing_in_it(host: Serve, other: Serve) -> None:
    name = f"pass-{os.getpid()}"
    host.create(name, "", mode="passthrough", tpm=device(other, "one"))
    tool(other, "one", "tpm2_pcrextend", "23:sha256=" + "ab" * 32)
    value = tool(other, "one", "tpm2_pcrread", "sha256:23")
    script = (
        "tpm2_pcrread sha256:23; tpm2_createprimary -Q -c /tmp/p.ctx;"
        "tpm2_nvdefine -Q 0x1500001 -s 4; printf abcd | tpm2_nvwrite -Q 0x1500001 -i -"
    )
    for turn in range(2):
        if turn:
            script = "tpm2_nvread -s 4 0x1500001"
        done = podman("--rm", f"--device=holdfast.dev/vtpm={name}", IMAGE, "sh", "-c", script)
        assert done.returncode == 0, done.stderr
        assert ("abcd" if turn else value) in done.stdout
        until("it is off", lambda: host.inspect(name)["state"] == "off")
    assert tool(other, "one", "tpm2_nvread", "-s", "4", "0x1500001") == "abcd"  # truly in there
    for kind in ("transient", "loaded-session", "saved-session"):
        assert tool(other, "one", "tpm2_getcap", f"handles-{kind}").strip() == ""


def test_it_is_one_container_s_as_long_as_that_runs(host: Serve, other: Serve) -> None:
    name = f"lease-{os.getpid()}"
    path = device(other, "two")
    host.create(name, "", mode="passthrough", tpm=path)
    with pytest.raises(Conflict, match="passed through to one container"):
        host.create("second", "", mode="passthrough", tpm=path)
    with container(name) as running:
        again = podman("--rm", f"--device=holdfast.dev/vtpm={name}", IMAGE, "true")
        assert again.returncode != 0
        assert "in use by container" in again.stderr
        with pytest.raises(OSError, match="busy"):
            os.open(path, os.O_RDWR)  # nor may another program have it meanwhile
        leak = "tpm2_createprimary -Q -c /tmp/p; tpm2_startauthsession -S /tmp/s"
        subprocess.run(
            ["podman", "exec", running, "sh", "-c", leak], timeout=60, check=True,
            capture_output=True,
        )  # fmt: skip
        (worker,) = host.workers()
        os.kill(worker, 9)  # what it had is flushed by the next

        def served() -> bool:
            with connect(host.place(name) / "run" / "tpm.sock") as sock:
                return len(exchange(sock, rq.get_random(8))) == 20

        until("another worker serves", served)
    until("it is off", lambda: host.inspect(name)["state"] == "off")
    os.close(os.open(path, os.O_RDWR))
    assert tool(other, "two", "tpm2_getcap", "handles-transient").strip() == ""


def test_a_device_that_somebody_has_keeps_the_container_from_starting(
    host: Serve, other: Serve
) -> None:
    other.create("three")
    other.power_on("three")
    name = f"busy-{os.getpid()}"
    host.create(name, "", mode="passthrough", tpm=device(other, "three"))
    held = os.open(device(other, "three"), os.O_RDWR)
    try:
        done = podman("--rm", f"--device=holdfast.dev/vtpm={name}", IMAGE, "true")
    finally:
        os.close(held)
    assert done.returncode != 0
    assert "is in use by another program" in done.stderr
    assert host.inspect(name)["state"] == "off"
    assert podman("--rm", f"--device=holdfast.dev/vtpm={name}", IMAGE, "true").returncode == 0


def test_it_is_not_attested_by_this_host_and_not_started_by_hand(host: Serve, other: Serve) -> None:
    other.create("four")
    other.power_on("four")
    name = f"plain-{os.getpid()}"
    host.create(name, "", mode="passthrough", tpm=device(other, "four"))
    with pytest.raises(Conflict, match="by starting that container"):
        host.power_on(name)
    with container(name), pytest.raises(Conflict, match="identity of its own"):
        host.call("POST", f"/v1/vtpms/{name}/evidence", {"nonce": "00" * 16})


@pytest.mark.parametrize("on", [False, True])
def test_a_vtpm_of_this_host_is_none_to_pass_through(host: Serve, tmp_path: Path, on: bool) -> None:
    """Its files are answered by the daemon that is asked: it must not wait for itself."""
    name = f"itself-{on}-{os.getpid()}".lower()
    host.create(name)
    if on:
        host.power_on(name)
    link = tmp_path / "tpm0"
    link.symlink_to(host.place(name) / "dev" / "tpm0")
    for path in (str(host.place(name) / "dev" / "tpm0"), str(link)):
        with pytest.raises(Conflict, match="is a vTPM of this host"):
            host.create("looped", "", mode="passthrough", tpm=path)


def test_a_device_that_is_off_is_not_waited_for(host: Serve, other: Serve) -> None:
    name = f"off-{os.getpid()}"
    other.create("six")
    host.create(name, "", mode="passthrough", tpm=device(other, "six"))
    done = podman("--rm", f"--device=holdfast.dev/vtpm={name}", IMAGE, "true")
    assert done.returncode != 0
    assert "No such device or address" in done.stderr
    assert host.inspect(name)["state"] == "off"


def test_its_state_goes_nowhere(host: Serve, other: Serve) -> None:
    name, own = f"stays-{os.getpid()}", f"own-{os.getpid()}"
    other.create("five")
    other.power_on("five")
    path = device(other, "five")
    host.create(name, "", mode="passthrough", tpm=path)
    host.create(own, "linked")
    for command, what in ((("snapshot", "create"), "no snapshot"), (("migrate", "send"), "move")):
        done = host.cli(*command, name)
        assert done.returncode == 4
        assert what in done.stderr
        assert f"its state is in {path}" in done.stderr
        assert host.cli(*command, "nobody").returncode == 3
    done = host.cli("migrate", "send", own)
    assert done.returncode == 4
    assert "this version" in done.stderr
    done = host.cli("backup", name, "--out", "/nowhere", "--config", str(host.config))
    assert done.returncode == 4
    assert "no backup is made" in done.stderr


def test_what_cannot_be_passed_through_is_refused_by_name(host: Serve, other: Serve) -> None:
    for body, why in (
        ({"mode": "passthrough"}, "go together"),
        ({"tpm": "/dev/tpm0"}, "go together"),
        ({"mode": "loan", "tpm": "/dev/tpm0"}, "vtpm or passthrough"),
        ({"mode": "passthrough", "tpm": "/dev/tpm77"}, "/dev/tpm77: No such file"),
        ({"mode": "passthrough", "tpm": "/dev/null"}, "not the device of a TPM"),
        ({"mode": "passthrough", "tpm": "tpm0"}, "not by 'tpm0'"),
        ({"mode": "passthrough", "tpm": device(other, "one", "tpmrm0")}, "many users at once"),
        ({"mode": "passthrough", "tpm": "/dev/x", "banks": ["sha256"]}, "banks is of a vTPM"),
        ({"mode": "passthrough", "tpm": "/dev/x", "ports": "swtpm"}, "ports is of a vTPM"),
    ):
        with pytest.raises(InvalidInput, match=why):
            host.create("refused", "", **body)


def test_the_anchor_is_refused_by_name(other: Serve) -> None:
    with a_host(cdi=Path("/run/cdi"), tcti=f"device:{device(other, 'one', 'tpmrm0')}") as host:
        for node in ("tpm0", "tpmrm0"):
            with pytest.raises(Conflict, match="is this host's anchor"):
                host.create("anchor", "", mode="passthrough", tpm=device(other, "one", node))
        host.create("another", "", mode="passthrough", tpm=device(other, "two"))
