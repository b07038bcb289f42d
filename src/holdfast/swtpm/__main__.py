"""`holdfast-swtpm socket|chardev ...`: what swtpm's drivers start.

The process that is started is the one that owns the sockets and whose id is in the pid file (with
--daemon: its child, once it is ready). It ends with 0 on SIGTERM and on a control channel's
SHUTDOWN, and with 1 and a line that begins with `swtpm:` if it cannot do what was asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from holdfast import __version__
from holdfast.engine.libtpms import Engine, Entropy, StateKind
from holdfast.errors import Conflict, HoldfastError, HostError, InvalidInput
from holdfast.frontend.cancelling import Canceller
from holdfast.frontend.loop import Loop
from holdfast.linux import process, seccomp, vtpm_proxy
from holdfast.protocol import linear
from holdfast.protocol.stateblob import decode_file
from holdfast.sandbox import swtpm as box
from holdfast.swtpm import keys, listening, profiles, user
from holdfast.swtpm.controls import Leaving
from holdfast.swtpm.machine import FILES, PROFILE_TOO_LATE, Machine
from holdfast.swtpm.options import (
    CAPABILITIES,
    PREFIX,
    PROFILE_CAPABILITIES,
    Endpoint,
    Interface,
    Options,
    Output,
    StatePlace,
    parse,
)
from holdfast.swtpm.service import Service
from holdfast.swtpm.storage import Directory, SingleFile, Storage, told_of

USAGE: Final = """A TPM 2.0 that is driven as swtpm is.

Usage: swtpm socket|chardev [options]
       swtpm -v|--version

Use the --help option to see the help screen for each interface type.
"""
_PID_MODE: Final = 0o640
_ACTIONS: Final = {"kill": seccomp.KILL_PROCESS, "log": seccomp.LOG}


def run(options: Options) -> None:
    """Do what the command line asks for; returns at its end."""
    if options.print_capabilities:
        _print(_capabilities(Engine()))
        return
    if options.print_profiles:
        _print({"AvailableProfiles": profiles.built_in(Engine())})
        return
    if options.print_info is not None:
        sys.stdout.write(_info(options, options.print_info) + "\n")
        return
    if options.state is None:
        wanted = " for --print-states" if options.print_states else ""
        raise InvalidInput(f"Error: --tpmstate option is required{wanted}")
    if options.print_states:
        _print({"type": "swtpm", "states": _states(options.state)})
        return
    _check_reachable(options)
    leaving = Leaving(
        keys.load(options.migration_key) if options.migration_key else None, options.unsafe_plain
    )
    key = keys.load(options.key) if options.key else None
    log = _log(options.log)
    if options.run_as:
        user.become(options.run_as)
    storage = _storage(options.state)
    engine, loop = Engine(), Loop()
    profile = profiles.load(options.profile, engine) if options.profile is not None else None
    with contextlib.ExitStack() as opened:
        serve = _open(options, opened)  # before going into the background: errors are seen
        pid_path = Path(options.pid.file if options.pid else "").absolute()
        ready = _into_background() if options.daemon else (lambda: None)
        if options.pid is not None:
            opened.enter_context(_pid_file(options.pid, pid_path))
        process.set_name(PREFIX)
        process.set_dumpable(False)
        canceller = _confined(options.seccomp, engine)
        Entropy().reseed()
        cancellable = partial(loop.run_cancellable, canceller)
        machine = Machine(engine, storage, key, options.rules, cancellable, profile)
        service = Service(machine, leaving, loop, ends_with_data=options.terminate)
        if not options.incoming:
            storage.lock()
        if not options.need_init or options.control is None:
            machine.start()
        serve(service)
        ready()
        log("ready")
        service.run()
        log("ended")


def _print(said: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")


def _capabilities(engine: Engine) -> dict[str, object]:
    features, said = list(CAPABILITIES), {}
    if engine.offers_profiles:
        features += PROFILE_CAPABILITIES
        said = {"profiles": profiles.capabilities(engine)}
    return {"type": "swtpm", "features": features, **said, "version": __version__}


def _info(options: Options, flags: int) -> str:
    """What libtpms says, of the TPM in --tpmstate if that is given. Nothing is written."""
    engine = Engine()
    profile = profiles.load(options.profile, engine) if options.profile is not None else None
    if options.state is None:
        return profiles.info(engine, flags)
    process.set_dumpable(False)
    Entropy().reseed()
    key = keys.load(options.key) if options.key is not None else None
    name, place = FILES[StateKind.PERMANENT], options.state
    storage = None if place.linear and not Path(place.path).exists() else _storage(place)
    data = storage.load(name) if storage is not None else None
    if storage is None or data is None:
        engine.manufacture(profile)  # as the one that would be made
    elif profile is not None:
        raise Conflict(PROFILE_TOO_LATE)
    else:
        with told_of(storage.where(name)):
            engine.restore(decode_file(data, key))
    return profiles.info(engine, flags)


def _confined(action: str, engine: Engine) -> Canceller:
    """Enter the box, both threads of ours; the second one."""
    canceller = Canceller(engine.cancel)
    if action == "none":
        canceller.start()
    else:
        box.enter(_ACTIONS[action], canceller.start)
    return canceller


def _check_reachable(options: Options) -> None:
    if options.interface is Interface.SOCKET:
        if options.server is None and options.control is None:
            raise InvalidInput("Error: --server, --port, --fd or --ctrl is needed to be reached")
    elif bool(options.device) == options.vtpm_proxy:
        raise InvalidInput("Error: one of --chardev and --vtpm-proxy is needed")


def _open(options: Options, opened: contextlib.ExitStack) -> Callable[[Service], None]:
    """Open everything there is to be reached by; what then has the service serve it."""
    steps: list[Callable[[Service], None]] = []
    if options.server is not None:
        steps.append(_server(options.server, options, opened))
    if options.control is not None:
        steps.append(_control(options.control, opened))
    if options.vtpm_proxy:
        device = _proxy()
        steps.append(lambda service: service.serve_device(device.fd, ends=options.terminate))
        sys.stdout.write(f"New TPM device: /dev/tpm{device.number} ")
        sys.stdout.write(f"(major/minor = {device.major}/{device.minor})\n")
        sys.stdout.flush()
    elif options.device:
        try:
            fd = os.open(options.device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"Cannot open {options.device}: {error.strerror}") from None
        steps.append(lambda service: service.serve_device(fd, ends=True))

    def all_of_them(service: Service) -> None:
        for step in steps:
            step(service)

    return all_of_them


def _server(
    endpoint: Endpoint, options: Options, opened: contextlib.ExitStack
) -> Callable[[Service], None]:
    once, ends = endpoint.disconnect, options.terminate
    if endpoint.fd >= 0:
        sock, listens = listening.inherited(endpoint.fd)
        if not listens:
            fd = sock.detach()
            return lambda service: service.serve_client(fd, ends=True)
    else:
        sock = _listen(endpoint, opened)
    return lambda service: service.serve_commands(sock, once=once, ends=ends)


def _control(endpoint: Endpoint, opened: contextlib.ExitStack) -> Callable[[Service], None]:
    ends = endpoint.terminate
    if endpoint.client_fd >= 0:
        fd = listening.inherited(endpoint.client_fd)[0].detach()
        return lambda service: service.serve_control_client(fd, ends=ends)
    if endpoint.fd >= 0:
        sock, listens = listening.inherited(endpoint.fd)
        if not listens:
            raise InvalidInput(f"--ctrl fd={endpoint.fd} does not listen: is clientfd= meant?")
    else:
        sock = _listen(endpoint, opened)
    return lambda service: service.serve_control(sock, ends=ends)


def _listen(endpoint: Endpoint, opened: contextlib.ExitStack) -> socket.socket:
    sock = listening.listener(endpoint)
    if endpoint.path:
        path = Path(endpoint.path).absolute()
        opened.callback(path.unlink, missing_ok=True)
    return sock


def _proxy() -> vtpm_proxy.ProxyDevice:
    try:
        return vtpm_proxy.new_device()
    except OSError as error:
        raise HostError(
            f"{vtpm_proxy.DEVICE}: {error.strerror}: is the kernel's tpm_vtpm_proxy there?"
        ) from None


def _storage(place: StatePlace) -> Storage:
    path = Path(place.path).absolute()
    if place.linear:
        return SingleFile(path, mode=place.mode, locks=bool(place.lock))
    return Directory(path, mode=place.mode, locks=place.lock is not False)


def _states(place: StatePlace) -> list[dict[str, object]]:
    if place.linear and not Path(place.path).exists():
        return []
    storage = _storage(place)
    found = ((name, storage.load(name)) for name in linear.STATES)
    return [{"name": name, "size": len(data)} for name, data in found if data is not None]


def _into_background() -> Callable[[], None]:
    """Go on as a child; the parent ends with 0 once that is called, else with the child's end."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            os._exit(0 if pipe.read(1) else 1)
    os.close(reader)
    os.setsid()
    os.chdir("/")

    def ready() -> None:
        os.write(writer, b"\0")
        os.close(writer)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)

    return ready


