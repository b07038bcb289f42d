from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from .plain import Plain
from .standin import StandIn
from .swtpm import Swtpm

S = TypeVar("S", bound=StandIn)


@contextmanager
def powered(kind: type[S]) -> Iterator[S]:
    """One that is on, in a directory of its own with a short path (sun_path has 108 bytes)."""
    directory = Path(tempfile.mkdtemp(prefix="hf"))
    directory.chmod(0o711)
    made = kind(directory)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(directory)


@pytest.fixture
def swtpm() -> Iterator[Swtpm]:
    with powered(Swtpm) as made:
        yield made


@pytest.fixture(params=[Swtpm, Plain])
def standin(request: pytest.FixtureRequest) -> Iterator[StandIn]:
    """Each of the two that can stand for a host's TPM."""
    with powered(request.param) as made:
        yield made
