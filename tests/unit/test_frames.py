"""Commands are cut from a stream by the size they declare, however they arrive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import DecodeError
from holdfast.protocol import control
from holdfast.protocol.frames import FrameBuffer
from holdfast.tpm2.constants import BUFFER_MAX
from holdfast.tpm2.wire import u16, u32

COMMANDS = st.lists(
    st.binary(max_size=40).map(lambda b: u16(0x8001) + u32(10 + len(b)) + u32(0x17B) + b),
    min_size=1,
    max_size=8,
)


@given(COMMANDS, st.data())
def test_pieces_and_pipelines_give_the_commands_that_were_sent(
    commands: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(commands)
    buffer, got = FrameBuffer(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += buffer.feed(stream[:size])
        stream = stream[size:]
    assert got == commands
    assert not buffer.partial


@pytest.mark.parametrize("size", [0, 1, 9, BUFFER_MAX + 1, 0xFFFFFFFF])
def test_a_header_whose_size_lies_ends_the_stream(size: int) -> None:
    with pytest.raises(DecodeError):
        FrameBuffer().feed(u16(0x8001) + u32(size) + u32(0x17B))


def test_a_locality_prefix_is_not_a_command() -> None:
    with pytest.raises(DecodeError):
        FrameBuffer().feed(u32(8) + b"\4" + u32(12) + u16(0x8001) + u32(12))


@given(st.binary(max_size=200))
def test_any_stream_gives_commands_or_a_decode_error(data: bytes) -> None:
    buffer = FrameBuffer()
    try:
        for command in buffer.feed(data):
            assert int.from_bytes(command[2:6], "big") == len(command)
    except DecodeError:
        assert not buffer.partial


@pytest.mark.parametrize("audience", list(control.Audience))
@pytest.mark.parametrize("command", list(control.Command))
def test_every_control_command_with_every_length_is_a_request_a_refusal_or_not_yet_whole(
    command: control.Command, audience: control.Audience
) -> None:
    row = control.TABLE[command]
    for size in range(4097):
        body = bytes(size)
        if isinstance(row.body, control.Sized) and size >= row.body.prefix:
            length = size - row.body.prefix
            body = bytes(row.body.prefix - 4) + u32(length) + bytes(length)
        parsed = control.parse(u32(command) + body, audience)
        if row.audience > audience:
            assert parsed == control.refusal(command, control.RESULT_BAD_ORDINAL)
        elif isinstance(row.body, control.Sized):
            whole = control.Request(command, body)
            assert parsed == (whole if size >= row.body.prefix else None)
        elif size in row.body:
            assert parsed == control.Request(command, body)
        else:
            bad = control.refusal(command, control.RESULT_BAD_PARAMETER)
            assert parsed == (None if size < max(row.body) else bad)


@pytest.mark.parametrize(
    ("command", "most"),
    [
        (command, row.body.most)
        for command, row in control.TABLE.items()
        if isinstance(row.body, control.Sized)
    ],
)
def test_a_body_that_says_it_is_too_long_is_refused_before_it_has_come(
    command: control.Command, most: int
) -> None:
    layout = control.TABLE[command].body
    assert isinstance(layout, control.Sized)
    head = u32(command) + bytes(layout.prefix - 4)
    for length in (most + 1, 0xFFFFFFFF):
        refused = control.parse(head + u32(length), control.Audience.HOST)
        assert refused == control.refusal(command, control.RESULT_BAD_PARAMETER)
    assert control.parse(head + u32(most), control.Audience.HOST) is None


@pytest.mark.parametrize("number", [0, 0x14, 0x100, 0xFFFFFFFF])
def test_an_unknown_control_command_is_a_bad_ordinal(number: int) -> None:
    answer = control.parse(u32(number) + b"anything", control.Audience.HOST)
    assert answer == u32(control.RESULT_BAD_ORDINAL)
