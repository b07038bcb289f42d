"""Profiles: which algorithms, commands and attributes a new TPM has, as libtpms 0.10 and newer let
its maker choose. A profile is a JSON object; libtpms judges it, when it makes a TPM of it.

Here: where one is read from, what of it this host's libcrypto forbids, what libtpms says of them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, Final

from holdfast.engine.algorithms import (
    ALGORITHMS,
    ATTRIBUTES,
    HMAC_ATTRIBUTES,
    LEAST_SIZES,
    Libcrypto,
)
from holdfast.engine.libtpms import Engine
from holdfast.errors import HostError, InvalidInput
from holdfast.swtpm.options import REMOVALS, ProfileSource

PROFILE_MAX: Final = 10 * 1024
CUSTOM: Final = "custom"
# TPMLIB_INFO_*, those of libtpms 0.9 first.
_INFO_OLD: Final = 1 | 2 | 4
_INFO_ALGORITHMS: Final = 8
_INFO_COMMANDS: Final = 0x10
_INFO_ACTIVE: Final = 0x20
_INFO_AVAILABLE: Final = 0x40
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_FIPS_HOST: Final = "fips-host"


def load(source: ProfileSource, engine: Engine) -> str:
    """The profile that was asked for. HostError if libtpms has none; InvalidInput."""
    if not engine.offers_profiles:
        raise engine.too_old("--profile")
    text = json.dumps({"Name": source.name}) if source.name else source.text or _read(source)
    text = text.strip()
    if "\0" in text or not text.isascii():
        raise InvalidInput("a profile is ASCII text, without NUL")
    if not source.remove_disabled:
        return text
    return _without_disabled(text, engine, assumed=source.remove_disabled == REMOVALS[1])


def _read(source: ProfileSource) -> str:
    name = source.file or f"descriptor {source.fd}"
    try:
        with open(source.file or source.fd, "rb") as file:
            data = file.read(PROFILE_MAX + 1)
    except OSError as error:
        raise HostError(f"Unable to read profile {name}: {error.strerror}") from None
    if len(data) > PROFILE_MAX:
        raise InvalidInput(f"the profile in {name} is longer than {PROFILE_MAX} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidInput(f"the profile in {name} is not text") from None


def _without_disabled(text: str, engine: Engine, *, assumed: bool) -> str:
    """The profile without what is disabled on this host, or (`assumed`) on one in FIPS mode."""
    try:
        profile = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInput(f"Error: the profile is not JSON: '{text}'") from None
    name = profile.get("Name") if isinstance(profile, dict) else None
    if name != CUSTOM and not str(name).startswith(f"{CUSTOM}:"):
        raise InvalidInput(
            f"Error parsing profile options: remove-disabled changes a '{CUSTOM}' profile alone, "
            f"not '{name}'"
        )
    if "Algorithms" not in profile:
        profile["Algorithms"] = _built_in(engine, CUSTOM)["Algorithms"]
    if not all(isinstance(profile.get(part, ""), str) for part in ("Algorithms", "Attributes")):
        raise InvalidInput(f"Error: Algorithms and Attributes are texts in a profile: '{text}'")
    lib = None if assumed else Libcrypto()
    profile["Algorithms"] = _allowed(profile["Algorithms"], lib)
    given = [name for name in profile.get("Attributes", "").split(",") if name]
    if attributes := _attributes(given, lib):
        profile["Attributes"] = ",".join(attributes)
    return json.dumps(profile)


def _allowed(algorithms: str, lib: Libcrypto | None) -> str:
    disabled = [name for name, allows in ALGORITHMS.items() if lib is None or not allows(lib)]
    kept = [
        word for word in dict.fromkeys(algorithms.split(","))
        if not any(word in (name, f"{name}-min-size={word.partition('=')[2]}") for name in disabled)
    ]  # fmt: skip
    for name, (least, allows) in LEAST_SIZES.items():
        if lib is not None and allows(lib):
            continue
        sizes = [word for word in kept if word.startswith(f"{name}=")]
        numbers = [word.partition("=")[2] for word in sizes]
        if not all(_NUMBER.fullmatch(number) for number in numbers):
            raise InvalidInput(f"Error: Could not parse '{','.join(sizes)}' as a number.")
        wanted = f"{name}={max([least, *map(int, numbers)])}"
        if sizes:
            kept[kept.index(sizes[0])] = wanted
        kept = [word for word in kept if word == wanted or word not in sizes]
        if wanted not in kept:
            kept.append(wanted)
    return ",".join(kept)


def _attributes(given: list[str], lib: Libcrypto | None) -> list[str]:
    probes = {**ATTRIBUTES, **(HMAC_ATTRIBUTES if lib is not None else {})}
    if _FIPS_HOST in given:  # which has them all but the last
        probes = {name: allows for name, allows in probes.items() if name in HMAC_ATTRIBUTES}
    more = [name for name, allows in probes.items()
            if name not in given and (lib is None or not allows(lib))]  # fmt: skip
    if more and lib is None:
        more = list(probes)  # swtpm's order: what it assumes comes last
    return [*(name for name in given if name not in more), *more]


def built_in(engine: Engine) -> list[dict[str, Any]]:
    """Those of libtpms. HostError if it has none."""
    if not engine.offers_profiles:
        raise engine.too_old("--print-profiles")
    found: list[dict[str, Any]] = json.loads(engine.info(_INFO_AVAILABLE))["AvailableProfiles"]
    return found


def _built_in(engine: Engine, name: str) -> dict[str, Any]:
    try:
        return next(profile for profile in built_in(engine) if profile["Name"] == name)
    except StopIteration:
        raise HostError(f"libtpms {engine.version_text} has no profile '{name}'") from None


def names(engine: Engine) -> list[str]:
    """Of those of libtpms; none where it has none."""
    return [profile["Name"] for profile in built_in(engine)] if engine.offers_profiles else []


def capabilities(engine: Engine) -> dict[str, object]:
    """What --print-capabilities says of profiles, where libtpms has them."""
    said = json.loads(engine.info(_INFO_ALGORITHMS | _INFO_COMMANDS))
    parts = {"algorithms": said["RuntimeAlgorithms"], "commands": said["RuntimeCommands"]}
    return {"names": names(engine)} | {
        part: {"canbedisabled": runtime["CanBeDisabled"], "implemented": runtime["Implemented"]}
        for part, runtime in parts.items()
    }


def active(engine: Engine) -> str:
    """The profile of the TPM that runs, as JSON; empty where libtpms has none."""
    said = json.loads(engine.info(_INFO_ACTIVE))
    return json.dumps(said["ActiveProfile"], separators=(",", ":")) if said else ""


def info(engine: Engine, flags: int) -> str:
    """--print-info. HostError for what libtpms of this version cannot say."""
    if flags & ~_INFO_OLD and not engine.offers_profiles:
        raise engine.too_old(f"--print-info 0x{flags:x}")
    return engine.info(flags)


def in_directory(directory: Path) -> list[dict[str, Any]] | None:
    """Profiles in files, under the files' names; None if there is no such directory."""
    try:
        paths = sorted(path for path in directory.iterdir() if path.suffix == ".json")
    except OSError:
        return None
    found = []
    for path in paths:
        try:
            profile = json.loads(_read(ProfileSource(file=os.fspath(path))))
        except (ValueError, RecursionError, InvalidInput, HostError):
            continue  # not a profile, as any file may be
        if isinstance(profile, dict) and "Name" in profile:
            found.append(profile | {"Name": path.stem})
    return found
