"""The two TPMs of most tests here: a Debian swtpm for all of them, and ours in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.engine.libtpms import Engine
from tests.engine.conftest import engine  # one engine in a process

from .sides import InProcess, State, Swtpm, running

__all__ = ["engine"]


@pytest.fixture(scope="session")
def state() -> State:
    return State.stored()


@pytest.fixture(scope="module")
def swtpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    with running("swtpm", tmp_path_factory.mktemp("theirs") / "t") as made:
        yield made


@pytest.fixture
def ours(engine: Engine) -> InProcess:
    return InProcess(engine)
