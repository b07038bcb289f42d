"""Where a new state goes and under which key; one that is there stays unless told otherwise."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from holdfast.protocol import linear

from .program import OURS, SECONDS, SETUP, STARTED, THEIRS, Program, running
from .setting_up import CERTIFIED, Place, boot, opened_to_nobody

KEYS = {
    "keyfile": (("--keyfile", "k16"), ("--key", "file=k16")),
    "keyfile of 256 bits": (
        ("--keyfile", "k32", "--cipher", "aes-256-cbc"), ("--key", "file=k32,mode=aes-256-cbc"),
    ),
    "pwdfile": (
        ("--pwdfile", "password", "--cipher", "aes-cbc"), ("--key", "pwdfile=password"),
    ),
    "pwdfile of 256 bits": (
        ("--pwdfile", "password", "--cipher", "aes-256-cbc"),
        ("--key", "pwdfile=password,mode=aes-256-cbc"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", [OURS, THEIRS], ids=["in ours", "in Debian's"])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", ["directory", "dir://", "file://"])
def test_a_state_boots_under_its_key(
    keyed: Place, command: tuple[str, ...], key: str, form: str
) -> None:
    given, booted = KEYS[key]
    where: tuple[str, ...] = ()
    state = f"dir://{keyed.state}" if form == "dir://" else str(keyed.state)
    if form == "file://":
        state = f"file://{keyed.path / 'one'}"
        where = ("--tpmstate", f"backend-uri={state}")
    keyed.made("--createek", *given, state=state)
    assert set(boot(keyed, command, *booted, state=where).keys) == {0x81010001, 0x81010016}
    assert b"\x01\xc0\x00\x02" not in b"".join(keyed.files().values())


@pytest.mark.parametrize("kind", ["keyfile", "pwdfile"])
def test_a_key_comes_by_a_descriptor(keyed: Place, kind: str) -> None:
    source = "k16" if kind == "keyfile" else "password"
    with (keyed.path / source).open("rb") as file:
        number = file.fileno()
        done = keyed.run(f"--{kind}-fd", str(number), pass_fds=(number,))
    assert done.returncode == 0, done.stderr
    name = "file" if kind == "keyfile" else "pwdfile"
    boot(keyed, THEIRS, "--key", f"{name}={source}")


@pytest.mark.parametrize("command", [OURS, THEIRS], ids=["in ours", "in Debian's"])
def test_a_linear_file_boots(place: Place, command: tuple[str, ...]) -> None:
    state = f"file://{place.path / 'one'}"
    place.made(*CERTIFIED, state=state)
    stored = linear.decode((place.path / "one").read_bytes())
    assert list(stored.states) == ["permall"]
    assert (place.path / "one").stat().st_mode & 0o777 == 0o640
    assert len(boot(place, command, state=("--tpmstate", f"backend-uri={state}")).contents) == 3
    assert "Found existing TPM state 'permall'." in place.refused(state=state)
    place.made("--overwrite", "--createek", state=state)
    tpm = boot(place, command, state=("--tpmstate", f"backend-uri={state}"))
    assert (len(tpm.keys), tpm.contents) == (2, {})


def test_an_empty_file_takes_a_state_and_another_file_is_left_alone(place: Place) -> None:
    (place.path / "empty").touch()
    place.made(state=f"file://{place.path / 'empty'}")
    assert linear.decode((place.path / "empty").read_bytes()).states
    (place.path / "other").write_bytes(b"something that is no store" * 99)
    for options in ((), ("--overwrite",)):
        assert "linear TPM store" in place.refused(*options, state=f"file://{place.path / 'other'}")


def test_what_is_written_is_the_users_of_runas(place: Place) -> None:
    directory = place.path / "nobodys"
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    with opened_to_nobody(place.path):
        conf = place.config(f"create_certs_tool_config = {directory}/localca.conf\n")
        (directory / "localca.conf").write_text(
            f"statedir = {directory}/ca\nsigningkey = {directory}/ca/k.pem\n"
            f"issuercert = {directory}/ca/c.pem\n"
        )
        log = directory / "log"
        options = ("--create-ek-cert", "--write-ek-cert-files", str(directory), *conf)
        place.made("--runas", "nobody", "--logfile", str(log), *options, state=str(directory))
    made = [path for path in directory.rglob("*") if path.name != "localca.conf"]
    assert len(made) >= 10
    assert {path.stat().st_uid for path in made} == {65534}
    assert "as nobody:nogroup @" in log.read_text()


# --- what is there is not touched without being told ---------------------------------------------


def test_a_state_that_is_there_is_an_error_is_kept_or_is_replaced(place: Place) -> None:
    place.made()
    first = (place.state / "tpm2-00.permall").read_bytes()
    assert "Found existing TPM state 'permall'." in place.refused("--createek")
    assert "Not overwriting existing state file." in place.made("--createek", "--not-overwrite")
    assert (place.state / "tpm2-00.permall").read_bytes() == first
    (place.state / "tpm2-00.volatilestate").write_bytes(b"of the old TPM")
    place.made("--createek", "--overwrite")
    assert (place.state / "tpm2-00.permall").read_bytes() != first
    assert sorted(path.name for path in place.state.iterdir()) == [".lock", "tpm2-00.permall"]


def test_a_suspended_state_alone_is_a_state(place: Place) -> None:
    (place.state / "tpm2-00.volatilestate").write_bytes(b"of some TPM")
    assert "Found existing TPM state 'volatilestate'." in place.refused()


@pytest.mark.parametrize("command", [OURS, THEIRS], ids=["ours", "Debian's"])
def test_a_running_tpm_is_not_set_up(place: Place, command: tuple[str, ...]) -> None:
    with running(Program(place.path, command), *STARTED):
        for options in (("--overwrite",), ("--reconfigure",)):
            done = place.run(*options)
            assert done.returncode == 1
            assert "another TPM runs on it" in done.stderr


def test_reconfiguration_changes_the_banks_and_nothing_else(keyed: Place) -> None:
    key = ("--keyfile", "k16")
    keyed.made(*CERTIFIED, "--create-spk", *key)
    before = boot(keyed, THEIRS, "--key", "file=k16")
    said = keyed.made("--reconfigure", "--pcr-banks", "sha384,sha1", *key)
    assert "Starting vTPM reconfiguration as root:root @" in said
    after = boot(keyed, OURS, "--key", "file=k16")
    assert [(alg.name, len(pcrs)) for alg, pcrs in after.banks.banks] == [
        ("SHA1", 24), ("SHA256", 0), ("SHA384", 24), ("SHA512", 0)
    ]  # fmt: skip
    assert (after.keys, after.indices, after.contents) == (
        before.keys, before.indices, before.contents
    )  # fmt: skip


def test_reconfiguration_needs_a_tpm_its_key_and_that_it_is_off(keyed: Place) -> None:
    assert "There is no TPM state in" in keyed.refused("--reconfigure")
    keyed.made("--keyfile", "k16")
    assert "no key was given" in keyed.refused("--reconfigure")
    assert "HMAC failed" in keyed.refused("--reconfigure", "--pwdfile", "password")
    (keyed.state / "tpm2-00.volatilestate").write_bytes(b"suspended")
    assert "is suspended" in keyed.refused("--reconfigure", "--keyfile", "k16")


@pytest.mark.parametrize("form", ["", "file://"])
def test_of_many_at_once_on_one_state_one_makes_it(place: Place, form: str) -> None:
    state = f"{form}{place.state}{'/one' if form else ''}"
    command = [SETUP, "--tpm2", "--tpmstate", state, "--createek", "--config",
               str(place.path / "setup.conf"), "--write-ek-cert-files", "."]  # fmt: skip
    processes = [
        subprocess.Popen([*command, "--create-ek-cert"], cwd=place.path, text=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(5)
    ]  # fmt: skip
    said = [process.communicate(timeout=6 * SECONDS)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1, 1, 1, 1], said
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            assert re.search("Found existing TPM state|another TPM runs on it|File exists", text)
    where = ("--tpmstate", f"backend-uri={state}") if form else ()
    tpm = boot(place, state=where)
    assert (place.path / "ek-rsa2048.crt").read_bytes() == tpm.contents[0x01C00002]
    assert not list(place.path.glob(".ek-*"))
