"""Files of vTPMs that sleep: whole, and of this boot, or not taken for one."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import IntegrityError, NotFound
from holdfast.linux.process import boot_id
from holdfast.store.asleep import Asleep

INSTANCE = uuid4()


@pytest.fixture
def files(tmp_path: Path) -> Asleep:
    return Asleep(tmp_path / "asleep")


def test_what_was_kept_is_read_until_it_is_discarded(files: Asleep) -> None:
    for left in (b"one", b"", b"two"):
        files.keep(INSTANCE, left)
        assert files.read(INSTANCE) == left
    files.discard(INSTANCE)
    with pytest.raises(NotFound):
        files.read(INSTANCE)


@given(left=st.binary(max_size=64), data=st.data())
def test_every_change_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, left: bytes, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("asleep")
    files = Asleep(directory)
    files.keep(INSTANCE, left)
    place = directory / str(INSTANCE)
    there = bytearray(place.read_bytes())
    there[data.draw(st.integers(0, len(there) - 1))] ^= data.draw(st.integers(1, 255))
    place.write_bytes(there)
    with pytest.raises(IntegrityError, match="damaged"):
        files.read(INSTANCE)


def test_what_a_boot_before_left_is_not_of_this_one(
    files: Asleep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a directory for what runs is kept over a reboot."""
    files.keep(INSTANCE, b"left")
    assert Asleep(tmp_path / "asleep").read(INSTANCE) == b"left"
    other = boot_id().int ^ 1
    monkeypatch.setattr("holdfast.store.asleep.boot_id", lambda: type(INSTANCE)(int=other))
    with pytest.raises(IntegrityError, match="another boot"):
        Asleep(tmp_path / "asleep").read(INSTANCE)
