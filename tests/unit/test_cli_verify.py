"""`holdfast verify` at the command line, and what it keeps between two appraisals."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from holdfast.appraise import progress
from holdfast.cli.app import run

from .evidence_maker import AUDIENCE, NONCE, USER_DATA, Given, make, policy_text
from .web_host import HOST, WEB


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text(HOST))
    return path


class Ended(NamedTuple):
    """How the command line ended, and what it said."""

    exit_code: int
    output: str


def verify(policy: Path, given: Given, *more: str) -> Ended:
    evidence = policy.with_name("evidence.json")
    evidence.write_bytes(make(given).encode_json())
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as ended:
        run([
            "verify", str(evidence), "--policy", str(policy), "--nonce", NONCE.hex(),
            "--audience", AUDIENCE, "--user-data", USER_DATA.hex(), *more,
        ])  # fmt: skip
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, said.getvalue())


def test_what_was_seen_is_kept_and_must_not_go_back(policy: Path) -> None:
    file = policy.with_name("web.progress")
    keep = ("--progress", str(file))
    assert verify(policy, Given(WEB), *keep).exit_code == 0
    first = progress.decode(file.read_text())
    assert (first.epoch, first.run) == (11, 3)
    assert file.stat().st_mode & 0o777 == 0o600
    assert verify(policy, Given(WEB, leaf={"epoch": 12}), *keep).exit_code == 0
    later = file.read_text()
    assert progress.decode(later).epoch == 12
    back = verify(policy, Given(WEB), *keep)
    assert back.exit_code == 7
    assert "epoch" in back.output
    assert file.read_text() == later


def test_damage_is_not_taken_for_a_first_time(policy: Path) -> None:
    file = policy.with_name("web.progress")
    for damage in ("", "{", "not JSON"):
        file.write_text(damage)
        refused = verify(policy, Given(WEB), "--progress", str(file))
        assert refused.exit_code == 7
        assert "progress" in refused.output
        assert file.read_text() == damage


def test_what_is_kept_replaces_the_file_a_link_leads_to_and_is_its_owners_alone(
    policy: Path,
) -> None:
    kept = policy.with_name("kept")
    kept.mkdir()
    link = policy.with_name("link")
    link.symlink_to("kept/web.progress")
    assert verify(policy, Given(WEB), "--progress", str(link)).exit_code == 0
    file = kept / "web.progress"
    file.chmod(0o644)
    before = file.stat().st_ino
    assert verify(policy, Given(WEB, leaf={"epoch": 12}), "--progress", str(link)).exit_code == 0
    assert link.is_symlink()
    assert file.stat().st_ino != before  # never written in place
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in kept.iterdir()] == ["web.progress"]


def test_what_cannot_be_kept_is_not_accepted(policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = policy.with_name("web.progress")
    keep = ("--progress", str(file))
    assert verify(policy, Given(WEB), *keep).exit_code == 0
    before, names = file.read_text(), sorted(policy.parent.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(os, "replace", full)
    refused = verify(policy, Given(WEB, leaf={"epoch": 12}), *keep)
    assert refused.exit_code == 6
    assert "accepted" not in refused.output
    assert "No space left" in refused.output
    assert file.read_text() == before
    assert sorted(policy.parent.iterdir()) == names


def test_of_two_appraisals_at_once_the_later_one_waits(policy: Path) -> None:
    """Else the earlier could write last, and what the later one saw would be forgotten."""
    file = policy.with_name("web.progress")
    lock = os.open(policy.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done: list[int] = []

    def late() -> None:
        done.append(verify(policy, Given(WEB), "--progress", str(file)).exit_code)

    thread = threading.Thread(target=late)
    thread.start()
    thread.join(1.0)
    assert thread.is_alive()
    assert not file.exists()
    os.close(lock)
    thread.join(30)
    assert done == [0]
    assert progress.decode(file.read_text()).epoch == 11


def test_nothing_is_kept_of_what_is_refused(policy: Path) -> None:
    file = policy.with_name("web.progress")
    other = Given(WEB, nonce=bytes(32))
    assert verify(policy, other, "--progress", str(file)).exit_code == 7
    assert not file.exists()
