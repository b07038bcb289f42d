"""What one daemon counts, in plain integers: whoever counts adds one, and whoever asks adds up.

Not here: names and the format of what is shown (`daemon.metrics`).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Times:
    """How long something took, in seconds: how many up to each bound and above the bound before."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def note(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass
class Counts:
    """Since the daemon began; `asleep` is how many are now."""

    restarts: int = 0  # of workers, in place of one that died
    sleeps: int = 0
    asleep: int = 0
    wakes: Times = field(default_factory=Times)  # from the first byte to the first answer
