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


NAMES = st.binary(max_size=66)


@given(
    st.builds(
        Progress, st.just(PROGRESS.instance), NUMBERS, NUMBERS, NUMBERS, CLOCKS, NAMES, CLOCKS,
        NUMBERS, st.just(bytes(range(32))), NAMES, NUMBERS, NUMBERS, NUMBERS,
    )
)  # fmt: skip
def test_it_is_read_as_it_was_written(progress: Progress) -> None:
    assert decode(encode(progress)) == progress


def test_what_the_first_version_has_kept_still_counts() -> None:
    value = json.loads(encode(PROGRESS)) | {"version": 1}
    for name in ("index_name", "sequence", "unclean", "recoveries"):
        del value[name]
    assert decode(json.dumps(value)) == PROGRESS


def changed(**members: Any) -> str:
    return json.dumps({**json.loads(encode(PROGRESS)), **members})


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "null", "[" * 100_000, encode(PROGRESS)[:-10],
        changed(version=1), changed(version=3), changed(version=True), changed(index_name=None),
        changed(sequence=-1), changed(instance="web"), changed(epoch=-1), changed(epoch="5"),
        changed(run=True), changed(host_ak_name="xyz"), changed(vtpm_clock={}),
        changed(host_clock={"clock": 1, "reset_count": 2, "restart_count": 3, "safe": 1}),
        changed(more=1),
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(DecodeError, match="progress"):
        decode(text)
