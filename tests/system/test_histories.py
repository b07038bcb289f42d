"""Random histories of vTPMs on one host, each against a model: whatever comes after whatever.

Never two live copies, never a lost acknowledged write, never an epoch going back; nobody's key,
random number or connection is another's, and what is destroyed is gone. Each history makes vTPMs of
its own, and at its end looks at each a last time and destroys it. In most of them nothing dies; in
the others once, and now and then the host is stopped, or is given an older registry.

A history is drawn as numbers, whole, before anything is done; what a number means depends on what
can be done then. HOLDFAST_SOAK=1 tells ten times as many, other ones each time. A failure says the
shortest history that leads to it.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from holdfast.errors import HoldfastError

from .chronicle import Known, compare
from .histories import History
from .serve import Serve, a_host
from .test_faults import Device, Stream

SOAK: Final = os.environ.get("HOLDFAST_SOAK") == "1"
TIMES: Final = 10 if SOAK else 1
# What befalls so many of 500 histories. Whoever dies often within a minute is started later and
# later: so there are few of them.
FATES: Final = {
    "nothing": 446, "worker": 40, "keeper": 4, "daemon": 4, "spawner": 3, "stop": 2, "older": 1,
}  # fmt: skip
PROCESSES: Final = ("keeper", "daemon", "spawner")
LENGTHS: Final = (5, 8)
VTPMS_MAX: Final = 3
CLIENTS_MAX: Final = 2
MADE_MAX: Final = 4  # in one history


# --- what can be done ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One step, in numbers. `what` 0 is none: so the simplest history is also the shortest."""

    what: int
    which: int
    how: int


@dataclass(frozen=True)
class Plan:
    """One history: whether it begins with the power on, how many vTPMs at once, the steps, and
    before which of them its fate comes."""

    on: bool
    crowd: int
    steps: tuple[Draw, ...]
    when: int


_LENGTH: Final = st.integers(*LENGTHS)
DRAWS: Final = st.builds(Draw, st.integers(0, 9999), st.integers(0, 5), st.integers(0, 9))
PLANS: Final = st.builds(
    Plan,
    st.sampled_from((True, False, True, True)),
    # Mostly one, as each costs as much as all that is done to it.
    st.sampled_from((1, 1, 2, 1, 1, VTPMS_MAX, 1)),
    st.lists(DRAWS, min_size=LENGTHS[0], max_size=LENGTHS[1]).map(tuple),
    st.integers(0, LENGTHS[1]),
)


@dataclass(frozen=True)
class Step:
    """`do` to one vTPM of those for `whom` that can be done."""

    what: str
    whom: Callable[[Known], bool]
    do: Callable[[History, Known, int], None]


def off(known: Known) -> bool:
    return not known.on


def on(known: Known) -> bool:
    return known.on


def active(known: Known) -> bool:
    return known.state == "active"


def anyone(_known: Known) -> bool:
    return True


def has_room(known: Known) -> bool:
    return known.on and len(known.clients) < CLIENTS_MAX


def restorable(known: Known) -> bool:
    return not known.on and bool(known.snapshots)


def slept_before(known: Known) -> bool:
    return known.asleep and len(known.blobs) > 1


def restore(history: History, known: Known, how: int) -> None:
    names = list(known.snapshots)
    history.restore(known, names[how % len(names)])


def remove(history: History, known: Known, how: int) -> None:
    names = list(known.snapshots)
    history.remove(known, names[how % len(names)])


