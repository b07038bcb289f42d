"""Two keepers of one host TPM: the second is refused, whichever way it looks at it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from holdfast.errors import Conflict, HostError
from holdfast.keeper.sole import claim, locks_of_this_user

from .box import NOBODY, PYTHON, Box


def test_a_second_keeper_of_the_same_tpm_is_refused_and_the_first_serves_on(
    box: Box, tmp_path: Path
) -> None:
    """Its directory may be a copy: what counts is the TPM."""
    box.start()
    link = tmp_path / "another-name"
    link.symlink_to(box.swtpm.tcti.partition("path=")[2])
    for tcti in (box.swtpm.tcti, f"swtpm:path={link}"):
        done = subprocess.run(
            [
                *PYTHON, "holdfast.keeper", "serve", "--dir", str(box.keeper), "--tcti", tcti,
                "--socket", str(tmp_path / "second.sock"),
            ],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "has a keeper already" in done.stdout
    assert box.listens()


def test_whoever_let_go_of_a_tpm_can_be_followed(tmp_path: Path) -> None:
    for _ in range(2):
        claim(f"swtpm:path={tmp_path}").close()


@pytest.mark.parametrize(("one", "other"), [("device:/dev/tpm0", "device:/dev/tpmrm0")])
def test_both_devices_of_a_tpm_are_one(one: str, other: str) -> None:
    with claim(one), pytest.raises(Conflict):
        claim(other)
    with claim(one), claim("device:/dev/tpm1"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_no_other_user_can_keep_a_keeper_away(tmp_path: Path) -> None:
    """A name that anybody can take, as a socket's, would let one user stop all vTPMs."""
    tcti = f"swtpm:path={tmp_path}"
    claim(tcti).close()
    files = list(locks_of_this_user().iterdir())
    assert files
    pid = os.fork()
    if pid == 0:
        taken = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            for file in files:
                with contextlib.suppress(PermissionError):
                    fcntl.flock(os.open(file, os.O_RDONLY), fcntl.LOCK_EX)
                    break
            else:
                taken = 0
        finally:
            os._exit(taken)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    claim(tcti).close()


@pytest.mark.parametrize("what", ["everybody's", "a link"])
def test_a_claim_is_made_where_nobody_else_can_make_one(tmp_path: Path, what: str) -> None:
    locks = tmp_path / "locks"
    if what == "a link":
        (tmp_path / "there").mkdir(mode=0o700)
        locks.symlink_to(tmp_path / "there")
    else:
        locks.mkdir()
        locks.chmod(0o777)
    with pytest.raises((HostError, OSError)):
        claim(f"swtpm:path={tmp_path}", locks)
