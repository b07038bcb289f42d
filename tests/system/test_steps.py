"""kill -9 of any process at every named step of whatever changes state (`linux.steps`).

HOLDFAST_SOAK=1 kills each of the four at each step, instead of two by turns.

One host lives through all of it. A step holds its operation; then one process is killed, and the
rest goes on. After each: nothing acknowledged is lost, no epoch has gone back, what was under way
is either done or not, and the host works.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import pytest

from holdfast.errors import HoldfastError, NotFound
from holdfast.linux.steps import Step
from tests.asking import until

from .serve import Serve, a_host
from .stepping import Steps, stepping
from .test_faults import GET_RANDOM, Stream, define, read, write
from .test_rekey_recovery import keys_of

# Of an administrator's recovery, which has nothing to do with what else goes on: visited, and
# survived, in tests/unit/test_committer.py and tests/system/test_recover_commands.py. Of sleep and
# wake, which need a host whose vTPMs sleep soon: in tests/system/test_sleep_steps.py.
ELSEWHERE: Final = frozenset({Step.RECOVERY_WRITTEN, Step.RECOVERY_SETTLED}) | frozenset(
    step for step in Step if step.name.startswith(("SLEEP", "WAKE"))
)
VICTIMS: Final = ("daemon", "keeper", "spawner", "worker")


def called(value: Step | str) -> str:
    """In a test's name."""
    return value.name.lower() if isinstance(value, Step) else value


