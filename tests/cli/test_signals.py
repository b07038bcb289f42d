"""Signals: an interrupted command is its own master; what was begun is taken back first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from .program import HOLDFAST, needs_tools

Process = subprocess.Popen[str]
SLOW = """
import json, pathlib, select, signal, sys
place = pathlib.Path(sys.argv[1])
def once(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, once)
try:
    print("ready", file=(place / "fifo").open("w"), flush=True)
    signal.pause()
except KeyboardInterrupt:
    select.select([], [], [], 1.0)  # longer than subprocess.run would have waited
    (place / "undone").write_text("all of it")
    sys.exit(130)
"""

CALLS_IT = """
import sys
from holdfast.cli.programs import module
try:
    module(["slow_keeper", sys.argv[1]])
except KeyboardInterrupt:
    sys.exit(130)
"""


def begin(script: str, place: Path) -> Process:
    return subprocess.Popen(
        [HOLDFAST, "tpm", "--", "sh", "-c", script], env={**os.environ, "TMPDIR": str(place)},
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def pipe(end: IO[str] | None) -> IO[str]:
    assert end is not None
    return end


@needs_tools
def test_a_command_that_goes_on_after_ctrl_c_keeps_its_tpm(tmp_path: Path) -> None:
    script = "trap 'echo heard' INT; echo begun; read a; read b; tpm2_getrandom --hex 8"
    with begin(script, tmp_path) as process:
        assert pipe(process.stdout).readline() == "begun\n"
        os.killpg(process.pid, signal.SIGINT)
        assert pipe(process.stdout).readline() == "heard\n"
        out, err = process.communicate("\n\n", timeout=30)
    assert (process.returncode, len(out), err) == (0, 16, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_a_signal_ends_ends_it_as_in_a_shell(
    tmp_path: Path, number: signal.Signals
) -> None:
    with begin("echo begun; read a", tmp_path) as process:
        assert pipe(process.stdout).readline() == "begun\n"
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait(30) == 128 + number  # its input is open until then
        assert pipe(process.stderr).read() == ""
    assert list(tmp_path.iterdir()) == []


def test_interrupted_it_waits_until_the_keeper_has_taken_back_what_it_made(tmp_path: Path) -> None:
    """A module of another name stands for the keeper; it has set up nothing and is slow to end."""
    (tmp_path / "slow_keeper.py").write_text(SLOW)
    os.mkfifo(tmp_path / "fifo")
    with subprocess.Popen(
        [sys.executable, "-c", CALLS_IT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert (tmp_path / "fifo").read_text() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")
    assert (tmp_path / "undone").read_text() == "all of it"
