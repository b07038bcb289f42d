"""What pyproject.toml promises to those who build the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


def test_the_licence_is_an_spdx_expression_and_the_build_knows_those() -> None:
    """A table is deprecated (PEP 639); setuptools reads expressions from 77 on."""
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    (wanted,) = PYPROJECT["build-system"]["requires"]
    least = re.fullmatch(r"setuptools>=(\d+)[\d.]*", wanted)
    assert least is not None
    assert int(least[1]) >= 77
