"""Configuration: one TOML file, read once, passed on as values.

`/etc/holdfast/holdfast.toml`, or the file that `--config` or `HOLDFAST_CONFIG` names. An unknown
key is an error. Everything has a default; a host without /dev/tpmrm0 names its TPM.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from holdfast.errors import InvalidInput
from holdfast.store.database import Durability

DEFAULT_FILE: Final = Path("/etc/holdfast/holdfast.toml")
ENVIRONMENT: Final = "HOLDFAST_CONFIG"
_WORDS: Final = {
    "extra_forbidden": "there is no such key",
    "model_type": "is a section, written [NAME]",
    "string_type": "is text",
    "path_type": "is text",
    "bool_type": "is true or false",
    "int_type": "is a whole number",
    "enum": "has another value than those there are",
}


def _absolute(path: Path) -> Path:
    """A relative one would mean another place for each process that reads it."""
    if not path.is_absolute():
        raise PydanticCustomError("relative", "is a path that begins with /")
    return path


Place = Annotated[Path, Field(strict=False), AfterValidator(_absolute)]  # TOML has no paths
Some = Annotated[int, Field(ge=0, le=256)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Host(_Section):
    """The host's TPM and its event log."""

    tcti: str = "device:/dev/tpmrm0"
    event_log: Place = Path("/sys/kernel/security/tpm0/binary_bios_measurements")
    stand_in: bool = False


class Paths(_Section):
    """Where things are."""

    state: Place = Path("/var/lib/holdfast")
    run: Place = Path("/run/holdfast")
    cdi: Place = Path("/run/cdi")

    @property
    def api(self) -> Path:
        return self.run / "api.sock"

    @property
    def vault(self) -> Path:
        """Where the keeper keeps what `init` made."""
        return self.state / "keeper"

    @property
    def keeper(self) -> Path:
        return self.run / "internal" / "keeper.sock"

    @property
    def spawner(self) -> Path:
        return self.run / "internal" / "spawner.sock"

    def vtpm(self, name: str) -> Path:
        return self.run / "vtpm" / name


class Workers(_Section):
    """Blank workers kept ready, vTPMs manufactured ahead; and when those that are on sleep."""

    blank: Some = 3
    manufactured: Some = 0
    idle_after: Annotated[int, Field(ge=0, le=86_400)] = 30
    active_max: Annotated[int, Field(ge=1, le=10_000)] = 1000
    memory_reserve: Annotated[int, Field(ge=0, le=100)] = 10


class Keeper(_Section):
    """The user the keeper becomes; made at `init` if it does not exist."""

    user: str = "holdfast-keeper"


class Store(_Section):
    """What an acknowledged write survives; and how often a day the host TPM's NV is written."""

    durability: Annotated[Durability, Field(strict=False)] = Durability.FSYNC
    durable_anchors_per_day: Annotated[int, Field(ge=1, le=10_000)] = 50


class Config(_Section):
    """All of it."""

    host: Host = Host()
    paths: Paths = Paths()
    workers: Workers = Workers()
    keeper: Keeper = Keeper()
    store: Store = Store()


def load(path: Path | None) -> Config:
    """Read the configuration; InvalidInput says what is wrong with which key."""
    file = path or Path(os.environ.get(ENVIRONMENT, DEFAULT_FILE))
    try:
        text = file.read_text()
    except FileNotFoundError:
        if path is None and ENVIRONMENT not in os.environ:
            return Config()
        raise InvalidInput(f"there is no configuration at {file}") from None
    except OSError as error:
        raise InvalidInput(f"the configuration {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{file} is not TOML: it is not UTF-8") from None
    try:
        return Config.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{file} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InvalidInput(f"{file}: {key}: {_WORDS.get(first['type'], first['msg'])}") from None
