"""Programs of ours that a command runs: one JSON object comes back, or the error it names."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from holdfast.client import ENVIRONMENT, Client
from holdfast.errors import HostError, by_name


def module(arguments: list[str], given: bytes | None = None) -> Any:
    """Run one of our modules and read the JSON it prints; its error becomes ours.

    `given` is its standard input, if it is not to be ours.
    """
    command = [sys.executable, "-P", "-m", *arguments]
    pipe = subprocess.PIPE
    source = None if given is None else pipe
    with subprocess.Popen(command, stdin=source, stdout=pipe, stderr=pipe) as process:
        printed, said = _printed(process, given)
    try:
        value = json.loads(printed)
    except ValueError:
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise HostError(f"{arguments[0]} ended with {process.returncode}: {last}") from None
    if process.returncode:
        if value.get("errno"):
            raise OSError(value["errno"], os.strerror(value["errno"]), value["file"])
        raise by_name(value["error"], value["why"])
    return value


def _printed(process: subprocess.Popen[bytes], given: bytes | None) -> tuple[bytes, bytes]:
    """All it prints. Interrupted, it is told so and waited for: it takes back what it has made."""
    try:
        return process.communicate(given)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        process.send_signal(signal.SIGINT)  # a terminal has told it too; it heeds the first
        process.communicate()
        raise


def keeper(arguments: list[str], given: bytes | None = None) -> dict[str, Any]:
    value = module(["holdfast.keeper", *arguments], given)
    assert isinstance(value, dict)
    return value


def settings_of(config: Path | None) -> dict[str, Any]:
    return of_config("settings", config)


def daemon_of(config: Path | None) -> Client:
    """The daemon of this configuration, unless the environment says where it is.

    What is wrong with the configuration is an error all the same.
    """
    settings = settings_of(config) if config is not None else None
    if settings is None or ENVIRONMENT in os.environ:
        return Client()
    return Client(Path(settings["api"]))


def of_config(part: str, config: Path | None, *more: str) -> dict[str, Any]:
    """What one of the daemon's modules says of the configuration."""
    given = [*more, *(["--config", str(config)] if config else [])]
    value = module([f"holdfast.daemon.{part}", *given])
    assert isinstance(value, dict)
    return value


def keeper_user(name: str, *, make: bool = False) -> tuple[int, int]:
    """The keeper's own user; with `make` it is made if there is none."""
    entry = user(name)
    if entry is None and not make:
        raise HostError(f"there is no user {name}: run holdfast init")
    if entry is None:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name]
        if subprocess.run(command, check=False).returncode:
            raise HostError(f"the user {name} could not be made")
        entry = pwd.getpwnam(name)
    return entry.pw_uid, entry.pw_gid


def user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None
