"""What programs read of us is easy to take apart; and the version is where everybody looks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast import __version__
from holdfast.cli import output

PROGRAM = str(Path(sys.executable).with_name("holdfast"))
LONG = "x" * 300
HEAD = ("NAME", "CONTAINER", "STATE")
ROWS = [("web", "", "off"), (LONG, "[bold]\t\x1b[31m", "active")]


def test_a_table_for_a_program_is_one_tab_between_fields_and_nothing_else(
    capfd: pytest.CaptureFixture[str],
) -> None:
    output.table(HEAD, ROWS)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("\t") for line in lines] == [
        list(HEAD),
        ["web", "", "off"],
        [LONG, "[bold]\ufffd\ufffd[31m", "active"],
    ]


def test_a_table_on_a_terminal_has_its_columns_below_each_other() -> None:
    script = f"from holdfast.cli import output; output.table({HEAD!r}, {ROWS[:1]!r})"
    ours, its = os.openpty()
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "80"}
    command = [sys.executable, "-c", script]
    subprocess.run(command, stdout=its, env=environment, timeout=30, check=True)
    os.close(its)
    head, row, *_ = os.read(ours, 4096).decode().splitlines()
    os.close(ours)
    assert "\t" not in head + row
    assert head.index("STATE") == row.index("off")


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_the_version_is_an_option_and_a_command(arguments: list[str]) -> None:
    done = subprocess.run(
        [PROGRAM, *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"holdfast {__version__}\n", "")
