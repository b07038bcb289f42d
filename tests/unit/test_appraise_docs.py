"""docs/verification.md and the code say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdfast.appraise.policy import parse_policy
from holdfast.appraise.verifier import STEPS
from holdfast.errors import InvalidInput
from holdfast.evidence.bundle import MEMBERS
from tests.unit.evidence_maker import HardwareMaker

PAGE = (Path(__file__).parents[2] / "docs" / "verification.md").read_text()


def test_the_page_has_the_verifiers_steps_in_their_order_and_words() -> None:
    found = re.findall(r"^(\d+)\. \*\*(.+?)\*\* — (.+?\.) ?", PAGE, re.MULTILINE)
    assert [(int(n), name) for n, name, _ in found] == [
        (n, name) for n, (name, _) in enumerate(STEPS, 1)
    ]
    assert [claim for _, _, claim in found] == [claim for _, claim in STEPS]


def test_the_page_lists_every_member_and_what_protects_it() -> None:
    rows = [row.split(" | ") for row in PAGE.splitlines() if row.startswith("| `")]
    listed = {
        label: row[-1].rstrip(" |")
        for row in rows
        if len(row) == 3
        for label in re.findall(r"`([a-z-]+)`", row[0])
    }
    assert {m.label for m in MEMBERS} <= listed.keys()
    assert all((listed[m.label] == "its digest in the leaf") is m.in_leaf for m in MEMBERS)


def test_the_pages_policy_is_one_but_for_its_ellipses() -> None:
    text = PAGE[PAGE.index("```toml") + 7 :]
    text = text[: text.index("```")]
    with pytest.raises(InvalidInput):
        parse_policy(text)
    files = {"tpm-vendors.pem": HardwareMaker().pem.encode()}
    filled = re.sub(r'(?<=")(sha256:)?…(?=")', lambda m: (m[1] or "") + "0" * 64, text)
    policy = parse_policy(filled, files)
    assert policy.host is not None
    assert policy.host.events[4].required


def test_the_page_ends_with_what_it_does_not_protect_against() -> None:
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert headings[-1] == "What this does not protect against"
