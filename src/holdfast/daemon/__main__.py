"""`python -m holdfast.daemon`: the daemon by itself, started and restarted by the supervisor."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import structlog
from aiohttp import web

from holdfast.attest.collector import Collector
from holdfast.daemon import config
from holdfast.daemon.api import Api
from holdfast.daemon.host import Host
from holdfast.daemon.inside import Inside
from holdfast.daemon.listening import Room, listen
from holdfast.errors import HoldfastError
from holdfast.linux import process

# A connection is closed that brings no whole request head for so long.
EVIDENCE_SECONDS = 5.0
API_SECONDS = 10.0
# Who does not read its answers is not waited for longer at the end: the vTPMs have to be sealed.
END_SECONDS = 2.0
API_ROOM = Room(root=512, user=16, others=256)
API_BACKLOG = 128


def _runner(application: web.Application, idle: float) -> web.AppRunner:
    return web.AppRunner(
        application, keepalive_timeout=idle, shutdown_timeout=END_SECONDS, access_log=None
    )


async def serve(settings: config.Config, ready_fd: int | None) -> None:
    """Open, serve, end in order."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    inside = Inside()
    host = Host(
        settings,
        opened=lambda vtpm, ends: inside.open(vtpm, ends.take_evidence()),
        closed=inside.close,
    )
    api = Api(host, Collector(host.keeper, host.committer))
    own = _runner(api.own_application(inside.asked), EVIDENCE_SECONDS)
    await own.setup()
    inside.serve(own)
    await host.start()
    runner = _runner(api.application(), API_SECONDS)
    await runner.setup()
    path = settings.paths.api
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(os.fspath(path))
    path.chmod(0o666)  # who may do what is decided by credentials, call by call
    sock.listen(API_BACKLOG)
    server = await listen(runner, sock, API_ROOM)
    if ready_fd is not None:
        os.write(ready_fd, b"\n")
        os.close(ready_fd)
    await stop.wait()
    server.stop()
    await asyncio.gather(runner.cleanup(), inside.end())
    await host.stop()
    path.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="holdfast-daemon", description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--ready-fd", type=int, help="gets a byte when the API is open")
    parser.add_argument("--begin-fd", type=int, help="what is loaded waits for a byte here")
    options = parser.parse_args(arguments)
    process.set_pdeathsig(signal.SIGTERM)
    process.set_dumpable(False)
    process.raise_open_files()
    process.set_name("holdfast-daemon")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )
    # It would log a traceback for each request that is no HTTP: anyone could fill the log so.
    # What fails in our own code is logged, and rationed, where it is answered (`api.problems`).
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            if options.begin_fd is not None and not os.read(options.begin_fd, 1):
                return 1  # who was to say so has ended
            asyncio.run(serve(config.load(options.config), options.ready_fd))
    except (HoldfastError, OSError) as error:
        sys.stderr.write(f"holdfast-daemon: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
