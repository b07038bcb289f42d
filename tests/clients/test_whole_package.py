"""Every program of tpm2-tools is run, or is on a list with the reason why not."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from .tools import Way

FIXTURES = frozenset({"tpm", "spare", "plain", "fapi"})  # they note what was run
NOT_RUN: dict[str, str] = {}  # program: why


def programs() -> set[str]:
    """What Debian's package puts into /usr/bin."""
    listed = subprocess.run(["dpkg", "-L", "tpm2-tools"], capture_output=True, check=True)
    lines = listed.stdout.decode().split("\n")
    return {Path(line).name for line in lines if line.startswith("/usr/bin/")}


def written() -> set[tuple[str, str]]:
    """The tests of this directory that run programs on a vTPM: file and name."""
    found = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                asked = {argument.arg for argument in node.args.args}
                found |= {(path.name, node.name)} if asked & FIXTURES else set()
    return found


def test_every_program_of_tpm2_tools_is_run(
    way: Way, ran: dict[str, set[str]], request: pytest.FixtureRequest
) -> None:
    chosen = {(item.path.name, item.name.partition("[")[0]) for item in request.session.items}
    if left_out := written() - chosen:
        pytest.skip(f"not all tests were chosen: {len(left_out)} were left out")
    there = programs()
    assert len(there) > 100
    assert set(NOT_RUN) <= there
    assert sorted(there - ran[way] - set(NOT_RUN)) == []
    assert sorted(ran[way] & set(NOT_RUN)) == []
