"""Token buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdfast.instance.bucket import Bucket


def test_a_burst_is_free_and_then_each_waits_its_turn() -> None:
    bucket = Bucket(10, 3)
    waits = [round(bucket.wait(100.0), 3) for _ in range(5)]
    assert waits == [0, 0, 0, 0.1, 0.2]
    assert bucket.wait(200.0) == 0


def test_what_is_refused_takes_nothing() -> None:
    bucket = Bucket(1, 2)
    assert [bucket.allow(5.0) for _ in range(4)] == [True, True, False, False]
    assert bucket.allow(6.1)


@given(st.lists(st.floats(0, 10), max_size=60), st.floats(0.5, 50), st.floats(1, 20))
def test_never_more_than_the_burst_and_the_rate_allow(
    gaps: list[float], rate: float, burst: float
) -> None:
    bucket, now, allowed = Bucket(rate, burst), 1.0, 0
    for gap in gaps:
        now += gap
        allowed += bucket.allow(now)
    assert allowed <= burst + rate * (now - 1.0) + 1
