"""What a vTPM wants of the open ends by which it is reached: an interface.

Not here: the ends themselves (`frontend.door`).
"""

from __future__ import annotations

from typing import Protocol


class Door(Protocol):
    """The open ends of one run, and who answers at the device while no worker does."""

    @property
    def nodes(self) -> str:
        """What makes its device nodes, as `lc.Hold` says it."""

    def descriptors(self) -> tuple[int, ...]:
        """/dev/fuse, data listener, control listener, nodes: for their holder."""

    def held(self) -> None:
        """Their holder has them."""

    def share(self, page: int) -> None:
        """Map the page that this run's worker writes; takes the descriptor over."""

    def unshare(self) -> None:
        """Its worker has gone in good order."""

    @property
    def words(self) -> tuple[int, int]:
        """What is known of open files, as `lc.Hold` says it."""

    def used(self) -> float:
        """When the worker served somebody last (monotonic)."""

    def fail_in_flight(self) -> None:
        """Answer, with an error, what a worker took and did not answer."""

    def answer(self) -> None:
        """Answer at the device from now on: the vTPM is off."""

    def leave(self) -> None:
        """Answer no more."""

    def close(self) -> None:
        """Close our copies of the ends."""
