"""swtpm's configuration files: swtpm_setup.conf(5), swtpm-localca.conf(5) and .options(5).

`key = value` a line, `#` begins a comment, `${NAME}` is the environment's. A keyword that we do
not have is refused, like a repeated one: what it asks for would be missing without a word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast.errors import Conflict, HostError, InvalidInput
from holdfast.swtpm.setup import durable, regular

SETUP: Final = "swtpm_setup.conf"
LOCALCA: Final = "swtpm-localca.conf"
LOCALCA_OPTIONS: Final = "swtpm-localca.options"
TOOL_SECONDS: Final = 60
_SYSTEM: Final = Path("/etc")
_SYSTEM_STATE: Final = Path("/var/lib/swtpm-localca")
_FILE_MAX: Final = 64 * 1024
_MODE: Final = 0o644
_VARIABLE: Final = re.compile(r"\$\{([^}]*)\}")
_PLATFORM_OPTIONS: Final = {
    "--platform-manufacturer": "manufacturer",
    "--platform-model": "model",
    "--platform-version": "version",
}


@dataclass(frozen=True)
class SetupConfig:
    """swtpm_setup.conf. Without a tool, the local CA of this program signs."""

    tool: str = ""
    tool_config: str = ""
    tool_options: str = ""
    tool_seconds: int = TOOL_SECONDS
    pcr_banks: str = ""
    rsa_keysize: str = ""
    profile: str = ""  # JSON
    profile_file: str = ""
    profiles: str = ""  # the directory of --profile-name local:NAME


@dataclass(frozen=True)
class AuthorityConfig:
    """swtpm-localca.conf."""

    state: Path
    signing_key: Path
    issuer: Path
    serial: Path
    password: bytes | None = None


_SETUP_KEYWORDS: Final = {
    "create_certs_tool": "tool",
    "create_certs_tool_config": "tool_config",
    "create_certs_tool_options": "tool_options",
    "create_certs_tool_seconds": "tool_seconds",
    "active_pcr_banks": "pcr_banks",
    "rsa_keysize": "rsa_keysize",
    "profile": "profile",
    "profile_file": "profile_file",
    "local_profiles_dir": "profiles",
}


def user_directory(environ: Mapping[str, str]) -> Path | None:
    """$XDG_CONFIG_HOME or ~/.config; None without a home."""
    if environ.get("XDG_CONFIG_HOME"):
        return Path(environ["XDG_CONFIG_HOME"])
    return Path(environ["HOME"], ".config") if environ.get("HOME") else None


def found(name: str, environ: Mapping[str, str]) -> Path | None:
    """The user's file of that name, else the system's, else None."""
    places = (user_directory(environ), _SYSTEM)
    paths = (place / name for place in places if place is not None)
    return next((path for path in paths if os.access(path, os.R_OK)), None)


def setup(path: Path, environ: Mapping[str, str]) -> SetupConfig:
    """Read swtpm_setup.conf. HostError or InvalidInput, with the file's name."""
    given = _keywords(path, _SETUP_KEYWORDS, environ)
    seconds = given.pop("create_certs_tool_seconds", str(TOOL_SECONDS))
    if not seconds.isdecimal() or not 0 < int(seconds) < 1 << 16:
        raise InvalidInput(f"{path}: create_certs_tool_seconds '{seconds}' is no number of seconds")
    texts = {_SETUP_KEYWORDS[name]: value for name, value in given.items()}
    return SetupConfig(tool_seconds=int(seconds), **texts)


def authority(path: Path | None, environ: Mapping[str, str]) -> AuthorityConfig:
    """Read swtpm-localca.conf; without one, its usual places."""
    if path is None:
        user = user_directory(environ)
        state = _SYSTEM_STATE
        if os.getuid() and user is not None:
            state = user / "var/lib/swtpm-localca"
        return AuthorityConfig(
            state, state / "signkey.pem", state / "issuercert.pem", state / "certserial"
        )
    known = ("statedir", "signingkey", "issuercert", "certserial", "signingkey_password")
    given = _keywords(path, known, environ)
    for name in known[:3]:
        if not given.get(name):
            raise InvalidInput(f"Missing '{name}' config value in config file {path}.")
    if given["signingkey"].startswith(("pkcs11:", "tpmkey:")):
        raise InvalidInput(
            f"{path}: signingkey '{given['signingkey']}': the local CA here has keys in files; "
            "name swtpm_localca as create_certs_tool for others"
        )
    state = Path(given["statedir"])
    password = given.get("signingkey_password")
    return AuthorityConfig(
        state,
        Path(given["signingkey"]),
        Path(given["issuercert"]),
        Path(given["certserial"]) if given.get("certserial") else state / "certserial",
        password.encode() if password else None,
    )


