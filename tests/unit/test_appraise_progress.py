"""What an appraisal leaves for the next is read back as it was, or refused."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.appraise.progress import decode, encode
from holdfast.appraise.result import Progress
from holdfast.errors import DecodeError
from holdfast.ids import InstanceId
from holdfast.tpm2.structures import ClockInfo

CLOCK = ClockInfo(1, 2, 3, True)
PROGRESS = Progress(
    InstanceId(UUID(int=1 << 127, version=4)), 0, 5, 6, CLOCK, b"\0\x0b" * 17, CLOCK, 9, bytes(32)
)
NUMBERS = st.integers(min_value=0, max_value=2**64 - 1)
CLOCKS = st.builds(ClockInfo, NUMBERS, NUMBERS, NUMBERS, st.booleans())


@given(NUMBERS, NUMBERS, NUMBERS, CLOCKS, st.binary(max_size=66), CLOCKS, NUMBERS)
def test_it_is_read_as_it_was_written(
    lineage: int, epoch: int, run: int, vtpm: ClockInfo, name: bytes, host: ClockInfo, events: int
) -> None:
    instance, head = PROGRESS.instance, bytes(range(32))
    progress = Progress(instance, lineage, epoch, run, vtpm, name, host, events, head)
    assert decode(encode(progress)) == progress


def changed(**members: Any) -> str:
    return json.dumps({**json.loads(encode(PROGRESS)), **members})


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "null", "[" * 100_000, encode(PROGRESS)[:-10],
        changed(version=2), changed(instance="web"), changed(epoch=-1), changed(epoch="5"),
        changed(run=True), changed(host_ak_name="xyz"), changed(vtpm_clock={}),
        changed(host_clock={"clock": 1, "reset_count": 2, "restart_count": 3, "safe": 1}),
        changed(more=1),
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(DecodeError, match="progress"):
        decode(text)
