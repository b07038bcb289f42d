"""What the daemon decides before it does anything: who may connect, what status says, its file."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.daemon import config
from holdfast.daemon.__main__ import API_ROOM
from holdfast.daemon.doctor import brief
from holdfast.daemon.ground import is_virtual
from holdfast.daemon.inside import ROOM as EVIDENCE_ROOM
from holdfast.daemon.inside import Inside
from holdfast.daemon.listening import Present, Room
from holdfast.errors import InvalidInput
from holdfast.instance.vtpm import VirtualTpm

# --- connections ---


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=300))
def test_there_are_never_more_connections_than_agreed(moves: list[tuple[bool, int]]) -> None:
    room = Room(root=5, user=3, others=7)
    present, there = Present(room), dict.fromkeys(range(7), 0)
    for comes, uid in moves:
        others = sum(count for user, count in there.items() if user)
        if comes:
            fits = there[0] < 5 if uid == 0 else there[uid] < 3 and others < 7
            assert present.enter(uid) is fits
            there[uid] += fits
        elif there[uid]:
            present.go(uid)
            there[uid] -= 1


def test_many_users_of_one_person_leave_root_its_room() -> None:
    present = Present(API_ROOM)
    entered = sum(present.enter(100_000 + n // 16) for n in range(65_536))
    assert entered == API_ROOM.others
    assert present.enter(0)


def test_a_container_has_no_more_connections_for_having_many_users() -> None:
    present = Present(EVIDENCE_ROOM)
    assert sum(present.enter(uid) for uid in range(1000)) <= 2 * EVIDENCE_ROOM.user


def test_a_run_that_is_taken_up_at_the_end_is_left_to_the_next_daemon(tmp_path: Path) -> None:
    inside, vtpm = Inside(), cast(VirtualTpm, object())
    asyncio.run(inside.end())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(tmp_path / "s"))
        inside.open(vtpm, sock)
        assert sock.fileno() == -1


def test_a_daemon_whose_supervisor_ends_while_it_loads_does_not_begin() -> None:
    begin, began = os.pipe()
    os.close(began)
    command = [sys.executable, "-m", "holdfast.daemon", "--begin-fd", str(begin)]
    done = subprocess.run(command, pass_fds=(begin,), capture_output=True, timeout=60, check=False)
    os.close(begin)
    assert (done.returncode, done.stderr) == (1, b"")


# --- status ---


def finding(what: str, level: str = "ok", says: str = "fine") -> dict[str, str]:
    return {"what": what, "level": level, "says": says}


def seen(*findings: dict[str, str]) -> dict[str, Any]:
    value = {"verdict": "ok", "findings": list(findings), "vtpms": {"off": 2}}
    return {**value, "root_key_memory": "memfd_secret"}


def test_each_part_has_its_worst_finding_and_the_rest_is_named() -> None:
    findings = (
        finding("keeper"), finding("host TPM", "warning", "a stand-in"),
        finding("virtual host", "note", "snapshots"), finding("host event log"),
        finding("spawner", says="2 workers live"), finding("FUSE", "problem"),
        finding("libtpms", "note"),
    )  # fmt: skip
    short = brief(seen(*findings))
    assert short["host"] == {"level": "warning", "says": "a stand-in; snapshots"}
    assert short["keeper"] == {"level": "ok", "says": "fine"}
    assert short["spawner"]["says"] == "2 workers live"
    assert short["more"] == ["FUSE (problem)"]
    assert short["vtpms"] == {"off": 2}
    assert short["root_key_memory"] == "memfd_secret"


def test_a_host_that_nothing_is_known_of_is_said_so() -> None:
    short = brief(seen(finding("keeper", "problem", "gone"), finding("spawner", "problem", "gone")))
    assert short["host"]["says"] == "not known without the keeper"
    assert short["keeper"]["level"] == "problem"


def test_a_virtual_machine_is_told_by_its_processor() -> None:
    assert is_virtual("processor : 0\nflags\t\t: fpu vme hypervisor lahf_lm\n")
    assert not is_virtual("processor : 0\nflags\t\t: fpu vme\nmodel name : hypervisor\n")
    assert not is_virtual("")


# --- configuration ---


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[workers]\nblank = '3'\n", "workers.blank: is a whole number"),
        ("[workers]\nblank = 257\n", "workers.blank: Input should be less than or equal to 256"),
        ("[workers]\nmanufactured = true\n", "workers.manufactured: is a whole number"),
        ("[host]\nstand_in = 1\n", "host.stand_in: is true or false"),
        ("[host]\nevent_log = 5\n", "host.event_log: is text"),
        ("[paths]\ncdi = 'cdi'\n", "paths.cdi: is a path that begins with /"),
        ("[keeper]\nuser = []\n", "keeper.user: is text"),
        ("[engine]\n", "engine: there is no such key"),
        ("[[host]]\n", "host: is a section"),
    ],
)
def test_a_value_of_another_type_is_an_error_that_names_file_and_key(
    tmp_path: Path, text: str, why: str
) -> None:
    file = tmp_path / "holdfast.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput) as error:
        config.load(file)
    assert str(error.value).startswith(f"{file}: {why}")


def test_a_good_configuration_is_read(tmp_path: Path) -> None:
    file = tmp_path / "holdfast.toml"
    file.write_text("[paths]\nrun = '/run/other'\n[workers]\nblank = 0\n[host]\nstand_in = true\n")
    made = config.load(file)
    assert made.paths.api == Path("/run/other/api.sock")
    assert (made.workers.blank, made.host.stand_in) == (0, True)
