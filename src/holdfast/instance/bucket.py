"""A token bucket: how often something may happen, and how long it has to wait."""

from __future__ import annotations


class Bucket:
    """`rate` tokens a second, at most `burst` saved; time is an argument (seconds, monotonic)."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = 0.0

    def wait(self, now: float) -> float:
        """Take a token; how many seconds to wait before using it (0: none)."""
        passed = max(0.0, now - self._at) if self._at else 0.0
        self._tokens = min(self._burst, self._tokens + passed * self._rate)
        self._at = now
        self._tokens -= 1
        return max(0.0, -self._tokens / self._rate)

    def allow(self, now: float) -> bool:
        """Take a token if there is one."""
        if self.wait(now) > 0:
            self._tokens += 1
            return False
        return True
