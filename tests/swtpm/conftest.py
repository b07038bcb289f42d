"""The place of a TPM that is to be set up."""

from __future__ import annotations

from pathlib import Path

import pytest

from .setting_up import Place, authority_config


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "state").mkdir()
    for name in ("ca", "theirs"):
        authority_config(tmp_path, name)
    (tmp_path / "options").write_text(
        "--platform-manufacturer Maker\n--platform-version 3.1 --platform-model Box\n"
    )
    common = f"create_certs_tool_options = {tmp_path}/options\n"
    (tmp_path / "setup.conf").write_text(f"create_certs_tool_config = {tmp_path}/ca.conf\n{common}")
    (tmp_path / "tool.conf").write_text(
        f"create_certs_tool = swtpm_localca # in PATH\n"
        f"create_certs_tool_config = {tmp_path}/theirs.conf\n{common}"
    )
    return Place(tmp_path)


@pytest.fixture
def keyed(place: Place) -> Place:
    (place.path / "k16").write_text("00112233445566778899aabbccddeeff")
    (place.path / "k32").write_text("00112233445566778899aabbccddeeff" * 2)
    (place.path / "password").write_text("correct horse")
    return place
