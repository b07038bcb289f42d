"""Configuration: one TOML file, read once, passed on as values.

`/etc/holdfast/holdfast.toml`, or the file that `--config` or `HOLDFAST_CONFIG` names. An unknown
key is an error. Everything has a default; a host without /dev/tpmrm0 names its TPM.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from holdfast.errors import InvalidInput

DEFAULT_FILE: Final = Path("/etc/holdfast/holdfast.toml")
ENVIRONMENT: Final = "HOLDFAST_CONFIG"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Host(_Section):
    """The host's TPM and its event log."""

    tcti: str = "device:/dev/tpmrm0"
    event_log: Path = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
    stand_in: bool = False


class Paths(_Section):
    """Where things are."""

    state: Path = Path("/var/lib/holdfast")
    run: Path = Path("/run/holdfast")
    cdi: Path = Path("/run/cdi")

    @property
    def api(self) -> Path:
        return self.run / "api.sock"

    @property
    def keeper(self) -> Path:
        return self.run / "internal" / "keeper.sock"

    @property
    def spawner(self) -> Path:
        return self.run / "internal" / "spawner.sock"

    def vtpm(self, name: str) -> Path:
        return self.run / "vtpm" / name


class Workers(_Section):
    """Blank workers kept ready, and vTPMs manufactured ahead."""

    blank: int = 3
    manufactured: int = 0


class Keeper(_Section):
    """The user the keeper becomes; made at `init` if it does not exist."""

    user: str = "holdfast-keeper"


class Config(_Section):
    """All of it."""

    host: Host = Host()
    paths: Paths = Paths()
    workers: Workers = Workers()
    keeper: Keeper = Keeper()


def load(path: Path | None) -> Config:
    """Read the configuration; InvalidInput says what is wrong with which key."""
    file = path or Path(os.environ.get(ENVIRONMENT, DEFAULT_FILE))
    try:
        text = file.read_text()
    except FileNotFoundError:
        if path is None and ENVIRONMENT not in os.environ:
            return Config()
        raise InvalidInput(f"there is no configuration at {file}") from None
    try:
        return Config.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{file} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InvalidInput(f"{file}: {key}: {first['msg']}") from None
