"""A worker that dies while it begins: between the commit it begins with and its answer.

What it committed is the newest state then, and its successor begins with that. All other steps are
visited in `test_steps`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import closing

import pytest

from holdfast.linux.steps import Step
from tests.asking import until

from .serve import Serve, a_host, children, serves
from .stepping import Steps, stepping
from .test_faults import Stream, define, read, write

STEPS = (Step.COMMIT_WRITTEN, Step.KEEPER_ADVANCED, Step.COMMIT_EXTENDED)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serve, Steps]]:
    with stepping(tmp_path_factory) as steps, a_host() as host:
        host.create("web")
        host.power_on("web")
        with closing(Stream(host.place("web"))) as wire:
            define(wire)
            assert write(wire, 1) == 0
        yield host, steps


@pytest.mark.parametrize("how", ["power on", "replacement"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name.lower())
def test_a_worker_that_dies_with_its_first_commit_under_way_has_a_successor(
    held: tuple[Serve, Steps], step: Step, how: str
) -> None:
    host, steps = held
    host.call("POST", "/v1/vtpms/web/stop", {})
    killed = []

    def kill() -> None:
        """Whoever serves now: the one that begins."""
        for worker in children(host.children()["spawner"]):
            if serves(worker):
                killed.append(worker)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)

    if how == "replacement":
        host.power_on("web")
        (first,) = host.workers()
        steps.arm(step, kill)
        os.kill(first, signal.SIGKILL)
    else:
        steps.arm(step, kill)
        host.power_on("web")
    until("it is visited, and somebody killed", lambda: killed)
    until("another serves", lambda: {*host.workers()} - {*killed})
    assert host.inspect("web")["state"] == "active"
    with closing(Stream(host.place("web"))) as wire:
        assert read(wire) == 1
        assert write(wire, 1) == 0
