"""TCP ports of a vTPM inside its container's network namespace, where unmodified clients look.

    127.0.0.1:2321    TPM commands
    127.0.0.1:2322    controls (swtpm's), or signals (the simulator's)

Whoever is in that network namespace may use the vTPM: a container that shares its host's gets none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from typing import Final

from holdfast.errors import Conflict, HostError
from holdfast.linux.namespaces import Clone, enter

COMMANDS: Final = 2321
CONTROLS: Final = 2322
_ADDRESS: Final = "127.0.0.1"
_BACKLOG: Final = 128
_IP_FREEBIND: Final = 15  # linux/in.h: the loopback interface may not be up yet


def listen(pid: int) -> tuple[socket.socket, socket.socket]:
    """Listening sockets for commands and controls in the network namespace of a process.

    Conflict if that is the host's or another has the ports; HostError if it cannot be entered.
    """
    try:
        there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"the container's network namespace: {error.strerror}") from None
    try:
        if os.path.samestat(os.fstat(there), os.stat("/proc/self/ns/net")):
            raise Conflict(
                "the container has the host's network: its vTPM's ports would be everybody's; "
                "give it a network of its own, or make the vTPM without ports"
            )
        return _in_a_thread(there)
    finally:
        os.close(there)


def _in_a_thread(namespace: int) -> tuple[socket.socket, socket.socket]:
    """A thread's network namespace is its own, so it enters, listens and ends."""
    made: list[socket.socket] = []
    failed: list[OSError] = []

    def run() -> None:
        try:
            enter(namespace, Clone.NEWNET)
            for port in (COMMANDS, CONTROLS):
                made.append(_listener(port))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        for sock in made:
            sock.close()
        (error,) = failed
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                f"port {COMMANDS} or {CONTROLS} is taken in the container's network, "
                "by another container of its pod it may be"
            )
        raise HostError(f"ports in the container's network: {error.strerror}")
    commands, controls = made
    return commands, controls


def _listener(port: int) -> socket.socket:
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((_ADDRESS, port))
        sock.listen(_BACKLOG)
        undo.pop_all()
        return sock
