"""The cffi bindings in the tree are those of the declarations beside them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import holdfast

ROOT = Path(holdfast.__file__).parent
SCRIPT = ROOT.parent.parent / "scripts" / "make-bindings"


@pytest.mark.parametrize("header", sorted(ROOT.glob("*/*.h")), ids=lambda path: path.name)
def test_a_binding_is_up_to_date(header: Path) -> None:
    generate = runpy.run_path(str(SCRIPT))["generate"]
    assert header.with_name(f"{header.stem}_abi.py").read_text() == generate(header)
