from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .swtpm import Swtpm


@pytest.fixture
def swtpm() -> Iterator[Swtpm]:
    """A powered-on swtpm in a directory of its own with a short path (sun_path has 108 bytes)."""
    directory = Path(tempfile.mkdtemp(prefix="hf"))
    directory.chmod(0o711)
    made = Swtpm(directory)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory)