@contextlib.contextmanager
def _pid_file(output: Output, path: Path) -> Iterator[None]:
    text = f"{os.getpid()}\n".encode()
    try:
        if output.fd >= 0:
            os.write(output.fd, text)
            os.close(output.fd)
            yield
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, _PID_MODE)
        with os.fdopen(fd, "wb") as file:
            file.write(text)
    except OSError as error:
        where = output.file or f"descriptor {output.fd}"
        raise HostError(f"Could not write pid file {where}: {error.strerror}") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _log(output: Output | None) -> Callable[[str], None]:
    """What writes a line to the log; errors go to standard error as well, wherever the log is."""
    if output is None or output.file == "-":
        return lambda _: None
    fd = output.fd
    if fd < 0:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        flags |= os.O_TRUNC if output.truncate else 0
        try:
            fd = os.open(output.file, flags, _PID_MODE)
        except OSError as error:
            raise HostError(f"Could not open logfile {output.file}: {error.strerror}") from None
    prefix = output.prefix

    def line(text: str) -> None:
        os.write(fd, f"{prefix}{PREFIX}: {text}\n".encode(errors="backslashreplace"))

    return line


def main() -> int:
    """Entry point of `holdfast-swtpm`."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-v"], ["--version"]):
        sys.stdout.write(f"TPM emulator version {__version__}, Holdfast\n")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 1
    try:
        interface = Interface(arguments[0])
    except ValueError:
        sys.stderr.write(f"Unsupported TPM interface type '{arguments[0]}'.\n{USAGE}")
        return 1
    try:
        run(parse(interface, arguments[1:], os.environ))
    except (HoldfastError, OSError) as error:
        sys.stderr.write(f"{PREFIX}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
