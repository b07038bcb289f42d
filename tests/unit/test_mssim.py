"""The simulator's framing: cut where it is cut, whatever arrives and however."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError
from holdfast.protocol.mssim import CommandStream, Dialect, End, Handshake, Sent
from holdfast.tpm2 import requests as rq
from holdfast.tpm2.wire import u32

COMMANDS = [rq.get_random(8), rq.startup(), rq.get_random(64)]


def framed(locality: int, command: bytes) -> bytes:
    return u32(8) + bytes((locality,)) + u32(len(command)) + command


@given(
    st.lists(st.tuples(st.sampled_from(COMMANDS), st.sampled_from([None, 0, 3])), max_size=5),
    st.data(),
)
def test_commands_come_out_as_they_went_in_however_the_stream_is_cut(
    sent: list[tuple[bytes, int | None]], data: st.DataObject
) -> None:
    stream = b"".join(c if where is None else framed(where, c) for c, where in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    buffer, got = CommandStream(Dialect.SWTPM), []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += buffer.feed(stream[begin:end])
    assert got == [Sent(where, command) for command, where in sent]
    assert not buffer.partial


def test_the_simulator_s_own_signals_are_known_on_the_command_port() -> None:
    buffer = CommandStream(Dialect.MSSIM)
    assert buffer.feed(u32(15)) == []
    assert buffer.feed(u32(1) + framed(0, COMMANDS[0])) == [Handshake(), Sent(0, COMMANDS[0])]
    assert buffer.feed(u32(20) + b"whatever") == [End()]


@pytest.mark.parametrize("dialect", list(Dialect))
@given(data=st.binary(max_size=200))
def test_any_bytes_are_items_or_a_decode_error(dialect: Dialect, data: bytes) -> None:
    buffer = CommandStream(dialect)
    with contextlib.suppress(DecodeError):
        for item in buffer.feed(data):
            if isinstance(item, Sent):
                assert len(item.command) >= 10
        assert len(data) < 4200


def test_an_answer_is_framed_as_its_command_was() -> None:
    assert Sent(None, b"").answer(b"response") == b"response"
    assert Sent(0, b"").answer(b"response") == u32(8) + b"response" + u32(0)
