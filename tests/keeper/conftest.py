from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hwtpm.swtpm import Swtpm

from .box import Box, Guest


@pytest.fixture
def box() -> Iterator[Box]:
    """A provisioned host: an swtpm as its TPM, and no keeper running yet."""
    directory = Path(tempfile.mkdtemp(prefix="hf"))
    directory.chmod(0o711)
    swtpm = Swtpm(directory)
    swtpm.start()
    made = Box(directory, swtpm)
    try:
        made.provision()
        yield made
    finally:
        made.stop()
        swtpm.stop()
        shutil.rmtree(directory)


@pytest.fixture
def guest() -> Iterator[Guest]:
    """A TPM of a container, newly made: another swtpm."""
    directory = Path(tempfile.mkdtemp(prefix="hf"))
    swtpm = Swtpm(directory)
    swtpm.start()
    try:
        yield Guest(swtpm)
    finally:
        swtpm.stop()
        shutil.rmtree(directory)