def platform(path: Path | None) -> dict[str, str]:
    """Manufacturer, model, version: those that swtpm-localca.options gives."""
    words = [] if path is None else _read(path).split()
    if len(words) % 2:
        raise InvalidInput(f"{path}: {words[-1]} has no value")
    given: dict[str, str] = {}
    for option, value in zip(words[::2], words[1::2], strict=True):
        name = _PLATFORM_OPTIONS.get(option)
        if name is None or name in given:
            why = "is given twice" if name else "is not known here"
            raise InvalidInput(f"{path}: option {option} {why}")
        given[name] = value
    return given


def create(flags: Iterable[str], environ: Mapping[str, str]) -> list[Path]:
    """Write a user's configuration files: their names, or none where one exists and may stay.

    Conflict if one exists and neither `overwrite` nor `skip-if-exist` is among `flags`.
    """
    directory = user_directory(environ)
    if directory is None:
        raise HostError("Neither XDG_CONFIG_HOME nor HOME is set.")
    if os.getuid() == 0 and "root" not in flags:
        raise InvalidInput(
            f"Requiring the 'root' flag since the configuration files will shadow those in "
            f"{_SYSTEM}."
        )
    directory = directory.absolute()
    state = directory / "var/lib/swtpm-localca"
    files = {
        SETUP: (
            "# Without create_certs_tool, the program signs certificates itself.\n"
            f"create_certs_tool_config = {directory / LOCALCA}\n"
            f"create_certs_tool_options = {directory / LOCALCA_OPTIONS}\n"
            "# Comma-separated list of PCR banks to activate by default\n"
            "active_pcr_banks = sha256\n"
        ),
        LOCALCA: (
            f"statedir = {state}\n"
            f"signingkey = {state / 'signkey.pem'}\n"
            f"issuercert = {state / 'issuercert.pem'}\n"
            f"certserial = {state / 'certserial'}\n"
        ),
        LOCALCA_OPTIONS: (
            f"--platform-manufacturer {_word(os.uname().sysname)}\n"
            f"--platform-version {_word(os.uname().release)}\n"
            f"--platform-model {_word(os.uname().machine)}\n"
        ),
    }
    paths = [directory / name for name in files]
    there = [path for path in paths if os.path.lexists(path)]
    if there and "overwrite" not in flags:
        if "skip-if-exist" in flags:
            return []
        raise Conflict(f"File {there[0]} already exists. Refusing to overwrite.")
    state.mkdir(0o750, parents=True, exist_ok=True)
    for path, text in zip(paths, files.values(), strict=True):
        durable.replace(path, text.encode(), _MODE)
    return paths


def _word(text: str) -> str:
    return "_".join(text.split()) or "unknown"


def _read(path: Path) -> str:
    try:
        data = regular.read(path, _FILE_MAX + 1)
    except OSError as error:
        raise HostError(f"Cannot read {path}: {error.strerror}") from None
    if len(data) > _FILE_MAX:
        raise InvalidInput(f"{path} is longer than {_FILE_MAX} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not text") from None


def _keywords(path: Path, known: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for number, line in enumerate(_read(path).splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, equals, value = (part.strip() for part in text.partition("="))
        where = f"{path}, line {number}"
        if not equals or name not in known:
            raise InvalidInput(f"{where}: '{name}' is not known here")
        if name in given:
            raise InvalidInput(f"{where}: '{name}' is given twice")
        given[name] = _resolved(value, environ, where)
    return given


def _resolved(value: str, environ: Mapping[str, str], where: str) -> str:
    def of(match: re.Match[str]) -> str:
        try:
            return environ[match[1]]
        except KeyError:
            raise InvalidInput(f"{where}: environment variable {match[1]} is not set") from None

    return _VARIABLE.sub(of, value)
