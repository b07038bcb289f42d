"""A boot that is another than the one before is told by the event that makes it so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.daemon.boots import EarlierBoot
from holdfast.eventlog import tcg2
from holdfast.eventlog.difference import differences

BOOT = Path(__file__).parents[1] / "fixtures" / "boot"
OLD, NEW = ((BOOT / name).read_bytes() for name in ("old.bin", "new.bin"))
BEFORE, NOW = tcg2.parse(OLD), tcg2.parse(NEW)
ANOTHER = r"PCR 4: event 22 EV_EFI_BOOT_SERVICES_APPLICATION \EFI\BOOT\BOOTX64.EFI is another"
WHY_NOT = "this boot state is not approved: of sha256:0,2,4,7, PCR 4 differs; if that is"


def test_the_first_event_that_is_another_is_named() -> None:
    assert differences(BEFORE, NOW, range(10)) == (ANOTHER,)
    assert differences(BEFORE, NOW, [0, 2, 7]) == ()
    assert differences(BEFORE, BEFORE, range(24)) == ()


def test_events_that_came_or_went_are_named() -> None:
    shorter = replace(NOW, events=NOW.events[:-5])
    (gone,) = differences(NOW, shorter, [4])
    assert (
        gone == "PCR 4: event 32 EV_EFI_BOOT_SERVICES_APPLICATION from memory is not there any more"
    )
    (new,) = differences(shorter, NOW, [4])
    assert new == "PCR 4: event 32 EV_EFI_BOOT_SERVICES_APPLICATION from memory is new"


def test_another_startup_locality_is_named() -> None:
    (found,) = differences(BEFORE, replace(BEFORE, startup_locality=3), [0, 4])
    assert found == "PCR 0: the TPM was started at locality 3, before at 0"


def test_only_pcrs_that_the_keeper_names_are_compared(tmp_path: Path) -> None:
    earlier = EarlierBoot(tmp_path / "boot.log")
    assert earlier.differences(NOW, WHY_NOT) == ()  # there was none that is known
    earlier.remember(OLD)
    assert earlier.differences(NOW, WHY_NOT) == (ANOTHER,)
    assert earlier.differences(NOW, WHY_NOT.replace("PCR 4", "PCR 0, 4")) == (ANOTHER,)
    assert earlier.differences(NOW, WHY_NOT.replace("PCR 4", "PCR 0, 7")) == ()
    assert earlier.differences(NOW, "the host TPM does not answer") == ()
    assert (tmp_path / "boot.log").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"no log", OLD[:-1]])
def test_a_log_that_was_damaged_tells_nothing_and_breaks_nothing(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "boot.log").write_bytes(content)
    earlier = EarlierBoot(tmp_path / "boot.log")
    assert earlier.differences(NOW, WHY_NOT) == ()
    earlier.remember(NEW)
    assert (tmp_path / "boot.log").read_bytes() == NEW


def test_where_nothing_can_be_kept_nothing_is(tmp_path: Path) -> None:
    EarlierBoot(tmp_path / "nowhere" / "boot.log").remember(NEW)
    assert list(tmp_path.iterdir()) == []