def deaths(steps: Sequence[Step]) -> list[tuple[Step, str]]:
    """Who dies at which step: with HOLDFAST_SOAK=1 everybody at each; else the two processes by
    turns, so that each dies at every second step, in a few minutes."""
    if os.environ.get("HOLDFAST_SOAK") == "1":
        return [(step, victim) for step in steps for victim in VICTIMS]
    return [
        (step, victim)
        for number, step in enumerate(steps)
        for victim in (VICTIMS[number % 2], VICTIMS[2 + (number // 2) % 2])
    ]


OPERATIONS: Final = {
    "CREATE": "create", "POWER_ON": "power_on", "POWER_OFF": "power_off", "COMMIT": "write",
    "KEEPER_ADVANCED": "write", "ANCHOR": "destroy", "KEEPER_SETTLED": "destroy",
    "DESTROY": "destroy", "RESTORE": "restore",
    "REKEY_SUCCEEDED": "succeed", "REKEY_CARRIED": "succeed", "REKEY": "rekey",
}  # fmt: skip
SECONDS: Final = 60.0
KILLS_MAX: Final = 8


class Story:
    """A host with a vTPM that is written to and one that comes and goes; what is known of both."""

    def __init__(self, host: Serve) -> None:
        self.host = host
        self.known = self.tried = 0
        self.epoch = 0
        self.on = False
        self.kills = 0
        self.keys = keys_of(host)
        self.given: tuple[str, ...] = ()
        host.create("main")
        self.power_on()
        with self._wire() as wire:
            define(wire)
        self.write()

    @contextmanager
    def _wire(self) -> Iterator[Stream]:
        wire = Stream(self.host.place("main"))
        try:
            yield wire
        finally:
            wire.close()

    # --- what is done; each raises if it was not acknowledged ---

    def power_on(self) -> None:
        self.host.power_on("main")
        self.on = True

    def power_off(self) -> None:
        self.host.call("POST", "/v1/vtpms/main/stop", {})
        self.on = False

    def write(self) -> None:
        self.tried += 1
        with self._wire() as wire:
            answer = write(wire, self.tried)
            assert answer == 0, hex(answer)
        self.known = self.tried

    def create(self) -> None:
        self.host.create("spare")

    def destroy(self) -> None:
        self.host.call("DELETE", "/v1/vtpms/spare")

    def restore(self) -> None:
        """The one that comes and goes: what it had is not looked at here (`test_snapshots`)."""
        body = {"reason": "a test"}
        self.host.call("POST", "/v1/vtpms/spare/snapshots/s/restore", body)

    def rekey(self) -> None:
        """Of all that there is; what a kill has left is finished by doing it again."""
        self.host.call("POST", "/v1/rekey", {"root": True, "data": True})
        until("keys are changed", self._rekeyed, SECONDS)

    def _rekeyed(self) -> bool:
        return bool(self.host.call("GET", "/v1/rekey")["done"])

    def succeed(self) -> None:
        """Another recovery key."""
        self.given = self.keys.change()
        self._succeed()

    def _succeed(self) -> None:
        done = self.host.cli(*self.given)
        assert done.returncode == 0, done.stderr
        self.keys.took()

    # --- around it ---

    def prepare(self, operation: str) -> None:
        """Everything is as the operation wants to find it.

        Who dies often is started later and later, so now and then all is started anew.
        """
        self.kills += 1
        if self.kills % KILLS_MAX == 0:
            assert self.host.stop() == 0
            self.host.start()
            self.on = False
        there = self.spare_is_there()
        wanted = operation in ("destroy", "restore", "rekey")
        if there and not wanted:
            self.destroy()
        if wanted and not there:
            self.create()
        snapshots = "/v1/vtpms/spare/snapshots"
        if operation in ("restore", "rekey") and not self.host.call("GET", snapshots)["snapshots"]:
            self.host.call("POST", snapshots, {"name": "s"})
        # Off and on again: a worker that is replaced six times within a minute is not replaced.
        self.power_off()
        if operation != "power_on":
            self.power_on()

    def spare_is_there(self) -> bool:
        try:
            self.host.inspect("spare")
        except NotFound:
            return False
        return True

    def check(self, operation: str, done: bool) -> None:
        """The host works, and nothing that was promised is lost."""
        host = self.host
        state = host.inspect("main")["state"]
        assert state in ("active", "off"), state
        if done and operation in ("power_on", "power_off"):
            assert state == ("active" if operation == "power_on" else "off")
        self.on = state == "active"
        if not self.on:
            self.power_on()
        with self._wire() as wire:
            found = read(wire)
        assert found in (self.known, self.tried), (found, self.known, self.tried)
        self.known = found
        with contextlib.closing(sqlite3.connect(host.database)) as db:
            query = "SELECT epoch FROM states JOIN instances USING (id) WHERE name = 'main'"
            (epoch,) = db.execute(query).fetchone()
        assert epoch >= self.epoch, f"epoch {epoch} after {self.epoch}"
        self.epoch = epoch
        if done and operation in ("create", "destroy"):
            assert self.spare_is_there() == (operation == "create")
        if operation == "succeed" and not done:
            self._succeed()
        if operation == "rekey":
            self.rekey()  # on the running vTPM, whose state and key go on together
            self.restore()
        if self.spare_is_there():
            host.power_on("spare")
            host.call("POST", "/v1/vtpms/spare/stop", {})


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Story, Steps]]:
    with stepping(tmp_path_factory) as steps, a_host(per_day=10_000) as host:
        yield Story(host), steps


def operation_of(step: Step) -> str:
    return next(op for prefix, op in OPERATIONS.items() if step.name.startswith(prefix))


HERE: Final = tuple(step for step in Step if step not in ELSEWHERE)
SUCCEEDING: Final = (
    Step.COMMIT_WRITTEN, Step.KEEPER_ADVANCED, Step.ANCHOR_WRITTEN, Step.KEEPER_SETTLED,
)  # fmt: skip
COMMITTING: Final = (Step.COMMIT_WRITTEN, Step.KEEPER_ADVANCED, Step.COMMIT_EXTENDED)


@pytest.mark.parametrize(("step", "victim"), deaths(HERE), ids=called)
def test_a_kill_at_this_step_loses_nothing_that_was_acknowledged(
    story: tuple[Story, Steps], step: Step, victim: str
) -> None:
    killed(story, step, victim, operation_of(step))


@pytest.mark.parametrize(("step", "victim"), deaths(COMMITTING), ids=called)
def test_a_kill_while_a_state_is_committed_under_another_key_loses_neither(
    story: tuple[Story, Steps], step: Step, victim: str
) -> None:
    """State and key go on together, or both stay."""
    killed(story, step, victim, "rekey")


@pytest.mark.parametrize("victim", ["daemon", "keeper"])
@pytest.mark.parametrize("step", SUCCEEDING, ids=lambda step: step.name.lower())
def test_a_kill_while_new_chains_begin_leaves_what_the_old_ones_ended_with(
    story: tuple[Story, Steps], step: Step, victim: str
) -> None:
    killed(story, step, victim, "succeed")


def killed(story: tuple[Story, Steps], step: Step, victim: str, operation: str) -> None:
    """Do it, kill at the step, and look at what is there."""
    told, steps = story
    host = told.host
    told.prepare(operation)
    pids = host.children() | dict.fromkeys(("worker",), next(iter(host.workers()), 0))

    def kill() -> None:
        if pids.get(victim):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[victim], signal.SIGKILL)

    steps.arm(step, kill)
    done = False
    with contextlib.suppress(HoldfastError, OSError, AssertionError):
        getattr(told, operation)()
        done = True
    until(f"{step} is visited", lambda: not steps.waits, SECONDS)
    until("the host works again", lambda: works(host), SECONDS)
    told.check(operation, done)


def works(host: Serve) -> bool:
    try:
        if not host.answers():
            return False
        findings = {f["what"]: f["level"] for f in host.call("GET", "/v1/doctor")["findings"]}
        if host.inspect("main")["state"] == "active":
            wire = Stream(host.place("main"))
            with contextlib.closing(wire):
                wire.exchange(GET_RANDOM)
        elif not host.place("main").exists():
            return False
    except (HoldfastError, OSError):
        return False
    return findings["keeper"] != "problem" and findings["spawner"] != "problem"


def test_every_step_that_there_is_was_visited(story: tuple[Story, Steps]) -> None:
    _, steps = story
    assert set(HERE) <= steps.visited
