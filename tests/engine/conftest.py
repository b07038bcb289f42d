"""The real TPM. libtpms holds one in a process, so every test gets it fresh, one after another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from holdfast.engine.libtpms import Engine, Entropy
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc
from holdfast.worker.tpm import DurableTpm

_ENGINE: list[Engine] = []


@pytest.fixture
def engine() -> Iterator[Engine]:
    """libtpms, off."""
    if not _ENGINE:
        _ENGINE.append(Engine())
        Entropy().reseed()
    yield _ENGINE[0]
    _ENGINE[0].power_off()


@pytest.fixture
def tpm(engine: Engine) -> DurableTpm:
    """A new TPM, started, whose every commit succeeds."""
    engine.manufacture()
    rq.response(Cc.Startup, engine.process(rq.startup()))
    tpm = DurableTpm(engine, lambda _: True)
    noted = engine.take_noted()
    assert noted is not None
    tpm.committed(noted)
    return tpm
