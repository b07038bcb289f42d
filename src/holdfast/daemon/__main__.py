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
from collections.abc import Coroutine
from pathlib import Path

import structlog
from aiohttp import web

from holdfast.attest.collector import Collector
from holdfast.daemon import config
from holdfast.daemon.api import Api
from holdfast.daemon.host import Host
from holdfast.errors import HoldfastError
from holdfast.instance.vtpm import VirtualTpm
from holdfast.linux import process

EVIDENCE_SECONDS = 5.0  # an idle connection of a container's is closed after this


async def serve(settings: config.Config, ready_fd: int | None) -> None:
    """Open, serve, end in order."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runners: dict[str, web.AppRunner] = {}
    tasks: set[asyncio.Task[None]] = set()
    api: Api | None = None

    async def close_evidence(vtpm: VirtualTpm) -> None:
        previous = runners.pop(vtpm.record.name, None)
        if previous is not None:
            await previous.cleanup()

    async def open_evidence(vtpm: VirtualTpm, sock: socket.socket) -> None:
        assert api is not None
        await close_evidence(vtpm)
        runner = web.AppRunner(
            api.own_application(vtpm), keepalive_timeout=EVIDENCE_SECONDS, access_log=None
        )
        await runner.setup()
        await web.SockSite(runner, sock).start()
        runners[vtpm.record.name] = runner

    def begin(work: Coroutine[None, None, None]) -> None:
        task = loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    host = Host(
        settings,
        opened=lambda vtpm, ends: begin(open_evidence(vtpm, ends.evidence.dup())),
        closed=lambda vtpm: begin(close_evidence(vtpm)),
    )
    api = Api(host, Collector(host.keeper))
    await host.start()
    runner = web.AppRunner(api.application(), access_log=None)
    await runner.setup()
    path = settings.paths.api
    path.unlink(missing_ok=True)
    site = web.UnixSite(runner, os.fspath(path))
    await site.start()
    path.chmod(0o666)  # who may do what is decided by credentials, call by call
    if ready_fd is not None:
        os.close(ready_fd)
    await stop.wait()
    await runner.cleanup()
    for each in runners.values():
        await each.cleanup()
    await host.stop()
    path.unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="holdfast-daemon", description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--ready-fd", type=int, help="closed when the API is open")
    options = parser.parse_args(arguments)
    process.set_pdeathsig(signal.SIGTERM)
    process.set_dumpable(False)
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
    logging.getLogger("aiohttp").setLevel(logging.ERROR)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(config.load(options.config), options.ready_fd))
    except (HoldfastError, OSError) as error:
        sys.stderr.write(f"holdfast-daemon: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
