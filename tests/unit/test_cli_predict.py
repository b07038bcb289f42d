"""`policy predict` at the command line: the values on standard output, all else beside them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from holdfast.cli.app import run
from holdfast.eventlog.authenticode import authenticode

BOOT = Path(__file__).parents[1] / "fixtures" / "boot"
SEEN = json.loads((BOOT / "pcrs.json").read_text())
PREDICT = ["policy", "predict", "--event-log", "old.bin"]
NEW = authenticode((BOOT / "new.efi").read_bytes()).hex()
IS_ROOT = os.geteuid() == 0


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BOOT)


def called(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    out, err = capfd.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, out, err


@pytest.mark.parametrize(
    "change",
    [
        ["--boot-application", "old.efi=new.efi"],
        ["--boot-application", "22=new.efi"],
        ["--replace-digest", f"4:22=sha256:{NEW}"],
        ["--replace-digest", f"4:{authenticode((BOOT / 'old.efi').read_bytes()).hex()}={NEW}"],
    ],
)
def test_the_values_are_alone_on_standard_output(
    capfd: pytest.CaptureFixture[str], change: list[str]
) -> None:
    code, out, err = called([*PREDICT, *change], capfd)
    assert code == 0
    assert json.loads(out) == {pcr: SEEN["new"][pcr] for pcr in ("0", "2", "4", "7")}
    assert f"PCR 4: {SEEN['new']['4']}: 6 kept, 1 replaced" in err
    assert "22 replaced EV_EFI_BOOT_SERVICES_APPLICATION" in err
    assert re.search(r"^warning PCR 4: event 23: a boot option did not start", err, re.MULTILINE)


def test_with_a_file_for_the_values_the_report_is_the_output(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "next.json"
    code, report, err = called([*PREDICT, "--pcrs", "4,0", "--out", str(out)], capfd)
    assert (code, err) == (0, "")
    assert json.loads(out.read_text()) == {pcr: SEEN["old"][pcr] for pcr in ("0", "4")}
    assert report.startswith(f"PCR 0: {SEEN['old']['0']}: 4 kept\n")


def test_json_has_every_event_and_every_warning(capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--drop", "4:23", "--append", f"4:{'ab' * 32}", "--pcrs", "4", "--json"]
    code, out, err = called([*PREDICT, *given], capfd)
    assert (code, err) == (0, "")
    value = json.loads(out)
    fates = [(event["event"], event["fate"]) for event in value["events"]]
    assert fates[3:] == [
        (23, "dropped"), (24, "kept"), (25, "kept"), (32, "kept"), (None, "appended"),
    ]  # fmt: skip
    assert value["events"][3]["by"] == "--drop 4:23"
    assert value["bank"] == "sha256"
    assert value["warnings"] == []  # the event that there would be one about is dropped


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--event-log", "nothere"], "nothere: No such file"),
        (["--event-log", "old.efi"], "old.efi is no event log"),
        (["--pcrs", "4,x"], "'4,x' is not a list of PCRs"),
        (["--pcrs", "99"], "some of 0 to 23"),
        (["--boot-application", "old.efi"], "--boot-application old.efi: it is OLD=NEW"),
        (["--boot-application", "=new.efi"], "it is OLD=NEW"),
        (["--boot-application", "nothere=new.efi"], "nothere: No such file"),
        (["--boot-application", "old.efi=old.bin"], "not an EFI program: it does not begin"),
        (["--boot-application", "new.efi=old.efi"], "that program was not started in this boot"),
        (["--replace-digest", "4"], "begins with a PCR's number and a colon"),
        (["--replace-digest", "x:00=00"], "begins with a PCR's number and a colon"),
        (["--replace-digest", "4:22"], "it is PCR:OLD=NEW"),
        (["--replace-digest", "4:22=00"], "'00' is not a SHA-256 digest in hex"),
        (["--drop", "4:9"], "PCR 4 has no event 9; it has 14"),
        (["--drop", "9:9"], "PCR 9 is not one of those to predict"),
        (["--append", "4:9"], "'9' is not a SHA-256 digest"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    capfd: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    code, out, err = called([*PREDICT, *arguments], capfd)
    assert (code, out) == (2, "")
    assert err.startswith("holdfast: ")
    assert err.count("\n") == 1
    assert why in err


@pytest.mark.skipif(not IS_ROOT, reason="for who is not root the answer is another")
def test_this_hosts_log_is_predicted_from_only_where_holdfast_is_set_up(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "holdfast.toml"
    config.write_text(f'[paths]\nstate = "{tmp_path}/state"\n')
    code, _, err = called(["policy", "predict", "--config", str(config)], capfd)
    assert code == 3
    assert "this host is not initialised: run holdfast init" in err
