"""swtpm's command line (swtpm(8)): what was asked, as values. What we do not have is refused.

Options of the form `--name key=value,flag` are tables here, so that an unknown or a repeated member
is an error and never ignored. Nothing is opened.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NoReturn

from holdfast.errors import InvalidInput
from holdfast.swtpm.machine import Rules, Startup

CAPABILITIES: Final = (
    "tpm-2.0", "tpm-send-command-header", "flags-opt-startup", "flags-opt-disable-auto-shutdown",
    "ctrl-opt-terminate", "cmdarg-seccomp", "cmdarg-key-fd", "cmdarg-pwd-fd",
    "cmdarg-print-states", "cmdarg-migration", "nvram-backend-dir", "nvram-backend-file",
    "tpmstate-opt-lock", "rsa-keysize-2048", "rsa-keysize-3072",
)  # fmt: skip
# Those that need a libtpms with profiles.
PROFILE_CAPABILITIES: Final = (
    "cmdarg-profile", "cmdarg-print-profiles", "profile-opt-remove-disabled", "cmdarg-print-info",
)  # fmt: skip
REMOVALS: Final = ("check", "fips-host")
LOG_LEVEL_MAX: Final = 4
PREFIX = "swtpm"
_TRUE: Final = {"true": True, "false": False}


class Interface(Enum):
    """How TPM commands arrive."""

    SOCKET = "socket"
    CHARDEV = "chardev"


@dataclass(frozen=True)
class Endpoint:
    """Where to listen, or a descriptor that was inherited."""

    path: str = ""
    port: int = 0
    address: str = "127.0.0.1"
    interface: str = ""
    fd: int = -1
    client_fd: int = -1
    mode: int = 0o770
    uid: int = -1
    gid: int = -1
    disconnect: bool = False
    terminate: bool = False


@dataclass(frozen=True)
class KeySource:
    """A key or a password, in a file or behind a descriptor."""

    file: str = ""
    fd: int = -1
    password: bool = False
    hexadecimal: bool = True
    size: int = 16
    kdf: str = "pbkdf2"
    remove: bool = False


@dataclass(frozen=True)
class ProfileSource:
    """A profile by its name, as JSON, in a file or behind a descriptor."""

    name: str = ""
    text: str = ""
    file: str = ""
    fd: int = -1
    remove_disabled: str = ""  # one of REMOVALS


@dataclass(frozen=True)
class StatePlace:
    """A directory, or a file or block device."""

    path: str
    linear: bool = False
    mode: int = 0o640
    lock: bool | None = None


@dataclass(frozen=True)
class Output:
    """A file or a descriptor to write to."""

    file: str = ""
    fd: int = -1
    prefix: str = ""
    level: int = 1
    truncate: bool = False


@dataclass(frozen=True)
class Options:
    """What was asked of `swtpm socket` or `swtpm chardev`."""

    interface: Interface
    server: Endpoint | None
    control: Endpoint | None
    state: StatePlace | None
    key: KeySource | None
    migration_key: KeySource | None
    rules: Rules
    need_init: bool
    terminate: bool
    daemon: bool
    run_as: str
    pid: Output | None
    log: Output | None
    seccomp: str
    device: str
    vtpm_proxy: bool
    incoming: bool
    release_lock: bool
    unsafe_plain: bool
    print_capabilities: bool
    print_states: bool
    profile: ProfileSource | None
    print_profiles: bool
    print_info: int | None  # flags of TPMLIB_GetInfo


def _end(option: str, text: str) -> int:
    """Where the first member ends: at a comma, or behind the JSON object that is its value."""
    comma = text.find(",")
    end = comma if comma >= 0 else len(text)
    start = text.find("=", 0, end) + 1
    if not start or text[start : start + 1] != "{":
        return end
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            break
    else:
        raise InvalidInput(f"Error parsing {option} options: Unterminated JSON map.")
    end = position + 1
    if text[end : end + 1] not in ("", ","):
        raise InvalidInput(
            f"Error parsing {option} options: Unexpected character following JSON map."
        )
    return end


def _parts(option: str, text: str) -> Iterator[str]:
    while (end := _end(option, text)) < len(text):
        yield text[:end]
        text = text[end + 1 :]
    yield text


def pairs(option: str, text: str, known: Mapping[str, str]) -> dict[str, str]:
    """Split `a=1,b`; `known` says of each member whether it has a "value" or is a "flag"."""
    found: dict[str, str] = {}
    for part in _parts(option, text):
        name, equals, value = part.partition("=")
        kind = known.get(name)
        if kind is None or (kind == "value" and not equals):
            raise InvalidInput(f"Error parsing {option} options: Unknown option '{part}'")
        if kind == "flag" and equals and value not in _TRUE:
            raise InvalidInput(f"Error parsing {option} options: '{name}' is true or false")
        if name in found:
            raise InvalidInput(f"Error parsing {option} options: '{name}' is given twice")
        found[name] = value if equals else "true"
    return found


def _values(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "value")


def _flags(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "flag")


def _number(option: str, name: str, text: str, base: int = 10, most: int = 0xFFFFFFFF) -> int:
    try:
        number = int(text, base)
    except ValueError:
        number = -1
    if not 0 <= number <= most:
        raise InvalidInput(f"Error parsing {option} options: {name} '{text}' is not a valid number")
    return number


def _descriptor(option: str, name: str, text: str) -> int:
    fd = _number(option, name, text, most=0x7FFFFFFF)
    if fd <= 2:
        raise InvalidInput(f"Error parsing {option} options: {name} must be greater than 2")
    return fd


def endpoint(option: str, text: str, *, control: bool) -> Endpoint:
    """`--server` or `--ctrl`."""
    known = _values("type", "path", "port", "bindaddr", "ifname", "fd", "mode", "uid", "gid")
    known |= _values("clientfd") | _flags("terminate") if control else _flags("disconnect")
    given = pairs(option, text, known)
    kind = given.get("type", "tcp" if not control else "")
    if kind not in ("tcp", "unixio"):
        raise InvalidInput(f"Error parsing {option} options: type '{kind}' is not unixio or tcp")
    fd = _descriptor(option, "fd", given["fd"]) if "fd" in given else -1
    client = _descriptor(option, "clientfd", given["clientfd"]) if "clientfd" in given else -1
    if fd >= 0 and client >= 0:
        raise InvalidInput(f"Error parsing {option} options: fd and clientfd exclude each other")
    if fd < 0 and client < 0:
        needed = "path" if kind == "unixio" else "port"
        if needed not in given:
            raise InvalidInput(f"Error parsing {option} options: {kind} needs {needed}")
    if kind == "tcp" and client >= 0:
        raise InvalidInput(f"Error parsing {option} options: clientfd is for unixio alone")
    return Endpoint(
        path=given.get("path", "") if kind == "unixio" else "",
        port=_number(option, "port", given["port"], most=0xFFFF) if "port" in given else 0,
        address=given.get("bindaddr", "127.0.0.1"),
        interface=given.get("ifname", ""),
        fd=fd,
        client_fd=client,
        mode=_number(option, "mode", given.get("mode", "0770"), 8, 0o7777),
        uid=_number(option, "uid", given["uid"]) if "uid" in given else -1,
        gid=_number(option, "gid", given["gid"]) if "gid" in given else -1,
        disconnect=given.get("disconnect") == "true",
        terminate=given.get("terminate") == "true",
    )


def key_source(option: str, text: str) -> KeySource:
    """`--key` or `--migration-key`."""
    known = _values("file", "fd", "pwdfile", "pwdfd", "mode", "format", "kdf") | _flags("remove")
    given = pairs(option, text, known)
    sources = [name for name in ("file", "fd", "pwdfile", "pwdfd") if name in given]
    if len(sources) != 1:
        raise InvalidInput(f"Error parsing {option} options: one of file, fd, pwdfile, pwdfd")
    (source,) = sources
    sizes = {"aes-cbc": 16, "aes-128-cbc": 16, "aes-256-cbc": 32}
    mode, form, kdf = (
        given.get("mode", "aes-cbc"), given.get("format", "hex"), given.get("kdf", "pbkdf2")
    )  # fmt: skip
    for name, value, legal in (
        ("mode", mode, tuple(sizes)), ("format", form, ("hex", "binary")),
        ("kdf", kdf, ("pbkdf2", "sha512")),
    ):  # fmt: skip
        if value not in legal:
            raise InvalidInput(
                f"Error parsing {option} options: {name} '{value}' is not {' or '.join(legal)}"
            )
    at_descriptor = source in ("fd", "pwdfd")
    return KeySource(
        file="" if at_descriptor else given[source],
        fd=_descriptor(option, source, given[source]) if at_descriptor else -1,
        password=source.startswith("pwd"),
        hexadecimal=form == "hex",
        size=sizes[mode],
        kdf=kdf,
        remove=given.get("remove") == "true",
    )


def state_place(text: str) -> StatePlace:
    """`--tpmstate`."""
    given = pairs("tpmstate", text, _values("dir", "backend-uri", "mode") | _flags("lock", "fsync"))
    if ("dir" in given) == ("backend-uri" in given):
        raise InvalidInput("Error parsing tpmstate options: one of dir, backend-uri")
    if given.get("fsync") == "false":
        raise InvalidInput(
            "Error parsing tpmstate options: fsync=false is not offered: "
            "what a TPM has acknowledged is on the disk here"
        )
    path, linear = given.get("dir", ""), False
    if "backend-uri" in given:
        scheme, _, path = given["backend-uri"].partition("://")
        if scheme not in ("dir", "file") or not path:
            raise InvalidInput(
                f"Error parsing tpmstate options: backend-uri '{given['backend-uri']}' is neither "
                "dir:// nor file://"
            )
        linear = scheme == "file"
    mode = _number("tpmstate", "mode", given.get("mode", "0640"), 8, 0o777)
    lock = _TRUE[given["lock"]] if "lock" in given else None
    return StatePlace(path, linear, mode, lock)


def output(option: str, text: str) -> Output:
    """`--log` or `--pid`."""
    known = _values("file", "fd")
    if option == "log":
        known |= _values("level", "prefix") | _flags("truncate")
    given = pairs(option, text, known)
    if ("file" in given) == ("fd" in given):
        raise InvalidInput(f"Error parsing {option} options: one of file, fd")
    level = _number(option, "level", given.get("level", "1"))
    if level > LOG_LEVEL_MAX:
        raise InvalidInput(
            f"Error parsing log options: level {level} would write commands with their secrets; "
            f"at most {LOG_LEVEL_MAX} is offered"
        )
    return Output(
        file=given.get("file", ""),
        fd=_descriptor(option, "fd", given["fd"]) if "fd" in given else -1,
        prefix=given.get("prefix", ""),
        level=level,
        truncate=given.get("truncate") == "true",
    )


def profile_source(text: str) -> ProfileSource:
    """`--profile`."""
    given = pairs("profile", text, _values("name", "profile", "file", "fd", "remove-disabled"))
    sources = [name for name in ("name", "profile", "file", "fd") if given.get(name)]
    if len(sources) != 1:
        raise InvalidInput("Error parsing profile options: one of name, profile, file, fd")
    removal = given.get("remove-disabled", "")
    if "remove-disabled" in given and removal not in REMOVALS:
        raise InvalidInput(
            f"Invalid option parameter '{removal}' for 'remove-disabled': "
            f"there are {' and '.join(REMOVALS)}"
        )
    return ProfileSource(
        name=given.get("name", ""),
        text=given.get("profile", ""),
        file=given.get("file", ""),
        fd=_descriptor("profile", "fd", given["fd"]) if given.get("fd") else -1,
        remove_disabled=removal,
    )


def _info_flags(text: str) -> int:
    try:
        flags = int(text, 0)
    except ValueError:
        flags = -1
    if not 0 <= flags <= 0xFFFFFFFF:
        raise InvalidInput(f"Cannot parse info value '{text}'.")
    return flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput(message)


def _parser(interface: Interface) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"{PREFIX} {interface.value}", allow_abbrev=False,
        description="A TPM 2.0 for virtual machines and tests, driven as swtpm is.",
    )  # fmt: skip
    add = parser.add_argument
    add("--tpm2", action="store_true", help="choose TPM 2 functionality: the only one there is")
    add("--tpmstate", metavar="dir=DIR|backend-uri=URI", help="where the state is kept; "
        "mode=0..., lock[=false]")  # fmt: skip
    add("--server", metavar="type=unixio|tcp,...", help="where TPM commands arrive: path=, port=, "
        "bindaddr=, ifname=, fd=, mode=, uid=, gid=, disconnect")  # fmt: skip
    add("--ctrl", metavar="type=unixio|tcp,...", help="the control channel: path=, port=, "
        "bindaddr=, ifname=, fd=, clientfd=, mode=, uid=, gid=, terminate")  # fmt: skip
    add("--key", metavar="file=|fd=|pwdfile=|pwdfd=,...", help="the key of the state files: "
        "mode=aes-cbc|aes-256-cbc, format=hex|binary, kdf=pbkdf2|sha512, remove")  # fmt: skip
    add("--migration-key", metavar="file=|fd=|pwdfile=|pwdfd=,...",
        help="the key under which state leaves by the control channel; as --key")  # fmt: skip
    add("--migration", metavar="incoming,release-lock-outgoing", help="when the state is locked")
    add("--flags", metavar="FLAG,...", help="not-need-init, startup-clear|startup-state|"
        "startup-none, disable-auto-shutdown, unsafe-plain-stateblobs")  # fmt: skip
    add("--locality", metavar="FLAG,...", help="reject-locality-4, allow-set-locality")
    add("--log", metavar="file=|fd=,...", help="level=, prefix=, truncate; file=- logs nothing")
    add("--pid", metavar="file=|fd=", help="where the process id is written")
    add("--seccomp", metavar="action=kill|log|none", help="what happens on a system call "
        "that a TPM does not need")  # fmt: skip
    add("-d", "--daemon", action="store_true", help="go into the background")
    add("-t", "--terminate", action="store_true", help="end when the data connection does")
    add("-r", "--runas", metavar="USER", default="", help="change to this user")
    add("--print-capabilities", action="store_true", help="print them as JSON and end")
    add("--print-states", action="store_true", help="print which states there are and end")
    add("--profile", metavar="name=|profile=JSON|file=|fd=,...", help="which algorithms and "
        f"commands a new TPM has (libtpms 0.10): remove-disabled={'|'.join(REMOVALS)}")  # fmt: skip
    add("--print-profiles", action="store_true", help="print those of libtpms as JSON and end")
    add("--print-info", metavar="FLAGS", help="print what libtpms says of itself, and of the TPM "
        "in --tpmstate, as JSON and end")  # fmt: skip
    if interface is Interface.SOCKET:
        add("-p", "--port", metavar="PORT", help="TCP port for TPM commands; disconnects after "
            "each")  # fmt: skip
        add("-f", "--fd", metavar="FD", help="a connected socket for TPM commands")
    else:
        add("-c", "--chardev", metavar="DEVICE", default="", help="a character device to serve")
        add("--vtpm-proxy", action="store_true", help="make /dev/tpmN by the kernel's vtpm_proxy")
    return parser


def parse(interface: Interface, arguments: list[str], environ: Mapping[str, str]) -> Options:
    """Read a command line; InvalidInput says what is wrong with it."""
    given = _parser(interface).parse_args(arguments)
    proxy = bool(getattr(given, "vtpm_proxy", False))
    flags = pairs(
        "flags", given.flags,
        _flags(
            "not-need-init", "startup-clear", "startup-state", "startup-none",
            "disable-auto-shutdown", "unsafe-plain-stateblobs",
        ),
    ) if given.flags else {}  # fmt: skip
    startups = [name for name in flags if name.startswith("startup-")]
    if len(startups) > 1:
        raise InvalidInput("Error parsing flags options: one startup-... at most")
    startup = Startup(startups[0].removeprefix("startup-")) if startups else Startup.NONE
    if proxy and not startups:
        startup = Startup.CLEAR
    locality = pairs(
        "locality", given.locality, _flags("reject-locality-4", "allow-set-locality")
    ) if given.locality else {}  # fmt: skip
    migration = pairs(
        "migration", given.migration, _flags("incoming", "release-lock-outgoing")
    ) if given.migration else {}  # fmt: skip
    seccomp = pairs("seccomp", given.seccomp, _values("action")) if given.seccomp else {}
    action = seccomp.get("action", "kill")
    if action not in ("kill", "log", "none"):
        raise InvalidInput(f"Error parsing seccomp options: action '{action}' is not known")
    state = given.tpmstate or (f"dir={environ['TPM_PATH']}" if environ.get("TPM_PATH") else "")
    if not given.tpm2 and not given.print_capabilities:
        raise InvalidInput("only TPM 2 is offered: give --tpm2")
    return Options(
        interface=interface,
        server=_server(given, environ),
        control=endpoint("ctrl", given.ctrl, control=True) if given.ctrl else None,
        state=state_place(state) if state else None,
        key=key_source("key", given.key) if given.key else None,
        migration_key=(
            key_source("migration-key", given.migration_key) if given.migration_key else None
        ),
        rules=Rules(
            startup=startup,
            auto_shutdown="disable-auto-shutdown" not in flags,
            reject_locality_4="reject-locality-4" in locality,
            allow_set_locality=proxy or "allow-set-locality" in locality,
        ),
        need_init=not ("not-need-init" in flags or startup is not Startup.NONE),
        terminate=given.terminate,
        daemon=given.daemon,
        run_as=given.runas,
        pid=output("pid", given.pid) if given.pid else None,
        log=output("log", given.log) if given.log else None,
        seccomp=action,
        device=getattr(given, "chardev", ""),
        vtpm_proxy=proxy,
        incoming="incoming" in migration,
        release_lock="release-lock-outgoing" in migration,
        unsafe_plain="unsafe-plain-stateblobs" in flags,
        print_capabilities=given.print_capabilities,
        print_states=given.print_states,
        profile=profile_source(given.profile) if given.profile is not None else None,
        print_profiles=given.print_profiles,
        print_info=_info_flags(given.print_info) if given.print_info is not None else None,
    )


def _server(given: argparse.Namespace, environ: Mapping[str, str]) -> Endpoint | None:
    port = getattr(given, "port", None)
    fd = getattr(given, "fd", None)
    ways = [way for way in (given.server, port, fd) if way is not None]
    if len(ways) > 1:
        raise InvalidInput("--server, --port and --fd exclude each other")
    if given.server is not None:
        return endpoint("server", given.server, control=False)
    if fd is not None:
        return Endpoint(fd=_descriptor("fd", "fd", fd))
    if port is None and not given.ctrl and "TPM_PORT" in environ:
        port = environ["TPM_PORT"]
    if port is None:
        return None
    number = _number("port", "port", port, most=0xFFFF)
    return Endpoint(port=number, disconnect=True)
