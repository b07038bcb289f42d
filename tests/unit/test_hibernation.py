"""What a vTPM sleeps with: it reads back as it was, and whatever contradicts itself is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError
from holdfast.frontend.filter import Profile
from holdfast.frontend.resources import Client
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol import hibernation as hb
from holdfast.protocol import ipc
from holdfast.protocol.ipc import MESSAGE_MAX
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.commands import Cc

from .test_ipc import values

ANSWER = rq.error_response(0) + b"random"
hibernated = values(hb.Hibernated)


@given(hibernated)
def test_it_reads_back_as_it_was(kept: hb.Hibernated) -> None:
    assert hb.decode(kept.encode()) == kept


@given(hibernated, st.data())
def test_changed_it_is_another_or_refused(kept: hb.Hibernated, data: st.DataObject) -> None:
    raw = bytearray(kept.encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        found = hb.decode(bytes(raw))
    except DecodeError:
        return
    assert found.encode() == bytes(raw)


@given(hibernated, st.data())
def test_shortened_or_grown_it_is_refused(kept: hb.Hibernated, data: st.DataObject) -> None:
    raw = kept.encode()
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    for changed in (cut, raw + b"\0"):
        with pytest.raises(DecodeError):
            hb.decode(changed)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_are_one(data: bytes) -> None:
    try:
        assert hb.decode(data).encode() == data
    except DecodeError:
        return


def test_another_message_is_none() -> None:
    with pytest.raises(DecodeError, match="it is a Done"):
        hb.decode(ipc.Done().encode())


def test_the_largest_fits_into_one_message_with_what_goes_along() -> None:
    assert hb.HIBERNATED_MAX < MESSAGE_MAX - (256 << 10)


@given(values(hb.Resources))
def test_resources_resume_or_are_refused(kept: hb.Resources) -> None:
    """Those that resume say the same of themselves again."""
    vtpm = Vtpm(lambda _: ANSWER, Profile.LINKED)
    try:
        clients = vtpm.resume(kept)
    except DecodeError:
        return
    again = vtpm.asleep(clients[hb.SHARED + 1 :])
    assert again.clock > kept.clock
    assert again.clients == _without_twins(kept.clients)


def _without_twins(clients: tuple[hb.Client, ...]) -> tuple[hb.Client, ...]:
    """Of two under one handle the last counts."""
    return tuple(
        hb.Client(
            tuple({o.virtual: o for o in client.objects}.values()),
            tuple(dict.fromkeys(client.sessions)), client.evicts, client.made, client.number,
        )
        for client in clients
    )  # fmt: skip


def session(handle: int, *, owned: bool) -> hb.Session:
    return hb.Session(handle, b"", 1, 1, owned)


def client(*sessions: int) -> hb.Client:
    return hb.Client((), sessions, False, 0, 0)


CONTRADICTIONS: dict[str, Any] = {
    "no clients at all": hb.Resources(1, (), ()),
    "the host's own alone": hb.Resources(1, (client(),), ()),
    "a session that is nowhere": hb.Resources(1, (client(), client(0x03000000)), ()),
    "a session of nobody's that is owned": hb.Resources(
        1, (client(), client()), (session(0x03000000, owned=True),)
    ),
    "a session of two": hb.Resources(
        1, (client(0x03000000), client(0x03000000)), (session(0x03000000, owned=True),)
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(what: str) -> None:
    vtpm = Vtpm(lambda _: ANSWER, Profile.LINKED)
    with pytest.raises(DecodeError):
        vtpm.resume(CONTRADICTIONS[what])


def test_handles_go_on_where_they_were() -> None:
    """A handle that was given out is not given to another object after a wake."""
    made = rq.error_response(0)[:6] + bytes(4) + (0x80000000).to_bytes(4, "big") + bytes(4)
    vtpm = Vtpm(lambda _: made, Profile.PLAIN)
    mine: Client = vtpm.attach()
    load = rq.command(Cc.ContextLoad, params=bytes(40))
    first = vtpm.execute(mine, load)[10:14]
    woken = Vtpm(lambda _: made, Profile.PLAIN)
    *_, same = woken.resume(vtpm.asleep([mine]))
    assert woken.execute(same, load)[10:14] != first
