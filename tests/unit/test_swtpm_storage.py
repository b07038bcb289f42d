"""State in a directory that others write to: what lies there is neither written nor waited for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from holdfast.errors import HostError
from holdfast.swtpm.storage import Directory, SingleFile

STATE = b"the state, with its secrets"


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path)


def test_a_file_that_somebody_made_ready_never_gets_the_state(directory: Directory) -> None:
    """Whoever made it could have it open, or own it."""
    prepared = directory.path / "TMP2-00.permall"
    prepared.write_text("")
    with prepared.open() as held:
        directory.save("permall", STATE)
        assert held.read() == ""
    kept = directory.path / "tpm2-00.permall"
    assert directory.load("permall") == kept.read_bytes() == STATE
    assert (kept.stat().st_uid, stat.S_IMODE(kept.stat().st_mode)) == (os.geteuid(), 0o640)
    assert not prepared.exists()


def test_a_fifo_is_not_written_to(directory: Directory) -> None:
    fifo = directory.path / "TMP2-00.permall"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        directory.save("permall", STATE)
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)
    assert directory.load("permall") == STATE


def test_a_link_is_not_followed(directory: Directory, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_text("mine")
    (directory.path / "TMP2-00.permall").symlink_to(target)
    directory.save("permall", STATE)
    assert target.read_text() == "mine"
    (directory.path / "tpm2-00.volatilestate").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        directory.load("volatilestate")


@pytest.mark.parametrize("name", ["tpm2-00.permall", ".lock"])
def test_a_fifo_is_not_waited_for(directory: Directory, name: str) -> None:
    os.mkfifo(directory.path / name)
    with pytest.raises(HostError, match=name):
        directory.load("permall") if name != ".lock" else directory.lock()


def test_one_file_is_a_file_or_a_block_device(tmp_path: Path) -> None:
    fifo = tmp_path / "state"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/null")):
        with pytest.raises(HostError, match=str(path)):
            SingleFile(path)
