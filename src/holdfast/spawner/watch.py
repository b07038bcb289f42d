"""The ends of vTPMs that sleep: who comes first is noticed, and nothing of what it brings is read.

One descriptor for all of them (epoll), so that thousands cost the spawner's loop nothing.

Not here: whom that wakes (`instance.sleep`).
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from uuid import UUID


class Watch:
    """Ends by whose they are; an instance is watched until the first readiness of one of its own.

    The descriptors are the caller's: it forgets an instance before it closes them.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ends: dict[UUID, tuple[int, ...]] = {}
        self._whose: dict[int, UUID] = {}

    def fileno(self) -> int:
        """Readable when somebody has come."""
        return self._epoll.fileno()

    def begin(self, instance: UUID, ends: Sequence[int]) -> None:
        """Watch these. OSError if one cannot be watched: then none is."""
        self.forget(instance)
        self._ends[instance] = tuple(ends)
        try:
            for fd in ends:
                self._epoll.register(fd, select.EPOLLIN)
                self._whose[fd] = instance
        except OSError:
            self.forget(instance)
            raise

    def forget(self, instance: UUID) -> None:
        """Watch it no more, if it is watched."""
        for fd in self._ends.pop(instance, ()):
            if self._whose.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def came(self) -> list[UUID]:
        """To whom somebody has come; they are watched no more."""
        found = {self._whose[fd] for fd, _ in self._epoll.poll(0) if fd in self._whose}
        for instance in found:
            self.forget(instance)
        return list(found)

    def close(self) -> None:
        self._epoll.close()
