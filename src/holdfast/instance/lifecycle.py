"""The states of an instance and what may happen in each: one table for code, tests and docs.

Not here: carrying a transition out.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from holdfast.errors import Conflict


class State(Enum):
    """Where an instance is in its life."""

    DEFINED = "defined"  # named, not yet made: a crash during manufacture leaves it here
    OFF = "off"  # manufactured and powered off
    ACTIVE = "active"  # powered on: it has, or is being given, a worker
    ASLEEP = "asleep"  # powered on, and nobody uses it: its worker is gone until somebody comes
    FAILED = "failed"  # its run could not go on: never reset by itself
    DESTROYED = "destroyed"  # gone, and only a name in the log


class Event(Enum):
    """What happens to an instance."""

    MANUFACTURED = "manufactured"
    POWERED_ON = "powered on"
    SLEPT = "put to sleep"
    WOKEN = "woken"
    POWERED_OFF = "powered off"
    FAILED = "failed"
    RETRIED = "retried"  # an administrator has looked, and says: try again
    DESTROYED = "destroyed"


TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = {
    (State.DEFINED, Event.MANUFACTURED): State.OFF,
    (State.DEFINED, Event.DESTROYED): State.DESTROYED,
    (State.OFF, Event.POWERED_ON): State.ACTIVE,
    (State.OFF, Event.FAILED): State.FAILED,
    (State.OFF, Event.DESTROYED): State.DESTROYED,
    (State.ACTIVE, Event.POWERED_OFF): State.OFF,
    (State.ACTIVE, Event.FAILED): State.FAILED,
    (State.ACTIVE, Event.SLEPT): State.ASLEEP,
    (State.ASLEEP, Event.WOKEN): State.ACTIVE,
    (State.ASLEEP, Event.POWERED_OFF): State.OFF,
    (State.ASLEEP, Event.FAILED): State.FAILED,
    (State.FAILED, Event.RETRIED): State.OFF,
    (State.FAILED, Event.DESTROYED): State.DESTROYED,
}


ON: Final = frozenset({State.ACTIVE, State.ASLEEP})  # it has power, and somebody has it


def stored(state: State) -> State:
    """As the registry has it: that one sleeps is known as long as its spawner and blob live."""
    return State.ACTIVE if state is State.ASLEEP else state


def after(state: State, event: Event) -> State:
    """The state after `event`; Conflict if it cannot happen in `state`."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        raise Conflict(f"a vTPM that is {state.value} cannot be {event.value}")
    return following
