"""kill -9 of any process at every named step of sleep and wake (`linux.steps`).

After each: what was written is there, no epoch has gone back, a session is there or its vTPM was
reset and says so, and it sleeps and wakes again. Other operations' steps are in test_steps.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
from collections.abc import Iterator
from functools import partial
from typing import Final

import pytest

from holdfast.errors import HoldfastError
from holdfast.linux.steps import Step
from holdfast.tpm2 import requests as rq
from tests.asking import rc, until
from tests.commands import digest_of, handle_of

from .running import on_device
from .serve import Serve
from .stepping import Steps, stepping
from .test_faults import Stream, define, read, write
from .test_sleep_host import sleeps, sleepy
from .test_steps import ELSEWHERE, KILLS_MAX, SECONDS, called, deaths

NAME: Final = "main"
HERE: Final = tuple(step for step in Step if step.name.startswith(("SLEEP", "WAKE")))


class Night:
    """A host with a vTPM that sleeps as soon as it can; what is known of it."""

    def __init__(self, host: Serve) -> None:
        self.host = host
        self.epoch = self.written = self.kills = 0
        host.create(NAME)

    def prepare(self) -> None:
        """On anew: a worker that dies six times within a minute is not replaced."""
        self.kills += 1
        if self.kills % KILLS_MAX == 0:
            assert self.host.stop() == 0
            self.host.start()
        with contextlib.suppress(HoldfastError):
            self.host.call("POST", f"/v1/vtpms/{NAME}/stop", {})
        self.host.power_on(NAME)
        with contextlib.closing(Stream(self.host.place(NAME))) as wire:
            if not self.written:
                define(wire)
            self.written += 1
            assert write(wire, self.written) == 0

    def restarts(self) -> int:
        return int(self.host.inspect(NAME)["restarts"])

    def serves(self) -> bool:
        try:
            with contextlib.closing(Stream(self.host.place(NAME))) as wire:
                return self.host.answers() and read(wire) == self.written
        except (HoldfastError, OSError):
            return False

    def check(self) -> None:
        query = "SELECT epoch FROM states JOIN instances USING (id) WHERE name = ?"
        with contextlib.closing(sqlite3.connect(self.host.database)) as db:
            (epoch,) = db.execute(query, (NAME,)).fetchone()
        assert epoch >= self.epoch, f"epoch {epoch} after {self.epoch}"
        self.epoch = epoch


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Night, Steps]]:
    with stepping(tmp_path_factory) as steps, sleepy("idle_after = 1") as host:
        yield Night(host), steps


@pytest.mark.parametrize(("step", "victim"), deaths(HERE), ids=called)
def test_a_kill_at_this_step_is_a_sleep_a_wake_or_a_reset_that_is_counted(
    night: tuple[Night, Steps], step: Step, victim: str
) -> None:
    told, steps = night
    host = told.host
    told.prepare()

    def kill() -> None:
        pids = host.children() | dict.fromkeys(("worker",), next(iter(host.workers()), 0))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[victim], signal.SIGKILL)

    device = os.open(host.place(NAME) / "dev" / "tpmrm0", os.O_RDWR)
    try:
        session = handle_of(on_device(device, rq.start_policy_session()))
        before = told.restarts()
        if step.name.startswith("WAKE"):
            until("it sleeps", partial(sleeps, host, NAME), SECONDS)
        steps.arm(step, kill)
        if step.name.startswith("WAKE"):
            with contextlib.suppress(OSError):
                on_device(device, digest_of(session))
        until(f"{step} is visited", lambda: not steps.waits, SECONDS)
        until("it serves again", told.serves, SECONDS)
        answer = on_device(device, digest_of(session))
        assert (rc(answer) == 0) == (told.restarts() == before)
    finally:
        os.close(device)
    told.check()
    until("it sleeps", partial(sleeps, host, NAME), SECONDS)
    assert told.serves()


def test_one_whose_workers_die_at_every_wake_fails_and_is_not_tried_for_ever(
    night: tuple[Night, Steps],
) -> None:
    """As they would of what a taken-over worker left for its successor."""
    told, steps = night
    host = told.host
    told.prepare()
    until("it sleeps", partial(sleeps, host, NAME), SECONDS)

    def kill() -> None:
        for worker in host.workers():
            os.kill(worker, signal.SIGKILL)
        steps.arm(Step.COMMIT_WRITTEN, kill)  # each that is to wake commits before it serves

    steps.arm(Step.COMMIT_WRITTEN, kill)
    with contextlib.closing(Stream(host.place(NAME))):
        until("it fails", lambda: host.inspect(NAME)["state"] == "failed", 2 * SECONDS)
    steps.arm(Step.COMMIT_WRITTEN, lambda: None)
    assert "keeps dying" in host.inspect(NAME)["why_failed"]
    host.call("POST", f"/v1/vtpms/{NAME}/retry", {})
    told.prepare()
    assert told.serves()


def test_every_step_of_sleep_and_wake_was_visited(night: tuple[Night, Steps]) -> None:
    _, steps = night
    assert set(HERE) <= steps.visited
    assert set(HERE) <= ELSEWHERE
