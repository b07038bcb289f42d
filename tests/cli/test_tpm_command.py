"""`holdfast tpm -- COMMAND` and the pytest fixture: a TPM for anybody, with no root and no daemon.

As root these run as another user who keeps one capability, to read the interpreter wherever it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .nobody import NOBODY, as_nobody
from .program import HOLDFAST, needs_tools


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of that user's, for everything that is made; it is empty again at the end."""
    directory = Path(tempfile.mkdtemp(prefix="hft-"))
    temporary = directory / "tmp"
    temporary.mkdir()
    if os.geteuid() == 0:
        for place in (directory, temporary):
            os.chown(place, NOBODY, NOBODY)
    yield directory
    left = [path.name for path in temporary.iterdir()]
    shutil.rmtree(directory)
    assert left == []


def test_one_state_is_for_one_at_a_time(home: Path) -> None:
    """Of two that write, one would write in vain."""
    second = f"{HOLDFAST} tpm --state kept -- true"
    done = run(home, HOLDFAST, "tpm", "--state", "kept", "--", "sh", "-c", second)
    assert done.returncode == 6
    assert "another TPM runs on the state in kept" in done.stderr


def run(home: Path, *command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(home / "tmp"), "HOME": str(home)}
    environment |= {"HOLDFAST_SOCKET": str(home / "no-daemon-here"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        as_nobody(*command), cwd=home, env=environment, capture_output=True, text=True,
        timeout=seconds, check=False,
    )  # fmt: skip


def test_who_runs_it_is_not_root(home: Path) -> None:
    script = (
        "import os; s = open('/proc/self/status').read();"
        "print(os.getuid(), s.split('CapEff:')[1].split()[0])"
    )
    uid, capabilities = run(home, sys.executable, "-c", script).stdout.split()
    assert uid != "0"
    assert int(capabilities, 16) in (0, 1 << 2)  # CAP_DAC_READ_SEARCH


@needs_tools
def test_a_command_of_anybody_gets_a_tpm_of_its_own(home: Path) -> None:
    done = run(home, HOLDFAST, "tpm", "--", "tpm2_getrandom", "--hex", "8")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 16
    again = run(home, HOLDFAST, "tpm", "--", "tpm2_getrandom", "--hex", "8")
    assert again.stdout != done.stdout


@needs_tools
def test_it_is_a_plain_tpm_all_of_whose_rights_are_the_callers(home: Path) -> None:
    script = (
        "tpm2_pcrextend 0:sha256=$(printf 11%.0s $(seq 32)) && tpm2_pcrread sha256:0 &&"
        "tpm2_createprimary -Q -C p -c p.ctx && tpm2_create -Q -C p.ctx -u u -r r &&"
        "tpm2_load -Q -C p.ctx -u u -r r -c k.ctx && tpm2_changeauth -c platform secret"
    )
    done = run(home, HOLDFAST, "tpm", "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert "0x" + "0" * 64 not in done.stdout


@needs_tools
def test_what_is_kept_in_a_directory_is_there_for_the_next_command(home: Path) -> None:
    keep = ("tpm", "--state", str(home / "state"), "--")
    script = "tpm2_nvdefine -Q 0x1500001 -s 4 && printf kept | tpm2_nvwrite 0x1500001 -i -"
    assert run(home, HOLDFAST, *keep, "sh", "-c", script).returncode == 0
    assert run(home, HOLDFAST, *keep, "tpm2_nvread", "0x1500001").stdout == "kept"
    assert run(home, HOLDFAST, "tpm", "--", "tpm2_nvread", "0x1500001").returncode != 0


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_it_ends_as_its_command_does(home: Path, status: int) -> None:
    assert run(home, HOLDFAST, "tpm", "--", "sh", "-c", f"exit {status}").returncode == status


def test_what_cannot_be_run_is_said(home: Path) -> None:
    done = run(home, HOLDFAST, "tpm")
    assert done.returncode == 2
    assert "which command?" in done.stderr
    done = run(home, HOLDFAST, "tpm", "--", "no-such-program")
    assert done.returncode == 6
    assert "no-such-program" in done.stderr
    done = run(home, HOLDFAST, "tpm", "--replay", "/dev/null", "--", "true")
    assert done.returncode == 6
    assert "Traceback" not in done.stderr


def test_an_interrupted_command_leaves_no_tpm_behind(home: Path) -> None:
    script = 'printf "%s\\n" "$TPM2TOOLS_TCTI"; read end'
    with subprocess.Popen(
        as_nobody(HOLDFAST, "tpm", "--", "sh", "-c", script),
        env={**os.environ, "TMPDIR": str(home / "tmp")}, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        place = Path(process.stdout.readline().strip().partition("path=")[2])
        assert place.is_socket()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does
        assert process.wait(30) != 0
    assert not place.exists()


PLAIN_TEST = """\
import subprocess

SEEN = set()


def ek(tcti):
    read = ["tpm2_readpublic", "-T", tcti, "-c"]
    for command in (["tpm2_createek", "-T", tcti, "-G", "ecc", "-c", "0x81010002"],):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return subprocess.run([*read, "0x81010002"], check=True, capture_output=True).stdout


def test_one(holdfast_tpm):
    SEEN.add(ek(holdfast_tpm))


def test_another(holdfast_tpm):
    SEEN.add(ek(holdfast_tpm))
    assert len(SEEN) == 2
"""


@needs_tools
def test_the_fixture_is_there_in_anybodys_pytest(home: Path) -> None:
    file = home / "test_mine.py"
    file.write_text(PLAIN_TEST)
    file.chmod(0o644)
    pytest_run = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file))
    done = run(home, *pytest_run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