CLONE: Final = Step("clone", anyone, lambda history, known, _: history.clone(known))
POWER_ON: Final = Step("power on", off, lambda history, known, _: history.power_on(known))
USE: Final = Step("use", on, lambda history, known, _: history.look(known))
STEPS: Final = (
    POWER_ON,
    USE,
    Step("write to", on, lambda history, known, _: history.write(known)),
    Step("extend a PCR of", on, lambda history, known, _: history.extend(known)),
    Step("be a client by its socket of", has_room,
         lambda history, known, _: history.come(known, Stream)),
    Step("be a client by its file of", has_room,
         lambda history, known, _: history.come(known, Device)),
    Step("put to sleep", active, lambda history, known, _: history.sleep(known)),
    Step("wake by an older blob", slept_before,
         lambda history, known, _: history.wake_with_an_older_blob(known)),
    Step("power off by an older blob", slept_before,
         lambda history, known, _: history.power_off_with_an_older_blob(known)),
    Step("power off", on, lambda history, known, _: history.power_off(known)),
    Step("take a snapshot of", off, lambda history, known, _: history.snapshot(known)),
    Step("restore a snapshot of", restorable, restore),
    Step("remove a snapshot of", restorable, remove),
    Step("ask for what cannot be of", anyone,
         lambda history, known, _: history.ask_for_what_cannot_be(known)),
)  # fmt: skip
DESTROY: Final = Step("destroy", off, lambda history, known, _: history.destroy(known))
KILL_WORKER: Final = Step(
    "kill the worker of", active,
    lambda history, known, how: history.kill_worker(known, how // 2, writes=bool(how % 2)),
)  # fmt: skip
KILLS: Final = {
    what: Step(
        f"kill the {what} beside", anyone,
        lambda history, known, how, what=what: history.kill(what, known, how // 2),
    )
    for what in PROCESSES
}  # fmt: skip
STOP: Final = Step(
    "stop the host, and start it, with", anyone, lambda history, *_: history.stop_and_start()
)
OLDER: Final = Step(
    "put back a registry that is older than", anyone,
    lambda history, known, _: history.put_an_older_registry_back(known),
)  # fmt: skip
FATAL: Final = {"worker": KILL_WORKER, **KILLS, "stop": STOP, "older": OLDER}


# --- telling -------------------------------------------------------------------------------------


class Stage:
    """The host on which histories are told; another one if a history has broken it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.host = self._begin()
        self.done: Counter[str] = Counter()  # how often what was done to one in which state

    def _begin(self) -> Serve:
        host = self._stack.enter_context(a_host(running=False, per_day=10_000))
        workers = "idle_after = 0\nblank = 3\nmanufactured = 2"
        host.config.write_text(host.config.read_text() + f"[workers]\n{workers}\n")
        host.start()
        return host

    def clear(self) -> None:
        """Nothing of a history that failed is there for the next."""
        try:
            for vtpm in self.host.call("GET", "/v1/vtpms")["vtpms"]:
                self.host.call("POST", f"/v1/vtpms/{vtpm['name']}/stop", {})
                self.host.call("DELETE", f"/v1/vtpms/{vtpm['name']}")
            compare(self.host, ())
        except (HoldfastError, OSError, AssertionError):
            self.end()
            self.host = self._begin()

    def end(self) -> None:
        self._stack.close()


class Tale:
    """One history as it is told on a stage."""

    def __init__(self, stage: Stage, fate: str, plan: Plan) -> None:
        self._stage = stage
        self._fate = FATAL.get(fate)
        self._plan = plan
        self._history = History(stage.host)
        self.told: list[str] = []

    def tell(self) -> None:
        try:
            self._create()
            if self._plan.on:
                self._do(POWER_ON, self._plan.steps[0])
            for number, draw in enumerate(self._plan.steps):
                if number >= self._plan.when:
                    self._meet_its_fate(draw)
                if draw.what == 0:
                    continue
                possible = [each for each in self._steps() if each is None or self._some(each)]
                self._do(possible[draw.what % len(possible)], draw)
            last = self._plan.steps[-1]
            if self._fate is KILL_WORKER and not self._some(KILL_WORKER):
                self._do(POWER_ON if self._some(POWER_ON) else USE, last)
            self._meet_its_fate(last)
            self.told.append("its end")
            self._history.end()
        except BaseException:
            for known in self._history.known.values():
                known.leave()
            self._stage.clear()
            raise

    def _steps(self) -> Iterator[Step | None]:
        """All that may be told; None: make one more."""
        there, made = len(self._history.known), self._history.made
        yield from STEPS
        if there > 1:
            yield DESTROY
        if there < self._plan.crowd and made < MADE_MAX:
            yield from (None, CLONE)

    def _some(self, step: Step) -> list[Known]:
        return [known for known in self._history.known.values() if step.whom(known)]

    def _do(self, step: Step | None, draw: Draw) -> None:
        if step is None:
            self._create()
            return
        among = self._some(step)
        known = among[draw.which % len(among)]
        self.told.append(f"{step.what} {known.name}, which is {known.state}")
        self._stage.done[f"{step.what} one that is {known.state}"] += 1
        step.do(self._history, known, draw.how)
        self._history.check()

    def _create(self) -> None:
        self.told.append("create one")
        self._history.create()
        self._history.check()

    def _meet_its_fate(self, draw: Draw) -> None:
        """Once, as soon as it can be."""
        if self._fate is not None and self._some(self._fate):
            step, self._fate = self._fate, None
            self._do(step, draw)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.end()


@pytest.mark.timeout(7200 if SOAK else 900)
@pytest.mark.parametrize("fate", FATES)
def test_whatever_happens_to_vtpms_nothing_is_lost_doubled_or_set_back(
    stage: Stage, fate: str
) -> None:
    @settings(
        max_examples=TIMES * FATES[fate], derandomize=not SOAK, database=None, deadline=None,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(PLANS)
    def told(plan: Plan) -> None:
        tale = Tale(stage, fate, plan)
        try:
            tale.tell()
        except BaseException as error:
            error.add_note("the history: " + "; ".join(tale.told))
            raise

    told()


STATES: Final = {
    off: ("off",), on: ("active", "asleep"), active: ("active",), has_room: ("active", "asleep"),
    restorable: ("off",), slept_before: ("asleep",), anyone: ("off", "active", "asleep"),
}  # fmt: skip


def test_everything_that_can_be_done_was_done_in_some_history(stage: Stage) -> None:
    """To one in each state in which it can be: a model of what never comes says nothing."""
    wanted = {f"{step.what} one that is {state}" for step in STEPS for state in STATES[step.whom]}
    wanted |= {f"{step.what} one that is active" for step in (KILL_WORKER, *KILLS.values())}
    assert wanted <= stage.done.keys(), f"never: {wanted - stage.done.keys()}; {stage.done}"
