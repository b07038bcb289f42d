"""What a command line is given, in words that several commands share: names, users, files."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer

from holdfast.errors import Forbidden, InvalidInput
from holdfast.ids import instance_name

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="The vTPM's name.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file (TOML).")]
_JSON_MAX: Final = 16 << 20  # bytes in a file of JSON
_UID_DIGITS: Final = 10


def must_be_root(what: str) -> None:
    if os.geteuid() != 0:
        raise Forbidden(f"{what} is for root")


def quoted(name: str) -> str:
    """A name in a path; InvalidInput for what is no name."""
    return quote(instance_name(name), safe="")


def uid_of(owner: str) -> int:
    if owner.isascii() and owner.isdigit() and len(owner) <= _UID_DIGITS:
        return int(owner)
    try:
        return pwd.getpwnam(owner).pw_uid
    except (KeyError, ValueError):
        raise InvalidInput(f"there is no user {owner!a}") from None


def read_file(path: Path, most: int) -> bytes:
    """A file's content; InvalidInput if that is more than `most` bytes."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise InvalidInput(f"{path} has more than {most} bytes")
    return data


def json_file(path: Path) -> Any:
    data = read_file(path, _JSON_MAX)
    try:
        return json.loads(data.decode())  # of bytes, Python would take UTF-16 as well
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not JSON: it is not UTF-8") from None
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise InvalidInput(f"{path} is not JSON of ours: it nests too deeply") from None
