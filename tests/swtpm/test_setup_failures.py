"""A set-up that fails or is ended leaves nothing behind: rights, disks, the tool, signals."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.asking import until

from .program import SECONDS, SETUP
from .setting_up import CERTIFIED, Place, boot, opened_to_nobody


def test_what_a_user_may_not_write_is_refused(place: Place) -> None:
    nobody = ("--runas", "nobody")
    place.ca.mkdir(0o700)
    with opened_to_nobody(place.path):
        said = place.refused(*nobody)
        assert f"Need read/write rights on directory {place.state} for user nobody." in said
        said = place.refused(*nobody, state=f"file://{place.path}/one")
        assert f"Need write rights on directory {place.path} for user nobody." in said
        os.chown(place.state, 65534, 65534)
        assert f"{place.ca}" in (said := place.refused(*nobody, "--create-ek-cert"))
        assert "Permission denied" in said
        said = place.refused(*nobody, "--create-ek-cert", "--write-ek-cert-files", ".")
        assert "User nobody cannot access directory ." in said


@pytest.mark.parametrize("form", ["", "file://"])
@pytest.mark.parametrize("free", [0, 4096])
def test_a_full_disk_is_an_error_and_leaves_nothing(place: Place, form: str, free: int) -> None:
    small = place.path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=True)
    try:
        (small / "filling").write_bytes(bytes(16384 - free))
        done = place.run(*CERTIFIED, state=f"{form}{small}{'/one' if form else ''}")
        assert (done.returncode, "No space left on device" in done.stderr) == (1, True)
        assert {path.name for path in small.iterdir()} <= {"filling", ".lock"}
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), "ek-rsa2048.crt"),
        ((), "ek-secp384r1.crt"),
        (("--rsa-keysize", "3072"), "ek-rsa3072.crt"),
    ],
)
def test_a_directory_in_a_certificates_place_is_refused_before_anything_is_made(
    place: Place, options: tuple[str, ...], name: str
) -> None:
    (place.path / name).mkdir()
    before = sorted(place.path.rglob("*"))
    said = place.refused("--create-ek-cert", "--write-ek-cert-files", ".", *options)
    assert f"{name} is a directory" in said
    assert sorted(place.path.rglob("*")) == before  # not even a lock, or a CA


def test_certificate_files_that_cannot_have_their_names_are_not_left_under_others(
    place: Place,
) -> None:
    target = place.path / "ek-secp384r1.crt"
    target.touch()
    subprocess.run(["mount", "--bind", target, target], check=True)
    try:
        done = place.run("--create-ek-cert", "--write-ek-cert-files", ".")
    finally:
        subprocess.run(["umount", target], check=True)
    assert done.returncode == 1
    assert "ek-secp384r1.crt: Device or resource busy" in done.stderr
    assert target.read_bytes() == b""
    assert not list(place.path.glob(".ek-*"))


def test_a_reader_that_goes_stops_nothing(place: Place) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [SETUP, "--tpm2", "--tpmstate", str(place.state), "--createek"]
    done = subprocess.run(command, stdout=writer, stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 0
    assert len(boot(place).keys) == 2


# --- the program that makes certificates ---------------------------------------------------------


def tool(place: Place, script: str, seconds: int = 30) -> tuple[str, str]:
    path = place.path / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return place.config(f"create_certs_tool = {path}\ncreate_certs_tool_seconds = {seconds}\n")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no such luck >&2; exit 3", "tool exit with status 3: no such luck"),
        ("kill -9 $$", "tool exit with status -9"),
        ("exit 0", "tool left no ek.cert"),
        ('touch "$6"/ek.cert', "tool left ek.cert of 0 bytes"),
        ('mkfifo "$6"/ek.cert', "tool left no ek.cert: not a regular file"),
        ('ln -s /dev/zero "$6"/ek.cert', "tool left no ek.cert: not a regular file"),
        ('head -c 2049 /dev/zero > "$6"/ek.cert', "tool left ek.cert of 2049 bytes"),
        ('echo certificate > "$6"/ek.cert', "tool made no certificate"),
        ('cp "$(dirname "$0")"/another.der "$6"/ek.cert', "of another key than the EK's"),
    ],
)
def test_a_tool_that_fails_is_an_error_and_leaves_nothing(
    place: Place, script: str, message: str
) -> None:
    place.made("--create-ek-cert", "--write-ek-cert-files", str(place.path))
    (place.path / "ek-rsa2048.crt").rename(place.path / "another.der")
    for name in ("tpm2-00.permall", ".lock"):
        (place.state / name).unlink()
    before = set(Path("/tmp").glob("swtpm_setup.certs.*"))
    said = place.refused("--create-ek-cert", *tool(place, script))
    assert message in said
    assert "Authoring the TPM state failed." in said
    assert set(Path("/tmp").glob("swtpm_setup.certs.*")) <= before


def test_a_tool_that_hangs_is_killed_with_what_it_started(place: Place) -> None:
    config = tool(place, f"sleep 1000 & echo $! > {place.path}/pid; wait", seconds=1)
    before = place.files()
    done = place.run("--create-ek-cert", *config)
    assert done.returncode == 1
    assert "tool did not end within 1 s and was killed" in done.stderr
    pid = int((place.path / "pid").read_text())
    (place.path / "pid").unlink()
    assert place.files() == before
    until("what it started is gone", partial(gone, pid), SECONDS)


def test_a_signal_ends_it_and_the_tool_and_leaves_nothing(place: Place) -> None:
    config = tool(place, f"echo $$ > {place.path}/pid; exec sleep 1000")
    command = [SETUP, "--tpm2", "--tpmstate", str(place.state), "--create-ek-cert", *config]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=place.path)
    assert process.stdout is not None
    pid = place.path / "pid"
    until("the tool runs", lambda: pid.exists() and pid.read_text(), SECONDS)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 128 + signal.SIGTERM
    process.stdout.close()
    until("the tool is gone", partial(gone, int(pid.read_text())), SECONDS)
    assert [path.name for path in place.state.iterdir()] == [".lock"]


def gone(pid: int) -> bool:
    """Whether a process ended; one that nobody waits for is there as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_whenever_it_is_ended_the_state_is_whole_or_none(
    place: Place, number: signal.Signals
) -> None:
    place.made("--create-ek-cert")  # the CA is there then
    command = [SETUP, "--tpm2", *CERTIFIED, "--config", str(place.path / "setup.conf")]
    ends = []
    for turn in range(24):
        state = place.path / f"state{turn}"
        state.mkdir()
        process = subprocess.Popen(
            [*command, "--tpmstate", state], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(turn % 13):  # as far as it has said this many lines
            process.stdout.readline()
        process.send_signal(number)
        process.communicate(timeout=SECONDS)
        ends.append(process.returncode)
        left = {path.name for path in state.iterdir()} - {".lock"}
        if number is signal.SIGTERM:
            assert left in (set(), {"tpm2-00.permall"})
        if "tpm2-00.permall" in left:
            where = ("--tpmstate", f"dir={state}")
            assert len(boot(place, state=where).contents) == 3
    assert set(ends) != {0}
