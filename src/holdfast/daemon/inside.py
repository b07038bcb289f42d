"""What is served inside containers: each one's own evidence, on a socket of its own.

One application for all of them; a request's vTPM is that of the socket by which it came. A run's
socket ends with the run, and every connection to it: what is made for the next run is nobody's who
was in the one before.

Not here: the application (`api`), and counting connections (`listening`).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from holdfast.daemon.listening import Listening, Room, listen
from holdfast.errors import NotFound
from holdfast.instance.background import background
from holdfast.instance.vtpm import VirtualTpm

# A container is one tenant, however many users it has; it has a user 0 as well.
ROOM: Final = Room(root=8, user=8, others=8)


@dataclass(eq=False)
class _Place:
    """Where one run's evidence is had."""

    path: str
    listening: Listening | None = None  # once it does
    over: bool = False


class Inside:
    """The sockets of all runs."""

    def __init__(self) -> None:
        self._runner: web.AppRunner | None = None
        self._there: dict[str, VirtualTpm] = {}  # by the socket's path
        self._places: dict[VirtualTpm, _Place] = {}
        self._ended = False

    def serve(self, runner: web.AppRunner) -> None:
        """Serve this application, which asks `asked` whom a request is about."""
        self._runner = runner

    def asked(self, request: web.Request) -> VirtualTpm:
        """Whose socket a request came by; NotFound if its run is over."""
        path = request.transport.get_extra_info("sockname") if request.transport else None
        vtpm = self._there.get(path or "")
        if vtpm is None:
            raise NotFound("this run is over")
        return vtpm

    def open(self, vtpm: VirtualTpm, sock: socket.socket) -> None:
        """Serve a vTPM's run on a listening socket, which is taken over."""
        self.close(vtpm)
        if self._ended:  # one that this daemon has just taken up, and leaves to the next
            sock.close()
            return
        place = self._places[vtpm] = _Place(sock.getsockname())
        self._there[place.path] = vtpm
        background(self._listen(place, sock))

    async def _listen(self, place: _Place, sock: socket.socket) -> None:
        assert self._runner is not None, "what is to be served is known before any vTPM"
        place.listening = await listen(self._runner, sock, ROOM)
        if place.over:
            place.listening.end()

    def close(self, vtpm: VirtualTpm) -> None:
        """The run is over."""
        place = self._places.pop(vtpm, None)
        if place is not None:
            self._there.pop(place.path, None)
            place.over = True
            if place.listening is not None:
                place.listening.end()

    async def end(self) -> None:
        """End the sockets of all runs; one that is opened from now on is closed at once."""
        self._ended = True
        for vtpm in tuple(self._places):
            self.close(vtpm)
        if self._runner is not None:
            await self._runner.cleanup()
