"""swtpm_ioctl: every verb against our swtpm and Debian's alike, and what a container may ask."""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.swtpm.program import OURS, THEIRS, Program, running
from tests.system.serve import Serve, container

from .conftest import SUFFIX
from .tools import Programs, Tools, environment

BAD_ORDINAL = "0xa"
BAD_LOCALITY = "0x3d"
# In this order: the TPM is off, started, off, loaded from blobs, started again, off.
VERBS = (
    "-g", "-b 0", "-e", "-i", "-e", "-l 0", "-l 1", "-l 4", "-l 5", "-r 3", "-r 0", "-e", "-C",
    "-b 0", "-b 3000", "-b 10", "--info 1", "--info 0x20", "-h text", "-v",
    "--save permanent perm", "--save volatile vol", "--save savestate state", "--stop", "-e",
    "-v", "-b 3000", "-b 0", "-b 4096", "--load permanent perm", "--load volatile vol", "-i",
    "--load permanent perm", "--stop", "--load permanent absent", "-s",
)  # fmt: skip
IN_THE_CLEAR = ("--flags", "unsafe-plain-stateblobs")


def said(directory: Path, verb: str, *target: str | Path) -> tuple[int, str]:
    done = Programs(directory, environment()).run("swtpm_ioctl", *target, *shlex.split(verb))
    return done.returncode, (done.stdout + done.stderr).decode()


def verbs_of_its_help() -> set[str]:
    text = subprocess.run(["swtpm_ioctl", "--help"], capture_output=True, check=False)
    help_ = (text.stdout + text.stderr).decode()
    found = set(re.findall(r"^(--?[a-zA-Z-]+)[ :]", help_, re.MULTILINE))
    return found - {"--tpm-device", "--tcp", "--unix", "--version", "--help"}


def test_every_verb_is_tried() -> None:
    assert verbs_of_its_help() - {"-c"} == {verb.split(maxsplit=1)[0] for verb in VERBS}


def test_every_verb_is_answered_as_debian_s_swtpm_answers_it(tmp_path: Path) -> None:
    answers = []
    for number, command in enumerate((OURS, THEIRS)):
        directory = tmp_path / str(number)
        directory.mkdir()
        program = Program(directory, command)
        with running(program, *(IN_THE_CLEAR if command is OURS else ())):
            target = ("--unix", program.control)
            answers.append([(verb, *said(directory, verb, *target)) for verb in VERBS])
            assert program.ended() == 0  # after -s
        for name in ("perm", "vol"):
            assert (directory / name).stat().st_size > 1000
    assert answers[0] == answers[1]


def test_a_hash_goes_into_pcr_17_and_a_locality_stays(tmp_path: Path) -> None:
    program = Program(tmp_path)
    with running(program, "--flags", "startup-clear"):
        target = ("--unix", program.control)
        for verb in ("-l 0", "-h text"):
            assert said(tmp_path, verb, *target) == (0, "")
        value = hashlib.sha256(bytes(32) + hashlib.sha256(b"text").digest()).hexdigest().upper()
        assert value in program.tool("tpm2_pcrread", "sha256:17")
        assert said(tmp_path, "-e", *target) == (0, "tpmEstablished is 1\n")
        assert said(tmp_path, "-r 3", *target)[0] == 0
        assert said(tmp_path, "-e", *target) == (0, "tpmEstablished is 0\n")


def test_state_does_not_leave_in_the_clear(tmp_path: Path) -> None:
    program = Program(tmp_path)
    with running(program, "--flags", "startup-clear"):
        code, text = said(tmp_path, "--save permanent perm", "--unix", program.control)
        assert (code, "PTM_GET_STATEBLOB" in text) == (1, True)
        assert (tmp_path / "perm").read_bytes() == b""


# What a container is told, where it is not refused.
ALLOWED = {
    "-c": "ptm capability is 0x682c\n",
    "-e": "tpmEstablished is 0\n",
    "-g": "ptm configuration flags: 0x0\n",
    "-l 0": "",
    "-C": "",
    "-b 0": "TPM buffersize: 4096\nminimum size  : 2808\nmaximum size  : 4096\n",
    "--info 0x20": "{}\n",
}
REFUSED = {
    "-i": BAD_ORDINAL, "--stop": BAD_ORDINAL, "-s": BAD_ORDINAL, "-v": BAD_ORDINAL,
    "-r 0": BAD_ORDINAL, "-r 3": BAD_ORDINAL, "-h text": BAD_ORDINAL, "-b 3000": BAD_ORDINAL,
    "--save permanent blob": BAD_ORDINAL, "--save volatile blob": BAD_ORDINAL,
    "--save savestate blob": BAD_ORDINAL, "--load permanent data": BAD_ORDINAL,
    "--load volatile data": BAD_ORDINAL, "--load savestate data": BAD_ORDINAL,
    "-l 1": BAD_LOCALITY, "-l 2": BAD_LOCALITY, "-l 3": BAD_LOCALITY, "-l 4": BAD_LOCALITY,
}  # fmt: skip


def only_what_is_its_own(directory: Path, before: Callable[[], str], *target: str | Path) -> None:
    """Every verb, and that none of it did anything to the TPM."""
    (directory / "data").write_bytes(b"state" * 100)
    was = before()
    for verb, text in ALLOWED.items():
        assert said(directory, verb, *target) == (0, text), verb
    for verb, code in REFUSED.items():
        status, text = said(directory, verb, *target)
        assert status == 1, verb
        assert re.search(rf"TPM result from PTM_\w+: {code}\b", text), (verb, text)
    tried = {verb.split(maxsplit=1)[0] for verb in (*ALLOWED, *REFUSED)}
    assert tried | {"--info"} == verbs_of_its_help()
    assert before() == was


def state(tools: Tools) -> str:
    clock = [line for line in tools("readclock").split("\n") if "count" in line]
    return "\n".join([*clock, tools("pcrread sha256:all")])


@pytest.mark.parametrize("way", ["socket"], indirect=True)
def test_a_container_s_control_socket_gives_it_only_its_own(
    tpm: Tools, containers: Callable[[str], Path], tmp_path: Path
) -> None:
    control = containers("socket") / "run" / "tpm.sock.ctrl"
    only_what_is_its_own(tmp_path, lambda: state(tpm), "--unix", control)


def test_the_control_port_of_its_network_gives_it_no_more(host: Serve, tmp_path: Path) -> None:
    name = f"ioctl-{SUFFIX}"
    host.create(name, "linked", ports="swtpm")
    with container(name) as running_:
        pid = subprocess.run(
            ["podman", "inspect", "--format", "{{.State.Pid}}", running_],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        tools = Tools(tmp_path, f"swtpm:path={host.place(name)}/run/tpm.sock")
        inside = tmp_path / "swtpm_ioctl"
        inside.write_text(f'#!/bin/sh\nexec nsenter -t {pid} -n /usr/bin/swtpm_ioctl "$@"\n')
        inside.chmod(0o755)
        found = Programs(tmp_path, environment()).out(inside, "--tcp", "127.0.0.1:2322", "-g")
        assert found == b"ptm configuration flags: 0x0\n"
        before = state(tools)
        for verb in ("-i", "-s", "--stop", "-h text", "-l 3"):
            command = [inside, "--tcp", "127.0.0.1:2322", *shlex.split(verb)]
            assert "TPM result from PTM_" in Programs(tmp_path, environment()).fails(*command)
        assert state(tools) == before
