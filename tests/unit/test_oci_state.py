"""The state on a hook's standard input."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError
from holdfast.protocol.oci_state import STATE_MAX, ContainerState, parse_state

STATE: dict[str, Any] = {
    "ociVersion": "1.0.2-dev",
    "id": "3e9339b43ca33e47",
    "status": "creating",
    "pid": 15332,
    "bundle": "/graph/overlay-containers/3e9339b43ca33e47/userdata",
    "annotations": {"io.container.manager": "libpod"},
}


def encoded(**changes: Any) -> bytes:
    return json.dumps({key: v for key, v in (STATE | changes).items() if v is not ...}).encode()


def test_what_runc_sends_is_read() -> None:
    assert parse_state(encoded()) == ContainerState(
        STATE["id"], "creating", 15332, STATE["bundle"], STATE["annotations"]
    )


def test_a_stopped_container_needs_no_process_and_no_annotations() -> None:
    state = parse_state(encoded(status="stopped", pid=..., annotations=...))
    assert (state.pid, state.annotations) == (0, {})
    assert parse_state(encoded(status="stopped", pid=0)).pid == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        encoded() + b"{}",
        encoded().replace(b'"pid"', b'"id"'),
        encoded(id=7),
        encoded(id=""),
        encoded(id=".."),
        encoded(id="a/b"),
        encoded(id="a\n"),
        encoded(pid=0),
        encoded(pid=...),
        encoded(pid=-1),
        encoded(pid=True),
        encoded(pid=2**40),
        encoded(pid="1"),
        encoded(status="asleep"),
        encoded(status=[]),
        encoded(bundle="relative"),
        encoded(bundle="/a\0b"),
        encoded(bundle="/" + "a" * 5000),
        encoded(annotations=[]),
        encoded(annotations={"a": 1}),
        b"[" * 100_000,
        b'{"a":"\xff"}',
        b" " * (STATE_MAX + 1),
    ],
)
def test_what_is_not_a_state_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        parse_state(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
)


@given(
    st.binary(max_size=100)
    | st.dictionaries(st.sampled_from(sorted(STATE)), values).map(lambda some: encoded(**some))
)
def test_a_state_is_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        parse_state(data)
