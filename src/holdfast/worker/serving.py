"""All the ways in which clients reach one vTPM in its worker; asleep, and awake again.

Rules: whoever is let in waits until the loop turns; a worker that sleeps reads nothing any more.

Not here: the TPM, and the channels to spawner and daemon (`service`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from holdfast.errors import DecodeError, ProtocolError
from holdfast.frontend.controls import ContainerControls
from holdfast.frontend.devices import TPM0, TPMRM0, Devices
from holdfast.frontend.loop import Loop
from holdfast.frontend.mssim import CommandPort, PlatformPort
from holdfast.frontend.nodes import NodeKind
from holdfast.frontend.page import Page, Words
from holdfast.frontend.proxy import ProxyConnection
from holdfast.frontend.resources import Client
from holdfast.frontend.sockets import ControlConnection, DataConnection, Stream
from holdfast.frontend.vtpm import Vtpm
from holdfast.protocol import hibernation as hb
from holdfast.protocol import lifecycle as lc
from holdfast.protocol.hibernation import Spoken
from holdfast.protocol.mssim import Dialect

_CHANNELS: Final = 3  # daemon, keys, page
_HELD: Final = 3  # /dev/fuse, data and control listener
_PORTS: Final = 2


class Ends(NamedTuple):
    """What a worker is begun with: its descriptors by what they are."""

    daemon: int
    keys: int
    page: int
    held: Sequence[int] = ()
    nodes: Sequence[int] = ()
    kind: NodeKind = NodeKind.NONE
    ports: Sequence[int] = ()
    dialect: str = ""
    kept: Sequence[int] = ()
    spoken: Sequence[Spoken] = ()

    @classmethod
    def of(cls, begin: lc.Begin, fds: list[int]) -> Ends:
        """ProtocolError unless they are as many as Begin says."""
        kind = NodeKind(begin.nodes)
        counts = (
            _CHANNELS, _HELD * begin.held, kind.descriptors, _PORTS * bool(begin.dialect),
            len(begin.spoken),
        )  # fmt: skip
        if len(fds) != sum(counts):
            raise ProtocolError(f"Begin with {len(fds)} descriptors from the spawner")
        parts, start = [], 0
        for count in counts:
            parts.append(fds[start : start + count])
            start += count
        (daemon, keys, page), held, nodes, ports, kept = parts
        spoken = tuple(map(Spoken, begin.spoken))
        return cls(daemon, keys, page, held, nodes, kind, ports, begin.dialect, kept, spoken)


class Serving:
    """One vTPM, its devices and connections, on the loop from now on."""

    def __init__(
        self,
        loop: Loop,
        page: Page,
        ends: Ends,
        vtpm: Vtpm,
        controls: ContainerControls,
        kept: hb.Hibernated | None = None,
    ) -> None:
        """Let clients in; `kept`: those who were there before it slept, with what they had.

        DecodeError if that contradicts itself.
        """
        self.vtpm = vtpm
        self._loop = loop
        self._page = page
        made = int(time.time()) if kept is None else kept.made
        self._devices = Devices(vtpm, page, time.monotonic, made)
        self._makers: Mapping[Spoken, Callable[[int], Stream]] = {
            Spoken.RAW: partial(DataConnection, vtpm, loop.hear_host),
            Spoken.CONTROL: partial(ControlConnection, controls),
            Spoken.SIMULATOR: partial(CommandPort, vtpm, loop.hear_host),
            Spoken.PLATFORM: PlatformPort,
        }
        streams = [
            self._makers[spoken](fd) for fd, spoken in zip(ends.kept, ends.spoken, strict=True)
        ]
        if kept is not None:
            self._resume(kept, streams)
        for stream in streams:
            loop.add(stream)
        self._listen(ends)

    def _listen(self, ends: Ends) -> None:
        loop, devices = self._loop, self._devices
        fuse, data, control = ends.held
        loop.serve_devices(fuse, devices)
        if ends.kind is NodeKind.CUSE:
            for fd, node in zip(ends.nodes, (TPM0, TPMRM0), strict=True):
                loop.serve_devices(fd, devices, node)
        elif ends.kind is NodeKind.VTPM_PROXY:
            (server,) = ends.nodes
            serve_driver(loop, self._page, self.vtpm, server)
        commands, askers = Spoken.RAW, Spoken.CONTROL
        loop.listen(data, self._makers[commands])
        loop.listen(control, self._makers[askers], cancels=True)
        if ends.dialect:
            if ends.dialect != Dialect.SWTPM.value:
                commands, askers = Spoken.SIMULATOR, Spoken.PLATFORM
            port, control_port = ends.ports
            loop.listen(port, self._makers[commands])
            loop.listen(control_port, self._makers[askers], cancels=True)

    # --- sleep and wake ---

    def asleep(self, permanent: bytes, volatile: bytes) -> hb.Hibernated:
        """All of it, as a successor goes on from it."""
        streams = self._loop.kept()
        own = [stream.client for stream in streams if stream.client is not None]
        others = [*self._devices.clients(), *own]
        resources = self.vtpm.asleep(others)
        clients = (self.vtpm.host, self.vtpm.shared, *others)
        place = {client: number for number, client in enumerate(clients)}
        connections = tuple(
            stream.asleep(place[stream.client] if stream.client is not None else hb.SHARED)
            for stream in streams
        )
        words = self._page.words
        return hb.Hibernated(
            permanent, volatile, resources, self._devices.asleep(place), connections,
            words.exclusive, words.last_handle, self._devices.made,
        )  # fmt: skip

    def connections(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """What is spoken on clients' connections, and their descriptors."""
        spoken, numbers = [], []
        for stream in self._loop.kept():
            assert stream.spoken is not None
            spoken.append(stream.spoken.value)
            numbers.append(stream.fd)
        return tuple(spoken), tuple(numbers)

    def _resume(self, kept: hb.Hibernated, streams: Sequence[Stream]) -> None:
        """Go on with clients that were there, on a TPM that went on before."""
        try:
            clients = self.vtpm.resume(kept.resources)
            self._devices.resume(kept.files, clients)
            self._page.words = Words(kept.exclusive, kept.last_handle)
            spoken = [stream.spoken.value for stream in streams if stream.spoken is not None]
            if spoken == [connection.spoken for connection in kept.connections]:
                for stream, connection in zip(streams, kept.connections, strict=True):
                    stream.resume(connection, clients)
            else:  # whoever kept them has died, and with it the connections
                self._flush(clients[c.client] for c in kept.connections if c.client != hb.SHARED)
        except (IndexError, KeyError) as error:
            raise DecodeError("hibernated vTPM", f"it contradicts itself: {error}") from None

    def _flush(self, gone: Iterable[Client]) -> None:
        for client in gone:
            self.vtpm.detach(client)


def serve_driver(loop: Loop, page: Page, vtpm: Vtpm, server: int) -> None:
    """Answer the kernel's driver at the server's end of a vtpm_proxy device."""
    loop.add(ProxyConnection(partial(vtpm.execute, vtpm.shared), page, server))
