"""Instance names, and the life-cycle table."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import Conflict, InvalidInput
from holdfast.ids import NAME_MAX, instance_id, instance_name
from holdfast.instance.lifecycle import TRANSITIONS, Event, State, after


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a/b",
        "../x",
        "..",
        "a..b",
        ".a",
        "-a",
        "a" * 300,
        "a\n",
        "a\0b",
        "é",
        "a b",
        "a\x1b[31m",
    ],
)
def test_a_name_that_could_be_anything_else_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        instance_name(name)


@given(st.text(max_size=80))
def test_what_is_a_name_is_safe_as_a_file_name(text: str) -> None:
    try:
        name = instance_name(text)
    except InvalidInput:
        return
    assert 0 < len(name) <= NAME_MAX
    assert not set(name) & set("/\0 \n")
    assert not name.startswith((".", "-"))


@given(st.text(max_size=40))
def test_an_id_is_a_canonical_uuid_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert str(instance_id(text)) == text


def test_what_the_table_does_not_allow_is_a_conflict() -> None:
    for state, event in itertools.product(State, Event):
        if (state, event) in TRANSITIONS:
            assert after(state, event) is TRANSITIONS[state, event]
        else:
            with pytest.raises(Conflict):
                after(state, event)


def test_nothing_leaves_destroyed_and_failed_leaves_only_by_hand() -> None:
    assert not [s for s, _ in TRANSITIONS if s is State.DESTROYED]
    assert {e for s, e in TRANSITIONS if s is State.FAILED} == {Event.RETRIED, Event.DESTROYED}
