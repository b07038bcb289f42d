"""What the repository promises about itself, and a page that stops being true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdfast.cli import INTERRUPTED
from holdfast.errors import EXIT_CODES, HoldfastError
from holdfast.protocol import control

ROOT = Path(__file__).parents[2]
CLI = (ROOT / "docs" / "cli.md").read_text()


def test_the_page_has_the_exit_codes_there_are() -> None:
    section = CLI.partition("## Exit codes")[2].partition("\n## ")[0]
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    assert documented == {0, 1, *EXIT_CODES.values(), INTERRUPTED}
    assert all(issubclass(kind, HoldfastError) for kind in EXIT_CODES)


def test_make_test_runs_every_directory_of_tests() -> None:
    """It names them, as not all may run side by side."""
    make = (ROOT / "Makefile").read_text()
    there = {f"tests/{path.parent.name}" for path in (ROOT / "tests").glob("*/test_*.py")}
    recipe = make.partition("\ntest:")[2].partition("\n\n")[0]
    lists = re.findall(r"^BESIDE_\w+ = (.*)$", make, re.MULTILINE)
    named = [word for part in (*lists, recipe) for word in re.findall(r"tests/\w+", part)]
    assert len(lists) == recipe.count("$(BESIDE_")
    assert set(named) == there


def test_pinned_dependencies_name_no_registry() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert len(pinned) > 20
    for line in pinned:
        assert re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[^\s@/:]+( ;.*)?", line), line


def test_no_control_command_that_could_hurt_evidence_is_a_containers() -> None:
    """INIT wipes PCRs 0-15, HASH_* forge PCR 17, STATEBLOB reads secrets."""
    containers = {
        c for c, row in control.TABLE.items() if row.audience is control.Audience.CONTAINER
    }
    assert containers == {
        control.Command.GET_CAPABILITY, control.Command.GET_TPMESTABLISHED,
        control.Command.SET_LOCALITY, control.Command.CANCEL_TPM_CMD,
        control.Command.GET_CONFIG, control.Command.SET_BUFFERSIZE, control.Command.GET_INFO,
    }  # fmt: skip
    assert set(control.TABLE) == set(control.Command)


@pytest.mark.parametrize("page", ["architecture.md", "threat-model.md", "measuring.md"])
def test_a_page_says_what_it_does_not_protect_against(page: str) -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert any("not" in heading.lower() for heading in headings), headings
