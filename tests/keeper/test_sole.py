"""Two keepers of one host TPM: the second is refused, whichever way it looks at it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from holdfast.errors import Conflict
from holdfast.keeper.sole import claim

from .box import PYTHON, Box


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
