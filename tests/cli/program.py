"""The program that these tests run, and what it is run with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

HOLDFAST = str(Path(sys.executable).with_name("holdfast"))
needs_tools = pytest.mark.skipif(
    not shutil.which("tpm2_getrandom"), reason="tpm2-tools are not installed"
)
